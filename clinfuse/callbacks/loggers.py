"""Loggers with a run folder's habits, of which no service's failure can end a training.

``metrics.csv`` lies in the run's root, W&B needs no account, TensorBoard and MLflow no server.
"""

import contextlib
import importlib.util
import logging
import netrc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar
from urllib.parse import urlparse

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

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

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run's folder has its configuration in ``.hydra``."""


class NeverFailing(Logger):
    """A logger to a service: the first thing that fails is said in one line, and is the last.

    What is logged afterwards goes nowhere; the training does not notice. Comes before the class
    whose methods it guards.
    """

    service = ""
    failure: Exception | None = None

    def attempt(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What ``call`` returns; None where it fails, or anything has before."""
        if self.failure is None:
            try:
                return call(*args, **kwargs)
            except Exception as error:
                self.give_up(error)
        return None

    def give_up(self, error: Exception) -> None:
        self.failure = error
        log.warning("%s failed (%s): the run goes on without it", self.service, reason(error))

    @property
    def experiment(self) -> Any:
        """The service's own object; one that takes anything and does nothing, where it failed."""
        if self.failure is None:
            try:
                return super().experiment  # type: ignore[misc]
            except Exception as error:
                self.give_up(error)
        return DummyLogger().experiment

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_metrics, *args, **kwargs)  # type: ignore[safe-super]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_hyperparams, *args, **kwargs)  # type: ignore[safe-super]

    def after_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().after_save_checkpoint, *args, **kwargs)

    def save(self) -> None:
        self.attempt(super().save)

    def finalize(self, status: str = "success") -> None:
        self.attempt(super().finalize, status)


class RunWandbLogger(NeverFailing, WandbLogger):
    """W&B: where it cannot start online it starts offline, and where it fails it is left out.

    A process that trains several runs, as a sweep does, finishes each when the next one starts;
    Lightning would write them all into the first.
    """

    service = "W&B"
    _running: ClassVar["RunWandbLogger | None"] = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._wandb_init.pop("anonymous")  # Lightning passes what W&B no longer has, and warns of
        self._status = "success"

    @property
    def experiment(self) -> Any:
        if self._experiment is None and self.failure is None:
            if RunWandbLogger._running is not None:
                RunWandbLogger._running.finish()
            self.attempt(self._start)
        return super().experiment

    def _start(self) -> None:
        try:
            _ = super(NeverFailing, self).experiment
        except Exception as error:
            if self._wandb_init.get("mode") == "offline":
                raise
            self._wandb_init["mode"] = "offline"
            _ = super(NeverFailing, self).experiment
            log.warning(
                "W&B did not start (%s): this run is logged offline, %s", reason(error), self.sync()
            )
        RunWandbLogger._running = self

    def give_up(self, error: Exception) -> None:
        """Said once; the run is ended and its service let go, so that the next begins anew."""
        super().give_up(error)
        for end in (self._end, _forget_wandb):
            with contextlib.suppress(Exception):
                end()

    def sync(self) -> str:
        """How an offline run gets online."""
        return f"`wandb sync {self.save_dir}/wandb/latest-run` uploads it"

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_image, *args, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(super().log_table, *args, **kwargs)

    def finalize(self, status: str = "success") -> None:
        self._status = status
        super().finalize(status)

    def finish(self) -> None:
        """End the run; W&B does so by itself when the process ends."""
        self.attempt(self._end)
        if RunWandbLogger._running is self:
            RunWandbLogger._running = None

    def _end(self) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(self._status != "success"))


def _forget_wandb() -> None:
    import wandb
    from wandb.sdk.lib.module import unset_globals

    unset_globals()  # else wandb.run stays, and the next run would write into it
    wandb.teardown()


class RunMLFlowLogger(NeverFailing, MLFlowLogger):
    """MLflow, left out where it fails."""

    service = "MLflow"


def wandb_logger(
    save_dir: str | Path,
    name: str,
    project: str,
    tags: Sequence[str] = (),
    group: str | None = None,
    job_type: str = "train",
    start_seconds: float | int = 30,
    finish_seconds: float | int = 120,
) -> RunWandbLogger:
    """Weights & Biases: online with a key, offline without one, and then it says how to sync.

    ``WANDB_MODE``, ``WANDB_INIT_TIMEOUT`` and ``WANDB_FINISH_TIMEOUT`` decide where they are set.

    Args:
        save_dir: the run's folder.
        name: of the run.
        project: of all runs.
        tags: of the run: its method, its preset. Empty ones and repetitions are dropped.
        group: whose runs belong together: the sweep's name.
        job_type: what kind of run it is within its group.
        start_seconds: if W&B has not begun by then, the run is logged offline.
        finish_seconds: how long W&B may upload at the end; ``wandb sync`` uploads what is left.
    """
    offline = "WANDB_MODE" not in os.environ and not has_wandb_key()
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = RunWandbLogger(
        save_dir=save_dir,
        name=name,
        project=project,
        tags=[tag for tag in dict.fromkeys(map(str, tags)) if tag],
        group=group,
        job_type=job_type,
        settings=_limits(init_timeout=start_seconds, finish_timeout=finish_seconds),
        **({"mode": "offline"} if offline else {}),
    )
    if offline:
        log.info("no W&B key: logged offline, %s", logger.sync())
    return logger


def _limits(**seconds: float | int) -> dict[str, float | int]:
    """How long W&B may keep a run waiting: what the user has not set and this version knows."""
    from wandb import Settings  # a second, which who logs elsewhere need not wait

    known = {name: value for name, value in seconds.items() if name in Settings.model_fields}
    return {n: value for n, value in known.items() if f"WANDB_{n.upper()}" not in os.environ}


def has_wandb_key() -> bool:
    """Whether a W&B key is in the environment or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(netrc.netrc().authenticators(host or ""))
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def tensorboard_logger(save_dir: str | Path) -> TensorBoardLogger:
    """TensorBoard's event files under ``tensorboard/`` in the run's folder.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    _require("tensorboard", "tensorboard")
    return TensorBoardLogger(save_dir, name="", version="", sub_dir="tensorboard")


def mlflow_logger(
    save_dir: str | Path, name: str, project: str, tracking_uri: str | None = None
) -> RunMLFlowLogger:
    """MLflow's files under ``mlruns/`` in the run's folder, or at a ``tracking_uri``.

    Args:
        save_dir: the run's folder.
        name: of the run.
        project: the name of MLflow's experiment.
        tracking_uri: a database or a server that several runs share; None for the run's folder.

    Raises:
        ValueError: MLflow is not installed.
    """
    _require("mlflow", "mlflow")
    if tracking_uri is None:
        tracking_uri = (Path(save_dir) / "mlruns").resolve().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # it would rather have a database
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    return RunMLFlowLogger(experiment_name=project, run_name=name, tracking_uri=tracking_uri)


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"expected the package {package} for logger={extra}, found none: "
            f"pip install 'clinfuse[{extra}]'"
        )


def all_of(loggers: dict[str, Any] | None) -> list[Any]:
    """The loggers of a config group, in order, without those switched off."""
    return [logger for logger in (loggers or {}).values() if logger is not None]


def log_picture(
    loggers: Iterable[Logger],
    name: str,
    picture: UInt8[np.ndarray, "rows columns 3"],
    step: int,
    caption: str | None = None,
) -> None:
    """Give a picture to every logger that takes some: W&B, TensorBoard and MLflow."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step, caption=[caption])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
        elif isinstance(logger, RunMLFlowLogger):
            logger.attempt(_mlflow_image, logger, name, picture, step)


def _mlflow_image(logger: MLFlowLogger, name: str, picture: np.ndarray, step: int) -> None:
    file = f"{name}_step_{step:06d}.png"
    logger.experiment.log_image(logger.run_id, Image.fromarray(picture), file)


def reason(error: Exception) -> str:
    """An error in a few words of one line."""
    text = " ".join(str(error).split())
    return shorten(f"{type(error).__name__}: {text}", 160, placeholder=" …")
