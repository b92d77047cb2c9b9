import json

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from clinfuse.downstream import SCORES, Cohort, data_of, main
from clinfuse.functional.surface import dice
from clinfuse.metrics.segmentation import segmentation_scores
from clinfuse.tables import read_scored

SMALL = ("segmentation.steps=20", "seeds=[0,1]", "misregistration_mm=[0,2]")


@pytest.fixture(scope="module")
def study(phantoms, smoke_run, tmp_path_factory):
    """Runs the study with these overrides in one folder, which it returns."""
    out = tmp_path_factory.mktemp("downstream")

    def run(*overrides):
        asked = (f"run={smoke_run}", "inputs=[MRI,average]", *SMALL, f"out={out}", *overrides)
        main(phantoms.config(*asked, name="downstream", folder=out))
        return out

    return run


@pytest.fixture(scope="module")
def done(study):
    return study()


def test_every_image_has_every_score_of_every_case_seed_and_amplitude(done):
    rows = pd.read_csv(done / "cases.csv")
    assert list(dict.fromkeys(rows["method"])) == ["MRI", "average", "clinfuse"]
    assert set(rows["mask_source"]) == {"none"} and set(rows["roi"]) == {"lesion"}
    tested = json.loads((done / "splits.json").read_text())["test"]
    key = ["method", "seed", "misregistration_mm", "case_id", "metric"]
    assert not rows.duplicated(key).any()
    assert len(rows) == 3 * 2 * 2 * len(tested) * len(SCORES)
    assert set(rows[rows["method"] == "clinfuse"]["preset"]) == {"stroke"}


def test_what_no_ct_went_into_is_the_same_however_the_ct_has_moved(done):
    rows = pd.read_csv(done / "cases.csv")
    wide = rows[rows["method"] == "MRI"].pivot_table(
        index=["seed", "case_id", "metric"], columns="misregistration_mm", values="value"
    )
    assert len(wide) and (wide[0.0] == wide[2.0]).all()


def test_what_is_finished_is_skipped_and_the_rest_is_made_alike(done, study):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    (old,) = done.glob("clinfuse/cases.csv")
    rows = old.read_text()
    old.unlink()
    study()
    changed = {p.relative_to(done) for p in before if p.stat().st_mtime_ns != before[p]}
    assert {str(path) for path in changed if path.suffix == ".npy"} == set()  # fused only once
    assert not {str(path) for path in changed} & {"MRI/cases.csv", "average/cases.csv"}
    assert old.read_text() == rows


def test_a_folder_of_other_settings_is_not_mixed_with_these(done, study, capsys):
    with pytest.raises(SystemExit):
        study("segmentation.steps=21")
    error = capsys.readouterr().err
    assert "expected the segmentation that" in error and "remove this one" in error


def test_tables_collect_the_folder_with_its_data_and_split(done):
    scored = read_scored(done)
    assert scored.data["kind of data"] == "generated volumes" and scored.has_commit
    assert set(scored.rows["case_id"]) == set(scored.test_cases)


def test_thresholds_are_those_of_the_validation_cases_and_recorded(done):
    record = json.loads((done / "MRI" / "record.json").read_text())
    assert set(record["chosen"]) == {"0", "1"} and record["seconds"] > 0
    for chosen in record["chosen"].values():
        assert 0 < chosen["threshold"] < 1 and 0 <= chosen["validation_dice"] <= 1


def test_no_image_is_made_with_a_lesion_mask(phantoms, smoke_run):
    cfg = phantoms.config(f"run={smoke_run}", *SMALL, name="downstream")
    _, data = data_of(cfg, [str(smoke_run)])
    cohort = Cohort(data)
    amplitudes, tested = zip(*cohort.test, strict=True)
    assert amplitudes == (0.0, 2.0)
    studies = [*cohort.train, *cohort.val, *(study for part in tested for study in part)]
    assert len(cohort.train) == len(data.splits["train"])  # one draw of each
    assert any(study.lesion.any() for study in studies)
    assert not any(study.seen.lesion.any() or study.seen.reference is not None for study in studies)


def test_a_run_that_has_learned_from_test_cases_is_refused(study, smoke_run, capsys, tmp_path):
    saved = OmegaConf.load(smoke_run / ".hydra" / "config.yaml")
    learned = json.loads((smoke_run / "splits.json").read_text())["train"]
    splits = f"{{train: [{learned[1]}, {learned[2]}], val: [{learned[3]}], test: [{learned[0]}]}}"
    with pytest.raises(SystemExit):
        study(f"+data.splits={splits}", f"data.root={saved.data.root}", f"out={tmp_path}",
              "phantoms.cases=8", "phantoms.shape=[16,32,32]", "phantoms.spacing_mm=[8.0,6.0,6.0]",
              "data.prepare.workers=1")  # fmt: skip
    assert f"has not learned from, got {learned[0]} in the training of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("inputs=[PET]", "expected inputs of MRI, CT, both or rules"),
        ("inputs=[deterministic_unet]", "expected a method without weights"),
        ("inputs=[MRI,MRI]", "expected inputs and runs of different names"),
        ("misregistration_mm=[]", "expected misregistration_mm="),
        ("seeds=[]", "expected a seed and a draw at least, got seeds=[]"),
    ],
)
def test_what_cannot_be_studied_ends_in_one_sentence(study, override, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit):
        study(override, f"out={tmp_path}")
    assert sentence in capsys.readouterr().err


def test_the_table_has_all_scores_there_are():
    mask = torch.ones(1, 1, 2, 2, 2, dtype=torch.bool)
    (scores,) = segmentation_scores(mask, mask, (1.0, 1.0, 1.0))
    assert tuple((roi, metric) for roi, metric, _ in scores) == SCORES
    assert dict((metric, value) for _, metric, value in scores)["dice"] == dice(mask, mask)
