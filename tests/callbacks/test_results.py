import importlib
import json

import lightning
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clinfuse.callbacks.loggers import tensorboard_logger, wandb_logger
from clinfuse.callbacks.recorder import RunReport
from clinfuse.callbacks.results import LoggedResults, plain_table, score_tables, scores
from clinfuse.methods.rules import Weighted
from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.reporting.tables import bootstrap_interval
from clinfuse.reporting.views import CaseView


@pytest.fixture
def scored(no_account):
    """The folder of a run as its recorder and its cards leave it."""
    folder = no_account / "run"
    rows = [
        row
        for case, value in enumerate([20.0, 24.0, 31.0])
        for mm in (0.0, 2.0)
        for row in rows_of(case, value - mm, misregistration_mm=mm)
    ]
    write_rows(folder / "cases.csv", rows)
    (folder / "figures").mkdir()
    for number, name in enumerate(
        ("robustness", "reliability", "case_0", "validation_step_000004")
    ):
        Image.new("RGB", (6, 4), (number, 50, 90)).save(folder / "figures" / f"{name}.png")
    (folder / "report.html").write_text("<html>Bröca</html>", "utf-8")
    (folder / "model_card.md").write_text("# Model card: smoke\n", "utf-8")
    (folder / "cost.json").write_text(json.dumps({"training_seconds": 12.5}))
    return folder


def log_results(folder, *loggers):
    """What a trainer does when the test of a run in a folder has ended."""
    mri = np.linspace(-1, 1, 120, dtype=np.float32).reshape(4, 5, 6)
    lesion = np.zeros((4, 5, 6), bool)
    lesion[2, 3:, :2] = True
    recorder = RunReport(folder, preset="stroke", seed=3, method="ours")
    spacing_mm = (5.0, 1.0, 1.0)
    recorder.views = [CaseView("case_0", mri, mri, mri, spacing_mm, lesion=lesion, bone=mri > 0.5)]
    callbacks = [recorder, LoggedResults(folder)]
    trainer = lightning.Trainer(logger=list(loggers), accelerator="cpu", callbacks=callbacks)
    callbacks[1].on_test_end(trainer, Weighted(0.5))


def test_wandb_gets_rows_tables_figures_regions_report_and_scores_of_a_run_offline(
    scored, wandb_reading
):
    logger = wandb_logger(scored, "smoke", "clinfuse")
    log_results(scored, logger)
    logger.finish()
    run, rows = wandb_reading(scored), read_rows(scored / "cases.csv")

    logged = run.table("cases")
    assert list(logged[0]) == list(rows.columns) and len(logged) == len(rows) == 12
    assert [row["value"] for row in logged] == [
        20.0,
        None,
        18.0,
        None,
        24.0,
        None,
        22.0,
        None,
        31.0,
        None,
        29.0,
        None,
    ]
    assert "tables/kept.path" not in run.summary  # none of its scores is defined
    lines = {line["misregistration_mm"]: line for line in run.table("tables/quality")}
    assert {mm: line["mean"] for mm, line in lines.items()} == {0.0: 25.0, 2.0: 23.0}
    assert all(line["low"] < line["mean"] < line["high"] for line in lines.values())
    assert run.summary["test/bone_psnr/2mm"] == 23.0
    assert run.summary["cost/training_seconds"] == 12.5

    for number, name in enumerate(("robustness", "reliability", "case_0")):
        (picture,) = run.pictures(f"figures/{name}").values()
        shown = np.asarray(Image.open(picture))
        assert shown.shape == (4, 6, 3) and (shown == (number, 50, 90)).all()
    assert not any("validation" in name for name in run.summary)  # logged when they were drawn
    report = run.folder / "files" / run.summary["report.path"]
    assert report.read_text("utf-8") == "<html>Bröca</html>"
    assert run.run["notes"] == "# Model card: smoke\n"

    captions = [f"case_0: {name}" for name in ("MRI", "CT as given", "Fused")]
    assert list(run.pictures("test_regions")) == captions
    masks = run.summary["test_regions.all_masks"][0]
    assert set(masks) == {"bone", "lesion"}
    drawn = np.asarray(Image.open(run.folder / "files" / masks["lesion"]["path"]))
    expected = np.zeros((5, 6))
    expected[:2, 4:] = 3  # lesion is the third region; rows run to the back, columns to the left
    np.testing.assert_array_equal(drawn, expected)


def test_a_broken_record_costs_wandb_and_not_the_run(scored, caplog):
    (scored / "cost.json").write_text("no JSON")
    logger = wandb_logger(scored, "smoke", "clinfuse")
    log_results(scored, logger)
    assert isinstance(logger.failure, ValueError)
    assert "W&B failed (JSONDecodeError" in caplog.text


def test_other_loggers_get_the_figures(scored):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    logger = tensorboard_logger(scored)
    log_results(scored, logger)
    logger.save()
    events = accumulator.EventAccumulator(str(scored / "tensorboard")).Reload()
    names = ["figures/case_0", "figures/reliability", "figures/robustness"]
    assert sorted(events.Tags()["images"]) == names


def test_of_a_lesion_head_which_fuses_nothing_nothing_is_logged(no_account):
    log_results(no_account, logger := wandb_logger(no_account, "smoke", "clinfuse"))
    assert logger._experiment is None


@pytest.mark.slow
def test_an_offline_run_of_a_whole_training_is_read_back(
    entry_point, phantoms, tmp_path, wandb_reading
):
    folder = tmp_path / "run"
    done = entry_point(
        "clinfuse.train", *phantoms.run, "logger=[csv,wandb]", "+group=robustness",
        f"cache_dir={phantoms.cache_dir}", f"hydra.run.dir={folder}",
        WANDB_MODE="offline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run, rows = wandb_reading(folder), read_rows(folder / "cases.csv")
    assert run.run["tags"] == ["clinfuse", "stroke"] and run.exit_code == 0
    assert run.run["run_group"] == "robustness"
    assert run.config["method"]["steps"] == 2 and run.config["guidance"]["gamma"] == 3.0
    assert run.config["facts"]["commit"]

    written = pd.read_csv(folder / "metrics.csv").set_index("step")["train/loss"].dropna()
    assert run.curve("train/loss") == pytest.approx(written.to_dict()) and len(written) == 12
    assert len(run.table("cases")) == len(rows)
    names = ("quality", "calibration")
    quality, calibration = (pd.DataFrame(run.table(f"tables/{name}")) for name in names)
    bone = rows[(rows["roi"] == "bone") & (rows["metric"] == "psnr")]
    found = quality[quality["score"] == "Bone PSNR (dB)"].set_index("misregistration_mm")["mean"]
    expected = bone.groupby("misregistration_mm")["value"].mean()
    assert found.to_dict() == pytest.approx(expected.to_dict())
    assert "Brain coverage" in set(calibration["score"])
    assert run.summary["test/bone_psnr/2mm"] == pytest.approx(expected[2.0])

    assert len(run.pictures("validation_regions")) == 3
    for name in ("robustness", "reliability"):
        (picture,) = run.pictures(f"figures/{name}").values()
        original = Image.open(folder / "figures" / f"{name}.png").convert("RGB")
        np.testing.assert_array_equal(Image.open(picture), original)
    assert run.run["notes"] == (folder / "model_card.md").read_text("utf-8")


def rows_of(case, value, **more):
    """A score that is defined and one that is not."""
    settings = {"preset": "stroke", "seed": 0, "mask_source": "expert", "steps": 0}
    settings |= {"method": "ours", "misregistration_mm": 2.0} | more
    found = [("bone", "psnr", value), ("whole", "qabf", float("nan"))]
    return case_rows(found, case_id=f"case_{case}", **settings)


def test_tables_hold_means_with_intervals_over_patients_of_what_is_defined():
    values = [20.0, 24.0, 31.0, float("nan")]
    rows = pd.DataFrame([r for case, v in enumerate(values) for r in rows_of(case, v)])
    (table,) = score_tables(rows).values()
    (line,) = table.to_dict("records")
    low, high = bootstrap_interval(np.array(values[:3]))
    assert line == {
        "method": "ours", "score": "Bone PSNR (dB)", "misregistration_mm": 2.0,
        "mean": pytest.approx(25.0), "low": pytest.approx(low), "high": pytest.approx(high),
        "cases": 3, "patients": 3,
    }  # fmt: skip
    assert scores(rows) == {"test/bone_psnr/2mm": pytest.approx(25.0)}


def test_perturbed_cases_are_in_no_table_and_no_summary():
    spoiled = rows_of(0, 1.0, perturbation="mri_noise", amount=0.1)
    rows = pd.DataFrame(rows_of(0, 20.0) + rows_of(1, 24.0) + spoiled)
    assert scores(rows) == {"test/bone_psnr/2mm": 22.0}
    assert score_tables(rows)["quality"]["mean"].tolist() == [22.0]


def test_nothing_undefined_reaches_a_table_as_a_number():
    frame = pd.DataFrame({"method": ["a", "b"], "mean": [np.nan, 1.5], "cases": [0, 2]})
    assert plain_table(frame) == (["method", "mean", "cases"], [["a", None, 0], ["b", 1.5, 2]])
