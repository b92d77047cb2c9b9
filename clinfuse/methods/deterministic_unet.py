"""The same U-Net regressing F directly: says what diffusion itself buys."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.intensity import leaky_clamp
from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.losses.reference import ReferenceLoss
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods.base import FusionMethod, Optim, Stage, staged_optimizer
from clinfuse.methods.objective import (
    clean_pair_of,
    clean_roi_loss,
    reference_of,
)
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.types import FusionBatch


class DeterministicUNet(FusionMethod):
    """F = network(c), trained against the reference and on L_ROI against the clean registered pair.

    F is kept near model space as the anchor's mean is: air is -1 to the last digit in the metric,
    which a U-Net that may not overshoot reaches late.

    Args:
        network: builds the U-Net that returns F from no state, given its channels of state and
            output; the one that ``RoiDiffusion`` denoises with, in the same space.
        loss: L_ROI of Eq. 2.
        roi_weight: lambda_roi of Eq. 3.
        reference_loss: against the reference, over the whole volume.
        kept_weight: of what F loses of the clean sources (``SourceFidelity``).
        information: weight of VIF beside Qabf in that.
        optimizer: built but for its parameters.
        warmup_steps: of the learning rate.
        lesion_head: frozen network from F to lesion probability; None turns gamma off.
    """

    steps = 1
    needs_reference = True

    def __init__(
        self,
        network: Callable[..., FusionUNet],
        loss: ClinicalRoiLoss,
        roi_weight: float,
        reference_loss: ReferenceLoss,
        optimizer: Optim,
        warmup_steps: int = 50,
        lesion_head: nn.Module | None = None,
        kept_weight: float = 0.0,
        information: float = 0.3,
    ) -> None:
        super().__init__()
        self.kept_weight, self.kept_loss = kept_weight, SourceFidelity(1.0, information)
        self.network = network(state_channels=0, out_channels=1)
        self.loss, self.lesion_head = loss, lesion_head
        self.roi_weight, self.reference_loss = roi_weight, reference_loss
        self.optimizer, self.warmup_steps = optimizer, warmup_steps

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return self._regress(batch).clamp(-1, 1)

    def _regress(self, batch: FusionBatch) -> Tensor:
        condition = self.network.encode(batch.mri, batch.ct, batch.roi.to(batch.ct.dtype))
        return leaky_clamp(self.network(None, condition).float())

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        fused = self._regress(batch)
        error = self.reference_loss(fused, reference_of(batch), batch.spacing_mm).mean()
        roi = clean_roi_loss(self.loss, fused, batch, self.lesion_head).mean()
        total = error + self.roi_weight * roi
        losses = {"reference": error, "roi": roi}
        if self.kept_weight:
            losses["kept"] = self.kept_loss(fused, *clean_pair_of(batch)[:2]).mean()
            total = total + self.kept_weight * losses["kept"]
        losses["loss"] = total
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return total

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        return staged_optimizer(
            self.optimizer, [Stage(list(self.network.parameters()), 0, end)], self.warmup_steps
        )
