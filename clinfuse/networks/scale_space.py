"""A voxel's neighbourhood at several scales, and a small network that reads it."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from monai.networks.nets import FullyConnectedNet
from torch import Tensor, nn

from clinfuse.functional.gaussian import gaussian_smooth

AIR = -0.9
"""Below it a voxel is background, and no part of the contrast."""

LEVELS = 8
"""Of brightness, at which the share of the head's voxels is read."""


class ScaleSpaceNetwork(nn.Module):
    """One logit a voxel, from what a volume looks like around it (Lindeberg 1994).

    Every voxel is described by the volume, and by it smoothed at each scale; by the differences of
    neighbouring scales; by the standard deviation within the two middle windows; by what
    the other side of the head looks like at the same place; and by the histogram of the whole head,
    from which the contrast can be told: in T2 a lesion is bright, in ADC dark, in T1 a little dark.
    A few fully connected layers read that, the same ones at every voxel. There is no position
    among it, and all of it is differentiable in the volume but for the other side and the
    histogram, which are read and not to be changed.

    So little is learned from very many voxels, where a U-Net has to learn its neighbourhoods first
    (experiments/lesion_head).

    Args:
        spacing_mm: voxel size of the volumes, (d, h, w), where ``describe`` is told no other.
        scales_mm: standard deviations of the smoothing, in mm in every direction, at least three.
        width: of the hidden layers.
        depth: number of them.
        channels: of a volume, each described by itself and all of them read.
    """

    def __init__(
        self,
        spacing_mm: Sequence[float],
        scales_mm: Sequence[float] = (1.0, 2.0, 4.0, 8.0, 16.0),
        width: int = 64,
        depth: int = 2,
        channels: int = 1,
    ) -> None:
        super().__init__()
        if len(scales_mm) < 3:
            raise ValueError(f"expected three scales or more, got {list(scales_mm)}")
        self.spacing_mm, self.scales_mm = tuple(spacing_mm), tuple(scales_mm)
        self.channels = channels
        described = channels * (2 * (len(scales_mm) + 1) - 1 + 2 + 2 + LEVELS)
        self.standardise = nn.BatchNorm1d(described, momentum=0.05, affine=False)
        self.reader = FullyConnectedNet(described, 1, [width] * depth, act="swish")

    def forward(self, volume: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """A logit at every voxel."""
        described = self.describe(volume).movedim(1, -1)
        logits = self.read(described.flatten(0, -2))
        return logits.reshape(*described.shape[:-1], 1).movedim(-1, 1)

    def read(self, description: Float[Tensor, "n f"]) -> Float[Tensor, "n 1"]:
        """The logits of voxels so described."""
        return self.reader(self.standardise(description))

    def describe(
        self, volume: Float[Tensor, "b c *dhw"], spacing_mm: Sequence[float] | None = None
    ) -> Float[Tensor, "b f *dhw"]:
        """What there is to read about every voxel, of order 1, channel after channel.

        Args:
            volume: of any number of channels; the network reads those of ``channels`` at once.
            spacing_mm: its voxel size; None takes that which the network has been made for.
        """
        spacing_mm = self.spacing_mm if spacing_mm is None else spacing_mm
        return torch.cat([self._describe(part, spacing_mm) for part in volume.split(1, 1)], 1)

    def _describe(self, volume: Tensor, spacing_mm: Sequence[float]) -> Tensor:
        volume = volume.float()
        sigmas = [[mm / size for size in spacing_mm] for mm in self.scales_mm]
        sigmas = [sigma[-(volume.ndim - 2) :] for sigma in sigmas]
        smooth = [volume, *(gaussian_smooth(volume, sigma) for sigma in sigmas)]
        middle = len(self.scales_mm) // 2
        between = [4 * (fine - coarse) for fine, coarse in pairwise(smooth)]
        texture = [
            4 * (gaussian_smooth(volume.square(), sigmas[i]) - smooth[i + 1].square())
            .clamp(min=1e-6).sqrt()
            for i in (middle, middle + 1)
        ]  # fmt: skip
        other = [smooth[i + 1].detach().flip(-1) for i in (middle, middle + 1)]
        return torch.cat([*smooth, *between, *texture, *other, *contrast(volume)], 1)


@torch.no_grad()
def contrast(volume: Float[Tensor, "b 1 *dhw"]) -> list[Float[Tensor, "b 1 *dhw"]]:
    """The share of the head's voxels near each of ``LEVELS`` levels of brightness, everywhere."""
    head = (volume > AIR).float()
    levels = [-0.8 + 1.8 * i / (LEVELS - 1) for i in range(LEVELS)]
    near = torch.cat([torch.exp(-(((volume - level) / 0.15) ** 2)) * head for level in levels], 1)
    near = near.flatten(2).sum(2)
    shares = LEVELS / 2 * near / near.sum(1, keepdim=True).clamp(min=1)
    return [
        share.reshape(-1, *[1] * (volume.ndim - 1)).expand_as(volume) for share in shares.unbind(1)
    ]
