"""A callback that sends its own process a signal after some training steps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer


class SignalAt(Callback):
    """After each of some steps, once over all sessions of the run.

    Args:
        steps: after which.
        signums: one for each.
        folder: for a file per signal that was sent.
    """

    def __init__(self, steps: Sequence[int], signums: Sequence[int], folder: str) -> None:
        self.signums, self.folder = dict(zip(steps, signums, strict=True)), Path(folder)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        sent = self.folder / f"sent_{step}"
        if step in self.signums and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), self.signums[step])
