"""Averages over a region of interest, not over the volume."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def regional_mean(
    values: Float[Tensor, "b 1 *dhw"],
    region: Bool[Tensor, "b 1 *dhw"] | Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Mean of the values over each case's region; NaN, with zero gradient, where it is empty.

    Args:
        values: what to average. Those outside the region have no influence, not even if NaN.
        region: a mask, or the share of each voxel in the region, from 0 to 1, by which it counts.
    """
    weighted = values if region.dtype == torch.bool else values * region
    size = region.flatten(1).sum(1)
    total = torch.where(region > 0, weighted, 0).flatten(1).sum(1)
    return torch.where(size > 0, total / torch.where(size > 0, size, 1), torch.nan)


def shares_of_moved(mask: Float[Tensor, "*dhw"]) -> Float[Tensor, "*dhw"]:
    """How far each voxel belongs to a mask that was moved between voxels, from 0 to 1.

    Interpolation leaves the mask's share in each voxel. Up to a quarter is nothing, from three
    quarters on is all, and it is linear between. Cut at one half, the fourth digit of a motion
    would decide about whole voxels; taken as it is, the region would be a voxel wider all around.
    """
    return (2 * mask - 0.5).clamp(0, 1)


def bounding_box(mask: Bool[Tensor, "*dhw"]) -> tuple[slice, ...]:
    """The smallest box that holds all of the mask; a box without voxels where it is empty."""
    if not mask.numel():
        return (slice(0, 0),) * mask.ndim
    box = []
    seen = mask.view(torch.uint8)  # whose largest is found by vector instructions; any() is not
    for _ in range(mask.ndim):
        places = seen.flatten(1).amax(1).nonzero() if seen.ndim > 1 else seen.nonzero()
        box.append(slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0))
        seen = seen.amax(0)
    return tuple(box)
