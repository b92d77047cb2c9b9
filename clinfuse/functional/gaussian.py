"""Gaussian smoothing that keeps the shape, with mirrored borders."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

TRUNCATE = 3.5
"""Half-width of the window in standard deviations, as in Wang et al. (2004): 11 taps at 1.5."""

SMALLEST_SIGMA = 0.2
"""Below this many voxels the window is a single voxel for all purposes, and the axis is left."""


def gaussian_smooth(
    x: Float[Tensor, "b c *dhw"], sigma: Sequence[float | int]
) -> Float[Tensor, "b c *dhw"]:
    """x convolved with a separable Gaussian window of unit sum.

    The border is mirrored at the voxel's edge (d c b a | a b c d), as in
    ``scipy.ndimage.gaussian_filter(mode="reflect", truncate=3.5)``.

    Each axis is one product with its (size, size) matrix: on CPU as fast as a convolution at the
    sizes of medical volumes, and exact for windows wider than the volume.

    Args:
        x: volumes or slices.
        sigma: standard deviations in voxels, one a spatial axis.
    """
    if len(sigma) != x.ndim - 2:
        raise ValueError(f"expected one sigma for each of {x.ndim - 2} axes, got {list(sigma)}")
    for dim, width in enumerate(sigma, start=2):
        if not is_one_voxel(x.shape[dim], width):
            window = torch.from_numpy(window_matrix(x.shape[dim], float(width))).to(x)
            x = _along(x, window, dim)
    return x


def is_one_voxel(size: int, sigma: float) -> bool:
    """Whether the window along an axis of that many voxels leaves the axis as it is."""
    return sigma < SMALLEST_SIGMA or size == 1


def _along(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    if dim == x.ndim - 1:
        return x @ matrix.T
    return (matrix @ x.flatten(dim + 1)).reshape(x.shape)


@lru_cache(maxsize=64)
def window_matrix(size: int, sigma: float) -> Float64[np.ndarray, "size size"]:
    """Row i holds the weights of the voxels that make voxel i, mirrored taps folded in."""
    taps = window_taps(sigma)
    places = np.arange(size)[:, None]
    seen = mirrored(places + np.arange(len(taps)) - len(taps) // 2, size)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (places, seen), taps)
    return matrix


def window_taps(sigma: float) -> Float64[np.ndarray, " taps"]:
    """Weights of a window of unit sum, whose middle is the voxel itself."""
    radius = int(TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return taps / taps.sum()


def mirrored(places: Int[np.ndarray, "*shape"], size: int) -> Int[np.ndarray, "*shape"]:
    """Places along an axis, also beyond its ends: those within that are seen there in a mirror."""
    source = places % (2 * size)
    return np.where(source < size, source, 2 * size - 1 - source)
