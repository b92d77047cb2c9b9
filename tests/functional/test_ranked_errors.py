import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr

from clinfuse.functional.calibration import ause, ence, uce
from clinfuse.functional.ranked_errors import correlation, least_curve, ranked, rising_order


def voxels(size, seed=0, levels=None):
    """Standard deviations, of a few values where ``levels`` says how many, and errors."""
    generator = torch.Generator().manual_seed(seed)
    std = torch.rand(size, generator=generator)
    if levels is not None:
        std = (std * levels).ceil() / levels
    return std, std * torch.randn(size, generator=generator)


def ence_in_stored_order(std, error, bins=15):
    """Its definition with equal standard deviations in the order they are stored in.

    ``calibration.ence`` leaves their order to torch.
    """
    order = np.argsort(std.numpy(), kind="stable")
    parts = [np.array_split(x.double().numpy()[order] ** 2, bins) for x in (std, error)]
    stated, found = np.sqrt([[part.mean() for part in column if len(part)] for column in parts])
    return torch.tensor(np.mean(abs(stated - found) / stated), dtype=torch.float32)


def of_case(score, std, error):
    """A score of ``calibration`` of the voxels as one case."""
    std, error = std[None, None], error[None, None]
    return score(std, error, torch.ones_like(std, dtype=torch.bool))[0]


@pytest.mark.parametrize("levels", [None, 40, 1])
@pytest.mark.parametrize("size", [1, 7, 20_000])
def test_scores_from_one_sorting_are_those_that_calibration_defines(size, levels):
    std, error = voxels(size, levels=levels)
    errors = ranked(std, error)
    gap = (errors.sparsification_curve() - least_curve(error)).mean().float()
    ence_too = ence_in_stored_order(std, error)
    expected = ence_too, of_case(uce, std, error), of_case(ause, std, error)
    for found, score in zip((errors.ence(), errors.uce(), gap), expected, strict=True):
        # calibration's sums are in single precision
        torch.testing.assert_close(found, score, rtol=1e-4, atol=1e-6)
    if levels is None:
        torch.testing.assert_close(ence_too, of_case(ence, std, error), rtol=1e-4, atol=1e-6)


def test_no_error_at_all_has_no_curve():
    std, error = voxels(50)
    assert ranked(std, 0 * error).sparsification_curve().isnan().all()
    assert least_curve(0 * error).isnan().all()


def test_an_uncertainty_that_is_the_same_everywhere_has_a_flat_curve():
    std, error = voxels(1000, levels=1)
    torch.testing.assert_close(
        ranked(std, error).sparsification_curve(), torch.ones(100, dtype=torch.double)
    )


@given(
    st.lists(
        st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), max_size=50
    )
)
def test_the_order_is_that_of_a_stable_sorting(values):
    keys = torch.tensor(values, dtype=torch.float32)
    expected = np.argsort(keys.numpy(), kind="stable")
    np.testing.assert_array_equal(rising_order(keys), expected)
    np.testing.assert_array_equal(rising_order(keys.double()), expected)


def test_correlation_is_pearsons_and_undefined_for_a_constant():
    std, error = voxels(500)
    found = correlation(std, error.abs()).item()
    assert found == pytest.approx(pearsonr(std, error.abs()).statistic, abs=1e-6)
    assert correlation(torch.full_like(error, 0.3), error).isnan()
    assert correlation(error[:0], error[:0]).isnan()
