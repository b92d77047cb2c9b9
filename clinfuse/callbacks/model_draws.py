"""Keep the weights of earlier points of the training: the model draws of epistemic uncertainty."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from clinfuse.networks.pretrained import read_whole
from clinfuse.reporting.atomic import write_atomically


class ModelDraws(Callback):
    """Saves a stage's weights part of the way through it, for methods that have ``draw_stages``.

    Snapshots of one training as an ensemble (Huang et al. 2017), for a training in stages: draw i
    is what every stage had learned when it was ``fractions[i]`` done, at the epoch's end nearest to
    that. The weights are those that the run would have been left with there: averaged, if it
    averages.

    Args:
        folder: for ``draw_I_stage_J.pt``; each appears whole.
        fractions: of each stage, in (0, 1).
    """

    def __init__(self, folder: str | Path, fractions: Sequence[float] = (0.6, 0.8)) -> None:
        if not all(0 < fraction < 1 for fraction in fractions):
            raise ValueError(f"expected fractions of a stage in (0, 1), got {list(fractions)}")
        self.folder, self.fractions = Path(folder), tuple(fractions)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for draw, stage, prefixes in self._due(trainer, pl_module):
            weights = averaged_weights(trainer, pl_module)
            if not trainer.is_global_zero:
                continue
            kept = {name: w.cpu() for name, w in weights.items() if name.startswith(prefixes)}
            content = io.BytesIO()
            torch.save(kept, content)
            write_atomically(self.folder / f"draw_{draw}_stage_{stage}.pt", content.getvalue())

    def _due(self, trainer: Trainer, pl_module: Any) -> list[tuple[int, int, tuple[str, ...]]]:
        """Draw, stage and names of the weights whose time is this epoch's end."""
        per_epoch = max(int(trainer.num_training_batches) // trainer.accumulate_grad_batches, 1)
        due = []
        for stage, (start, end, prefixes) in enumerate(getattr(pl_module, "draw_stages", ())):
            for draw, fraction in enumerate(self.fractions):
                epoch = max(round((start + fraction * (end - start)) / per_epoch), 1)
                if end > start and epoch == trainer.current_epoch + 1:
                    due.append((draw, stage, prefixes))
        return due


def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
    """What a checkpoint saved now would hold: the averaged weights, if the run averages."""
    checkpoint: dict[str, Any] = {"state_dict": pl_module.state_dict()}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_save_checkpoint(trainer, pl_module, checkpoint)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return weights


def read_draws(folder: str | Path) -> list[dict[str, Tensor]]:
    """The weights of each model draw in a folder, its stages joined; none where none were kept.

    Raises:
        ValueError: a file that cannot be read.
    """
    draws: dict[str, dict[str, Tensor]] = {}
    for path in sorted(Path(folder).glob("draw_*_stage_*.pt")):
        try:
            weights = read_whole(path)
        except Exception as error:
            raise ValueError(
                f"expected readable weights, got {type(error).__name__}: {path}"
            ) from error
        draws.setdefault(path.stem.split("_stage_")[0], {}).update(weights)
    return list(draws.values())
