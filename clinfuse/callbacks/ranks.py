"""Processes that train one model together, its ranks: who is the first, and what it does alone."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Silent(Logger):
    """Logs nothing: the logger of all ranks but the first, where callbacks ask for one."""

    name = version = "silent"

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: of all ranks, or by itself."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def gather(trainer: Trainer) -> None:
    """Start the other ranks of a trainer, where nobody else does, and wait until all are here.

    ``fit`` would do the same, but what ranks have to agree on comes before it. Once they are there
    they can wait for one another. Nothing for a trainer of one process.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size > 1 and launcher is not None:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
        trainer.strategy.barrier()


def part(trainer: Trainer) -> None:
    """End what the ranks have in common, once all are here: each goes on, or ends, by itself.

    What asks whether there are others, as metrics do, would wait for them otherwise.
    """
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        trainer.strategy.barrier()
        torch.distributed.destroy_process_group()


def starts_its_own(trainer: Trainer) -> bool:
    """Whether a trainer of several ranks has to start them: neither Slurm nor torchrun has."""
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.world_size > 1 and not environment.creates_processes_externally


def alone(devices: Any) -> dict[str, Any]:
    """What a Trainer is told that is of one process, whatever this one is a rank of.

    Args:
        devices: as the Trainer would be told otherwise; a list of one names the device.
    """
    is_named = isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices) == 1
    own = [LightningEnvironment()]  # Slurm's would ask for as many devices as it has tasks
    one: Any = list(devices) if is_named else 1
    return {"devices": one, "num_nodes": 1, "strategy": "auto", "plugins": own}
