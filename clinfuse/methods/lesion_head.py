"""The lesion head S^(F): learns to see lesions in a fused volume, then is frozen into L_ROI."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning import LightningModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.spacing import shared_spacing
from clinfuse.functional.surface import dice
from clinfuse.methods.base import (
    Optim,
    Stage,
    case_places,
    staged_optimizer,
    step_generator,
)
from clinfuse.methods.objective import lesion_probability, reference_of
from clinfuse.networks.scale_space import ScaleSpaceNetwork
from clinfuse.types import FusionBatch

CLEAN_SHARE = 0.25
"""Share of the training draws that are the reference as it is: what a finished F is like."""


class LesionHead(LightningModule):
    """Lesion probability from a fused volume, within the brain.

    Trained on references, and on what the estimates x0_hat of a sampler are like: a reference
    blurred (the posterior mean that a denoiser returns while much noise is left) with noise of
    random strength on it. One draw in four is the reference itself. Frozen afterwards
    (``requires_grad_(False)``), it still passes gradients on to its input.

    A step learns from voxels of many heads at once: the volume that a step is given is described,
    some of its voxels replace the oldest in a pool, and the step draws from the pool. Steps on one
    head each, whose lesion may be one voxel or three thousand, unlearn what the last one taught.

    Args:
        network: describes voxels, and reads descriptions.
        optimizer: built but for its parameters.
        max_noise: largest standard deviation of the noise, in model space.
        max_blur_mm: largest standard deviation of the blur.
        lesion_voxels: drawn from each volume's lesion, or all of it.
        brain_voxels: drawn from each volume's brain.
        pool: volumes whose voxels are learned from at a time.
        voxels: of the pool that a step learns from.
        warmup_steps: of the learning rate.
        seed: of the noise, and of what is drawn.
    """

    is_trainable = True

    def __init__(
        self,
        network: ScaleSpaceNetwork,
        optimizer: Optim,
        max_noise: float = 0.3,
        max_blur_mm: float = 3.0,
        lesion_voxels: int = 600,
        brain_voxels: int = 2400,
        pool: int = 160,
        voxels: int = 4096,
        warmup_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer
        self.max_noise, self.max_blur_mm = max_noise, max_blur_mm
        self.lesion_voxels, self.brain_voxels = lesion_voxels, brain_voxels
        self.pool, self.voxels = pool, voxels
        self.warmup_steps, self.seed = warmup_steps, seed
        self.seen: list[tuple[Tensor, Tensor]] = []

    def train(self, mode: bool = True) -> "LesionHead":
        """A frozen head stays as it is evaluated, whatever it is part of."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, fused: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """Probability of lesion at every voxel."""
        return self.network(fused).sigmoid()

    def within(self, asked: Bool[Tensor, "b 1 *dhw"]) -> Callable[[Tensor], Tensor]:
        """``forward`` for volumes of which only the voxels ``asked`` for matter; 0 elsewhere.

        What it says of voxels outside the brain means nothing: it has seen none. And reading is
        what takes the time, and a brain is a fifth of a volume. Where the voxels are is
        found out here, once, so that nothing in a sampler's loop waits for it.
        """
        index = asked.flatten().nonzero()[:, 0]

        def probability(fused: Tensor) -> Tensor:
            described = self.network.describe(fused).movedim(1, -1).flatten(0, -2)
            read = self.network.read(described[index])[:, 0].sigmoid()
            return read.new_zeros(fused.numel()).index_put((index,), read).reshape(fused.shape)

        return probability

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        self._check(batch)
        place = case_places(self, len(batch), batch_idx)[0]  # each rank learns from what it saw
        generator = step_generator(self.global_step, self.seed, place)
        reference = reference_of(batch)
        fused = self._like_an_estimate(reference, batch.spacing_mm, generator)
        with torch.no_grad():
            descriptions = self.network.describe(fused)
        counts = self.lesion_voxels, self.brain_voxels
        for described, lesion, brain in zip(descriptions, batch.lesion, batch.brain, strict=True):
            self.seen.append(some_voxels(described, lesion[0], brain[0], *counts, generator))
        self.seen = self.seen[-self.pool :]
        described, lesion = (torch.cat(part) for part in zip(*self.seen, strict=True))
        drawn = torch.randint(len(lesion), (self.voxels,), generator=generator).to(lesion.device)
        logits = self.network.read(described[drawn])[:, 0]
        loss = binary_cross_entropy_with_logits(logits.float(), lesion[drawn])
        self.log("train/loss", loss.detach(), batch_size=len(batch), sync_dist=True)
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

    def _check(self, batch: FusionBatch) -> None:
        """Scales in mm are those of one voxel size: another's would be read wrongly in silence."""
        expected, found = self.network.spacing_mm, tuple(shared_spacing(batch.spacing_mm))
        if any(abs(a - b) > 1e-3 for a, b in zip(expected, found, strict=True)):
            raise ValueError(
                f"expected voxels of {list(expected)} mm, as method.network.spacing_mm says, "
                f"got {[round(size, 4) for size in found]} mm in {batch.case_id[0]}"
            )

    def _log_dice(self, stage: str, batch: FusionBatch) -> None:
        self._check(batch)
        predicted = lesion_probability(self, reference_of(batch), batch.brain) > 0.5
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


def some_voxels(
    described: Float[Tensor, "f *dhw"],
    lesion: Bool[Tensor, "*dhw"],
    brain: Bool[Tensor, "*dhw"],
    lesion_voxels: int,
    brain_voxels: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n f"], Float[Tensor, " n"]]:
    """Descriptions of some voxels of a volume, and which of them are lesion.

    Args:
        described: every voxel of a volume.
        lesion: its true lesion.
        brain: where it is asked about; everywhere, if that and the lesion are empty.
        lesion_voxels: drawn from the lesion, or all of it.
        brain_voxels: drawn from the brain and the lesion, with replacement.
        generator: of what is drawn, which does not depend on the descriptions.
    """
    rows, is_lesion = described.flatten(1).T, lesion.flatten()
    positive, asked = is_lesion.nonzero()[:, 0], (brain.flatten() | is_lesion).nonzero()[:, 0]
    if not len(asked):  # a head whose brain is not known
        asked = torch.arange(len(is_lesion), device=is_lesion.device)
    order = torch.randperm(len(positive), generator=generator).to(positive.device)
    some = torch.randint(len(asked), (brain_voxels,), generator=generator)
    chosen = torch.cat([positive[order[:lesion_voxels]], asked[some.to(asked.device)]])
    return rows[chosen], is_lesion[chosen].float()
