"""From a teacher's run to its student's: ``method=distill teacher=RUN``."""

import io
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from clinfuse.configuration import draws_of, run_config, trained_method
from clinfuse.data.splits import read_splits_file
from clinfuse.reporting.atomic import write_atomically

TEACHER = "clinfuse.methods.roi_diffusion.RoiDiffusion"
STUDENT = "clinfuse.methods.distilled.DistilledFusion"

_OF_STUDENT = (
    *("method", "method_name", "name", "label", "group", "scale_name", "grids", "table"),
    *("teacher", "optimizer", "trainer", "callbacks", "logger", "seed"),
    *("resume", "trainings", "interval_level", "test", "validate", "objective_metric"),
)
"""What a student does not take from its teacher's run."""

_ON_TOP = ("data", "phantoms", "guidance", "lesion_head", "cache_dir")
"""Settings of the teacher's run that the command line may change."""


def is_student(cfg: DictConfig) -> bool:
    """Whether a configuration asks for a student."""
    return bool(cfg.method.get("_target_") == STUDENT)


def taught(cfg: DictConfig) -> DictConfig:
    """A student's configuration: its teacher's run with another method.

    The teacher's method stands in it as it was configured, so that the student's folder is all
    that is needed later. Single settings of data, guidance and phantoms, and the preset, are
    changed where the command line says so.

    Raises:
        FileNotFoundError: the teacher's folder is no run's.
        ValueError: another method than distill was asked for, a teacher that is no clinfuse, or
            data and guidance of another kind.
    """
    if not is_student(cfg) or cfg.teacher is None:
        got = f"method={cfg.method_name}" + (" alone" if cfg.teacher is None else "")
        raise ValueError(f"expected method=distill with teacher=RUN, got {got}")
    saved = run_config(cfg.teacher)
    if saved.method.get("_target_") != TEACHER:
        raise ValueError(
            f"expected a run of method=clinfuse as teacher, got one of method={saved.method_name}: "
            f"{cfg.teacher}"
        )
    asked = [o.lstrip("+") for o in HydraConfig.get().overrides.task if "=" in o]
    groups = [o for o in asked if o.split("=")[0] in _ON_TOP[:3]]
    if groups:
        raise ValueError(
            f"a student has the data and guidance of its teacher, got {', '.join(groups)}: single "
            f"settings can be changed, as data.misregistration_mm=[0,2] or guidance.eta=0.1"
        )
    changes: Any = OmegaConf.from_dotlist(
        [o for o in asked if o.split(".")[0].split("=")[0] in _ON_TOP]
    )
    if any(o.startswith("preset=") for o in asked):
        weights = {name: cfg.guidance[name] for name in ("alpha", "beta", "gamma")}
        changes = OmegaConf.merge({"preset": cfg.preset, "guidance": weights}, changes)
    student = OmegaConf.merge(saved, changes)
    assert isinstance(student, DictConfig)
    teacher = OmegaConf.to_container(student.method, resolve=True)
    for name in _OF_STUDENT:
        if name in cfg:
            student[name] = cfg[name]
    student.teacher = str(Path(cfg.teacher).resolve())
    student.method.teacher = teacher
    return student


def check_patients(teacher: str | Path, data: Any) -> None:
    """Refuse to validate or test a student on patients that its teacher was trained on.

    Raises:
        ValueError: naming some of them.
    """
    path = Path(teacher) / "splits.json"
    if not path.is_file():
        return
    seen, own = set(read_splits_file(path)["train"]), data.splits
    if leaked := sorted(seen & {*own["val"], *own["test"]}):
        raise ValueError(
            f"expected validation and test patients that the teacher was not trained on, got "
            f"{len(leaked)} that it was, as {', '.join(leaked[:3])}: {path}"
        )


def learn_from(teacher: str | Path, student: Any, folder: Path) -> None:
    """Give a student its teacher's weights, and its folder the teacher's model draws."""
    student.learn_from(trained_method(teacher))
    for number, draw in enumerate(draws_of(teacher)):
        content = io.BytesIO()
        torch.save(draw, content)
        write_atomically(folder / "checkpoints" / f"draw_{number}_stage_0.pt", content.getvalue())
