import csv
import json
import logging
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from clinfuse.callbacks.checkpoint import PREVIOUS
from clinfuse.callbacks.interruption import Interrupted
from clinfuse.configuration import CONFIG_PATH, run_config, save_config
from clinfuse.data.splits import read_splits
from clinfuse.train import main, resumed

TRAINING = ("test=false", "callbacks.report=null", "callbacks.progress=null")
"""A run of ``phantoms.run`` that trains as any other and leaves the pictures out."""

KILLER = """
import os, pathlib
from lightning import Callback

class KillAt(Callback):
    \"\"\"Kills the process in the middle of an epoch, once.\"\"\"

    def __init__(self, step, marker, signum):
        self.step, self.marker, self.signum = step, pathlib.Path(marker), signum

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), self.signum)
"""


def kill_at(step, marker, signum):
    """What a command line is to say for a signal after a step, the first time it is given."""
    callback = {"_target_": "killer.KillAt", "step": step, "marker": marker, "signum": int(signum)}
    return [f"+callbacks.kill.{name}={value}" for name, value in callback.items()]


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def losses(folder):
    """Logged training losses as written, by step, over all parts of a resumed run."""
    written = {}
    for path in sorted(folder.glob("metrics*.csv"), key=lambda p: p.stat().st_mtime):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    written[int(row["step"])] = row["train/loss"]
    return written


def assert_identical(one, other, where=""):
    """Every tensor and number of two nested structures, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_identical(a, b, f"{where}/{i}")
    elif torch.is_tensor(one):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_a_run_leaves_everything_that_it_takes_to_repeat_and_to_judge_it(smoke_run):
    expected = {
        ".hydra/config.yaml", ".hydra/config.sha256", ".hydra/overrides.yaml", "metrics.csv",
        "checkpoints/last.ckpt",
        "cases.csv", "report.html", "facts.json", "splits.json", "train.log", "calibration.json",
        *(f"checkpoints/draw_{draw}_stage_{stage}.pt" for draw in (0, 1) for stage in (0, 1)),
    }  # fmt: skip
    assert all((smoke_run / name).is_file() for name in expected)
    pictures = {path.name for path in (smoke_run / "figures").iterdir()}
    assert {"robustness.png", "validation_step_000012.png"} <= pictures
    assert any(name.startswith("case_") for name in pictures)

    rows = pd.read_csv(smoke_run / "cases.csv")
    assert set(rows["method"]) == {"clinfuse"} and set(rows["preset"]) == {"stroke"}
    assert set(rows["misregistration_mm"]) == {0.0, 2.0} and set(rows["steps"]) == {2}
    of_findings = rows["metric"].isin({"conspicuity", "conspicuity_min"})  # too coarse for them
    assert rows[~of_findings]["value"].notna().all()

    facts = json.loads((smoke_run / "facts.json").read_text())
    cost = json.loads((smoke_run / "cost.json").read_text())
    assert cost["training_steps"] == 12 and cost["training_seconds"] > 0
    assert cost["parameters"] >= cost["trained_parameters"] > 10_000

    assert facts["seed"] == 0 and facts["data"]["cases"] == {"train": 6, "val": 1, "test": 1}
    assert facts["data"]["splits"] == read_splits(smoke_run)

    with (smoke_run / "metrics.csv").open(newline="") as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {
        "train/loss", "train/reference", "train/diffusion", "val/brain_ssim", "val/bone_psnr",
    } <= logged  # fmt: skip
    assert sorted(losses(smoke_run)) == list(range(12))


def test_the_saved_configuration_rebuilds_the_run_without_hydra(smoke_run):
    saved = OmegaConf.load(smoke_run / ".hydra" / "config.yaml")
    assert (saved.name, saved.method_name, saved.preset) == ("smoke", "clinfuse", "stroke")
    assert saved.resume is None
    for part in ("method", "network", "data", "schedule", "sampler"):
        OmegaConf.to_container(saved[part], resolve=True)  # nothing that only Hydra could fill in


def test_the_same_seed_gives_the_same_weights_and_losses_bit_for_bit(smoke_run, phantoms, tmp_path):
    again = tmp_path / "again"
    main(phantoms.config(*phantoms.run, *TRAINING, folder=again))
    first, second = checkpoint(smoke_run), checkpoint(again)
    assert second["global_step"] == 12
    assert_identical(first["state_dict"], second["state_dict"])
    assert losses(smoke_run) == losses(again)


def test_a_run_killed_in_an_epoch_and_resumed_ends_as_if_nothing_had_happened(
    smoke_run, entry_point, phantoms, tmp_path
):
    (tmp_path / "killer.py").write_text(KILLER)
    folder, cache = tmp_path / "run", f"cache_dir={smoke_run.parent / 'smoke_cache'}"
    killed = entry_point(
        "clinfuse.train", *phantoms.run, *TRAINING, cache, f"hydra.run.dir={folder}",
        *kill_at(6, tmp_path / "killed", signal.SIGKILL),
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint(folder)["global_step"] == 4  # an epoch has four steps: it was in the second
    configuration = (folder / ".hydra" / "config.yaml").read_bytes()

    trusted = {"PYTHONPATH": str(tmp_path), "CLINFUSE_TRUSTED": "killer.KillAt"}
    for half_written in (".cost.json.1.tmp", ".hydra/.config.yaml.1.tmp"):
        (folder / half_written).touch()  # as by who was stopped while writing
    resumed = entry_point("clinfuse.train", f"resume={folder}", **trusted)
    assert resumed.returncode == 0, resumed.stderr
    assert not list(folder.rglob(".*.tmp"))
    whole, ours = checkpoint(smoke_run), checkpoint(folder)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_identical(whole[part], ours[part], part)
    averaged = "current_model_state"  # beside the average, the weights that go on learning
    assert_identical(whole[averaged], ours[averaged])
    repeated = losses(folder)
    assert set(range(4, 12)) <= repeated.keys()
    assert repeated.items() <= losses(smoke_run).items()
    assert (folder / ".hydra" / "config.yaml").read_bytes() == configuration
    assert (folder / ".hydra_resumed" / "overrides.yaml").is_file()
    assert json.loads((folder / "cost.json").read_text())["training_steps"] == 12


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_that_was_asked_to_end_goes_on_within_the_epoch_by_the_same_command(
    workers, smoke_run, phantoms, tmp_path, monkeypatch
):
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "run"
    command = (
        *phantoms.run, *TRAINING, f"data.num_workers={workers}",
        *kill_at(6, tmp_path / "asked", signal.SIGTERM),
    )  # fmt: skip
    with pytest.raises(Interrupted) as ended:
        main(phantoms.config(*command, folder=folder))
    assert ended.value.code == 143 and checkpoint(folder)["global_step"] == 6
    main(phantoms.config(*command, folder=folder))
    whole, ours = checkpoint(smoke_run), checkpoint(folder)
    for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers"):
        assert_identical(whole[part], ours[part], part)
    assert losses(folder) == losses(smoke_run)
    for draw in (smoke_run / "checkpoints").glob("draw_*.pt"):
        kept = torch.load(folder / "checkpoints" / draw.name, weights_only=True)
        assert_identical(torch.load(draw, weights_only=True), kept, draw.name)
    ours, whole = (json.loads((f / "run.json").read_text()) for f in (folder, smoke_run))
    assert ours["objective"] == whole["objective"] and ours["is_finished"]


def test_a_finished_run_can_be_resumed_for_more_epochs_but_not_as_another_method(
    smoke_run, phantoms, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    main(phantoms.config(f"resume={folder}", "trainer.max_epochs=4", *TRAINING, folder=folder))
    assert checkpoint(folder)["global_step"] == 16
    with pytest.raises(SystemExit):
        main(phantoms.config(f"resume={folder}", "method=average", folder=folder))


def going_on(run, folder, phantoms, loggers, *overrides):
    """The loggers of a copy of a run, had it had other ones, when it goes on."""
    copy = shutil.copytree(run / ".hydra", folder / ".hydra").parent
    saved = run_config(copy)
    saved.logger = loggers
    save_config(saved, copy)
    return resumed(phantoms.config(f"resume={copy}", *overrides, folder=copy)).logger


def test_a_run_that_goes_on_is_logged_where_we_say_and_not_where_it_was(
    smoke_run, phantoms, tmp_path, caplog
):
    """Of a stranger's run no address, path or key is taken, and each is named."""
    csv = {"_target_": "clinfuse.callbacks.loggers.RunCSVLogger", "save_dir": "/elsewhere"}
    mlflow = {
        "_target_": "clinfuse.callbacks.loggers.mlflow_logger", "save_dir": ".", "name": "x",
        "project": "clinfuse", "tracking_uri": "http://stranger.invalid",
    }  # fmt: skip
    stranger = {"csv": csv, "mlflow": mlflow, "wandb": None, "spy": csv, "word": "x"}
    caplog.set_level(logging.INFO)
    loggers = going_on(smoke_run, tmp_path / "stranger", phantoms, stranger)
    assert list(loggers) == ["csv", "mlflow"] and loggers.mlflow.tracking_uri is None
    ours = OmegaConf.load(Path(CONFIG_PATH, "logger", "csv.yaml"))
    assert OmegaConf.to_container(loggers.csv, resolve=False) == OmegaConf.to_container(ours.csv)
    warned, told = [record.getMessage() for record in caplog.records]
    for named in (
        "logger.csv.save_dir='/elsewhere'", "logger.spy", "logger.word",
        "logger.mlflow.tracking_uri='http://stranger.invalid'",
    ):  # fmt: skip
        assert named in warned
    assert "wandb" not in warned and told.startswith("logged to: csv, mlflow (")


def test_a_run_that_goes_on_keeps_its_loggers_until_the_command_line_asks_for_others(
    smoke_run, phantoms, tmp_path, caplog
):
    own = OmegaConf.to_container(phantoms.config().logger, resolve=False)
    assert list(own) == ["csv", "wandb"]
    only = {"csv": own["csv"]}  # no word of W&B, though conf would have it
    for loggers in (own, only):
        kept = going_on(smoke_run, tmp_path / str(len(loggers)), phantoms, loggers)
        assert OmegaConf.to_container(kept, resolve=False) == loggers
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for asked, names in (("wandb", {"wandb"}), ("none", set())):
        kept = going_on(smoke_run, tmp_path / asked, phantoms, own, f"logger={asked}")
        assert set(kept) == names
    mine = going_on(smoke_run, tmp_path / "mine", phantoms, only, "logger.wandb.project=mine")
    assert mine.wandb.project == "mine" and "csv" in mine


@pytest.mark.parametrize("given", ["x", ["csv"]])
def test_what_are_no_loggers_are_none(given, smoke_run, phantoms, tmp_path):
    assert going_on(smoke_run, tmp_path / "copy", phantoms, given) == {}


def test_a_strangers_run_writes_nowhere_but_into_its_folder(smoke_run, phantoms, tmp_path, capsys):
    copy = shutil.copytree(smoke_run, tmp_path / "copy")
    saved = run_config(copy)
    saved.callbacks.cards.folder = str(tmp_path / "elsewhere")
    save_config(saved, copy)
    sentence = refusal(phantoms.config(f"resume={copy}", folder=copy), capsys)
    assert f"writes into '{tmp_path / 'elsewhere'}' (callbacks.cards.folder=" in sentence
    assert not (tmp_path / "elsewhere").exists()


def test_a_rule_has_nothing_to_train_and_is_scored_all_the_same(phantoms, tmp_path):
    folder = tmp_path / "average"
    main(
        phantoms.config(
            *phantoms.smoke, "method=average", "+callbacks.report.pictures=0", folder=folder
        )
    )
    assert set(pd.read_csv(folder / "cases.csv")["method"]) == {"average"}
    assert not (folder / "checkpoints").exists()


def test_a_lesion_head_is_trained_by_the_same_command_and_then_guides(phantoms, tmp_path):
    head, folder = tmp_path / "head", tmp_path / "clinfuse"
    main(
        phantoms.config(*phantoms.smoke, "method=lesion_head", "trainer.max_epochs=2", folder=head)
    )
    assert (head / "checkpoints" / "last.ckpt").is_file()
    overrides = (f"lesion_head={head}", "trainer.max_epochs=1", "callbacks.validation=null")
    main(phantoms.config(*phantoms.run, *overrides, folder=folder))
    rows = pd.read_csv(folder / "cases.csv")
    assert {"dice", "nsd", "hd95"} <= set(rows[rows["roi"] == "lesion"]["metric"])
    frozen, used = checkpoint(head)["state_dict"], checkpoint(folder)["state_dict"]
    for name, weight in frozen.items():
        # averaging a constant rounds: 0.995 a + 0.005 a is not quite a
        torch.testing.assert_close(used[f"lesion_head.{name}"], weight, rtol=1e-5, atol=1e-7)


def test_the_objective_of_a_sweep_is_the_last_validation_score(phantoms, tmp_path):
    folder = tmp_path / "run"
    overrides = ("method=deterministic_unet", "trainer.max_epochs=2", *TRAINING)
    objective = main(phantoms.config(*phantoms.smoke, *overrides, folder=folder))
    with (folder / "metrics.csv").open(newline="") as file:
        logged = [row["val/bone_psnr"] for row in csv.DictReader(file) if row["val/bone_psnr"]]
    assert objective == pytest.approx(float(logged[-1]), rel=1e-5)


# Bad input.


def refusal(cfg, capsys):
    """What is said on stderr when the entry point refuses, in one line."""
    with pytest.raises(SystemExit) as exit_:
        main(cfg)
    assert exit_.value.code == 1
    sentence, *hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert hint == ["(HYDRA_FULL_ERROR=1 shows where it was raised)"]
    assert sentence.startswith("clinfuse: expected ")
    return sentence


def rewritten(path, change):
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)


def with_nan(array, affine):
    array[3, 3, 3] = np.nan
    return array, affine


def moved(array, affine):
    affine[0, 3] += 1.0
    return array, affine


def truncated(path):
    path.write_bytes(path.read_bytes()[:2000])


FAULTS = {
    "missing_modality": (lambda f: (f / "ct.nii.gz").unlink(), ["ct.nii.gz, found none"]),
    "another_grid": (
        lambda f: rewritten(f / "ct.nii.gz", moved), ["one grid", "mri.nii.gz", "ct.nii.gz"],
    ),
    "empty_mask": (
        lambda f: rewritten(f / "bone_mask.nii.gz", lambda a, m: (0 * a, m)),
        ["bone mask with voxels", "all-zero"],
    ),
    "nan": (lambda f: rewritten(f / "mri.nii.gz", with_nan), ["finite", "1 that are NaN"]),
    "four_axes": (
        lambda f: rewritten(f / "mri.nii.gz", lambda a, m: (np.stack([a, a], -1), m)),
        ["3-D volume", "(32, 32, 16, 2)"],
    ),
    "truncated": (lambda f: truncated(f / "mri.nii.gz"), ["truncated or corrupt", "mri.nii.gz"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_study_is_refused_before_anything_is_trained(fault, phantoms, tmp_path, capsys):
    spoil, words = FAULTS[fault]
    cohort, folder = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(phantoms.root, cohort)
    case = read_splits(cohort)["train"][0]
    spoil(cohort / case)
    cfg = phantoms.config(
        "data=studies", f"data.root={cohort}", "network=tiny", "logger=csv", folder=folder
    )
    sentence = refusal(cfg, capsys)
    assert all(word in sentence for word in words) and case in sentence
    assert {path.name for path in folder.iterdir()} == {".hydra"}


def test_a_cohort_that_is_not_there_is_named(phantoms, tmp_path, capsys):
    cfg = phantoms.config("data=studies", f"data.root={tmp_path / 'nowhere'}", folder=tmp_path)
    assert str(tmp_path / "nowhere") in refusal(cfg, capsys)


def test_phantoms_are_not_written_among_a_users_own_studies(phantoms, tmp_path, capsys):
    own = tmp_path / "patients"
    shutil.copytree(phantoms.root / "case_000", own / "patient_1")
    before = sorted(path for path in own.rglob("*"))
    cfg = phantoms.config("experiment=smoke", f"data.root={own}", folder=tmp_path / "run")
    assert str(own) in refusal(cfg, capsys)
    assert sorted(path for path in own.rglob("*")) == before


@pytest.mark.parametrize("made", [False, True], ids=["no_run", "no_checkpoint"])
def test_what_cannot_be_resumed_is_refused(phantoms, tmp_path, capsys, made):
    if made:
        (tmp_path / ".hydra").mkdir()
        (tmp_path / ".hydra" / "config.yaml").write_text("method: {}\ndata: {}\n")
    sentence = refusal(phantoms.config(f"resume={tmp_path}", folder=tmp_path), capsys)
    assert str(Path("checkpoints") / "last.ckpt") in sentence or ".hydra/config.yaml" in sentence


def test_a_damaged_checkpoint_is_not_resumed_and_the_record_stays(
    smoke_run, phantoms, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    last, record = folder / "checkpoints" / "last.ckpt", (folder / "facts.json").read_bytes()
    last.with_name(PREVIOUS).unlink()
    last.write_bytes(last.read_bytes()[:1000])
    sentence = refusal(phantoms.config(f"resume={folder}", folder=folder), capsys)
    assert f"expected a readable checkpoint, got RuntimeError: {last}" in sentence
    assert (folder / "facts.json").read_bytes() == record


def test_a_checkpoint_with_one_before_it_is_trained_again_from_there(
    smoke_run, phantoms, tmp_path, caplog
):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    main(phantoms.config(f"resume={folder}", *TRAINING, folder=folder))
    assert f"{last}: this run goes on from the one saved before it" in caplog.text
    assert_identical(checkpoint(smoke_run)["state_dict"], checkpoint(folder)["state_dict"])


def test_what_cannot_be_tested_is_said_before_the_training(phantoms, tmp_path, capsys):
    lists = "data.splits={train: [1, 2], val: [3], test: []}"
    slices = ("data=phantom_slices", "phantom_slices.patients=3", "phantom_slices.slices=1")
    cfg = phantoms.config(
        "experiment=smoke", *slices, lists, "method=trainable_wavelet", folder=tmp_path
    )
    assert "expected pairs to test with, got none" in refusal(cfg, capsys)
    assert not (tmp_path / "checkpoints").exists()


def test_an_unknown_preset_is_refused_with_those_that_exist(entry_point, tmp_path):
    done = entry_point("clinfuse.train", "preset=heart", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "preset/heart" in done.stderr and "bone_tumor" in done.stderr
    assert not (tmp_path / "run").exists()
