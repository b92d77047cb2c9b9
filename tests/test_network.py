"""What the commands say to other machines: nothing, unless it is asked for."""

from pathlib import Path

import pytest

OFFLINE = Path(__file__).parent / "offline"


@pytest.fixture
def alone(entry_point, tmp_path):
    """Runs a command whose talk with others is written down; returns it, and whom it talked to."""
    heard = tmp_path / "heard"

    def run(module, *arguments, **environment):
        heard.touch()
        done = entry_point.cold(
            module, *arguments, PYTHONPATH=str(OFFLINE), CLINFUSE_TALKED_TO=str(heard),
            no_proxy="*", **environment,
        )  # fmt: skip
        return done, heard.read_text().splitlines()

    return run


@pytest.mark.slow
def test_one_who_talks_is_heard(alone, tmp_path):
    done, heard = alone(
        "clinfuse.prepare", "dataset=harvard", f"input={tmp_path / 'in'}", "download=true",
        f"output={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}",
        "+dataset.source.files=[{url: 'http://clinfuse.invalid/a.zip', sha256: null}]",
        f"hydra.run.dir={tmp_path / 'log'}",
    )  # fmt: skip
    assert done.returncode == 1 and set(heard) == {"clinfuse.invalid"}, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["none", "csv", "default"])
def test_training_talks_to_nobody(logger, alone, phantoms, tmp_path):
    done, heard = alone(
        "clinfuse.train", *phantoms.smoke, "trainer.max_epochs=1", "method=deterministic_unet",
        f"logger={logger}", f"cache_dir={phantoms.cache_dir}", f"hydra.run.dir={tmp_path / 'run'}",
        WANDB_MODE="offline",
    )  # fmt: skip
    assert done.returncode == 0 and heard == [], done.stderr
    assert (tmp_path / "run" / "wandb").is_dir() == (logger == "default")


@pytest.mark.slow
def test_scoring_fusing_and_preparing_talk_to_nobody(alone, smoke_run, phantoms, tmp_path):
    patient, log = phantoms.root / "case_000", f"hydra.run.dir={tmp_path / 'log'}"
    scans = (f"mri={patient / 'mri.nii.gz'}", f"ct={patient / 'ct.nii.gz'}")
    commands = (
        ("clinfuse.evaluate", f"run={smoke_run}", "misregistration_mm=[2]", log),
        ("clinfuse.fuse", f"run={smoke_run}", *scans, f"out={tmp_path / 'fused'}", log,
         f"cache_dir={tmp_path / 'cache'}"),
        ("clinfuse.prepare", f"input={phantoms.root}", f"output={tmp_path / 'out'}", log,
         "masks=classical", "registration=none"),
        ("clinfuse.tables", f"from=[{smoke_run}]", f"out={tmp_path / 'table'}", log),
        ("clinfuse.export", f"run={smoke_run}", f"out={tmp_path / 'run.safetensors'}"),
    )  # fmt: skip
    for module, *arguments in commands:
        done, heard = alone(module, *arguments)
        assert heard == [], (module, done.stderr)
        assert done.returncode == 0 or module == "clinfuse.prepare", done.stderr
