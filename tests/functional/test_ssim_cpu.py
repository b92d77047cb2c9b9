import numpy as np
import pytest
import torch

from clinfuse.functional.regional import bounding_box, regional_mean
from clinfuse.functional.ssim import ssim_map
from clinfuse.functional.ssim_cpu import mean_similarity

CONSTANTS = 0.02**2, 0.06**2  # Wang et al. (2004) for a range of 2


def volumes(shape, dtype=torch.float64):
    """Two images and a mask with holes, one face of it on the grid's border."""
    generator = torch.Generator().manual_seed(0)
    a, b, chance = torch.rand(3, *shape, generator=generator, dtype=dtype)
    mask = chance < 0.7
    mask[:, :, : shape[2] // 3] = False
    return a, (a + b) / 2, mask


def found_and_expected(a, b, mask, sigma, black=0.0):
    given = a.numpy(), b.numpy(), mask.numpy(), bounding_box(mask), sigma, (*CONSTANTS, black)
    one = a[None, None].double() - black, b[None, None].double() - black
    similarity = ssim_map(*one, sigma, mask=mask[None, None])
    return mean_similarity(*given), regional_mean(similarity, mask[None, None]).item()


@pytest.mark.parametrize(
    ("shape", "sigma"),
    [
        ((6, 7, 9), (4.0, 3.0, 5.0)),  # windows wider than the grid
        ((1, 12, 9), (3.0, 1.0, 0.7)),  # one slice
        ((5, 1, 40), (0.1, 2.0, 1.5)),  # windows of one voxel along two axes
        ((40, 20, 3), (1.2, 2.5, 0.6)),
    ],
)
def test_windows_of_any_width_see_what_those_of_the_map_do(shape, sigma):
    found, expected = found_and_expected(*volumes(shape), sigma)
    assert found == pytest.approx(expected, rel=1e-10)
    found, expected = found_and_expected(*volumes(shape, torch.float32), sigma)
    assert found == pytest.approx(expected, rel=1e-5)


def test_black_is_what_has_no_luminance():
    found, expected = found_and_expected(*volumes((4, 12, 15)), (1.0, 1.5, 2.0), black=0.5)
    assert found == pytest.approx(expected, rel=1e-10)
    other, _ = found_and_expected(*volumes((4, 12, 15)), (1.0, 1.5, 2.0))
    assert found < other - 0.01


def test_what_is_no_number_outside_the_mask_has_no_say():
    a, b, mask = volumes((4, 12, 15))
    spoilt = torch.where(mask, a, torch.nan)
    box, sigma, numbers = bounding_box(mask), (1.0, 1.5, 2.0), (*CONSTANTS, 0.0)
    scores = [
        mean_similarity(image.numpy(), b.numpy(), mask.numpy(), box, sigma, numbers)
        for image in (a, spoilt)
    ]
    assert np.isfinite(scores[0]) and scores[0] == scores[1]
