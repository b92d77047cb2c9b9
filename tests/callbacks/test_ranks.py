import json

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments import LightningEnvironment

from clinfuse.callbacks.ranks import alone, gather, is_first, starts_its_own

ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "callbacks.progress=null")


def trainer_of(phantoms, *overrides, **instead):
    cfg = phantoms.config(*phantoms.smoke, "trainer.accelerator=cpu", *overrides)
    return instantiate(cfg.trainer, logger=False, **instead, _convert_="all")


def test_a_process_by_itself_is_the_first_and_waits_for_nobody(phantoms):
    trainer = trainer_of(phantoms)
    gather(trainer)
    assert is_first() and not starts_its_own(trainer)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "devices, expected", [(4, 1), ("auto", 1), ([2], [2]), ([0, 1], 1), ("2", 1)]
)
def test_what_goes_on_alone_keeps_a_device_that_was_named(devices, expected):
    told = alone(devices)
    assert told["devices"] == expected and told["num_nodes"] == 1
    assert isinstance(told["plugins"][0], LightningEnvironment)


def test_a_task_among_several_of_slurm_tests_and_fuses_by_itself(phantoms, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "3")  # without these arguments Lightning refuses
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "fuse")
    with pytest.raises(InstantiationException, match="--ntasks=3"):
        trainer_of(phantoms)
    trainer = trainer_of(phantoms, **alone(1))
    assert trainer.world_size == 1 and trainer.is_global_zero


def test_ddp_is_configured_for_stages_that_train_some_of_the_weights(phantoms):
    trainer = trainer_of(phantoms, "trainer=ddp", "trainer.devices=2")
    assert trainer.world_size == 2 and starts_its_own(trainer)
    assert trainer.strategy._ddp_kwargs["find_unused_parameters"]
    assert trainer.strategy._timeout.days == 1


def test_fsdp_needs_a_gpu_and_lightning_says_so(phantoms):
    with pytest.raises(InstantiationException, match="`fsdp` requires a GPU accelerator"):
        trainer_of(phantoms, "trainer=fsdp", "trainer.accelerator=cpu")


@pytest.mark.slow
def test_two_ranks_train_as_one_process_with_their_batches_together(
    entry_point, phantoms, tmp_path
):
    """Three stages, six steps, two validations; then the first rank tests by itself."""
    assert phantoms.root.is_dir()
    common = (*phantoms.run, f"cache_dir={phantoms.cache_dir}", *ON_CPU)
    runs = {}
    for name, overrides in {
        "one": ("data.batch_size=2",),
        "two": ("data.batch_size=1", "trainer=ddp", f"trainings={tmp_path / 'trainings'}"),
    }.items():
        runs[name] = tmp_path / name
        done = entry_point("clinfuse.train", *common, *overrides, f"hydra.run.dir={runs[name]}")
        assert done.returncode == 0, done.stderr
    logged = {name: pd.read_csv(run / "metrics.csv") for name, run in runs.items()}
    for metric in ("train/loss", "val/bone_psnr", "val/whole_ssim"):
        one, two = (logged[name].set_index("step")[metric].dropna() for name in ("one", "two"))
        assert len(one) == len(two) == (6 if metric == "train/loss" else 1)
        np.testing.assert_allclose(two, one, atol=1e-4)
    one, two = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in runs.values()
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3)
    assert json.loads((runs["two"] / "run.json").read_text())["is_finished"]
    assert len(pd.read_csv(runs["two"] / "cases.csv")) == len(
        pd.read_csv(runs["one"] / "cases.csv")
    )
    assert not list(runs["two"].glob("metrics_*.csv"))  # the second rank logs nothing
    (remembered,) = (tmp_path / "trainings").glob("*.json")
    assert json.loads(remembered.read_text())["folder"] == str(runs["two"])


@pytest.mark.slow
def test_a_sweep_on_one_machine_of_trainings_on_several_processes_is_refused(
    entry_point, phantoms, tmp_path
):
    done = entry_point(
        "clinfuse.train", "-m", *phantoms.smoke, "seed=0,1", "trainer=ddp", *ON_CPU,
        f"cache_dir={phantoms.cache_dir}", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("clinfuse: expected one training at a time on 2 processes") == 2
