import json
import math
from dataclasses import asdict

import pytest
import torch

from clinfuse.functional.calibration import coverage, ence, expected_calibration_error
from clinfuse.metrics.calibration import (
    FLOOR,
    Calibration,
    CalibrationSample,
    Reliability,
    region_map,
)

SHAPE = (1, 12, 40, 40)
TRUE_SCALE = {"brain": 2.0, "bone": 3.0, "tissue": 0.5, "air": 0.2}


def study(generator, shape=SHAPE, louder=1.0, size=lambda stated: stated):
    """Fused, reference, spread and masks that overlap; the errors are normal, and their size that
    of the spread times a factor. One end of the volume is air."""
    roi = torch.zeros(3, *shape[1:], dtype=torch.bool)
    roi[0, :, :18], roi[1, :, 16:30] = True, True
    fused = torch.zeros(shape)
    fused[..., -4:, :] = -0.97
    spread = 0.02 + 0.05 * torch.rand(shape, generator=generator)
    factor = torch.tensor([*TRUE_SCALE.values()])[region_map(roi[None], fused[None])[0]]
    error = louder * factor * size(spread + FLOOR) * torch.randn(shape, generator=generator)
    return fused, fused - error, spread, roi


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.fixture
def fitted(generator):
    sample = CalibrationSample(level=0.9)
    for case in range(3):
        sample.update(f"case_{case}", *study(generator))
    return sample.fit(2.0)


def ratios(fitted, region):
    """Found / stated at the knots."""
    stated, found = torch.tensor(fitted.curve[region])
    return found / stated


def test_the_curve_of_each_region_is_found(fitted):
    for region, scale in TRUE_SCALE.items():
        # 8640 voxels a case in the brain, fewest in air with 1920: 240 in each of 8 bins
        assert ratios(fitted, region).tolist() == pytest.approx([scale] * 8, rel=0.08)
        assert fitted.quantile[region] == pytest.approx(1.6449, rel=0.03)
    assert list(fitted.case_ids) == ["case_0", "case_1", "case_2"]
    assert fitted.misregistration_mm == 2.0 and fitted.temperature is None


def test_a_calibration_straightens_what_no_factor_could(generator):
    def bent(stated):
        return 0.03 + 20 * stated**3

    sample = CalibrationSample()
    for case in range(3):
        sample.update(f"case_{case}", *study(generator, size=bent))
    fitted = sample.fit(0.0)
    fused, reference, spread, roi = (volume[None] for volume in study(generator, size=bent))
    error, std = fused - reference, fitted.std(fused, spread, roi)
    low, high = fitted.interval(fused, spread, roi)
    for region in range(4):
        mask = region_map(roi, fused) == region
        found, stated = error[mask].square().mean().sqrt(), (spread + FLOOR)[mask].square().mean()
        best_factor = (spread + FLOOR) * found / stated.sqrt()
        assert ence(best_factor, error, mask).item() > 0.15
        assert ence(std, error, mask).item() < 0.08  # 128 voxels a bin in air alone cost 5 %
        for half in (spread < spread[mask].median(), spread >= spread[mask].median()):
            assert coverage(reference, low, high, mask & half).item() == pytest.approx(
                0.9, abs=0.03
            )


def test_a_case_is_scored_by_the_curve_of_the_others(generator):
    sample = CalibrationSample(level=0.9)
    for louder in (1.0, 2.0):
        sample.update(f"{louder}", *study(generator, louder=louder))
    # errors of half the size stated and of twice: 1 of the first and 0.8 of the second are covered
    assert sample.fit(0.0).quantile["brain"] == pytest.approx(2 * 1.2816, rel=0.05)


def test_one_case_can_be_fitted_for_want_of_others(generator):
    sample = CalibrationSample()
    sample.update("only", *study(generator))
    assert sample.fit(0.0).quantile["brain"] == pytest.approx(1.6449, rel=0.05)


def test_a_calibration_survives_json(fitted, generator):
    fused, _, spread, roi = (volume[None] for volume in study(generator))
    again = Calibration(**json.loads(json.dumps(asdict(fitted))))
    assert torch.equal(again.std(fused, spread, roi), fitted.std(fused, spread, roi))
    bounds = zip(
        again.interval(fused, spread, roi), fitted.interval(fused, spread, roi), strict=True
    )
    assert all(torch.equal(a, b) for a, b in bounds)


def test_a_calibrated_std_is_finite_beyond_all_spreads_seen(fitted, generator):
    fused, _, spread, roi = (volume[None] for volume in study(generator))
    for factor in (0.0, 100.0):
        std = fitted.std(fused, factor * spread, roi)
        assert std.isfinite().all() and (std > 0).all()


def test_intervals_cover_new_cases_as_promised_in_every_region(fitted, generator):
    fused, reference, spread, roi = (volume[None] for volume in study(generator))
    low, high = fitted.interval(fused, spread, roi)
    for region in range(4):  # at these errors the clamp to [-1, 1] takes nothing away
        mask = region_map(roi, fused) == region
        assert coverage(reference, low, high, mask).item() == pytest.approx(0.9, abs=0.02)


def test_the_calibrated_std_is_the_size_of_the_errors(fitted, generator):
    fused, reference, spread, roi = (volume[None] for volume in study(generator))
    std = fitted.std(fused, spread, roi)
    assert ((fused - reference) / std).square().mean().sqrt().item() == pytest.approx(1, rel=0.03)


def test_intervals_stay_in_model_space_and_hold_the_mean(fitted, generator):
    *_, spread, roi = study(generator)
    fused = 2 * torch.rand((1, *SHAPE), generator=generator) - 1
    low, high = fitted.interval(fused, 3 * spread[None], roi[None])
    assert low.min() == -1 and high.max() == 1
    assert (low <= fused).all() and (fused <= high).all()


def test_a_region_that_no_validation_case_has_takes_what_the_others_say(generator):
    fused, reference, spread, roi = study(generator)
    roi[1] = False
    sample = CalibrationSample()
    sample.update("case", fused, reference, spread, roi)
    fitted = sample.fit(0.0)
    others = [ratios(fitted, region).mean() for region in ("brain", "tissue", "air")]
    assert min(others) < ratios(fitted, "bone").mean() < max(others)
    assert fitted.quantile["bone"] != fitted.quantile["brain"]


def test_one_patient_that_went_wrong_does_not_rule_the_curve(generator):
    sample = CalibrationSample()
    for case, louder in enumerate((1.0, 1.0, 20.0)):
        sample.update(f"case_{case}", *study(generator, louder=louder))
    assert ratios(sample.fit(0.0), "brain").tolist() == pytest.approx([2.0] * 8, rel=0.08)


def test_the_temperature_undoes_overconfidence(generator):
    logits = 2 * torch.randn(SHAPE, generator=generator)
    lesion = torch.rand(SHAPE, generator=generator) < torch.sigmoid(logits)
    sample = CalibrationSample()
    sample.update("case", *study(generator))
    sample.update_lesion(torch.sigmoid(3 * logits), lesion, torch.ones_like(lesion))
    fitted = sample.fit(0.0)
    assert fitted.temperature == pytest.approx(3, rel=0.05)
    inside = logits.abs() < 4  # probabilities are cut at 1e-6 before their logit is taken
    torch.testing.assert_close(
        fitted.probability(torch.sigmoid(3 * logits)[None])[0][inside],
        torch.sigmoid(3 * logits / fitted.temperature)[inside],
        atol=1e-3, rtol=0,
    )  # fmt: skip


def heads_answer(generator, prior=-5.0):
    """Log odds that are true, of a lesion of some 2 % of the voxels, and where it is."""
    logits = prior + 2 * torch.randn(SHAPE, generator=generator)
    return logits, torch.rand(SHAPE, generator=generator) < torch.sigmoid(logits)


def with_lesions(generator, *answers):
    sample = CalibrationSample()
    for case, (probability, lesion) in enumerate(answers):
        sample.update(f"case_{case}", *study(generator))
        sample.update_lesion(probability, lesion, torch.ones_like(lesion))
    return sample.fit(0.0)


def test_a_rare_lesions_probability_means_its_frequency_after_calibration(generator):
    answers = [heads_answer(generator) for _ in range(3)]
    fitted = with_lesions(generator, *((torch.sigmoid(3 * z), lesion) for z, lesion in answers))
    logits, lesion = (part[None] for part in heads_answer(generator))
    raw = torch.sigmoid(3 * logits)
    before, after = (
        expected_calibration_error(p, lesion, torch.ones_like(lesion)).item()
        for p in (raw, fitted.probability(raw))
    )
    assert after < 0.004 < 0.012 < before  # 19200 voxels, 2 to 3 % lesion


def test_cases_without_lesion_are_judged_with_the_others_and_not_alone(generator):
    logits, lesion = heads_answer(generator)
    ill = torch.sigmoid(3 * logits), lesion
    healthy = torch.full(SHAPE, 1e-4), torch.zeros_like(lesion)
    alone, together = with_lesions(generator, ill), with_lesions(generator, ill, healthy)
    # at temperature T the healthy one is called ill with odds 1e-4^(1/T): a little cooler suits it
    assert alone.temperature == pytest.approx(3, rel=0.1)
    assert 1.5 < together.temperature < alone.temperature
    assert with_lesions(generator, healthy, healthy).temperature is None
    every_voxel = torch.rand(SHAPE), torch.ones_like(lesion)
    assert with_lesions(generator, every_voxel).temperature is None


def test_probabilities_of_exactly_0_and_1_that_are_sometimes_wrong_are_cooled(generator):
    said = torch.rand(SHAPE, generator=generator) < 0.05
    wrong = torch.rand(SHAPE, generator=generator) < 0.01
    fitted = with_lesions(generator, (said.float(), said ^ wrong))
    # log odds of 99 to 1, stated as those of the 1e-6 that probabilities are cut at
    assert fitted.temperature == pytest.approx(math.log(1e6) / math.log(99), rel=0.05)
    calibrated = fitted.probability(said.float()[None])
    assert calibrated[said[None]].mean().item() == pytest.approx(0.99, abs=0.003)
    assert calibrated[~said[None]].mean().item() == pytest.approx(0.01, abs=0.003)


def test_without_a_lesion_head_probabilities_stay_as_they_are():
    calibration = Calibration(0.9, {}, {}, None, [], 0.0)
    probability = torch.rand(1, *SHAPE)
    assert calibration.probability(probability) is probability


def test_nothing_can_be_fitted_on_no_case():
    with pytest.raises(ValueError, match="expected validation cases"):
        CalibrationSample().fit(0.0)


def test_reliability_lies_on_the_diagonal_for_an_honest_std_and_streams_over_cases(generator):
    std = 0.01 * 10 ** torch.rand((4, 1, 8, 40, 40), generator=generator)
    error = std * torch.randn(std.shape, generator=generator)
    mask = torch.rand(std.shape, generator=generator) > 0.3
    streamed, at_once = Reliability(), Reliability()
    at_once.update(std, error, mask)
    for case in range(len(std)):
        streamed.update(*(v[case : case + 1] for v in (std, error, mask)))
    torch.testing.assert_close(streamed.points(), at_once.points())
    stated, found = at_once.points().unbind(1)
    assert len(stated) >= 5 and (stated.diff() > 0).all()
    torch.testing.assert_close(found, stated, rtol=0.08, atol=0)  # 200 voxels or more a bin
    loud = Reliability()
    loud.update(std / 2, error, mask)
    stated, found = loud.points().unbind(1)
    torch.testing.assert_close(found, 2 * stated, rtol=0.08, atol=0)


def test_reliability_shows_no_bin_of_a_few_voxels_and_none_outside_the_mask():
    seen = Reliability(fewest=200)
    std = torch.full((1, 1, 4, 10, 10), 0.1)
    std[:, :, 0] = 0.5
    mask = torch.ones_like(std, dtype=torch.bool)
    seen.update(std, 2 * std, mask)
    assert seen.points().tolist() == [pytest.approx([0.1, 0.2])]
    seen.update(std, std, ~mask)
    assert seen.points().tolist() == [pytest.approx([0.1, 0.2])]
