"""Sample with guidance in validation: ROI metrics to every logger, and a picture of one case."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from clinfuse.callbacks.loggers import log_picture
from clinfuse.callbacks.overlays import Overlays, log_overlays, of_pair, of_view
from clinfuse.callbacks.recorder import case_view, pair_pictures, summary_of
from clinfuse.metrics.regional import CaseMean, RegionalPSNR, RegionalSSIM
from clinfuse.reporting.figures import case_figure, figure_png, pictures_figure
from clinfuse.types import FusionBatch, SliceBatch


class GuidedValidation(Callback):
    """Scores the predictive mean that ``validation_step`` samples, guidance and all.

    Logs ``val/brain_ssim``, ``val/bone_psnr``, ``val/bone_ssim`` and ``val/whole_ssim``, each over
    the cases that define it, and draws the first case of each validation: a volume in three planes,
    a 2-D pair as its two sources and the fused picture. W&B gets a slice with the regions over it
    as well.

    Args:
        folder: where the pictures go.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.metrics: dict[str, CaseMean] = {
            "brain_ssim": RegionalSSIM(),
            "bone_psnr": RegionalPSNR(),
            "bone_ssim": RegionalSSIM(),
            "whole_ssim": RegionalSSIM(),
        }

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for metric in self.metrics.values():
            metric.reset()
            metric.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: FusionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:  # no fusion: the lesion head
            return
        summary = summary_of(outputs)
        fused, spread = summary.mean, summary.std
        if not fused.isfinite().all():  # a NaN would pass for an undefined score
            raise ValueError(
                f"expected a finite fused volume, got NaN or inf in {batch.case_id[0]}"
            )
        mri, ct, roi = batch.truth()
        brain, bone = roi[:, 0:1], roi[:, 1:2]
        spacing_mm = batch.spacing_mm
        self.metrics["brain_ssim"].update(fused, mri, brain, spacing_mm)
        self.metrics["bone_psnr"].update(fused, ct, bone)
        self.metrics["bone_ssim"].update(fused, ct, bone, spacing_mm)
        if batch.reference is not None:
            whole = brain.new_ones(brain.shape)
            self.metrics["whole_ssim"].update(fused, batch.reference, whole, spacing_mm)
        if batch_idx == 0 and trainer.is_global_zero and not trainer.sanity_checking:
            self._draw(trainer, batch, fused, spread)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        defined = {name: m for name, m in self.metrics.items() if int(m.count)}
        scores = {f"val/{name}": m.compute() for name, m in defined.items()}
        pl_module.log_dict(scores, sync_dist=True)

    def _draw(
        self, trainer: Trainer, batch: FusionBatch, fused: Tensor, spread: Tensor | None
    ) -> None:
        caption = f"validation at step {trainer.global_step}"
        png = figure_png(_figure(batch, fused, spread, caption))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"validation_step_{trainer.global_step:06d}.png"
        path.write_bytes(png)
        picture = np.asarray(Image.open(path).convert("RGB"))
        log_picture(trainer.loggers, "validation", picture, trainer.global_step, caption)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                shown = {batch.case_id[0]: _overlays(batch, fused)}
                log_overlays(logger, "validation_regions", shown, trainer.global_step)


def _figure(batch: FusionBatch, fused: Tensor, spread: Tensor | None, caption: str) -> Figure:
    """The first case of a batch."""
    if not isinstance(batch, SliceBatch):
        return case_figure(case_view(batch, 0, fused, spread, caption))
    name = f"{batch.case_id[0]}, {caption}"
    return pictures_figure([pair_pictures(batch, 0, fused, name)])


def _overlays(batch: FusionBatch, fused: Tensor) -> Overlays:
    """The first case of a batch."""
    if isinstance(batch, SliceBatch):
        return of_pair(batch, 0, fused)
    return of_view(case_view(batch, 0, fused, None, ""))
