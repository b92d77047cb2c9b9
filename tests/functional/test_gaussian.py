import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from clinfuse.functional.gaussian import gaussian_smooth


@pytest.mark.parametrize("sigma", [(0.6, 1.5, 3.3), (4.0, 0.5, 1.0)])  # wider than axis 0 too
def test_smoothing_agrees_with_scipy(sigma):
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 16, 11))
    expected = [
        [gaussian_filter(c, sigma, mode="reflect", truncate=3.5) for c in case] for case in x
    ]
    np.testing.assert_allclose(gaussian_smooth(torch.from_numpy(x), sigma), expected, atol=1e-12)


def test_an_axis_with_a_tiny_sigma_is_left_alone():
    x = torch.rand(1, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    slices = gaussian_smooth(x, (0.1, 1.5, 1.5))
    torch.testing.assert_close(slices[:, :, 2], gaussian_smooth(x[:, :, 2], (1.5, 1.5)))


def test_constants_stay_and_the_sum_is_kept():
    x = torch.rand(1, 1, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gaussian_smooth(torch.ones_like(x), (2.0, 3.0)), torch.ones_like(x))
    torch.testing.assert_close(gaussian_smooth(x, (2.0, 3.0)).sum(), x.sum())


def test_one_sigma_an_axis_is_demanded():
    with pytest.raises(ValueError, match="one sigma for each of 3 axes"):
        gaussian_smooth(torch.zeros(1, 1, 4, 4, 4), (1.0, 1.0))
