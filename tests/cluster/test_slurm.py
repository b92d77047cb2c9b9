"""A sweep, a training on two nodes and an interrupted one, on a real Slurm."""

import re
import shlex
import sys

import numpy as np
import pandas as pd
import pytest
import torch

pytestmark = pytest.mark.cluster

METHODS = "average,weighted,maximum,laplacian_pyramid,wavelet,deterministic_unet,clinfuse"

SWEEP = (
    "-m", "experiment=smoke", "scale=none", "sweep=methods", f"method={METHODS}",
    "callbacks.progress=null", "trainer.accelerator=cpu", "trainer.precision=32-true",
)  # fmt: skip

SMALL = (
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=4",
    "hydra.launcher.timeout_min=9",
)

ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "callbacks.progress=null")


def batch_script(path, *command):
    line = " ".join(shlex.quote(str(word)) for word in command)
    path.write_text(f"#!/usr/bin/env bash\nexec {line}\n")
    return path


def losses(run):
    rows = pd.read_csv(run / "metrics.csv").dropna(subset=["train/loss"])
    return rows.set_index("step")["train/loss"]


def weights(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def without_seconds(table):
    return table[[name for name in table.columns if "second" not in name.lower()]]


def test_a_sweep_gives_the_table_that_it_gives_on_one_machine(
    slurm, entry_point, phantoms, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

    def swept(folder, *launcher):
        done = entry_point(
            "clinfuse.train", *SWEEP, f"cache_dir={phantoms.cache_dir}",
            f"hydra.sweep.dir={tmp_path / folder}", *launcher, **slurm.environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    assert phantoms.root.is_dir()
    swept("local")
    swept("slurm", "hydra/launcher=slurm", *SMALL)
    jobs = list((tmp_path / "slurm" / ".submitit").glob("*/*_log.out"))
    assert len(jobs) == len(METHODS.split(",")) >= 6
    rows = [pd.read_csv(tmp_path / folder / "table" / "cases.csv") for folder in ("local", "slurm")]
    measured = [table[table["metric"] != "seconds"].reset_index(drop=True) for table in rows]
    pd.testing.assert_frame_equal(*measured)
    tables = [(tmp_path / folder / "table" / "table.csv") for folder in ("local", "slurm")]
    pd.testing.assert_frame_equal(*(without_seconds(pd.read_csv(table)) for table in tables))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "slurm").glob("*/cases.csv")}
    swept("slurm", "hydra/launcher=slurm", *SMALL)  # all finished before
    outs = [path.read_text() for path in (tmp_path / "slurm" / ".submitit").glob("*/*_log.out")]
    assert sum("finished before: " in out for out in outs) == len(METHODS.split(","))
    assert all(
        path.stat().st_mtime_ns == then
        for path, then in before.items()
        if "table" not in path.parts
    )


def test_a_job_that_fails_on_another_node_is_named_at_the_end(
    slurm, entry_point, phantoms, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    assert phantoms.root.is_dir()
    done = entry_point(
        "clinfuse.train", "-m", "experiment=smoke", "method=average,maximum",
        "callbacks.report.mask_source=expert,oracle", f"cache_dir={phantoms.cache_dir}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra/launcher=slurm", *SMALL, *ON_CPU,
        **slurm.environment,
    )  # fmt: skip
    assert done.returncode == 1
    named = [line for line in done.stderr.splitlines() if line.startswith("clinfuse: failed: ")]
    assert len(named) == 2 and all("got 'oracle'" in line for line in named)
    assert len(list((tmp_path / "sweep").glob("*/cases.csv"))) == 2


def test_two_ranks_on_two_nodes_train_as_one_process_with_their_batches_together(
    slurm, entry_point, phantoms, tmp_path
):
    common = (*phantoms.run, f"cache_dir={phantoms.cache_dir}", *ON_CPU)
    assert phantoms.root.is_dir()
    one, two = tmp_path / "one", tmp_path / "two"
    done = entry_point(
        "clinfuse.train", *common, "data.batch_size=2", f"hydra.run.dir={one}", **slurm.environment
    )
    assert done.returncode == 0, done.stderr
    script = batch_script(
        tmp_path / "train.sh", "srun", sys.executable, "-m", "clinfuse.train", *common,
        "data.batch_size=1", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2",
        f"hydra.run.dir={two}",
    )  # fmt: skip
    job = slurm.submit(script, "--nodes=2", "--ntasks-per-node=1", "--time=9")
    facts = slurm.wait(job)
    log = (tmp_path / "train.sh.log").read_text()
    assert facts["JobState"] == "COMPLETED", log
    assert facts["NodeList"] == "n[1-2]" and "GLOBAL_RANK: 1, MEMBER: 2/2" in log
    assert len(losses(one)) == len(losses(two)) == 6
    np.testing.assert_allclose(losses(two), losses(one), atol=1e-4)
    expected, got = weights(one), weights(two)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-3)
    scores = [pd.read_csv(run / "cases.csv") for run in (one, two)]
    assert (scores[0]["metric"] == scores[1]["metric"]).all()
    assert not list(two.glob("metrics_*.csv"))  # the second rank has logged nothing
    assert (two / "report.html").is_file()


def test_a_training_that_slurm_takes_its_node_from_goes_on_and_ends_the_same(
    slurm, entry_point, phantoms, tmp_path
):
    """Warned by SIGUSR1, as ``sbatch --signal=USR1@180`` does, and requeued without a warning."""
    common = (
        *phantoms.run, "trainer.max_epochs=30", "trainer.check_val_every_n_epoch=30",
        f"cache_dir={phantoms.cache_dir}", *ON_CPU, "test=false", "interval_level=null",
    )  # fmt: skip
    assert phantoms.root.is_dir()
    reference = tmp_path / "reference"
    done = entry_point("clinfuse.train", *common, f"hydra.run.dir={reference}", **slurm.environment)
    assert done.returncode == 0, done.stderr
    script = batch_script(
        tmp_path / "train.sh", "srun", sys.executable, "-m", "clinfuse.train", *common,
        "hydra.run.dir=${run_dir:null," + str(tmp_path / "fresh") + "}",
    )  # fmt: skip
    job = slurm.submit(script, "--requeue", "--ntasks=1", "--time=9")
    run = tmp_path / f"slurm_{job}_0"

    def has_trained(steps):
        csv = run / "metrics.csv"
        lines = csv.read_text().splitlines() if csv.is_file() else []
        return len(lines) > steps

    interruptions = (("scancel", "--signal=USR1", f"{job}.0"), ("scontrol", "requeue", job))
    for restarts, interruption in enumerate(interruptions, 1):
        facts = slurm.wait(job, lambda facts: facts["JobState"] == "RUNNING" and has_trained(8))
        assert facts["JobState"] == "RUNNING", (tmp_path / "train.sh.log").read_text()
        slurm(*interruption)
        facts = slurm.wait(job, lambda facts, n=restarts: int(facts["Restarts"]) >= n)
        assert int(facts["Restarts"]) == restarts, (tmp_path / "train.sh.log").read_text()
    facts = slurm.wait(job)
    assert facts["JobState"] == "COMPLETED", (tmp_path / "train.sh.log").read_text()
    assert int(facts["Restarts"]) == 2
    expected, got = weights(reference), weights(run)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert re.search(r'"is_finished": true', (run / "run.json").read_text())
