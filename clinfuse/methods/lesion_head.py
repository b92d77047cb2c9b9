"""The lesion head S^(F): learns to see lesions in a fused volume, then is frozen into L_ROI."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningModule
from monai.losses import DiceCELoss
from monai.transforms import RandCropByPosNegLabel
from torch import Tensor, nn

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.spacing import shared_spacing
from clinfuse.functional.surface import dice
from clinfuse.methods.base import Optim, Stage, staged_optimizer, step_generator
from clinfuse.methods.objective import reference_of
from clinfuse.networks.fusion_unet import crop, pad_to_multiple
from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.types import FusionBatch

CLEAN_SHARE = 0.25
"""Share of the training draws that are the reference as it is: what a finished F is like."""


EXPECTED_SHARE = 0.05
"""Share of a patch's voxels that are lesion, before any is seen. From one half, the first thing a
network learns is that there is none anywhere, and it takes hundreds of steps to leave that."""


class LesionHead(LightningModule):
    """Lesion probability from a fused volume.

    Trained on references, and on what the estimates x0_hat of a sampler are like: a reference
    blurred (the posterior mean that a denoiser returns while much noise is left) with noise of
    random strength on it. One draw in four is the reference itself. Frozen afterwards
    (``requires_grad_(False)``), it still passes gradients on to its input.

    A step learns from a few patches of a volume, most of them around a lesion: of a whole head a
    lesion is a thousandth, and a network that finds none is nearly right everywhere.

    Args:
        network: maps ``b 1 *dhw`` to one logit a voxel, sizes being multiples of ``multiple``. Its
            last parameter is the bias of that logit.
        optimizer: built but for its parameters.
        max_noise: largest standard deviation of the noise, in model space.
        max_blur_mm: largest standard deviation of the blur.
        patch_shape: (d, h, w) of the patches.
        patches: drawn from each volume.
        warmup_steps: of the learning rate.
        multiple: what the network's downsampling asks of every axis.
        seed: of the noise.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optim,
        max_noise: float = 0.3,
        max_blur_mm: float = 3.0,
        patch_shape: Sequence[int] = (16, 48, 48),
        patches: int = 4,
        warmup_steps: int = 50,
        multiple: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = with_safe_convolutions(network)
        *_, bias = self.network.parameters()
        nn.init.constant_(bias, math.log(EXPECTED_SHARE))
        self.optimizer, self.max_noise, self.max_blur_mm = optimizer, max_noise, max_blur_mm
        self.warmup_steps, self.multiple, self.seed = warmup_steps, multiple, seed
        self.cropped = RandCropByPosNegLabel(
            tuple(patch_shape), pos=2, neg=1, num_samples=patches, allow_smaller=True,
            image_threshold=-0.95,
        )  # fmt: skip
        self.objective = DiceCELoss(sigmoid=True, batch=True)

    is_trainable = True

    def train(self, mode: bool = True) -> "LesionHead":
        """A frozen head stays as it is evaluated, whatever it is part of."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, fused: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """Probability of lesion at every voxel."""
        return self._logits(fused).sigmoid()

    def _logits(self, fused: Tensor) -> Tensor:
        logits = self.network(pad_to_multiple(fused, self.multiple)).float()
        return crop(logits, fused.shape[2:])

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        generator = step_generator(self.global_step, self.seed)
        reference = reference_of(batch)
        fused = self._like_an_estimate(reference, batch.spacing_mm, generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        self.cropped.set_random_state(seed)
        patches = [
            torch.as_tensor(patch)
            for volume, lesion, head in zip(fused, batch.lesion, reference, strict=True)
            for patch in self.cropped(torch.cat([volume, lesion]), label=lesion, image=head)
        ]
        shown, lesion = torch.stack(patches).split(1, 1)
        loss = self.objective(self._logits(shown), lesion)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def _like_an_estimate(
        self, reference: Tensor, spacing_mm: Tensor, generator: torch.Generator
    ) -> Tensor:
        if torch.rand((), generator=generator) < CLEAN_SHARE:
            return reference
        blur_mm, strength = torch.rand(2, generator=generator).square().tolist()  # mostly little
        sigma = [self.max_blur_mm * blur_mm / size for size in shared_spacing(spacing_mm)]
        noise = torch.randn(reference.shape, generator=generator).to(reference)
        blurred = gaussian_smooth(reference, sigma)
        return (blurred + self.max_noise * strength * noise).clamp(-1, 1)

    def validation_step(self, batch: FusionBatch, batch_idx: int) -> None:
        self._log_dice("val", batch)

    def test_step(self, batch: FusionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self._log_dice("test", batch)

    def _log_dice(self, stage: str, batch: FusionBatch) -> None:
        predicted = self(reference_of(batch)) > 0.5
        score = dice(predicted, batch.lesion)
        for value in score[~score.isnan()]:
            self.log(
                f"{stage}/lesion_dice",
                value,
                batch_size=1,
                on_epoch=True,
                add_dataloader_idx=False,
            )

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        return staged_optimizer(
            self.optimizer, [Stage(list(self.network.parameters()), 0, end)], self.warmup_steps
        )
