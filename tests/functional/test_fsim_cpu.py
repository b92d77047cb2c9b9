import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from clinfuse.functional import fsim_cpu
from clinfuse.functional.fsim import fsim_to_each, phase_congruency


def pictures(height, width):
    """Smooth ones, noise, steps, and a flat one."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, height, width))
    smooth = gaussian_filter(noise[0], 3.0)
    steps = np.add.outer(np.arange(height) > height // 2, np.arange(width) % 20 > 9)
    stack = np.stack([200 * smooth / smooth.max(), 50 * noise[1], 80.0 * steps, 0 * smooth])
    return torch.from_numpy(stack.astype(np.float32))[:, None]


@pytest.mark.parametrize("shape", [(64, 64), (65, 70), (96, 40)])
def test_single_precision_is_double_precision_by_torch_but_for_rounding(shape):
    slices = pictures(*shape)
    expected = phase_congruency(slices.double())  # by torch, operation by operation
    found = phase_congruency(slices)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=0)
    assert (found[3] == 0).all()


def test_neither_other_pictures_nor_channels_change_one():
    slices = pictures(32, 40)
    alone = torch.cat([phase_congruency(picture[None]) for picture in slices])
    torch.testing.assert_close(phase_congruency(slices), alone, atol=0, rtol=0)
    channels = phase_congruency(slices.reshape(2, 2, 32, 40))
    torch.testing.assert_close(channels.reshape(alone.shape), alone, atol=0, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1001])
def test_the_median_is_torchs_the_lower_of_the_middle_two(size):
    rng = np.random.default_rng(size)
    for values in (
        rng.lognormal(0, 20, size),  # down to the smallest numbers
        rng.integers(0, 3, size),
        np.zeros(size),
    ):
        single = values.astype(np.float32)
        assert fsim_cpu._lower_median(single) == torch.from_numpy(single).median()


def test_the_median_is_found_where_a_sample_misses_it():
    values = np.linspace(0, 1, 9 * 1024, dtype=np.float32)
    values[::9] = 5  # all that the sample takes
    assert fsim_cpu._lower_median(values) == torch.from_numpy(values).median()


@pytest.mark.parametrize("shape", [(64, 64), (65, 70)])
def test_similarity_in_single_precision_is_that_in_double_but_for_rounding(shape):
    image, *others = pictures(*shape)[:3, None] / 300
    masks = [torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) < 0.5]
    masks.append(~masks[0])
    given = list(zip(others, masks, strict=True))
    found = fsim_to_each(image, given)
    expected = fsim_to_each(image.double(), [(other.double(), mask) for other, mask in given])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=2e-5, rtol=0)
