import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.functional.calibration import (
    ause,
    brier,
    conformal_quantile,
    coverage,
    ence,
    expected_calibration_error,
    uce,
    with_temperature,
)

SHAPE = (2, 1, 16, 32, 32)


def volume(values):
    """One case of one slice of one row."""
    return torch.tensor(values)[None, None, None, None]


def everywhere(like):
    return torch.ones_like(like, dtype=torch.bool)


@pytest.fixture
def stated():
    """Standard deviations from 0.05 to 0.5, and normal errors of exactly that size."""
    std = 0.05 + 0.45 * torch.rand(SHAPE)
    return std, std * torch.randn(SHAPE)


def test_a_normal_interval_covers_what_normal_errors_promise(stated):
    std, error = stated
    for z, expected in ((1.0, 0.6827), (1.6449, 0.9)):
        found = coverage(error, -z * std, z * std, everywhere(error))
        # binomial: a standard error of 0.004 over the 16384 voxels of a case
        np.testing.assert_allclose(found, expected, atol=0.016)


def test_coverage_counts_bounds_in_and_the_mask_only():
    truth, low, high = volume([0.0, 1.0, 2.0, 9.0]), volume([0.0] * 4), volume([1.0] * 4)
    mask = volume([True, True, True, False])
    assert coverage(truth, low, high, mask).item() == pytest.approx(2 / 3)


def test_an_honest_std_has_little_calibration_error_and_a_halved_one_twice_its_size(stated):
    std, error = stated
    mask = everywhere(error)
    # a bin's RMSE over 1092 voxels is off by 1 / sqrt(2 * 1092) = 2 %, |.| of that on average 1.7 %
    assert (ence(std, error, mask) < 0.035).all()
    np.testing.assert_allclose(ence(std / 2, error, mask), 1.0, atol=0.07)
    mean_variance = std.square().flatten(1).mean(1)
    assert (uce(std, error, mask) < 0.05 * mean_variance).all()
    np.testing.assert_allclose(
        uce(std / 2, error, mask), 0.75 * error.square().flatten(1).mean(1), rtol=0.02
    )


def test_uce_by_hand():
    std, error = volume([1.0, 1.0, 2.0, 2.0]), volume([2.0, 0.0, 1.0, 3.0])
    # variances 1 and 4 in two bins: |(4 + 0) - 2| + |(1 + 9) - 8|, over four voxels
    assert uce(std, error, everywhere(std), bins=2).item() == pytest.approx(1.0)


def test_ence_by_hand():
    std, error = volume([1.0, 1.0, 2.0, 2.0]), volume([2.0, 0.0, 1.0, 3.0])
    expected = ((2**0.5 - 1) / 1 + (5**0.5 - 2) / 2) / 2
    assert ence(std, error, everywhere(std), bins=2).item() == pytest.approx(expected)


def test_sparsification_by_hand():
    error = volume([4.0, -3.0, 2.0, -1.0])
    # left of the best order: 1, .8, .6, .4 of the mean; of the reverse: 1, 1.2, 1.4, 1.6
    assert ause(-error.abs(), error, everywhere(error), fractions=4).item() == pytest.approx(0.6)
    assert ause(error.abs(), error, everywhere(error), fractions=4).item() == pytest.approx(0)


def test_an_informative_spread_is_sparser_than_a_random_and_a_constant_one(stated):
    std, error = stated
    mask = everywhere(error)
    random, constant = torch.rand(SHAPE), torch.ones(SHAPE)
    for empty in (random, constant):
        assert (ause(std, error, mask) < 0.85 * ause(empty, error, mask)).all()
    np.testing.assert_allclose(ause(random, error, mask), ause(constant, error, mask), rtol=0.05)


def test_brier_and_ece_by_hand():
    probability = volume([0.9, 0.9, 0.1, 0.1])
    lesion = volume([True, False, False, False])
    mask = everywhere(lesion)
    expected = (0.01 + 0.81 + 0.01 + 0.01) / 4
    assert brier(probability, lesion, mask).item() == pytest.approx(expected)
    # half of the voxels say 0.9 and are right half the time, the others 0.1 and never
    expected = 0.5 * abs(0.9 - 0.5) + 0.5 * abs(0.1 - 0.0)
    found = expected_calibration_error(probability, lesion, mask, bins=10).item()
    assert found == pytest.approx(expected)


def test_every_score_reads_the_mask_alone_and_is_undefined_without_one(stated):
    std, error = stated
    mask = torch.rand(SHAPE) > 0.5
    spoilt_std, spoilt_error = (torch.where(mask, v, 7.0) for v in (std, error))
    probability, lesion = torch.rand(SHAPE), torch.rand(SHAPE) > 0.9
    spoilt = torch.where(mask, probability, 1.0)
    none = torch.zeros_like(mask)
    for score in (ence, uce, ause):
        assert torch.equal(score(std, error, mask), score(spoilt_std, spoilt_error, mask))
        assert score(std, error, none).isnan().all()
    for score in (brier, expected_calibration_error):
        assert torch.equal(score(probability, lesion, mask), score(spoilt, lesion, mask))
        assert score(probability, lesion, none).isnan().all()


@given(n=st.integers(9, 60), level=st.sampled_from([0.5, 0.8, 0.9]))
def test_the_conformal_quantile_leaves_the_promised_share_of_ranks_below(n, level):
    scores = torch.randperm(n).float()
    found = conformal_quantile(scores, level)
    # a new exchangeable score takes each of the n + 1 ranks alike: those up to ours are covered
    assert (scores <= found).sum().item() / (n + 1) >= level - 1e-6
    assert (scores <= found - 1).sum().item() / (n + 1) < level


def test_too_few_scores_promise_nothing():
    assert conformal_quantile(torch.arange(8.0), 0.9) == math.inf
    assert conformal_quantile(torch.arange(9.0), 0.9) == 8.0
    with pytest.raises(ValueError, match="expected a level"):
        conformal_quantile(torch.arange(9.0), 1.0)


def test_a_temperature_of_one_changes_nothing_and_a_high_one_leaves_doubt():
    probability = torch.linspace(0.001, 0.999, 50)
    torch.testing.assert_close(with_temperature(probability, 1.0), probability)
    torch.testing.assert_close(
        with_temperature(probability, 1e6), torch.full((50,), 0.5), atol=1e-4, rtol=0
    )
    cold = with_temperature(probability, 0.5)
    assert ((cold - 0.5).abs() >= (probability - 0.5).abs() - 1e-6).all()
