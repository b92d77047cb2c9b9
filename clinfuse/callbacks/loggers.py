"""Loggers with a run folder's habits: metrics.csv in its root, and W&B that needs no account."""

import logging
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, WandbLogger

log = logging.getLogger(__name__)


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger writing ``metrics.csv`` straight into the run's folder.

    A resumed run keeps the rows written before: they are set aside under ``metrics_1.csv``,
    ``metrics_2.csv`` and so on, since Lightning deletes what it finds.
    """

    def __init__(self, save_dir: str | Path) -> None:
        folder = Path(save_dir)
        earlier = folder / "metrics.csv"
        if earlier.exists():
            taken = len(list(folder.glob("metrics_*.csv")))
            earlier.rename(folder / f"metrics_{taken + 1}.csv")
        super().__init__(save_dir=folder, name="", version="")


def wandb_logger(
    save_dir: str | Path, name: str, project: str, tags: Sequence[str] = ()
) -> WandbLogger:
    """Weights & Biases: online with a key, offline without one, and then it says how to sync.

    ``WANDB_MODE`` decides where it is set.
    """
    offline = "WANDB_MODE" not in os.environ and not has_wandb_key()
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = WandbLogger(
        save_dir=save_dir, name=name, project=project, tags=list(tags), offline=offline
    )
    logger._wandb_init.pop("anonymous")  # Lightning passes what W&B no longer has, and warns of
    if offline:
        log.info(
            "no W&B key: logged offline, `wandb sync %s/wandb/latest-run` uploads it",
            save_dir,
        )
    return logger


def has_wandb_key() -> bool:
    """Whether a W&B key is in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().authenticators("api.wandb.ai"))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def all_of(loggers: dict[str, Any] | None) -> list[Any]:
    """The loggers of a config group, in order, without those switched off."""
    return [logger for logger in (loggers or {}).values() if logger is not None]
