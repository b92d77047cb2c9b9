"""The rows of a case: against the truth, within the true masks, undefined where undefined."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from skimage.metrics import peak_signal_noise_ratio

from clinfuse.functional.fsim import fsim
from clinfuse.functional.ssim import ssim
from clinfuse.functional.surface import dice, hd95, nsd
from clinfuse.metrics.calibration import AIR, FLOOR, Calibration
from clinfuse.metrics.fusion import FUSION_METRICS, fusion_metrics
from clinfuse.metrics.suite import case_metrics
from clinfuse.types import FusionBatch

SPACING_MM = (4.0, 2.0, 2.0)
SIMILARITY = [
    ("brain", "ssim"),
    ("brain", "fsim"),
    ("bone", "psnr"),
    ("bone", "ssim"),
    ("whole", "psnr"),
    ("whole", "ssim"),
    ("whole", "fsim"),
]
CONSPICUITY = [
    (roi, metric) for roi in ("lesion", "findings") for metric in ("conspicuity", "conspicuity_min")
]


def studies(cases: int = 2, shape=(6, 24, 24)) -> FusionBatch:
    """Random studies whose sources and masks are all unlike the truth."""
    mri, ct, reference, clean_mri, clean_ct = torch.rand(5, cases, 1, *shape) * 2 - 1
    depth, height, width = shape
    truth = torch.zeros(cases, 3, *shape, dtype=torch.bool)
    truth[:, 0, 1:-1, height // 4 : -height // 4, width // 4 : -width // 4] = True
    truth[:, 1, 1:-1, 2:-2, 2:5] = True
    truth[:, 2, depth // 3 : -depth // 3, height // 3 : -height // 3, width // 2 : -width // 4] = (
        True
    )
    return FusionBatch(
        mri=mri,
        ct=ct,
        roi=truth.roll(3, -1),
        spacing_mm=torch.tensor([SPACING_MM]).expand(cases, -1),
        case_id=[f"case_{n}" for n in range(cases)],
        reference=reference,
        clean_mri=clean_mri,
        clean_ct=clean_ct,
        clean_roi=truth,
    )


def values(rows) -> dict[tuple[str, str], float]:
    return {(roi, metric): value for roi, metric, value in rows}


def test_each_region_is_compared_with_its_own_clean_source_within_the_true_mask():
    batch = studies()
    fused = torch.rand(batch.mri.shape) * 2 - 1
    rows = case_metrics(fused, batch)
    for case in range(2):
        one = slice(case, case + 1)
        f, mri, ct, reference, roi = (
            t[one]
            for t in (fused, batch.clean_mri, batch.clean_ct, batch.reference, batch.clean_roi)
        )
        brain, bone, whole = roi[:, 0:1], roi[:, 1:2], torch.ones_like(roi[:, 0:1])
        expected = {
            ("brain", "ssim"): ssim(f + 1, mri + 1, brain, SPACING_MM),
            ("brain", "fsim"): fsim(f, mri, brain),
            ("bone", "psnr"): peak_signal_noise_ratio(
                ct[bone].numpy(), f[bone].numpy(), data_range=2.0
            ),
            ("bone", "ssim"): ssim(f + 1, ct + 1, bone, SPACING_MM),
            ("whole", "psnr"): peak_signal_noise_ratio(
                reference.numpy(), f.numpy(), data_range=2.0
            ),
            ("whole", "ssim"): ssim(f + 1, reference + 1, whole, SPACING_MM),
            ("whole", "fsim"): fsim(f, reference, whole),
        }
        ours = values(rows[case])
        assert list(ours) == SIMILARITY + CONSPICUITY
        for name, value in expected.items():
            assert ours[name] == pytest.approx(float(value), abs=1e-4), name


def test_perturbed_sources_and_masks_do_not_enter():
    batch = studies()
    fused = torch.rand(batch.mri.shape) * 2 - 1
    blank = replace(batch, mri=batch.mri * 0, ct=batch.ct * 0, roi=torch.zeros_like(batch.roi))
    assert case_metrics(fused, blank) == case_metrics(fused, batch)


def test_without_clean_fields_the_batchs_own_sources_are_the_truth():
    batch = studies()
    fused = torch.rand(batch.mri.shape) * 2 - 1
    own = replace(batch, clean_mri=None, clean_ct=None, clean_roi=None)
    said = replace(batch, clean_mri=batch.mri, clean_ct=batch.ct, clean_roi=batch.roi)
    assert case_metrics(fused, own) == case_metrics(fused, said)


def test_lesion_rows_come_from_a_prediction_and_from_nothing_else():
    batch = studies()
    fused = torch.rand(batch.mri.shape) * 2 - 1
    truth = batch.clean_roi[:, 2:3]
    probability = 0.6 * truth.roll(1, -1)
    rows = case_metrics(fused, batch, probability, tau_mm=1.0)
    hard = probability > 0.5
    for case in range(2):
        ours, one = values(rows[case]), slice(case, case + 1)
        assert ours["lesion", "dice"] == pytest.approx(dice(hard[one], truth[one]).item())
        assert 0 < ours["lesion", "dice"] < 1
        expected = nsd(hard[one], truth[one], SPACING_MM, 1.0).item()
        assert ours["lesion", "nsd"] == pytest.approx(expected)
        assert ours["lesion", "hd95"] == hd95(hard[one], truth[one], SPACING_MM).item() == 2
    of_lesion = {m for case in case_metrics(fused, batch) for roi, m, _ in case if roi == "lesion"}
    assert of_lesion == {"conspicuity", "conspicuity_min"}  # of the fused volume, not of a mask


def test_no_lesion_and_none_predicted_is_undefined_and_not_perfect():
    batch = studies()
    batch.clean_roi[0, 2] = False
    probability = torch.full(batch.mri.shape, 0.3)
    ours = [values(rows) for rows in case_metrics(batch.mri, batch, probability)]
    assert all(np.isnan(ours[0]["lesion", m]) for m in ("dice", "nsd", "hd95"))
    assert ours[1]["lesion", "dice"] == ours[1]["lesion", "nsd"] == 0
    assert np.isnan(ours[1]["lesion", "hd95"])


def test_an_empty_region_or_an_absent_reference_is_undefined_for_its_case_alone():
    batch = studies()
    batch.clean_roi[0, :2] = False
    fused = torch.rand(batch.mri.shape) * 2 - 1
    empty, full = (values(rows) for rows in case_metrics(fused, batch, spread=fused.abs()))
    for roi, metric in empty.keys() - set(CONSPICUITY):
        assert np.isnan(empty[roi, metric]) == (roi in ("brain", "bone")), (roi, metric)
    assert np.isfinite([full[name] for name in full.keys() - set(CONSPICUITY)]).all()
    unknown = case_metrics(fused, replace(batch, reference=None), spread=fused.abs())[1]
    for roi, metric, value in unknown:
        if (roi, metric) not in CONSPICUITY:
            assert np.isnan(value) == (roi == "whole" or metric == "spread_error_correlation")


def test_spread_is_correlated_with_the_error_over_head_brain_and_bone():
    batch = studies()
    batch.reference[..., :4] = -1
    fused = torch.rand(batch.mri.shape) * 2 - 1
    error = (fused - batch.reference).abs()
    spread = error + 0.5 * torch.rand(error.shape)
    rows = values(case_metrics(fused, batch, spread=spread)[1])
    head = batch.reference > -0.95
    masks = {"whole": head, "brain": batch.clean_roi[:, 0:1], "bone": batch.clean_roi[:, 1:2]}
    for roi, mask in masks.items():
        expected = pearsonr(spread[1][mask[1]], error[1][mask[1]]).statistic
        assert rows[roi, "spread_error_correlation"] == pytest.approx(expected, abs=1e-5)


def test_a_constant_spread_has_no_correlation():
    batch = studies()
    rows = values(case_metrics(batch.mri, batch, spread=torch.full_like(batch.mri, 0.3))[0])
    assert np.isnan(rows["brain", "spread_error_correlation"]) and rows["brain", "ause"] > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_fused_volume_that_is_not_finite_is_refused_and_not_left_out(bad):
    batch = studies()
    fused = batch.mri.clone()
    fused[1, 0, 2, 3, 4] = bad
    with pytest.raises(ValueError, match="case_1"):
        case_metrics(fused, batch)


def one_slice(batch: FusionBatch) -> FusionBatch:
    """The fourth slice of every study, as a batch of 2-D pairs."""
    flat = {
        name: getattr(batch, name)[:, :, 3]
        for name in ("mri", "ct", "roi", "reference", "clean_mri", "clean_ct", "clean_roi")
    }
    return replace(batch, **flat, spacing_mm=batch.spacing_mm[:, 1:])


def test_slices_are_scored_by_the_fields_own_metrics_against_the_clean_sources():
    slices = one_slice(studies(shape=(6, 48, 48)))
    fused = (slices.clean_mri + slices.clean_ct) / 2
    expected = fusion_metrics(fused, slices.clean_mri, slices.clean_ct)
    for case, rows in enumerate(case_metrics(fused, slices)):
        ours = values(rows)
        assert [name for roi, name in ours if name in FUSION_METRICS] == list(FUSION_METRICS)
        for name in FUSION_METRICS:
            assert ours["whole", name] == pytest.approx(expected[name][case].item()), name


def test_volumes_are_scored_by_them_where_they_are_asked_to_be():
    batch = studies(shape=(2, 44, 44))
    plain, full = (
        values(case_metrics(batch.mri, batch, with_fusion=asked)[0]) for asked in (None, True)
    )
    assert full.keys() - plain.keys() == {("whole", name) for name in FUSION_METRICS}


def test_slices_are_measured_too():
    slices = one_slice(studies())
    rows = case_metrics(slices.mri, slices, slices.mri.abs(), slices.mri.abs())
    small = {("whole", "vif")}  # no window of its coarsest scale fits in
    assert all(
        np.isfinite(value)
        for case in rows
        for roi, metric, value in case
        if (roi, metric) not in small.union(CONSPICUITY)
    )


def test_intervals_and_calibrated_spread_are_judged_in_the_true_masks_by_the_placed_regions():
    batch = studies()
    fused = torch.rand(batch.mri.shape) - 0.5
    spread = 0.05 + 0.2 * torch.rand(batch.mri.shape)
    placed = batch.roi.roll(2, -2)
    calibration = Calibration(
        level=0.9,
        curve={
            "brain": [[1.0], [2.0]],
            "bone": [[1.0], [3.0]],
            "tissue": [[1.0], [0.5]],
            "air": [[1.0], [0.5]],
        },
        quantile={"brain": 0.5, "bone": 4 / 3, "tissue": 4.0, "air": 4.0},
        temperature=2.0,
        case_ids=["other"],
        misregistration_mm=2.0,
    )
    probability = torch.rand(batch.mri.shape)
    rows = case_metrics(
        fused, batch, probability, spread, calibration=calibration, roi=placed
    )  # fmt: skip
    for case, of_case in enumerate(map(values, rows)):
        brain = batch.clean_roi[case, 0]
        region = [placed[case, 0], placed[case, 1] & ~placed[case, 0]]
        half = torch.where(region[0], 1.0, torch.where(region[1], 4.0, 2.0))
        half = half * (spread[case, 0] + FLOOR)
        error = (fused - batch.reference)[case, 0]
        expected = (error.abs() <= half)[brain].float().mean().item()
        assert of_case["brain", "coverage"] == pytest.approx(expected, abs=0.01)
        assert of_case["brain", "width"] < 2 * half[brain].mean().item() + 1e-5  # clamped
        assert of_case["brain", "ence"] != of_case["brain", "ence_raw"]
        head = (batch.reference[case, 0] > AIR).numpy()
        stated = calibration.std(fused, spread, placed)[case, 0].numpy()
        expected = pearsonr(stated[head], error.abs().numpy()[head])[0]
        assert of_case["whole", "spread_error_correlation_calibrated"] == pytest.approx(
            expected, abs=1e-4
        )
        assert of_case["lesion", "ece"] != of_case["lesion", "ece_raw"]
        lesion = batch.clean_roi[case, 2][brain].float()
        tempered = torch.sigmoid(torch.logit(probability[case, 0][brain]) / 2.0)
        assert of_case["lesion", "brier"] == pytest.approx(
            (tempered - lesion).square().mean().item(), rel=1e-3
        )


def test_without_a_calibration_only_what_is_stated_is_judged():
    batch = studies()
    fused = torch.rand(batch.mri.shape) - 0.5
    (first, _) = map(values, case_metrics(fused, batch, None, 0.1 + torch.rand_like(fused)))
    of_brain = {metric for roi, metric in first if roi == "brain"}
    assert {"uce_raw", "ence_raw", "ause"} <= of_brain
    assert not of_brain & {"uce", "ence", "coverage", "width"}


def test_an_informative_spread_is_judged_beside_one_that_says_nothing():
    batch = studies()
    error = torch.randn(batch.mri.shape, generator=torch.Generator().manual_seed(0)) / 10
    fused = batch.reference + error
    for case in map(values, case_metrics(fused, batch, None, error.abs())):
        for roi in ("whole", "brain", "bone"):
            assert case[roi, "ause"] == pytest.approx(0, abs=1e-6)
            assert case[roi, "ause_random"] > 0.1 and case[roi, "ause_constant"] > 0.1


def with_findings() -> FusionBatch:
    """Two heads: three lesions on the MRI and two findings on CT alone; then neither."""
    zeros = torch.zeros(2, 1, 6, 48, 48)
    brain, bone, lesion, dense = torch.zeros(4, 2, 1, 6, 48, 48, dtype=torch.bool)
    brain[:, :, :, 2:-2, 2:-2] = True
    for column in (8, 22, 36):
        lesion[0, 0, 2:4, 10:13, column : column + 3] = True
    for column in (12, 30):
        dense[0, 0, 2:4, 34:37, column : column + 3] = True
    mri, ct = torch.where(lesion, 0.2, zeros), torch.where(dense, 0.2, zeros)
    return FusionBatch(
        mri=zeros,
        ct=zeros,
        roi=torch.zeros(2, 3, 6, 48, 48, dtype=torch.bool),
        spacing_mm=torch.tensor([SPACING_MM]).expand(2, -1),
        case_id=["found", "healthy"],
        clean_mri=mri,
        clean_ct=ct,
        clean_roi=torch.cat([brain, bone, lesion], 1),
        findings=dense,
    )


def test_conspicuity_is_the_median_and_the_smallest_of_a_cases_findings_of_each_kind():
    batch = with_findings()
    shown = torch.zeros_like(batch.clean_mri)
    for share, column in zip((0.9, 0.2, 0.6), (8, 22, 36), strict=True):
        shown[..., 10:13, column : column + 3] = share
    for share, column in zip((0.5, 0.1), (12, 30), strict=True):
        shown[..., 34:37, column : column + 3] = share
    fused = 0.2 * shown * (batch.clean_roi[:, 2:3] | batch.findings)
    found, healthy = map(values, case_metrics(fused, batch))
    expected = {"lesion": (0.6, 0.2), "findings": (0.3, 0.1)}
    for roi, pair in expected.items():
        ours = tuple(found[roi, metric] for metric in ("conspicuity", "conspicuity_min"))
        assert ours == pytest.approx(pair, abs=1e-5)
    assert all(np.isnan(healthy[name]) for name in CONSPICUITY)
    unknown = values(case_metrics(fused, replace(batch, findings=None))[0])
    assert np.isnan(unknown["findings", "conspicuity"]) and unknown["lesion", "conspicuity"] > 0


def test_the_findings_of_one_kind_do_not_disturb_the_surround_of_the_other():
    batch = with_findings()
    beside = torch.zeros_like(batch.findings)
    beside[0, 0, 2:4, 10:13, 12:16] = True  # two voxels from the first lesion
    batch.findings, batch.clean_ct = beside, 0.2 * beside
    fused = batch.clean_mri + beside
    found = values(case_metrics(fused, batch)[0])
    assert found["lesion", "conspicuity_min"] == found["findings", "conspicuity"] == 1
    batch.findings = None
    assert values(case_metrics(fused, batch)[0])["lesion", "conspicuity_min"] < 0.9
