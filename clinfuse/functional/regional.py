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
    box = []
    for axis in range(mask.ndim):
        lines = mask.movedim(axis, 0).reshape(mask.shape[axis], -1).any(1).nonzero()
        start, stop = (int(lines[0]), int(lines[-1]) + 1) if len(lines) else (0, 0)
        box.append(slice(start, stop))
        mask = mask.narrow(axis, start, stop - start)
    return tuple(box)
