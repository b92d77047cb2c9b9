"""Averages over a region of interest, not over the volume."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def regional_mean(
    values: Float[Tensor, "b 1 *dhw"], mask: Bool[Tensor, "b 1 *dhw"]
) -> Float[Tensor, " b"]:
    """Mean of the values at each case's mask voxels; NaN, with zero gradient, where there are none.

    Values outside the mask have no influence, not even if they are NaN.
    """
    count = mask.flatten(1).sum(1)
    total = torch.where(mask, values, 0).flatten(1).sum(1)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


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
