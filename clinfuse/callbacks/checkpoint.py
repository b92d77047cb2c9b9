"""Checkpoints that are whole, that know where they are in an epoch, and that have one before."""

import io
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from clinfuse.callbacks.interruption import Interruptions
from clinfuse.reporting.atomic import write_atomically

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class RunCheckpoint(Interruptions, Checkpoint):
    """Saves ``last.ckpt`` so that a run which goes on from it ends as if it had never stopped.

    At the end of each epoch, before each validation, on the way through a long epoch, and when a
    signal asks the run to end. What was the last checkpoint becomes ``previous.ckpt``. Beside what
    Lightning saves it has the states of all global generators, how far the epoch is, and the
    metrics measured so far.

    Args:
        folder: of the checkpoints.
        minutes: at most so long without saving; None for as long as an epoch takes.
        every_n_steps: saves at these steps too; None for none.
    """

    def __init__(
        self,
        folder: str | Path,
        minutes: float | int | None = 10,
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        if minutes is not None and minutes < 0:
            raise ValueError(f"expected minutes of at least 0 or null, got {minutes}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"expected every_n_steps of at least 1 or null, got {every_n_steps}")
        self.folder, self.minutes, self.every_n_steps = Path(folder), minutes, every_n_steps
        self.metrics: dict[str, float] = {}
        self._goes_on: dict[str, Any] | None = None
        self._random: dict[str, Any] = {}
        self._batches, self._saved_at = 0, time.monotonic()
        self._logs_wait = self._ends = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            for half_written in self.folder.glob(".*.tmp"):
                half_written.unlink(missing_ok=True)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # ours is
        self._goes_on = checkpoint.get("clinfuse", {})
        self.metrics = dict(self._goes_on.get("metrics", {}))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["clinfuse"] = {
            "batches": self._batches,
            "random": self._random,
            "metrics": self.metrics,
        }
        if trainer.validating:  # Lightning goes back to a validation that had a batch begun
            begun = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            begun["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the loader and the generators where they were when the checkpoint was saved."""
        super().on_train_start(trainer, pl_module)
        self._saved_at = time.monotonic()
        if self._goes_on is None:
            return
        batches, states = self._goes_on.get("batches", 0), self._goes_on.get("random")
        epochs: Any = trainer.fit_loop.epoch_progress.current
        for sampler in _samplers(trainer):
            sampler.begin_at(epochs.processed, batches)
        fetcher: Any = trainer.fit_loop._data_fetcher
        if batches:  # the epoch's loader drew its number before the checkpoint, as this one has now
            iter(fetcher)
            pl_module.on_train_epoch_start()  # Lightning leaves it out within an epoch
        if states is not None:
            set_random_states(states)
        if not batches:
            iter(fetcher)
        self._goes_on = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What the step before has logged is in its logger by now, and is written."""
        if self._logs_wait:
            self._logs_wait = False
            for logger in trainer.loggers:
                logger.save()
        if self._ends:
            self.end_if_asked(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if trainer.is_last_batch:  # the epoch's end saves, or the validation before it
            self._batches, self._random = done, random_states()
        elif done % trainer.accumulate_grad_batches == 0:
            self._ends = self._is_asked(trainer)
            if self._ends or self._is_due(trainer):
                self._batches, self._random = done, random_states()
                self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.is_last_batch:
            self._save(trainer)
            self.end_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches, self._random = 0, random_states()
        self._save(trainer)
        if self._is_asked(trainer):
            self.end_if_asked(trainer)

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether a signal has come to this process or, in training on several, to any."""
        asked: bool = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        if asked and self.received is None:
            self.received = int(signal.SIGTERM)
        return asked

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        if self.minutes is None:
            return False
        is_late = time.monotonic() - self._saved_at >= 60 * self.minutes
        return bool(trainer.strategy.broadcast(is_late))

    def _save(self, trainer: Trainer) -> None:
        path = self.folder / LAST
        if trainer.is_global_zero and path.is_file():
            linked(path, path.with_name(PREVIOUS))
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at, self._logs_wait = time.monotonic(), True


class WholeFiles(TorchCheckpointIO):
    """Lightning's own, but that a file appears whole, on the disk, where it belongs."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_atomically(path, content.getvalue())


def linked(file: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the disk has no links; what was there goes."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        os.link(file, scratch)
    except OSError:
        shutil.copyfile(file, scratch)
    scratch.replace(target)
    scratch.unlink(missing_ok=True)  # of a link onto itself nothing is renamed


def random_states() -> dict[str, Any]:
    """The states of the generators that a whole process shares, in plain data and tensors."""
    of_numpy: Any = np.random.get_state()
    _, keys, *rest = of_numpy
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators where ``random_states`` found them."""
    keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def _samplers(trainer: Trainer) -> Iterator[Any]:
    """The samplers of the training that can begin within an epoch."""
    loaders = trainer.train_dataloader
    for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
        if hasattr(sampler := getattr(loader, "sampler", None), "begin_at"):
            yield sampler
