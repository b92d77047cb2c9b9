"""How far a training is and how long it will take, in steps rather than epochs."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class TrainingProgress(RichProgressBar):
    """Lightning's rich progress bar, headed by the training step and the time left until the last.

    An epoch is a number of draws here and means little; its own count is what the bar shows.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._steps = trainer.estimated_stepping_batches

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.progress is not None and self.train_progress_bar_id is not None:
            done = trainer.global_step - self._first_step
            seconds_per_step = (time.monotonic() - self._started) / max(done, 1)
            text = headline(trainer.global_step, self._steps, seconds_per_step)
            self.progress.update(self.train_progress_bar_id, description=text)


def headline(step: int, steps: int | float, seconds_per_step: float) -> str:
    """``Step 450/2400, 12 min left``; of a training without an end, the step alone."""
    if steps == float("inf"):
        return f"Step {step}"
    minutes = (steps - step) * seconds_per_step / 60
    left = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"
    return f"Step {step}/{steps:.0f}, {left if minutes >= 1 else 'under a minute'} left"
