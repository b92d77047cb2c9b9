"""Where the weights come from that a method does not draw but starts its training with."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import LightningModule

Weights = str | Path | Callable[[], Path] | None
"""A file, or what brings one when it is asked (a download), or none."""

CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""Of a run, in its folder."""


class StartsFromWeights(LightningModule):
    """A method that reads weights before its first training step, and never again.

    A run's checkpoint has them all, so neither going on with the run nor fusing with it asks for
    where they came from.
    """

    _goes_on = False

    @abstractmethod
    def start_training(self) -> None:
        """Read what the training starts from."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._goes_on = True

    def on_fit_start(self) -> None:
        if not self._goes_on:
            self.start_training()


def file_of(weights: Any) -> Path:
    """The file itself, brought if need be; it may not exist.

    Raises:
        FileNotFoundError: it could not be brought.
        ValueError: YAML has brought something else than ``Weights``.
    """
    if isinstance(weights, str | Path):
        return Path(weights)
    if not callable(weights):
        raise ValueError(f"expected weights as a file's name, got {weights!r}")
    try:
        return weights()
    except OSError as error:
        raise FileNotFoundError(
            f"expected weights to be brought, or method.weights=FILE: {error}"
        ) from error


def checkpoint_of_run(folder: str | Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        FileNotFoundError: no run, or one that has not saved a checkpoint.
    """
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"expected a trained run with {CHECKPOINT}, found none in {folder}")
    return path
