"""Masks by TotalSegmentator, run as a program of its own: it brings its own PyTorch.

Wasserthal et al. (2023) for CT, D'Antonoli et al. (2025) for MRI. The program's environment, its
weights and its device are the user's; here it is called, waited for and checked.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
import torch

from clinfuse.functional.intensity import looks_like_hu
from clinfuse.preparation.masks import Classical, MaskProvider, Masks, lesion_of, placed

log = logging.getLogger(__name__)

Task = Literal["total", "total_mr"]

MODELS: Mapping[tuple[Task, bool], tuple[str, ...]] = {
    ("total", False): ("Dataset294", "Dataset298"),
    ("total", True): ("Dataset297", "Dataset298"),
    ("total_mr", False): ("Dataset851", "Dataset852"),
    ("total_mr", True): ("Dataset852",),
}
"""By task and whether it is fast: the model that knows brain and skull, and the coarse one that the
tool looks for them with. What a folder of weights has to have."""

LABELS = {"brain": "brain", "bone": "skull"}
"""What the tool calls our masks."""

VERSION_TIMEOUT_S = 300.0
"""It imports PyTorch before it says its version."""

_THROUGH_ITS_API = """
import json, sys
from totalsegmentator.python_api import totalsegmentator

if __name__ == "__main__":
    totalsegmentator(**json.loads(sys.argv[1]))
"""


@dataclass(frozen=True)
class TotalSegmentator:
    """Brain and bone by the real tool; a lesion only from its file.

    Nothing is sent: the tool counts its users over the network unless its configuration says not
    to, so it is given a configuration of its own that says so. Where ``weights`` is None and the
    tool has none, it downloads them.

    Attributes:
        program: the tool, as ``OTHER_ENVIRONMENT/bin/TotalSegmentator``. None takes its Python
            package where this environment has it, else ``TotalSegmentator`` of the PATH.
        weights: folder of its models (``TOTALSEG_WEIGHTS_PATH``); None where the tool keeps them.
        brain_from: the image that the brain is found in: "ct" by task ``total``, or "mri" by
            ``total_mr``. Bone is always of the CT.
        fast: models of 3 mm instead of 1.5 mm.
        device: "cpu", "gpu" or "gpu:N"; without a GPU the tool falls back to the CPU.
        timeout_s: for one task; then it is stopped, with all that it started.

    Raises:
        ValueError: a device or source that there is not, or no time.
    """

    program: Path | str | None = None
    weights: Path | str | None = None
    brain_from: str = "ct"
    fast: bool = False
    device: str = "gpu"
    timeout_s: float | int = 3600

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|mps|gpu(:\d+)?", self.device):
            raise ValueError(f"expected device cpu, gpu or gpu:N, got {self.device!r}")
        if self.brain_from not in ("ct", "mri"):
            raise ValueError(f"expected brain_from=ct or brain_from=mri, got {self.brain_from!r}")
        if self.timeout_s <= 0:
            raise ValueError(f"expected a time limit above 0 s, got {self.timeout_s}")

    def __call__(self, mri: sitk.Image, ct: sitk.Image, files: Mapping[str, Path]) -> Masks:
        """The masks of one registered pair.

        Raises:
            FileNotFoundError: the program, its weights, one of its outputs or the lesion's file
                is not there.
            ValueError: CT is not in HU; the tool fails, takes too long, finds no voxel or answers
                on another grid; the lesion mask cannot be used.
        """
        if not looks_like_hu(torch.from_numpy(sitk.GetArrayFromImage(ct).astype(np.float32))):
            raise ValueError(
                "expected CT in HU for TotalSegmentator, got an 8-bit window: masks=classical "
                "can segment it"
            )
        lesion, drawn = lesion_of(files, ct)
        if self.brain_from == "ct":
            found = self._segmented("total", ct, ("brain", "bone"))
        else:
            found = self._segmented("total", ct, ("bone",))
            found |= self._segmented("total_mr", mri, ("brain",))
        made = {
            "brain": self._made("total" if self.brain_from == "ct" else "total_mr", "brain"),
            "bone": self._made("total", "bone"),
        }
        return Masks(found["brain"], found["bone"], lesion, {**made, **drawn})

    @cached_property
    def version(self) -> str:
        """What the tool says it is; "unknown" where it does not say."""
        if self._command is None:
            return version("TotalSegmentator")
        with tempfile.TemporaryDirectory(prefix="clinfuse_") as scratch:
            code, said, _ = self._run([*self._command, "--version"], scratch, VERSION_TIMEOUT_S)
        numbers = re.findall(r"\d+(?:\.\d+)+\S*", said)
        return numbers[-1] if code == 0 and numbers else "unknown"

    @cached_property
    def _command(self) -> list[str] | None:
        """How to call the program; None for the package of this environment."""
        if self.program is not None:
            found = shutil.which(Path(self.program).expanduser())
            if found is None:
                raise FileNotFoundError(
                    f"expected the program TotalSegmentator, found none that runs: {self.program}"
                )
            return [str(Path(found).absolute())]
        if find_spec("totalsegmentator") is not None:
            return None
        on_path = shutil.which("TotalSegmentator")
        if on_path is None:
            raise FileNotFoundError(
                "expected TotalSegmentator in this environment or on the PATH, found none: "
                "masks.program=OTHER_ENVIRONMENT/bin/TotalSegmentator names it"
            )
        return [on_path]

    def _segmented(
        self, task: Task, image: sitk.Image, names: Sequence[str]
    ) -> dict[str, sitk.Image]:
        models = self._models(task)
        log.info("TotalSegmentator %s, task %s %s", self.version, task, " ".join(models))
        with tempfile.TemporaryDirectory(prefix="clinfuse_") as scratch:
            given, answer = Path(scratch) / "image.nii.gz", Path(scratch) / "masks"
            sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), given)
            code, _, complaint = self._run(
                self._arguments(task, given, answer, [LABELS[name] for name in names]),
                scratch, self.timeout_s,
            )  # fmt: skip
            if code != 0:
                raise ValueError(
                    f"expected TotalSegmentator to finish task {task}, got exit status {code} "
                    f"({complaint}): {self._name}"
                )
            return {name: self._read(name, task, answer, image, complaint) for name in names}

    def _arguments(self, task: Task, given: Path, answer: Path, labels: Sequence[str]) -> list[str]:
        if self._command is None:
            asked = {
                "input": str(given), "output": str(answer), "task": task,
                "roi_subset": list(labels), "fast": self.fast, "device": self.device,
            }  # fmt: skip
            return [sys.executable, "-c", _THROUGH_ITS_API, json.dumps(asked)]
        arguments = ["-i", str(given), "-o", str(answer), "--task", task, "--roi_subset", *labels]
        return [
            *self._command, *arguments, "--device", self.device, *(["--fast"] * self.fast)
        ]  # fmt: skip

    def _models(self, task: Task) -> list[str]:
        """Names of the models that are to be used, of the folder that the user gave."""
        if self.weights is None:
            return []
        folder = Path(self.weights).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"expected a folder of weights, found none: {folder}")
        models = []
        for dataset in MODELS[task, self.fast]:
            there = sorted(path.name for path in folder.glob(f"{dataset}_*") if path.is_dir())
            if not there:
                raise FileNotFoundError(
                    f"expected the model {dataset}_* for TotalSegmentator's task {task}"
                    f"{' (fast)' * self.fast}, found none: {folder}"
                )
            models += there
        return models

    def _run(
        self, arguments: Sequence[str], scratch: str, timeout_s: float | int
    ) -> tuple[int, str, str]:
        """Exit status, what was said, and the last line of what was complained of."""
        said, complained = Path(scratch) / "stdout", Path(scratch) / "stderr"
        with said.open("wb") as stdout, complained.open("wb") as stderr:
            try:
                process = subprocess.Popen(
                    arguments, stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                    cwd=scratch, env=self._environment(Path(scratch)), start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise ValueError(
                    f"expected TotalSegmentator to start, got {error.strerror}: {self._name}"
                ) from error
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise ValueError(
                    f"expected TotalSegmentator to finish within {timeout_s:g} s, "
                    f"it did not and was stopped: {self._name}"
                ) from error
            finally:
                _stop(process)
        lines = complained.read_text(errors="replace").strip().splitlines()
        complaint = lines[-1].strip() if lines else "no message"
        return code, said.read_text(errors="replace"), complaint

    def _environment(self, scratch: Path) -> dict[str, str]:
        """Ours, with the weights and a configuration that keeps the tool from the network."""
        home = scratch / "home"
        home.mkdir(exist_ok=True)
        quiet = {
            "totalseg_id": "totalseg_clinfuse",
            "send_usage_stats": False,
            "prediction_counter": 0,
            "statistics_disclaimer_shown": True,
        }
        (home / "config.json").write_text(json.dumps(quiet))
        environment = {**os.environ, "TOTALSEG_HOME_DIR": str(home)}
        environment["TOTALSEG_WEIGHTS_PATH"] = str(
            _its_own_weights()
            if self.weights is None
            else Path(self.weights).expanduser().absolute()
        )
        if self._command is not None:  # another environment's Python must not import from ours
            for name in ("PYTHONPATH", "PYTHONHOME"):
                environment.pop(name, None)
        return environment

    def _read(
        self, name: str, task: Task, answer: Path, grid: sitk.Image, complaint: str
    ) -> sitk.Image:
        label = LABELS[name]
        path = answer / f"{label}.nii.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {path.name} of TotalSegmentator's task {task}, found none "
                f"({complaint}): {self._name}"
            )
        try:
            image = sitk.ReadImage(path)
        except RuntimeError as error:
            raise ValueError(
                f"expected a mask of TotalSegmentator's task {task}, got a file that is no image "
                f"({path.name}): {self._name}"
            ) from error
        mask = placed(image, grid, f"{label} of TotalSegmentator's task {task}", Path(self._name))
        if not sitk.GetArrayViewFromImage(mask).any():
            raise ValueError(
                f"expected to find {name} in the {'MRI' if task == 'total_mr' else 'CT'}, "
                f"TotalSegmentator's task {task} found no voxel: {self._name}"
            )
        return mask

    def _made(self, task: Task, name: str) -> dict[str, Any]:
        return {
            "tool": "TotalSegmentator",
            "version": self.version,
            "task": task,
            "parameters": {
                "label": LABELS[name],
                "fast": self.fast,
                "device": self.device,
                "models": self._models(task),
            },
        }

    @property
    def _name(self) -> str:
        return "totalsegmentator" if self._command is None else self._command[0]


def totalsegmentator_or_classical(**options: Any) -> MaskProvider:
    """TotalSegmentator where it is to be found, with these options; else classical masks.

    Raises:
        FileNotFoundError: a program was named, and is not there.
    """
    provider = TotalSegmentator(**options)
    try:
        log.info("brain and bone are by TotalSegmentator %s", provider.version)
        return provider
    except FileNotFoundError as error:
        if provider.program is not None:
            raise
        log.warning(
            "%s; until then brain and bone are by thresholds and morphology of the CT "
            "(masks=classical)",
            error,
        )
        return Classical()


def _its_own_weights() -> Path:
    """Where the tool keeps its models when nobody says where."""
    if "TOTALSEG_WEIGHTS_PATH" in os.environ:
        return Path(os.environ["TOTALSEG_WEIGHTS_PATH"])
    home = Path(os.environ.get("TOTALSEG_HOME_DIR", Path.home() / ".totalsegmentator"))
    return home / "nnunet" / "results"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the program, should it still run, and whatever it has started and left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
