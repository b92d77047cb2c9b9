from typing import ClassVar

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clinfuse.callbacks.recorder import CaseRecorder, RunReport, case_view, summary_of
from clinfuse.data.paired_slices import PairedSlices
from clinfuse.functional.psnr import psnr
from clinfuse.functional.surface import dice, signed_distance_mm
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.rules import MaskComposite, Weighted
from clinfuse.metrics.calibration import Calibration
from clinfuse.reporting.rows import CASE_COLUMNS

AMPLITUDES = [0.0, 2.0]


class BrightIsLesion(torch.nn.Module):
    """A lesion head without weights."""

    def forward(self, fused):
        return torch.sigmoid(20 * (fused - 0.3))


class Curious(FusionMethod):
    """Keeps what it was given; two members, half a unit apart."""

    steps = 7

    def __init__(self):
        super().__init__()
        self.lesion_voxels, self.deepest_mm, self.given = [], [], []

    def fuse(self, batch):
        return self.ensemble(batch).mean(0)

    def ensemble(self, batch):
        self.lesion_voxels.append(int(batch.lesion.sum()))
        self.deepest_mm.append(float(batch.lesion_distance_mm.min()))
        self.given.append((batch.roi, batch.lesion_distance_mm))
        return torch.stack([batch.mri * 0.5 - 0.25, batch.mri * 0.5 + 0.25])


@pytest.fixture
def data(phantoms):
    """The heads, with the largest infarct among the test cases."""
    data = phantoms.data(f"data.misregistration_mm={AMPLITUDES}")
    data._asked_splits = {
        "train": ["case_001"],
        "val": ["case_002"],
        "test": ["case_000", "case_007"],
    }
    return data


def scored(methods, recorder, data):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[recorder], inference_mode=False, enable_checkpointing=False,
    )  # fmt: skip
    for name, method in methods.items():
        recorder.method = name
        trainer.test(method, datamodule=data, verbose=False)
    return pd.DataFrame(recorder.rows)


def recorder_in(folder, **changes):
    settings = {"preset": "stroke", "seed": 3, "method": "average", "pictures": 1} | changes
    return CaseRecorder(folder, **settings)


def value(rows, **key):
    chosen = rows
    for column, wanted in key.items():
        chosen = chosen[chosen[column] == wanted]
    assert len(chosen) == 1
    return chosen["value"].item()


def test_every_method_case_and_amplitude_has_a_row_of_every_metric(tmp_path, data):
    methods = {"average": Weighted(0.5), "mask_composite": MaskComposite()}
    rows = scored(methods, recorder_in(tmp_path), data)
    assert tuple(rows.columns) == CASE_COLUMNS
    assert set(rows["preset"]) == {"stroke"} and set(rows["seed"]) == {3}
    assert (rows["patient_id"] == rows["case_id"]).all()  # each phantom is a patient
    assert set(rows["mask_source"]) == {"expert"} and set(rows["steps"]) == {0}
    groups = rows.groupby(["method", "misregistration_mm", "case_id"], sort=False)
    assert set(groups.groups) == {
        (method, amplitude, case)
        for method in methods
        for amplitude in AMPLITUDES
        for case in ("case_000", "case_007")
    }
    measured = {tuple(map(tuple, group[["roi", "metric"]].values)) for _, group in groups}
    assert measured == {
        (
            ("brain", "ssim"), ("brain", "fsim"), ("bone", "psnr"), ("bone", "ssim"),
            ("whole", "psnr"), ("whole", "ssim"), ("whole", "fsim"),
            ("lesion", "conspicuity"), ("lesion", "conspicuity_min"),
            ("findings", "conspicuity"), ("findings", "conspicuity_min"), ("whole", "seconds"),
        )
    }  # fmt: skip
    assert (rows.query("metric == 'seconds'")["value"] > 0).all()


def test_values_are_those_of_the_case_at_the_amplitude_they_stand_beside(tmp_path, data):
    rows = scored({"mask_composite": MaskComposite()}, recorder_in(tmp_path), data)
    for amplitude in AMPLITUDES:
        for batch in data.test_batches(amplitude):
            expected = psnr(MaskComposite().fuse(batch), batch.clean_ct, batch.clean_roi[:, 1:2])
            key = {"case_id": batch.case_id[0], "misregistration_mm": amplitude}
            got = value(rows, roi="bone", metric="psnr", **key)
            assert got == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture
def wrong(phantoms):
    """The same heads, unperturbed and then with something wrong in each way."""
    amounts = (
        "rotation_deg: [0, 3], mask_shift_mm: [4], mask_dilation_mm: [0, 8], mask_holes: [0.4], "
        "noise_std: [0.2], without_lesion: [1]"
    )
    overrides = f"+data.perturbations={{{amounts}}}", "data.misregistration_mm=[0.0]"
    data = phantoms.data(*overrides)
    data._asked_splits = {"train": ["case_001"], "val": ["case_002"], "test": ["case_007"]}
    return data


class InTheBrain(BrightIsLesion):
    """A lesion head that reads only where it is asked, and keeps where that was."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def within(self, asked):
        self.asked.append(asked)
        return lambda fused: self(fused) * asked


def test_perturbed_cases_have_rows_of_their_own_against_the_truth_and_no_pictures(tmp_path, wrong):
    head = InTheBrain()
    recorder = recorder_in(tmp_path, method="mask_composite", pictures=9, lesion_head=head)
    rows = scored({"mask_composite": MaskComposite()}, recorder, wrong)
    got = rows[["misregistration_mm", "perturbation", "amount"]].drop_duplicates()
    assert list(got.itertuples(index=False, name=None)) == [
        (0.0, "", 0.0), (0.0, "rotation_deg", 3.0), (0.0, "mask_shift_mm", 4.0),
        (0.0, "mask_dilation_mm", 8.0), (0.0, "mask_holes", 0.4), (0.0, "noise_std", 0.2),
        (0.0, "without_lesion", 1.0),
    ]  # fmt: skip
    assert set(rows.groupby(["perturbation", "amount"]).size()) == {len(rows) / 7}
    for condition, loader in zip(wrong.conditions, wrong.test_dataloader(), strict=True):
        (batch,) = loader
        fused, (_, ct, roi) = MaskComposite().fuse(batch), batch.truth()
        key = {"perturbation": condition.perturbation, "roi": "bone", "metric": "psnr"}
        expected = psnr(fused, ct, roi[:, 1:2]).item()
        assert value(rows, **key) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(asked, roi[:, :1]) for asked in head.asked)  # as it truly is
    assert [view.case_id for view in recorder.views] == ["case_007"]

    text = recorder.write().read_text("utf-8")
    assert "Robustness" in text and "One thing is wrong at a time" in text
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"perturbations.csv", "perturbations.png", "perturbations.pdf"} <= files
    written = pd.read_csv(tmp_path / "figures" / "perturbations.csv")
    whole = written.query("roi == 'whole' and metric == 'ssim'").set_index(["axis", "amount"])
    assert whole["mean"]["noise_std", 0.2] < whole["mean"]["noise_std", 0.0] - 0.1


def test_a_method_is_given_what_is_wrong(tmp_path, wrong):
    method = Curious()
    scored({"curious": method}, recorder_in(tmp_path), wrong)
    (still, _), *others = method.given
    changed = [not torch.equal(roi[:, :2], still[:, :2]) for roi, _ in others]
    assert changed == [True, True, True, True, False, False]  # turned, three of masks, noise, none
    assert method.lesion_voxels[-1] == 0 < min(method.lesion_voxels[:-1])


def test_an_ensemble_is_scored_by_its_mean_and_its_spread_by_its_correlation(tmp_path, data):
    rows = scored({"curious": Curious(), "half": Weighted(0.5)}, recorder_in(tmp_path), data)
    ensemble = rows[rows["method"] == "curious"]
    assert set(ensemble["steps"]) == {7}
    assert set(ensemble[ensemble["metric"] == "spread_error_correlation"]["roi"]) == {
        "whole", "brain", "bone",
    }  # fmt: skip
    assert "spread_error_correlation" not in set(rows[rows["method"] == "half"]["metric"])
    (batch,) = [b for b in data.test_batches(0.0) if b.case_id == ["case_007"]]
    expected = psnr(0.5 * batch.mri, batch.reference, torch.ones_like(batch.brain))
    got = value(ensemble, case_id="case_007", misregistration_mm=0.0, roi="whole", metric="psnr")
    assert got == pytest.approx(expected.item(), rel=1e-4)


def test_without_the_mask_no_method_sees_the_lesion_and_scores_still_know_it(tmp_path, data):
    def lesion_rows(mask_source):
        method = Curious()
        settings = {"mask_source": mask_source, "lesion_head": BrightIsLesion()}
        rows = scored({"curious": method}, recorder_in(tmp_path, **settings), data)
        assert set(rows["mask_source"]) == {mask_source}
        lesion = rows[rows["roi"] == "lesion"]
        assert set(lesion["metric"]) == {
            "dice", "nsd", "hd95", "ece_raw", "brier_raw", "conspicuity", "conspicuity_min",
        }  # fmt: skip
        return method, lesion

    seen, expert = lesion_rows("expert")
    blind, none = lesion_rows("none")
    assert max(seen.lesion_voxels) > 0 and set(blind.lesion_voxels) == {0}
    assert min(seen.deepest_mm) < 0 < min(blind.deepest_mm)  # its distance map would tell it too
    # the method looks at the MRI alone, so its scores may not change
    pd.testing.assert_series_equal(expert["value"], none["value"])
    dices = expert[(expert["metric"] == "dice") & (expert["case_id"] == "case_007")]["value"]
    assert dices.notna().all()


def test_the_automatic_mask_is_what_the_head_finds_in_the_sources_and_scores_know_the_true_one(
    tmp_path, data
):
    def told(mask_source):
        method = Curious()
        settings = {"mask_source": mask_source, "lesion_head": BrightIsLesion()}
        return method, scored({"curious": method}, recorder_in(tmp_path, **settings), data)

    (method, rows), (expert, expert_rows) = told("automatic"), told("expert")
    assert set(rows["mask_source"]) == {"automatic"}
    batches = [batch for amplitude in AMPLITUDES for batch in data.test_batches(amplitude)]
    assert len(method.given) == len(batches)
    for batch, (roi, distance_mm) in zip(batches, method.given, strict=True):
        composite = torch.where(batch.roi[:, 1:2], batch.ct, batch.mri)
        found = (BrightIsLesion()(composite) > 0.5) & batch.roi[:, :1]
        assert found.any() and not torch.equal(found, batch.lesion)
        assert torch.equal(roi, torch.cat([batch.roi[:, :2], found], 1))
        assert distance_mm[found].max() <= 0 < distance_mm[~found].min()
        expected = signed_distance_mm(found, batch.spacing_mm)
        torch.testing.assert_close(distance_mm, expected.to(distance_mm))
    assert method.lesion_voxels != expert.lesion_voxels
    # the method looks at the MRI alone, so only what it was scored against could differ
    scores = [frame[frame["metric"] != "seconds"]["value"] for frame in (rows, expert_rows)]
    pd.testing.assert_series_equal(*scores)


class NothingIsLesion(torch.nn.Module):
    """A lesion head that finds none."""

    def forward(self, fused):
        return torch.zeros_like(fused)


def test_where_the_head_finds_nothing_the_automatic_mask_is_empty(tmp_path, data):
    method = Curious()
    recorder = recorder_in(tmp_path, mask_source="automatic", lesion_head=NothingIsLesion())
    rows = scored({"curious": method}, recorder, data)
    assert set(method.lesion_voxels) == {0} and min(method.deepest_mm) > 0
    dices = rows[(rows["metric"] == "dice") & (rows["case_id"] == "case_007")]["value"]
    assert (dices == 0).all() and len(dices) == len(AMPLITUDES)  # the true one was missed


def test_the_report_has_a_table_of_how_visible_findings_are_where_any_can_be_judged(tmp_path, data):
    recorder = recorder_in(tmp_path, pictures=0)
    rows = scored({"average": Weighted(0.5)}, recorder, data)
    of_findings = rows[rows["metric"].isin({"conspicuity", "conspicuity_min"})]
    assert of_findings["value"].isna().all()  # on so coarse a grid findings have no surround
    assert "Conspicuity of findings" not in recorder.write().read_text("utf-8")
    for row in recorder.rows:
        if row["case_id"] == "case_007" and row["roi"] == "lesion":
            row["value"] = 0.4321
    text = recorder.write().read_text("utf-8")
    assert "Conspicuity of findings" in text and "Lesion on MRI, n = 1" in text and "0.43" in text
    assert "Only on CT" not in text


def test_the_lesion_score_is_of_what_the_head_sees_in_the_fused_volume(tmp_path, data):
    recorder = recorder_in(tmp_path, lesion_head=BrightIsLesion())
    rows = scored({"average": Weighted(0.5)}, recorder, data)
    for batch in data.test_batches(2.0):
        fused = Weighted(0.5).fuse(batch)
        expected = dice(BrightIsLesion()(fused) > 0.5, batch.clean_roi[:, 2:3]).item()
        key = {"case_id": batch.case_id[0], "misregistration_mm": 2.0}
        assert value(rows, roi="lesion", metric="dice", **key) == pytest.approx(
            expected, nan_ok=True
        )


def test_a_folder_with_rows_figures_and_a_report_is_written(tmp_path, data):
    recorder = recorder_in(tmp_path / "out", pictures_of="average", facts={"scanner": "none"})
    rows = scored({"average": Weighted(0.5), "mask_composite": MaskComposite()}, recorder, data)
    assert not (tmp_path / "out").exists()  # nothing before all is scored
    report = recorder.write()
    assert report == tmp_path / "out" / "report.html" and "scanner" in report.read_text()
    written = pd.read_csv(tmp_path / "out" / "cases.csv")
    assert len(written) == len(rows) and tuple(written.columns) == CASE_COLUMNS
    assert {p.name for p in (tmp_path / "out" / "figures").iterdir()} >= {
        "case_000.png", "robustness.png",
    }  # fmt: skip


@pytest.mark.parametrize("asked, shown", [(2.0, 2.0), (3.0, 0.0)])
def test_pictures_are_of_one_method_at_one_amplitude_or_the_first_where_that_is_not_tested(
    tmp_path, data, asked, shown
):
    recorder = recorder_in(tmp_path, pictures=5, pictures_at_mm=asked)
    scored({"average": Weighted(0.5), "mask_composite": MaskComposite()}, recorder, data)
    assert [view.case_id for view in recorder.views] == ["case_000", "case_007"]
    assert all(view.caption.startswith("average, preset stroke") for view in recorder.views)
    assert all(f"moved by {shown:g} mm" in view.caption for view in recorder.views)


def test_the_report_of_a_training_run_is_written_when_its_test_ends(tmp_path, data):
    scored(
        {"average": Weighted(0.5)}, RunReport(tmp_path, "stroke", 0, "average", pictures=0), data
    )
    assert (tmp_path / "report.html").is_file() and (tmp_path / "cases.csv").is_file()


def test_an_unknown_source_of_masks_is_refused(tmp_path):
    sources = r"mask_source of \('expert', 'automatic', 'none'\), got 'oracle'"
    with pytest.raises(ValueError, match=sources):
        recorder_in(tmp_path, mask_source="oracle")


def test_an_automatic_mask_without_a_head_to_draw_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a lesion head for mask_source=automatic"):
        recorder_in(tmp_path, mask_source="automatic")


def test_a_view_shows_sources_as_given_and_masks_as_they_truly_are(phantoms):
    batch = phantoms.batch(4.0, case=7)
    view = case_view(batch, 0, batch.mri, None, "caption")
    assert (view.ct == batch.ct[0, 0].numpy()).all()
    assert (view.bone == batch.clean_roi[0, 1].numpy()).all()
    assert (view.bone != batch.roi[0, 1].numpy()).any()
    assert view.spread is None and view.lesion.sum() == batch.clean_roi[0, 2].sum()
    assert case_view(phantoms.batch(case=6), 0, batch.mri, None, "").lesion is None  # none drawn


def test_a_summary_is_mean_and_standard_deviation_and_one_draw_has_no_spread():
    draws = torch.randn(5, 2, 1, 3, 4, 5)
    summary = summary_of(draws[None])
    mean, spread = summary.mean, summary.std
    torch.testing.assert_close(mean, (draws.sum(0) / 5).clamp(-1, 1))
    images = draws.clamp(-1, 1)  # a draw may leave model space
    apart = (images - images.mean(0)).square().sum(0) / 4
    torch.testing.assert_close(spread, apart.sqrt())
    assert summary_of(draws[None, :1]).std is None


def test_a_calibration_is_applied_to_rows_chart_and_report_of_the_method_shown(tmp_path, data):
    calibration = Calibration(
        level=0.9,
        curve={
            "brain": [[1.0], [0.5]],
            "bone": [[1.0], [2.0]],
            "tissue": [[1.0], [1.0]],
            "air": [[1.0], [1.0]],
        },
        quantile={"brain": 1.0, "bone": 9.0, "tissue": 2.0, "air": 2.0},
        temperature=None,
        case_ids=["case_002"],
        misregistration_mm=2.0,
    )
    recorder = recorder_in(tmp_path, method="curious", calibration=calibration)
    rows = scored({"curious": Curious()}, recorder, data)
    brain, bone = (
        rows[(rows["roi"] == r) & (rows["metric"] == "width")] for r in ("brain", "bone")
    )
    assert brain["value"].max() < bone["value"].min()
    text = recorder.write().read_text("utf-8")
    assert "Calibration of the uncertainty" in text and "Reliability" in text
    assert (tmp_path / "figures" / "reliability.png").is_file()
    assert "ENCE before calibration" in text and "Whole ENCE</td>" in text
    assert "Calibration of the uncertainty: intervals of 90% coverage" in text
    assert "<dt>Bone PSNR (dB)</dt>" in text and "<dt>Bone ENCE" not in text

    plain = recorder_in(tmp_path / "plain", method="curious")
    scored({"curious": Curious()}, plain, data)
    assert "Reliability" not in plain.write().read_text("utf-8")
    assert not (tmp_path / "plain" / "figures" / "reliability.png").exists()


@pytest.mark.parametrize("tried", [[2.0, 0.0], [0.0, 2.0]])
def test_slices_are_written_once_at_the_smallest_amplitude_and_runs_of_one_method_kept_apart(
    tmp_path, tried
):
    for folder, colour in (("vi", (200, 100, 0)), ("ir", (80, 80, 80))):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("RGB", (16, 12), colour).save(tmp_path / "set" / folder / "a.png")
    amplitudes = {"misregistration_mm": tried, "splits": {"test": ["a"]}}
    data = PairedSlices(tmp_path / "set", "vis_ir", **amplitudes)
    recorder = recorder_in(tmp_path)
    for weight, recorder.seed in ((0.0, 3), (1.0, 4)):
        scored({"weighted": Weighted(weight)}, recorder, data)
    fused = [tmp_path / "fused" / name / "a.png" for name in ("weighted", "weighted_stroke_seed_4")]
    visible, infrared = (np.asarray(Image.open(path)) for path in fused)
    assert visible.shape == infrared.shape == (12, 16, 3)
    assert (visible == (200, 100, 0)).all()  # all of it, unmoved
    assert ((infrared @ (0.299, 0.587, 0.114)).round() == 80).all()


class Reversing(Weighted):
    """Makes a colour of its own, and says what adapting cost."""

    adaptation_seconds: ClassVar = {"a": 2.5}

    def fused_chroma(self, batch):
        return -batch.chroma


def test_a_method_with_colour_and_costs_of_its_own_is_recorded_with_them(tmp_path):
    for folder, colour in (("vi", (200, 100, 0)), ("ir", (80, 80, 80))):
        (tmp_path / "set" / folder).mkdir(parents=True)
        Image.new("RGB", (16, 12), colour).save(tmp_path / "set" / folder / "a.png")
    data = PairedSlices(tmp_path / "set", "vis_ir", splits={"test": ["a"]})
    recorder = recorder_in(tmp_path)
    scored({"reversing": Reversing(0.0), "weighted": Weighted(0.0)}, recorder, data)
    own, given = (
        np.asarray(Image.open(tmp_path / "fused" / name / "a.png")).astype(float)[0, 0]
        for name in ("reversing", "weighted")
    )
    assert given[0] > given[2] and own[0] < own[2]  # red became blue
    seconds = [row for row in recorder.rows if row["metric"] == "adaptation_seconds"]
    assert [(row["method"], row["value"]) for row in seconds] == [("reversing", 2.5)]


def test_pictures_without_regions_are_reported_by_what_they_keep_of_both_sources(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for folder in ("vi", "ir"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        pixels = generator.integers(0, 255, (24, 24), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / folder / "a.png")
    data = PairedSlices(tmp_path / "set", "vis_ir", splits={"test": ["a"]})
    recorder = recorder_in(tmp_path)
    scored({"average": Weighted(0.5), "infrared": Weighted(1.0)}, recorder, data)
    text = recorder.write().read_text("utf-8")
    assert "What is kept of both sources" in text and "Qabf" in text and "Whole Qabf" not in text
    assert "Fusion quality under misregistration" not in text
    assert "Qabf" in capsys.readouterr().out
