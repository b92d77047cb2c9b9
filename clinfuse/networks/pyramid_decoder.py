"""The right half of a U-Net whose left half is somebody else's, and what turns it into F."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.functional.intensity import leaky_clamp
from clinfuse.networks.fusion_unet import crop

NORM_GROUPS, GROUP_FEATURES = 8, 4
"""At most so many groups in a norm, at least so many features in a group.

The coarsest level of a small image is one voxel, of which a group of one feature has no variance.
"""


class PyramidDecoder(nn.Module):
    """Features on the sources' own grid from features at 1/2, 1/4, ... of it, with skips.

    Ronneberger et al. (2015). Sizes may be odd: a level is doubled and cropped to the next one.

    Args:
        spatial_dims: 2 or 3.
        channels: of the pyramid, finest first.
        widths: features of the decoder, first on the sources' own grid, then at each level of the
            pyramid.
        own_channels: of what comes in on the sources' own grid.

    Raises:
        ValueError: not one width more than levels.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        widths: Sequence[int],
        own_channels: int = 2,
    ) -> None:
        super().__init__()
        if len(widths) != len(channels) + 1:
            raise ValueError(
                f"expected widths for the sources' grid and {len(channels)} levels, "
                f"got {list(widths)}"
            )
        inputs = [
            skip + coarser
            for skip, coarser in zip((own_channels, *channels), (*widths[1:], 0), strict=True)
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                normed_convolution(spatial_dims, features, width),
                normed_convolution(spatial_dims, width, width),
            )
            for features, width in zip(inputs, widths, strict=True)
        )

    def forward(
        self, own: Float[Tensor, "b c *dhw"], pyramid: Sequence[Float[Tensor, "b _ ..."]]
    ) -> Float[Tensor, "b w *dhw"]:
        """From the coarsest of the pyramid (finest first) to ``own``, which has full size."""
        x = self.levels[-1](pyramid[-1])
        steps = pairwise([pyramid[-1], *pyramid[-2::-1], own])
        for level, (_, skip) in zip(reversed(self.levels[:-1]), steps, strict=True):
            doubled = crop(F.interpolate(x, scale_factor=2, mode="nearest"), skip.shape[2:])
            x = level(torch.cat([doubled, skip], 1))
        return x


class SourceBlend(nn.Module):
    """F = w I_M + (1 - w) I_C + d, with w in [0, 1] and d read from features.

    Both are read by a convolution that starts at zero, so an untrained network returns the average.
    F is kept near model space: air is -1 to the last digit in the metric.

    Args:
        spatial_dims: 2 or 3.
        features: how many.
    """

    def __init__(self, spatial_dims: int, features: int) -> None:
        super().__init__()
        self.read = _convolution(spatial_dims)(features, 2, 3, padding=1)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(cast(Tensor, self.read.bias))

    def forward(
        self,
        features: Float[Tensor, "b w *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
    ) -> Float[Tensor, "b 1 *dhw"]:
        """F in full precision, whatever the autocast of the convolution."""
        weight, correction = self.read(features).float().split(1, 1)
        weight = weight.sigmoid()
        return leaky_clamp(weight * mri + (1 - weight) * ct + correction)


def normed_convolution(
    spatial_dims: int, in_channels: int, out_channels: int, size: int = 3
) -> nn.Module:
    """Convolution, group norm, ReLU: sizes are kept."""
    groups = math.gcd(NORM_GROUPS, out_channels, max(out_channels // GROUP_FEATURES, 1))
    return nn.Sequential(
        _convolution(spatial_dims)(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.GroupNorm(groups, out_channels),
        nn.ReLU(),
    )


def _convolution(spatial_dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    return nn.Conv3d if spatial_dims == 3 else nn.Conv2d
