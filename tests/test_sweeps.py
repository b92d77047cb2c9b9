import json
import signal
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from hydra.utils import get_class
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import OmegaConf

from clinfuse.configuration import CONFIG_PATH, FAILED, FailuresLast, Refused, register_resolvers
from clinfuse.sweeps import jobs_of

KILLER = """
import os, signal
from lightning import Callback

class KillIn(Callback):
    \"\"\"Kills the process when it has tested a case in one of a sweep's folders.\"\"\"

    def __init__(self, folder, wanted):
        self.is_here = wanted in folder

    def on_test_batch_end(self, *_):
        if self.is_here:
            os.kill(os.getpid(), signal.SIGKILL)
"""


SMOKE = ("experiment=smoke", "callbacks.results=null", "callbacks.cards=null")


def options(group):
    return sorted(path.stem for path in Path(CONFIG_PATH, group).glob("*.yaml"))


def composed(*overrides):
    register_resolvers()
    overrides = [*overrides, "hydra.runtime.output_dir=out"]
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    cfg.hydra.overrides.task = overrides[:-1]
    return cfg


@pytest.mark.parametrize("scale", ["small", "paper"])
@pytest.mark.parametrize("sweep", options("sweep"))
def test_every_sweep_has_jobs_that_compose_at_either_scale(sweep, scale):
    asked = [f"sweep={sweep}", f"scale={scale}", *["data.root=x"] * (scale == "paper")]
    cfg = composed(*asked)
    assert cfg.group == sweep and cfg.hydra.sweep.dir == f"runs/sweeps/{sweep}/{scale}"
    jobs = jobs_of(cfg)
    if sweep == "guidance_search":
        assert jobs == [] and cfg.hydra.sweeper.n_trials > 0
        return
    assert len(jobs) >= 2 and len({tuple(job) for job in jobs}) == len(jobs)
    ends = [composed(*job) for job in (jobs[0], jobs[-1])]
    assert ends[0].method != ends[1].method or ends[0].data != ends[1].data or (
        ends[0].seed != ends[1].seed or ends[0].callbacks != ends[1].callbacks
    )  # fmt: skip
    for end in ends:
        get_class(end.method._target_)


def test_a_sweep_that_the_command_line_leaves_one_value_has_one_job_of_that_name():
    cfg = composed("sweep=networks", "network=local")
    assert jobs_of(cfg) == [["network=local"]]
    cfg.hydra.overrides.task.append("seed=1,2")
    assert jobs_of(cfg) == [["network=local", f"seed={seed}"] for seed in (1, 2)]


def test_every_score_that_a_sweeps_table_shows_is_one_that_runs_have(smoke_run):
    rows = pd.read_csv(smoke_run / "cases.csv")
    known = set(rows["roi"] + "/" + rows["metric"])
    for sweep in options("sweep"):
        table = OmegaConf.load(Path(CONFIG_PATH, "sweep", f"{sweep}.yaml")).get("table") or {}
        assert set(table.get("scores") or []) <= known, sweep


@pytest.mark.parametrize("ablation", options("ablation"))
def test_every_ablation_changes_the_method_and_the_one_of_none_does_not(ablation):
    with_it, without = composed(f"ablation={ablation}"), composed()
    assert (with_it.method != without.method) == (ablation != "none")


def test_a_sweep_that_is_killed_goes_on_and_leaves_what_was_finished(
    entry_point, phantoms, tmp_path
):
    (tmp_path / "killer.py").write_text(KILLER)
    folder = tmp_path / "sweep"
    asked = [
        *SMOKE, "scale=none", "sweep=methods", "method=average,maximum,wavelet",
        "table.ours=wavelet",
        f"cache_dir={phantoms.cache_dir}", f"hydra.sweep.dir={folder}", "callbacks.progress=null",
        "hydra.sweep.subdir=${hydra:job.num}",
    ]  # fmt: skip
    kill = [
        "+callbacks.kill._target_=killer.KillIn", f"+callbacks.kill.wanted={folder}/1",
        "+callbacks.kill.folder=${hydra:runtime.output_dir}",
    ]  # fmt: skip
    killed = entry_point("clinfuse.train", *asked, *kill, PYTHONPATH=str(tmp_path))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "0" / "cases.csv").is_file() and not (folder / "1" / "cases.csv").exists()
    assert not (folder / "2").exists()
    named = entry_point("clinfuse.tables", f"from={folder}", f"out={tmp_path / 'early'}")
    assert "1 has no cases.csv: it failed, was stopped, or still runs" in named.stderr

    before = {path: path.stat().st_mtime_ns for path in (folder / "0").rglob("*.csv")}
    harmless = [kill[0], "+callbacks.kill.wanted=nowhere", kill[2]]
    again = entry_point("clinfuse.train", *asked, *harmless, PYTHONPATH=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert f"finished before: {folder}/0" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
    rows = pd.read_csv(folder / "table" / "cases.csv")
    counts = rows.groupby("method").size()
    assert set(counts.index) == {"average", "maximum", "wavelet"} and counts.nunique() == 1
    pd.testing.assert_frame_equal(
        rows[rows["method"] == "average"].drop(columns="method").reset_index(drop=True),
        pd.read_csv(folder / "0" / "cases.csv").drop(columns="method"),
    )
    assert "Made by:" in (folder / "table" / "table.md").read_text()
    third = entry_point("clinfuse.train", *asked, *harmless, PYTHONPATH=str(tmp_path))
    assert third.stdout.count("finished before") == 3


@pytest.mark.slow
def test_a_sweep_at_the_papers_scale_runs_dry_on_a_few_small_heads(entry_point, tmp_path):
    """The networks, tests and stages of training of the paper, on heads of 26 x 32 x 32."""
    folder = tmp_path / "eta"
    done = entry_point(
        "clinfuse.train", "-m", "sweep=eta", "scale=paper", "data=phantom", "phantoms.cases=6",
        "phantoms.shape=[26,32,32]", "phantoms.spacing_mm=[5.0,7.2,7.2]", "data.batch_size=2",
        "data.draws_per_epoch=8", "data.num_workers=0", "data.misregistration_mm=[0.0,2.0]",
        "trainer.max_epochs=3", "grids.eta='0.0,0.05'", f"hydra.sweep.dir={folder}",
        f"trainings={tmp_path / 'trainings'}", f"cache_dir={tmp_path / 'cache'}", "logger=csv",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = (folder / "table" / "table.md").read_text()
    assert "η 0.05" in table and "η 0" in table
    assert len(list((tmp_path / "trainings").glob("*.json"))) == 1


@pytest.mark.slow
def test_a_search_goes_on_past_a_trial_that_fails_and_names_it(entry_point, phantoms, tmp_path):
    folder = tmp_path / "search"
    done = entry_point(
        "clinfuse.train", "-m", *SMOKE, "sweep=guidance_search", "scale=none",
        "method.steps=choice(2,-1)", "hydra.sweeper.n_trials=4", "trainer.max_epochs=1",
        f"cache_dir={phantoms.cache_dir}", f"trainings={tmp_path / 'trainings'}",
        f"hydra.sweep.dir={folder}", "callbacks.progress=null",
    )  # fmt: skip
    failed = list(folder.rglob(FAILED))
    best = OmegaConf.load(folder / "optimization_results.yaml")
    assert done.returncode == 1 and 1 <= len(failed) <= 3, done.stderr
    assert all(f"clinfuse: failed: {path.parent}: " in done.stderr for path in failed)
    assert best.best_params["method.steps"] == 2 and best.best_value > 0


def job_return(error):
    done = JobReturn(status=JobStatus.FAILED)
    done.return_value = error
    return done


def test_a_job_that_fails_is_named_at_the_end_and_fails_the_sweep(tmp_path, capsys):
    callback = FailuresLast()
    config = OmegaConf.create(
        {"hydra": {"mode": RunMode.MULTIRUN, "sweep": {"dir": str(tmp_path)}, "runtime": {}}}
    )
    for name, error in (("a", Refused("expected this, got that")), ("b", None)):
        config.hydra.runtime.output_dir = str(tmp_path / name)
        done = job_return(error) if error else JobReturn(status=JobStatus.COMPLETED)
        callback.on_job_start(config)
        callback.on_job_end(config, done)
        assert done.status is JobStatus.COMPLETED and done.return_value is None
    with pytest.raises(SystemExit) as end:
        callback.on_multirun_end(config)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said == f"clinfuse: failed: {tmp_path / 'a'}: expected this, got that\n"

    config.hydra.runtime.output_dir = str(tmp_path / "a")
    callback.on_job_start(config)  # tried again: what failed then says nothing of it
    callback.on_multirun_end(config)


def test_a_sweep_that_is_asked_to_end_does_not_go_on_with_the_next_job(tmp_path):
    hydra = {"mode": RunMode.MULTIRUN, "runtime": {"output_dir": str(tmp_path)}}
    with pytest.raises(SystemExit) as end:
        ended = job_return(SIGTERMException())
        FailuresLast().on_job_end(OmegaConf.create({"hydra": hydra}), ended)
    assert end.value.code == 143 and not list(tmp_path.iterdir())


def test_one_bad_job_of_a_sweep_leaves_the_others_their_turn(entry_point, phantoms, tmp_path):
    done = entry_point(
        "clinfuse.train", "-m", *SMOKE, "method=average,maximum", "group=tried",
        "+data.perturbations={noise_std: [-1]},null", f"cache_dir={phantoms.cache_dir}",
        f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra:job.num}",
        "callbacks.report=null",
    )  # fmt: skip
    assert done.returncode == 1
    assert [(tmp_path / str(n) / "failed.txt").is_file() for n in range(4)] == [1, 0, 1, 0]
    assert json.loads((tmp_path / "1" / "run.json").read_text())["is_finished"]
    assert done.stderr.count("clinfuse: failed: ") == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_share_a_training_and_a_table(
    entry_point, phantoms, tmp_path
):
    folder, trainings = tmp_path / "sweep", tmp_path / "trainings"
    assert phantoms.root.is_dir()
    done = entry_point(
        "clinfuse.train", "-m", *phantoms.smoke, "sweep=steps", "scale=none", "sampler=ddim",
        "+grids.steps='1,2'", "trainer.max_epochs=1", f"cache_dir={phantoms.cache_dir}",
        f"trainings={trainings}", f"hydra.sweep.dir={folder}", "hydra/launcher=processes",
        "callbacks.progress=null", "callbacks.results=null", "callbacks.cards=null",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (remembered,) = trainings.glob("*.json")
    trained = json.loads(remembered.read_text())["folder"]
    logs = {str(log.parent): log.read_text() for log in folder.glob("*/train.log")}
    adopted = [run for run, log in logs.items() if f"settings: {trained}" in log]
    assert len(logs) == 2 and len(adopted) == 1 and trained in set(logs) - set(adopted)
    rows = pd.read_csv(folder / "table" / "cases.csv")
    assert rows.groupby("method").size().nunique() == 1 and rows["method"].nunique() == 2
