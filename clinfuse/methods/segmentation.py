"""Lesion segmentation on any image of a head: what the downstream study trains on each of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lightning import LightningModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset

from clinfuse.functional.surface import NO_SURFACE_MM
from clinfuse.methods.base import Optim, Stage, staged_optimizer, step_generator
from clinfuse.methods.lesion_head import some_voxels
from clinfuse.networks.scale_space import ScaleSpaceNetwork
from clinfuse.types import FusionBatch

Image = Callable[[FusionBatch], Float[Tensor, "b c *dhw"]]
"""What of a study a segmentation is given: a source, both, or what a fusion makes of them."""

IMAGES: Mapping[str, Image] = {
    "MRI": lambda batch: batch.mri,
    "CT": lambda batch: batch.ct,
    "both": lambda batch: torch.cat([batch.mri, batch.ct], 1),
}
"""The images that need no fusion, by the name that tables give them."""

AIR = -1.0


def blinded(batch: FusionBatch) -> FusionBatch:
    """What a clinic has of a study: no lesion mask, and nothing that only we know of a phantom.

    An image made from the mask would show the segmentation what it is to find (method.md §6).
    """
    distance_mm = batch.lesion_distance_mm
    return replace(
        batch,
        roi=torch.cat([batch.roi[:, :2], torch.zeros_like(batch.roi[:, 2:])], 1),
        reference=None,
        clean_mri=None,
        clean_ct=None,
        clean_roi=None,
        lesion_distance_mm=(
            None if distance_mm is None else torch.full_like(distance_mm, NO_SURFACE_MM)
        ),
        misregistration=None,
        findings=None,
    )


class Segmentation(LightningModule):
    """Lesion probability from an image of one channel or of several, within the brain.

    It learns as ``LesionHead`` does, a step from voxels of many heads at once, but from a finite
    set of images that are described once: making one may take a diffusion model its seconds.
    Whatever it is given, it is one and the same network, so that the same initial weights, voxels
    and steps are those of every image: channels that an image lacks are air, the description of
    which is constant, and the normalisation makes that 0.

    Args:
        network: describes voxels, and reads descriptions.
        optimizer: built but for its parameters.
        lesion_voxels: drawn from each image's lesion, or all of it.
        brain_voxels: drawn from each image's brain.
        voxels: of all images that a step learns from.
        steps: of the training.
        warmup_steps: of the learning rate.
        seed: of what is drawn. The initial weights are the network's.
    """

    def __init__(
        self,
        network: ScaleSpaceNetwork,
        optimizer: Optim,
        lesion_voxels: int = 600,
        brain_voxels: int = 2400,
        voxels: int = 4096,
        steps: int = 1000,
        warmup_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.optimizer = network, optimizer
        self.lesion_voxels, self.brain_voxels, self.voxels = lesion_voxels, brain_voxels, voxels
        self.steps, self.warmup_steps, self.seed = steps, warmup_steps, seed
        self.seen: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def describe(
        self, image: Float[Tensor, "b c *dhw"], spacing_mm: Sequence[float]
    ) -> Float[Tensor, "b f *dhw"]:
        """What there is to read about every voxel, the same whatever the weights.

        Raises:
            ValueError: more channels than the network has.
        """
        lacking = self.network.channels - image.shape[1]
        if lacking < 0:
            raise ValueError(
                f"expected an image of at most {self.network.channels} channels, "
                f"got {image.shape[1]}"
            )
        described = self.network.describe(image, spacing_mm)
        if not lacking:
            return described
        voxel = image.new_full((1, lacking, *[1] * (image.ndim - 2)), AIR)  # one is like any other
        air = self.network.describe(voxel, spacing_mm)
        return torch.cat([described, air.expand(len(image), -1, *image.shape[2:])], 1)

    def look_at(
        self,
        described: Float[Tensor, "b f *dhw"],
        lesion: Bool[Tensor, "b 1 *dhw"],
        brain: Bool[Tensor, "b 1 *dhw"],
    ) -> None:
        """Keep some voxels of images to learn from: the same ones, whatever the images show."""
        counts = self.lesion_voxels, self.brain_voxels
        for voxels, is_lesion, is_brain in zip(described, lesion[:, 0], brain[:, 0], strict=True):
            generator = step_generator(len(self.seen), self.seed)
            self.seen.append(some_voxels(voxels, is_lesion, is_brain, *counts, generator))

    def forward(
        self, described: Float[Tensor, "b f *dhw"], brain: Bool[Tensor, "b 1 *dhw"]
    ) -> Float[Tensor, "b 1 *dhw"]:
        """Probability of lesion at every voxel of the brain; elsewhere 0, for it has seen none."""
        asked = described.movedim(1, -1)[brain[:, 0]]
        probability = torch.zeros(brain.shape, device=described.device)
        probability[brain] = self.network.read(asked)[:, 0].sigmoid().float()
        return probability

    def train_dataloader(self) -> DataLoader:
        """What each step learns from: numbers of voxels among all that were looked at."""
        available = sum(len(lesion) for _, lesion in self.seen)
        draws = VoxelDraws(available, self.voxels, self.steps, self.seed)
        return DataLoader(draws, batch_size=None, shuffle=False)

    def on_fit_start(self) -> None:
        described, lesion = (torch.cat(part) for part in zip(*self.seen, strict=True))
        self.seen = [(described.to(self.device), lesion.to(self.device))]

    def training_step(self, drawn: Int[Tensor, " n"], batch_idx: int) -> Tensor:
        ((described, lesion),) = self.seen
        logits = self.network.read(described[drawn])[:, 0]
        return binary_cross_entropy_with_logits(logits.float(), lesion[drawn])

    def on_fit_end(self) -> None:
        self.seen = []

    def configure_optimizers(self) -> Any:
        weights = list(self.network.parameters())
        return staged_optimizer(self.optimizer, [Stage(weights, 0, self.steps)], self.warmup_steps)


class VoxelDraws(Dataset[Tensor]):
    """Voxels for each of some steps, by number, a function of (seed, step).

    Args:
        available: voxels to draw from.
        voxels: of a step.
        steps: how many.
        seed: of the draws.
    """

    def __init__(self, available: int, voxels: int, steps: int, seed: int) -> None:
        self.available, self.voxels, self.steps, self.seed = available, voxels, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Int[Tensor, " n"]:
        if step >= self.steps:
            raise IndexError(step)
        generator = step_generator(step, self.seed)
        return torch.randint(self.available, (self.voxels,), generator=generator)
