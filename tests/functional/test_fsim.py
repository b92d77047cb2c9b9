import numpy as np
import pytest
import torch
from scipy.ndimage import correlate, gaussian_filter

from clinfuse.functional.fsim import (
    fsim,
    fsim_to_each,
    gradient_magnitude,
    phase_congruency,
)

# piq 0.8.0, fsim(chromatic=False), of pair(*shape) as float64. Recorded, because piq needs
# torchvision, whose build has to match torch's; odd sizes and averaging down are among them.
PIQ = {(64, 64): 0.9254499137978999, (65, 70): 0.9086197094052655,
       (96, 97): 0.9121464780238434, (400, 390): 0.9268882774345107}  # fmt: skip


def pair(height, width):
    rng = np.random.default_rng(0)
    a = gaussian_filter(rng.normal(size=(height, width)), 2.0)
    a = a / np.abs(a).max()
    b = 0.7 * a + 0.2 * gaussian_filter(rng.normal(size=(height, width)), 1.0)
    return tuple(torch.from_numpy(image)[None, None] for image in (a, b.clip(-1, 1)))


def everywhere(image):
    return torch.ones_like(image, dtype=torch.bool)


@pytest.mark.parametrize("shape", PIQ)
def test_fsim_agrees_with_piqs_scores(shape):
    a, b = pair(*shape)
    # 1e-4: the two guard their divisions with different small numbers.
    assert fsim(a, b, everywhere(a)).item() == pytest.approx(PIQ[shape], abs=1e-4)
    single = fsim(a.float(), b.float(), everywhere(a)).item()
    assert single == pytest.approx(PIQ[shape], abs=1e-4)


def test_a_volume_is_the_weighted_mean_of_its_slices():
    a, b = (
        torch.cat([image, image.flip(-1) / 2, image * 0], dim=1)[:, None] for image in pair(48, 56)
    )
    mask = torch.rand(a.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    scores = torch.stack([fsim(a[:, :, i], b[:, :, i], mask[:, :, i]) for i in range(2)])
    pooled = [torch.maximum(*(phase_congruency(127.5 * x[:, :, i] + 127.5) for x in (a, b)))
              [mask[:, :, i]].sum() for i in range(2)]  # fmt: skip
    expected = (scores.squeeze() * torch.stack(pooled)).sum() / sum(pooled)
    torch.testing.assert_close(fsim(a, b, mask).squeeze(), expected)  # the flat slice adds nothing


def test_cases_of_a_batch_do_not_mix():
    a, b = pair(40, 40)
    mask = everywhere(a)
    mask[..., 20:] = False
    both = fsim(torch.cat((a, b)), torch.cat((b, b)), torch.cat((mask, ~mask)))
    torch.testing.assert_close(both, torch.cat((fsim(a, b, mask), fsim(b, b, ~mask))))


def test_one_image_is_compared_with_each_of_several_as_with_one_alone():
    images = [torch.cat([image, image.roll(9, -1)])[:, :, None] for image in pair(40, 36)]
    image, *others = (x.float() for x in (*images, images[1].flip(-1)))
    masks = [everywhere(image), everywhere(image)]
    masks[0][1] = False
    masks[1][..., :20] = False
    pairs = list(zip(others, masks, strict=True))
    expected = [fsim(image, *each) for each in pairs]
    assert expected[0][1].isnan()
    for ours, alone in zip(fsim_to_each(image, pairs), expected, strict=True):
        torch.testing.assert_close(ours, alone, equal_nan=True)


def test_only_pixels_of_the_mask_count():
    a, b = pair(64, 64)
    patched = b.clone()
    patched[..., :16, :16] = a[..., :16, :16]  # wavelengths reach 48, so look in the far corner
    mask = torch.zeros_like(everywhere(a))
    mask[..., 2:14, 2:14] = True
    assert fsim(a, patched, mask).item() > fsim(a, b, mask).item() + 0.02
    assert fsim(a, a, mask).item() == pytest.approx(1)


def test_nothing_to_see_is_undefined():
    flat = torch.zeros(2, 1, 3, 16, 16)
    mask = everywhere(flat)
    assert fsim(flat, flat, mask).isnan().all()
    image = torch.rand(flat.shape, generator=torch.Generator().manual_seed(0))
    mask[1] = False
    first, second = fsim(image, image, mask).tolist()
    assert first == pytest.approx(1) and np.isnan(second)


def test_phase_congruency_finds_an_edge_whatever_its_contrast():
    step = torch.zeros(1, 1, 64, 64)
    step[..., 32:] = 100.0
    congruency = phase_congruency(step)
    assert congruency.min() >= 0 and congruency.max() <= 1
    across = congruency[0, 0, 32]
    assert across[31:33].min() > 0.7 and across[23:27].max() < 0.3
    torch.testing.assert_close(phase_congruency(step / 10), congruency, atol=0.01, rtol=0)


def test_the_gradient_is_scharrs():
    image = pair(20, 24)[0]
    kernel = np.array([[3, 0, -3], [10, 0, -10], [3, 0, -3]]) / 16
    parts = [correlate(image[0, 0].numpy(), k, mode="constant") for k in (kernel, kernel.T)]
    np.testing.assert_allclose(gradient_magnitude(image)[0, 0], np.hypot(*parts), atol=1e-12)
