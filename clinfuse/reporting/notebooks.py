"""What the notebooks share: where they work, the commands that they run, and an interactive view.

A notebook finds what an earlier one has left, and makes what is missing by the command that the
README states, so that each of them runs alone.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCALE = "CLINFUSE_NOTEBOOK_SCALE"
"""Environment variable: ``ci`` makes everything small, in seconds, and its pictures coarse."""

MOVED_MM = (0, 2, 4)
"""By how much evaluations move the CT."""

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours and cursor motions of a terminal."""

_COHORT = ("phantoms.cases=24",)
_SMALL_COHORT = (
    "phantoms.cases=8",
    "phantoms.shape=[16,32,32]",
    "phantoms.spacing_mm=[8.0,6.0,6.0]",
)


def is_small() -> bool:
    """Whether the notebooks are to take seconds (``CLINFUSE_NOTEBOOK_SCALE=ci``)."""
    return os.environ.get(SCALE) == "ci"


def start() -> Path:
    """The folder of everything that the notebooks make; paths are relative to the one above theirs.

    That is the checkout, where the README's commands work too.
    """
    if Path.cwd().name == "notebooks":
        os.chdir("..")
    runs = Path("runs") / ("notebooks_ci" if is_small() else "notebooks")
    runs.mkdir(parents=True, exist_ok=True)
    return runs


def run_command(module: str, *arguments: str) -> None:
    """Run ``python -m MODULE ARGUMENTS``, printing the command and then its output as it comes.

    Raises:
        RuntimeError: it failed.
    """
    text = shlex.join(["python", "-m", module, *arguments])
    print(f"$ {text}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "COLUMNS": "100", "FORCE_COLOR": "1"},  # else no progress is shown
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            plain = _CONTROL.sub("", line).rstrip()
            is_progress = plain.endswith("it/s")
            print(plain, end="\r" if is_progress else "\n", flush=True)
    finally:
        process.terminate()  # if the notebook was interrupted; else it has ended
        status = process.wait()
    if status:
        raise RuntimeError(f"expected this command to succeed, it ended with {status}: {text}")


def trained_run() -> Path:
    """Folder of the run that the notebooks look at, trained if it is not there."""
    folder = start() / "run"
    if not (folder / "calibration.json").is_file():
        size: tuple[str, ...] = ("experiment=notebook",)
        if is_small():
            size = ("experiment=smoke", "method.members=3", "method.steps=2")
            size += ("trainer.log_every_n_steps=1",)
        run_command("clinfuse.train", *size, "test=false", "logger=csv", f"hydra.run.dir={folder}")
    return folder


def trained_lesion_head() -> Path:
    """Folder of a small lesion head, trained on the run's training cases if it is not there."""
    folder = start() / "lesion_head"
    if not (folder / "cost.json").is_file():
        size: tuple[str, ...] = ("experiment=smoke",)
        if not is_small():
            size = ("experiment=lesion_head", *_COHORT, "phantoms.seed=0", "trainer.max_epochs=2")
        run_command(
            "clinfuse.train",
            *size,
            "method=lesion_head",
            "test=false",
            "logger=csv",
            f"hydra.run.dir={folder}",
        )
    return folder


def evaluation() -> Path:
    """Folder where the run and three rules are scored on the same cases, made if need be."""
    return _evaluated(
        "evaluation", lambda: [f"run={trained_run()}", "baselines=[average,maximum,mask_composite]"]
    )


def rule_evaluation(*methods: str) -> Path:
    """Folder where methods without weights are scored on the run's cases, made if it is not there.

    That is the cohort's test cases, by the configuration that drew it.
    """
    cohort = _SMALL_COHORT if is_small() else _COHORT
    return _evaluated(
        "rules", lambda: [f"baselines=[{','.join(methods)}]", "data=phantom", *cohort]
    )


def _evaluated(name: str, asked: Callable[[], Sequence[str]]) -> Path:
    folder = start() / name
    if not (folder / "report.html").is_file():
        moved = f"misregistration_mm=[{','.join(map(str, MOVED_MM))}]"
        run_command("clinfuse.evaluate", *asked(), moved, f"hydra.run.dir={folder}")
    return folder


def viewer(volumes: Sequence[Mapping[str, Any]], height: int = 400) -> Any:
    """An interactive view of NIfTI files in planes and 3-D; None without ipyniivue, which it says.

    In radiological convention. A notebook shows it where its frontend has widgets.

    Args:
        volumes: as NiiVue takes them, the lowest first: ``path``, and perhaps ``colormap``,
            ``opacity``, ``cal_min`` and ``cal_max``.
        height: in pixels.

    Raises:
        FileNotFoundError: a file that is not there.
    """
    for volume in volumes:
        if not Path(volume["path"]).is_file():
            raise FileNotFoundError(f"expected a volume to show, found none at {volume['path']}")
    try:
        from ipyniivue import NiiVue  # type: ignore[import-untyped]
    except ImportError:
        print("No interactive view: pip install 'clinfuse[notebooks]' brings ipyniivue.")
        return None
    shown = NiiVue(height=height)
    shown.set_radiological_convention(True)
    shown.load_volumes([dict(volume) for volume in volumes])
    return shown
