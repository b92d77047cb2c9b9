"""Wavelet fusion whose choice between coefficients is learned: a mask for each Haar band."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.haar import haar_dwt, haar_idwt
from clinfuse.functional.intensity import leaky_clamp
from clinfuse.functional.spacing import shared_spacing
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.aims import aims_of
from clinfuse.methods.base import FusionMethod, Optim, Stage, staged_optimizer
from clinfuse.networks.fusion_unet import crop, pad_to_multiple
from clinfuse.types import FusionBatch


class TrainableWavelet(FusionMethod):
    """F = W^-1(m W(I_M) + (1 - m) W(I_C)), W the one-level Haar transform and m = network(W).

    Method.md section 7. Differentiable throughout, and lossless: masks of 1 return the MRI, masks
    of 0 the CT, for any size.

    Args:
        network: predicts the masks in [0, 1] from both sources' bands, as ``BandMasks`` does.
        loss: against the reference, taken for both sources, where a case has one; else against its
            clean registered pair.
        optimizer: built but for its parameters.
        warmup_steps: of the learning rate.
    """

    steps = 1

    def __init__(
        self, network: nn.Module, loss: SourceLoss, optimizer: Optim, warmup_steps: int = 50
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.optimizer, self.warmup_steps = optimizer, warmup_steps

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return self._blend(batch).clamp(-1, 1)

    def _blend(self, batch: FusionBatch) -> Tensor:
        mri, ct = (haar_dwt(pad_to_multiple(source, 2)) for source in (batch.mri, batch.ct))
        masks = self.network(mri, ct)
        fused = haar_idwt(masks * mri + (1 - masks) * ct)
        return leaky_clamp(crop(fused, batch.mri.shape[2:]))

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        terms = self.loss(self._blend(batch), *aims_of(batch), shared_spacing(batch.spacing_mm))
        losses = {"loss" if name == "total" else name: v for name, v in terms.means().items()}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        return staged_optimizer(
            self.optimizer, [Stage(list(self.network.parameters()), 0, end)], self.warmup_steps
        )
