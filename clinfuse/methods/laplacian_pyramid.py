"""Fusion in the Laplacian pyramid: the sharper detail at every scale, over a common base."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.spacing import shared_spacing
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.selection import Selection
from clinfuse.types import FusionBatch

BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)
"""Burt & Adelson's window with a = 0.375, up to its sum."""

THICK = 1.5
"""An axis this many times as coarse as the finest one waits until the others have caught up."""


class LaplacianPyramid(FusionMethod):
    """F with the pyramid that the rules make of both sources' pyramids, within model space.

    Burt & Adelson (1983). Of thick slices the axes are halved in the plane alone until a voxel is
    about as long as wide, so that a level is one scale in mm; any size will do, odd or one voxel.

    Args:
        levels: of detail, above the base.
        detail: what becomes of the details.
        base: what becomes of what is left when they are taken away.

    Raises:
        ValueError: fewer than one level.
    """

    def __init__(self, levels: int, detail: Selection, base: Selection) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"expected at least one level of the pyramid, got {levels}")
        self.levels, self.detail, self.base = levels, detail, base

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        axes = halved_axes(shared_spacing(batch.spacing_mm), self.levels)
        with torch.autocast(batch.mri.device.type, enabled=False):
            mri, ct = (laplacian_pyramid(source.float(), axes) for source in (batch.mri, batch.ct))
            details = [self.detail(m, c) for m, c in zip(mri[:-1], ct[:-1], strict=True)]
            return from_pyramid([*details, self.base(mri[-1], ct[-1])], axes).clamp(-1, 1)


def halved_axes(spacing_mm: Sequence[float], levels: int) -> list[tuple[int, ...]]:
    """Which spatial axes each level halves, finest level first: those that are still fine."""
    size, plan = list(spacing_mm), []
    for _ in range(levels):
        axes = tuple(axis for axis, mm in enumerate(size) if mm < THICK * min(size))
        size = [2 * mm if axis in axes else mm for axis, mm in enumerate(size)]
        plan.append(axes)
    return plan


def laplacian_pyramid(
    image: Float[Tensor, "b 1 *dhw"], axes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Details from fine to coarse and, last, the base; an axis of n becomes one of (n + 1) // 2.

    Args:
        image: to take apart.
        axes: spatial axes that each level halves, 0 the first.
    """
    levels = []
    for halved in axes:
        coarse = image
        for axis in halved:
            coarse = _along(coarse, _reduce(image.shape[axis + 2]), axis + 2)
        levels.append(image - _expand(coarse, image.shape, halved))
        image = coarse
    return [*levels, image]


def from_pyramid(
    levels: Sequence[Tensor], axes: Sequence[Sequence[int]]
) -> Float[Tensor, "b 1 *dhw"]:
    """The image whose ``laplacian_pyramid`` along the same axes is ``levels``."""
    image = levels[-1]
    for detail, halved in zip(levels[-2::-1], axes[::-1], strict=True):
        image = detail + _expand(image, detail.shape, halved)
    return image


def _expand(coarse: Tensor, shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    for axis in axes:
        coarse = _along(coarse, _interpolate(shape[axis + 2]), axis + 2)
    return coarse


def _along(x: Tensor, matrix: np.ndarray, dim: int) -> Tensor:
    return (x.movedim(dim, -1) @ torch.from_numpy(matrix).to(x).T).movedim(-1, dim)


@lru_cache(maxsize=64)
def _taps(size: int) -> np.ndarray:
    """Row i: the window around voxel 2 i, as far as it lies within the axis."""
    offset = np.arange(size) - 2 * np.arange((size + 1) // 2)[:, None] + 2
    return np.where((offset >= 0) & (offset < 5), np.take(BINOMIAL, offset.clip(0, 4)), 0)


def _reduce(size: int) -> np.ndarray:
    """REDUCE along an axis: every second voxel of the smoothed one."""
    return _taps(size) / _taps(size).sum(1, keepdims=True)


def _interpolate(size: int) -> np.ndarray:
    """EXPAND along an axis: its voxels from the ``(size + 1) // 2`` that REDUCE left."""
    return (_taps(size) / _taps(size).sum(0)).T
