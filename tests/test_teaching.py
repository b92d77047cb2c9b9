import json
import shutil

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from clinfuse.configuration import checkpoint_of, run_config, save_config, trained_method

STUDENT = (
    "method=distill", "method.steps=1", "method.teacher_steps=2", "trainer.max_epochs=1",
    "trainer.check_val_every_n_epoch=100", "callbacks.progress=null", "logger=csv",
)  # fmt: skip


@pytest.fixture(scope="module")
def student_run(smoke_run, entry_point, tmp_path_factory):
    """Folder of a student of the smoke run, from the command line."""
    folder = tmp_path_factory.mktemp("student") / "run"
    done = entry_point(
        "clinfuse.train", *STUDENT, f"teacher={smoke_run}", f"hydra.run.dir={folder}"
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_a_student_has_its_teachers_data_and_guidance(student_run, smoke_run):
    own, teacher = run_config(student_run), run_config(smoke_run)
    for name in ("data", "phantoms", "guidance", "preset", "network"):
        assert own[name] == teacher[name], name
    assert own.method_name == "distill"
    assert own.method.teacher == OmegaConf.to_container(teacher.method, resolve=True)
    splits = [json.loads((run / "splits.json").read_text()) for run in (student_run, smoke_run)]
    assert splits[0]["train"] == splits[1]["train"] and splits[0]["test"] == splits[1]["test"]


def test_a_students_folder_is_all_that_is_needed(student_run, smoke_run, phantoms, tmp_path):
    copy = shutil.copytree(student_run, tmp_path / "student")
    cfg = run_config(copy)
    cfg.teacher = str(tmp_path / "gone")
    save_config(cfg, copy)
    student, teacher = trained_method(copy), trained_method(smoke_run)
    for name, weight in teacher.anchor.state_dict().items():
        torch.testing.assert_close(student.teacher.anchor.state_dict()[name], weight)  # averaged
    assert len(student.teacher.other_anchors) == len(teacher.other_anchors)
    trained = torch.load(checkpoint_of(student_run), weights_only=True)["state_dict"]
    moved = [
        name for name, weight in teacher.network.state_dict().items()
        if not torch.equal(trained[f"network.{name}"], weight)
    ]  # fmt: skip
    assert moved


def test_a_student_is_scored_as_any_run(student_run):
    rows = pd.read_csv(student_run / "cases.csv")
    assert set(rows.method) >= {"distill"}
    assert (student_run / "report.html").is_file()
    assert "learned from" in (student_run / "model_card.md").read_text()


def test_other_guidance_is_refused_for_it_was_learned(student_run, entry_point, tmp_path):
    asked = (f"run={student_run}", "guidance.eta=0.3", f"out={tmp_path / 'out'}")
    done = entry_point("clinfuse.evaluate", *asked)
    assert done.returncode == 1
    assert "got a student that has learned its teacher's guidance" in done.stderr


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["method=distill"], "expected method=distill with teacher=RUN, got method=distill alone"),
        (["method=average", "teacher=RUN"], "with teacher=RUN, got method=average"),
        (["method=distill", "teacher=nowhere"], "found none in nowhere"),
        (["method=distill", "teacher=RUN", "data=studies"], "cannot be changed|data=studies"),
        (["method=distill", "teacher=STUDENT"], "got one of method=distill"),
    ],
)
def test_what_cannot_teach_is_refused_in_a_sentence(
    arguments, sentence, smoke_run, student_run, phantoms, tmp_path, capsys
):
    from clinfuse.teaching import taught

    names = {"teacher=RUN": f"teacher={smoke_run}", "teacher=STUDENT": f"teacher={student_run}"}
    cfg = phantoms.config(*[names.get(a, a) for a in arguments], folder=tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        taught(cfg)


def test_a_student_is_not_tested_on_patients_that_its_teacher_has_learned(smoke_run, tmp_path):
    from clinfuse.teaching import check_patients

    class Data:
        splits = json.loads((smoke_run / "splits.json").read_text())

    check_patients(smoke_run, Data)
    leaked = Data.splits["train"][0]
    Data.splits = {**Data.splits, "test": [*Data.splits["test"], leaked]}
    with pytest.raises(ValueError, match=f"got 1 that it was, as {leaked}"):
        check_patients(smoke_run, Data)
