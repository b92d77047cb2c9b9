import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from clinfuse.functional.calibration import (
    BINS,
    LEAST,
    ause,
    brier,
    conformal_quantile,
    coverage,
    ence,
    error_curve,
    expected_calibration_error,
    on_curve,
    uce,
    with_temperature,
)

SHAPE = (2, 1, 16, 32, 32)


def volume(values):
    """One case of one slice of one row."""
    return torch.tensor(values)[None, None, None, None]


def everywhere(like):
    return torch.ones_like(like, dtype=torch.bool)


def flat(values):
    """One case's voxels as netcal wants them."""
    return values.flatten().double().numpy()


@pytest.fixture(scope="module")
def netcal():
    """netcal 1.4.0; its metrics need none of the pyro, gpytorch and tensorboard it asks for."""
    pytest.importorskip("netcal", reason="netcal is not installed: pip install --no-deps netcal")
    return importlib.import_module("netcal.metrics")


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


def test_voxels_of_equal_uncertainty_count_as_their_mean_wherever_they_are_stored():
    rising, falling = volume([1.0, 2.0, 3.0, 4.0]), volume([4.0, 3.0, 2.0, 1.0])
    nothing, halves = volume([0.1] * 4), volume([0.1, 0.1, 0.2, 0.2])
    for error in (rising, falling):  # what is left of a constant map's curve is 1 all along
        constant = ause(nothing, error, everywhere(error), fractions=4).item()
        assert constant == pytest.approx(1 - (1 + 0.8 + 0.6 + 0.4) / 4)
    # two pairs: 1, then (1.5 + 1.5 + 3.5) / 3, 1.5 and 1.5 left, of a mean of 2.5
    expected = (1 + 6.5 / 7.5 + 0.6 + 0.6) / 4 - 0.7
    assert ause(halves, rising, everywhere(rising), fractions=4).item() == pytest.approx(expected)


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


def test_ece_asks_how_often_lesion_came_where_it_was_said_and_not_how_often_the_head_was_right():
    # 0.3 was said and 10 % were lesion, 0.7 and 50 %: 0.2 off each. Of the likelier class 0.7 was
    # said all along and it came in 90 % and 50 %, which is 70 % together and would score 0.
    probability = volume([0.3] * 10 + [0.7] * 10)
    lesion = volume([True] + [False] * 9 + [True, False] * 5)
    found = expected_calibration_error(probability, lesion, everywhere(lesion)).item()
    assert found == pytest.approx(0.2)


@pytest.mark.parametrize("said", [0.0, 0.01, 0.3])
def test_ece_of_one_probability_for_a_rare_lesion_is_its_distance_from_the_share_of_lesion(said):
    lesion = torch.arange(1000).reshape(1, 1, 1, 10, 100) % 100 == 0
    found = expected_calibration_error(torch.full(lesion.shape, said), lesion, everywhere(lesion))
    assert found.item() == pytest.approx(abs(said - 0.01), abs=1e-6)


@pytest.mark.parametrize("power", [1, 4])  # 4: nearly all probabilities are small
def test_ece_agrees_with_netcal(netcal, power):
    probability = torch.rand((1, *SHAPE[1:])) ** power
    lesion = torch.rand(probability.shape) < probability**1.5
    theirs = netcal.ECE(BINS).measure(flat(probability), lesion.flatten().long().numpy())
    ours = expected_calibration_error(probability, lesion, everywhere(lesion)).item()
    assert ours == pytest.approx(theirs, rel=1e-4) and ours > 0.05


def test_uce_agrees_with_netcal(netcal, stated):
    std, error = stated[0][:1], 1.3 * stated[1][:1]
    theirs = netcal.UCE(BINS).measure((flat(error), flat(std)), np.zeros(error.numel()))
    assert uce(std, error, everywhere(std)).item() == pytest.approx(float(theirs), rel=1e-4)


def test_ence_agrees_with_netcal_where_equally_wide_bins_hold_equally_many(netcal):
    std = (0.1 * (1 + torch.arange(BINS))).repeat(400).reshape(1, 1, 10, 20, 30)
    error = std * torch.randn(std.shape) * torch.where(std > 0.7, 1.5, 0.8)
    theirs = netcal.ENCE(BINS).measure((flat(error), flat(std)), np.zeros(error.numel()))
    ours = ence(std, error, everywhere(std)).item()
    assert ours == pytest.approx(float(theirs), rel=1e-4) and ours > 0.2


@pytest.mark.parametrize(("level", "z"), [(0.5, 0.67448975), (0.9, 1.64485363)])
def test_coverage_agrees_with_netcal(netcal, stated, level, z):
    std, error = (part[:1] for part in stated)
    theirs = netcal.PICP().measure(
        (flat(1.2 * error)[:, None], flat(std)[:, None]), np.zeros((std.numel(), 1)), q=level
    )
    ours = coverage(1.2 * error, -z * std, z * std, everywhere(std)).item()
    # a voxel or two on a bound may fall either way in single precision
    assert ours == pytest.approx(theirs.picp.item(), abs=2 / std.numel())


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


def drawn(truth, cases=3, voxels=16000, louder=1.0):
    """Cases of stated standard deviations and normal errors whose size is ``truth`` of them."""
    stated = 0.02 + 0.3 * torch.rand(cases, voxels)
    return list(torch.stack([louder * truth(stated) * torch.randn(cases, voxels), stated], 1))


@pytest.mark.parametrize(
    "truth", [lambda s: 2 * s, lambda s: 0.05 + 0.5 * s, lambda s: 0.1 + (s - 0.2).relu()]
)
def test_the_curve_of_errors_is_found(truth):
    stated = torch.linspace(0.05, 0.3, 50)
    found = on_curve(stated, error_curve(drawn(truth), bins=8).float())
    # 2000 voxels a bin: 1.6 % a case; chords across a kink or a bin add at most 3 %
    np.testing.assert_allclose(found, truth(stated), rtol=0.07)


def test_a_curve_never_falls_though_errors_do():
    curve = error_curve(drawn(lambda s: 0.3 - 0.5 * s), bins=8)
    assert (curve[0].diff() > 0).all() and (curve[1].diff() >= 0).all()
    assert curve[1].max() / curve[1].min() == pytest.approx(1, rel=1e-6)  # levelled altogether


def test_a_curve_of_one_case_is_the_isotonic_regression_of_its_bins():
    (case,) = drawn(lambda s: 0.1 + 0.05 * torch.sin(20 * s) + 0.2 * s, cases=1)
    order = case[1].argsort()
    square = np.array([part.square().mean(1).numpy() for part in case[:, order].chunk(10, 1)])
    theirs = IsotonicRegression().fit_transform(square[:, 1], square[:, 0])
    curve = error_curve([case], bins=10)
    np.testing.assert_allclose(curve[0], square[:, 1] ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(curve[1], theirs**0.5, rtol=1e-5)
    assert len(np.unique(theirs)) < 10  # it had something to do


def test_one_patient_that_went_wrong_does_not_rule_the_curve():
    cases = drawn(lambda s: 2 * s) + drawn(lambda s: 2 * s, cases=1, louder=20.0)
    curve = error_curve(cases, bins=8)
    np.testing.assert_allclose(curve[1] / curve[0], 2.0, rtol=0.06)


def test_a_constant_spread_has_one_knot_and_no_errors_a_curve_above_zero():
    error = torch.randn(4000)
    curve = error_curve([torch.stack([error, torch.full_like(error, 0.055)])], bins=8)
    assert curve[:, 0].tolist() == pytest.approx([0.055, error.square().mean().sqrt().item()])
    assert curve.shape == (2, 1)
    silent = error_curve([torch.stack([0 * error, torch.rand(4000) + 0.01])], bins=8)
    assert (silent[1] == LEAST).all()


def test_cases_of_a_few_voxels_are_heard_only_if_all_are():
    large, (small,) = drawn(lambda s: 2 * s), drawn(lambda s: 90 * s, cases=1, voxels=100)
    assert torch.equal(error_curve([*large, small], 8), error_curve(large, 8))
    (other,) = drawn(lambda s: 90 * s, cases=1, voxels=3)
    together = error_curve([small, other], 8)
    assert torch.equal(together, error_curve([torch.cat([small, other], 1)], 8))
    assert error_curve([other], 8).shape[1] <= 3 and error_curve([other], 8).isfinite().all()


def test_a_curve_joins_its_knots_and_keeps_its_ratio_beyond_them():
    curve = torch.tensor([[0.1, 0.2, 0.4], [0.3, 0.4, 0.4]])
    within = torch.linspace(0.1, 0.4, 31)
    np.testing.assert_allclose(on_curve(within, curve), np.interp(within, *curve), rtol=1e-5)
    beyond = torch.tensor([[0.0, 0.05], [0.8, 4.0]])
    torch.testing.assert_close(on_curve(beyond, curve), beyond * torch.tensor([[3.0], [1.0]]))


@given(x=st.floats(0.01, 1), y=st.floats(0.01, 1), stated=st.floats(0, 10))
def test_one_knot_is_a_factor(x, y, stated):
    found = on_curve(torch.tensor([stated]).double(), torch.tensor([[x], [y]]).double())
    assert found.item() == pytest.approx(stated * y / x)
