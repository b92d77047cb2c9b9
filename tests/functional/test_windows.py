import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.signal.windows import gaussian

from clinfuse.functional.windows import gaussian_taps, windowed_mean


def test_taps_are_a_gaussian_of_unit_sum():
    window = gaussian(7, 1.5)
    np.testing.assert_allclose(gaussian_taps(7, 1.5), window / window.sum())


def test_means_are_those_of_windows_that_lie_wholly_inside():
    pictures, taps = torch.rand(2, 3, 9, 11, dtype=torch.float64), gaussian_taps(5, 1.0)
    ours = windowed_mean(pictures, taps)
    for index in np.ndindex(2, 3):
        theirs = correlate(pictures[index].numpy(), np.outer(taps, taps))[2:-2, 2:-2]
        np.testing.assert_allclose(ours[index], theirs)


def test_the_mean_of_what_is_flat_is_itself():
    flat = torch.full((1, 12, 12), 200.0)
    assert windowed_mean(flat, gaussian_taps(7, 1.5)).numpy() == pytest.approx(200, rel=1e-6)
