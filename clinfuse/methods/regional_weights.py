"""The weighted mean with a weight of its own, fitted, for brain, bone, lesion and elsewhere."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.spacing import shared_spacing
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.aims import aims_of
from clinfuse.methods.base import FusionMethod, Optim, Stage, staged_optimizer
from clinfuse.types import ROI_NAMES, FusionBatch

REGIONS = (*ROI_NAMES, "elsewhere")
"""Order of the weights. A voxel belongs to its lesion, else to bone, else to brain."""


class RegionalWeights(FusionMethod):
    """F = w_r I_M + (1 - w_r) I_C, with one weight w_r in [0, 1] for each region r.

    The weights are fitted by gradient on the *training* patients, from 0.5, like those of any
    network: four numbers do not overfit them, draws are moved as the evaluation moves its cases,
    and the validation patients stay unseen for what is chosen and calibrated on them. No test
    patient is looked at. ``data.train_on=val`` optimises them on validation patients instead. A
    region that no case has (a lesion in slices without masks) keeps 0.5.

    Args:
        loss: against the reference, taken for both sources, where a case has one; else against its
            clean registered pair.
        optimizer: built but for its parameters.
        warmup_steps: of the learning rate.
    """

    def __init__(self, loss: SourceLoss, optimizer: Optim, warmup_steps: int = 10) -> None:
        super().__init__()
        self.loss, self.optimizer, self.warmup_steps = loss, optimizer, warmup_steps
        self.logits = nn.Parameter(torch.zeros(len(REGIONS)))

    @property
    def mri_weights(self) -> dict[str, float]:
        """The MRI's share in each region."""
        return dict(zip(REGIONS, self.logits.detach().sigmoid().tolist(), strict=True))

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        weights = self.logits.sigmoid().reshape(-1, *[1] * (batch.mri.ndim - 2))
        weight = (weights * regions_of(batch.roi)).sum(1, keepdim=True)
        return weight * batch.mri + (1 - weight) * batch.ct

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        terms = self.loss(self.fuse(batch), *aims_of(batch), shared_spacing(batch.spacing_mm))
        losses = {"loss" if name == "total" else name: v for name, v in terms.means().items()}
        weights = {f"{region}_weight": value for region, value in self.mri_weights.items()}
        logged = {name: value.detach() for name, value in losses.items()} | weights
        self.log_dict(
            {f"train/{n}": v for n, v in logged.items()}, batch_size=len(batch), sync_dist=True
        )
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        return staged_optimizer(self.optimizer, [Stage([self.logits], 0, end)], self.warmup_steps)


def regions_of(roi: Bool[Tensor, "b r *dhw"]) -> Bool[Tensor, "b q *dhw"]:
    """Masks in the order of ``REGIONS``, exactly one of which holds at every voxel."""
    brain, bone, lesion = roi.split(1, 1)
    bone = bone & ~lesion
    brain = brain & ~bone & ~lesion
    return torch.cat((brain, bone, lesion, ~(brain | bone | lesion)), 1)
