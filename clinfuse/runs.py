"""What a training run's folder says of itself: begun, finished, or trained by another run.

A sweep that is started again asks here which of its runs are done. Runs that differ in how they
sample and in what they are tested on alone share one training.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from clinfuse.callbacks.checkpoint import PREVIOUS, linked
from clinfuse.configuration import CHECKPOINT, checkpoint_content, fingerprint
from clinfuse.data.made_once import one_at_a_time
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.run_folder import write_config

log = logging.getLogger(__name__)

STATE = "run.json"

_SAY_NOTHING = (
    *("name", "label", "group", "scale_name", "grids", "table"),
    *("tags", "resume", "trainings", "logger", "callbacks"),
)
"""Settings that change neither weights nor scores; of the callbacks some do."""

_PLACES = ("default_root_dir", "use_distributed_sampler")
"""What a Trainer is told that changes neither; a sampler is ours, on however many processes."""

_DECIDING: Mapping[str, Sequence[str]] = {"ema": ("decay",), "model_draws": ("fractions",)}
_SCORING: Mapping[str, Sequence[str]] = {"report": ("mask_source",)}
"""What decides the weights, and what decides the scores beside them, among the callbacks."""

_OF_TESTS = (
    *("misregistration_mm", "val_misregistration_mm", "misregistration_deg_per_mm"),
    *("misregistration_seed", "perturbations", "perturbed_at_mm", "num_workers", "cache_dir"),
)
"""What a DataModule is told of validation, test and speed alone."""

_OF_TRAINING = (
    *("max_epochs", "max_steps", "precision", "gradient_clip_val", "overfit_batches"),
    *("accumulate_grad_batches", "limit_train_batches", "devices", "strategy"),
)
"""What a Trainer is told that decides the weights."""


class State(NamedTuple):
    """What ``run.json`` holds.

    Attributes:
        key: of the configuration that the folder is of.
        is_finished: trained, sampled and scored.
        objective: what goes back to a sweep.
        config: as ``.hydra/config.yaml``, which Hydra overwrites before it asks.
    """

    key: str
    is_finished: bool = False
    objective: float | None = None
    config: str = ""

    def write(self, folder: Path) -> None:
        write_atomically(folder / STATE, json.dumps(self._asdict(), indent=1) + "\n")


def run_key(cfg: DictConfig) -> str:
    """Differs between configurations whose weights or scores may differ."""
    plain = _resolved(cfg)
    kept = {name: value for name, value in plain.items() if name not in _SAY_NOTHING}
    kept["trainer"] = {k: v for k, v in plain["trainer"].items() if k not in _PLACES}
    return fingerprint(kept | _of_callbacks(plain, {**_DECIDING, **_SCORING}))


def training_key(cfg: DictConfig) -> str:
    """Differs between configurations whose weights may differ.

    What a method has for sampling alone its class says: ``sampling_only``.
    """
    plain = _resolved(cfg)
    sampling = getattr(get_class(plain["method"]["_target_"]), "sampling_only", ())
    decides = {
        "method": {k: v for k, v in plain["method"].items() if k not in sampling},
        "data": {k: v for k, v in plain["data"].items() if k not in _OF_TESTS},
        "trainer": {k: v for k, v in plain["trainer"].items() if k in _OF_TRAINING},
        "seed": plain["seed"],
        "lesion_head": plain.get("lesion_head"),
    }
    return fingerprint(decides | _of_callbacks(plain, _DECIDING))


def _of_callbacks(plain: dict[str, Any], asked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    callbacks = plain.get("callbacks") or {}
    return {
        name: {setting: callbacks[name].get(setting) for setting in settings}
        for name, settings in asked.items()
        if callbacks.get(name)
    }


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def begun(folder: Path, cfg: DictConfig) -> State:
    """What a run's folder holds of this configuration; of a folder that is new, what it will.

    ``State.write`` begins it, when there is something to keep.

    Raises:
        ValueError: the folder is another configuration's, whose record is put back.
    """
    key = run_key(cfg)
    if (state := read_state(folder)) is None:
        return State(key, config=OmegaConf.to_yaml(cfg))
    if state.key != key:
        write_config(folder, state.config)
        raise ValueError(
            f"expected a folder that is new, or of the same configuration, got one of another "
            f"(remove it, or choose another folder): {folder}"
        )
    return state


def read_state(folder: Path) -> State | None:
    """What ``run.json`` says; None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return State(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a run's record, got one that cannot be read: {path}") from error


def own_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, of a run that was interrupted; None where it saved none.

    One that is damaged gives way to the one before it, which is said.

    Raises:
        ValueError: neither can be read.
    """
    path = folder / CHECKPOINT
    before = path.with_name(PREVIOUS)
    if path.is_file():
        try:
            checkpoint_content(path)
            return path
        except ValueError:
            if not before.is_file():
                raise
            damage = f"expected a readable checkpoint, got a damaged one: {path}"
    elif before.is_file():
        damage = f"expected a checkpoint at {path}, found none"
    else:
        return None
    checkpoint_content(before)
    linked(before, path)
    log.warning("%s: this run goes on from the one saved before it", damage)
    return path


@contextmanager
def shared_training(trainings: Path, key: str, folder: Path) -> Iterator[Path | None]:
    """The folder of a finished run with the same training, or None: then train, and it is shared.

    Who comes meanwhile with the same key waits; a process that dies lets the next one in. A
    checkpoint that is damaged is said, and trained anew.

    Args:
        trainings: the folder that remembers, by key, who has trained what.
        key: ``training_key``.
        folder: of the run that asks.
    """
    record = trainings / f"{key}.json"
    with one_at_a_time(trainings / f"{key}.lock"):
        trained = Path(json.loads(record.read_text())["folder"]) if record.is_file() else None
        if trained != folder.resolve() and _is_readable(trained):
            yield trained
            return
        yield None
        if (folder / CHECKPOINT).is_file():
            content = {"folder": str(folder.resolve())}
            write_atomically(record, json.dumps(content) + "\n")


def adopt_training(trained: Path, folder: Path) -> None:
    """Give a run's folder the weights, and what they cost, of another run that trained them.

    Files are linked where the disk can, so that a sweep over ten samplers keeps one training. What
    the run itself had when it was interrupted gives way to them.
    """
    own = folder / CHECKPOINT.parent
    own.mkdir(parents=True, exist_ok=True)
    (own / PREVIOUS).unlink(missing_ok=True)
    for file in sorted((trained / CHECKPOINT.parent).iterdir()):
        if file.name != PREVIOUS and not file.name.startswith("."):
            linked(file, own / file.name)
    if (trained / "cost.json").is_file():
        shutil.copyfile(trained / "cost.json", folder / "cost.json")


def _is_readable(trained: Path | None) -> bool:
    if trained is None or not (trained / CHECKPOINT).is_file():
        return False
    try:
        checkpoint_content(trained / CHECKPOINT)
    except ValueError as error:
        log.warning("%s: trained anew", error)
        return False
    return True
