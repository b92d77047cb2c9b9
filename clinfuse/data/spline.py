"""Volumes moved as ``jitter.move`` moves them, in a fraction of its time, and on a GPU too.

The interpolation is ITK's, which TorchIO calls: a cubic B-spline through the voxels with mirrored
borders, or trilinear between them, to half a voxel beyond the outermost. What is saved is
generality: a movement is affine, so that each voxel's place and weights are a few products, and
volumes that go the same way share them.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import no_type_check  # numba reads types itself, and no checker may come before it

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numba import njit
from torch import Tensor

from clinfuse.data.jitter import CT_AIR, Interpolation, is_still
from clinfuse.data.volumes import Box, part_of
from clinfuse.functional.compiled import compiled

BORDER = 2
"""Voxels that the splines of the outermost half voxel reach beyond the grid."""

_FLOAT = np.float32
_INDEX = np.uint64  # without a sign, so that nothing asks whether it counts from the end
_ZERO, _HALF, _ONE, _TWO = (_FLOAT(x) for x in (0, 1 / 2, 1, 2))
_SIXTH, _TWO_THIRDS = _FLOAT(1 / 6), _FLOAT(2 / 3)


def move(
    volume: Float[Tensor, "c d h w"],
    matrix: Float[Tensor, "4 4"],
    spacing_mm: Sequence[float | int],
    fill: float = CT_AIR,
    interpolation: Interpolation = "bspline",
    window: Box | None = None,
) -> Float[Tensor, "c d_out h_out w_out"]:
    """``jitter.move``, by the same arguments, to rounding in single precision.

    Args:
        volume: on the CPU or on a GPU.
        matrix: any that can be inverted.
        spacing_mm: as in ``jitter.move``, like what follows.
        fill: what comes in from outside.
        interpolation: "bspline" is cubic.
        window: the part of the moved volume that is asked for.
    """
    sizes = volume.shape[1:]
    window = window or tuple(slice(0, size) for size in sizes)
    if is_still(matrix):
        return part_of(volume, window)
    source = _to_source(matrix, sizes, spacing_mm, window)
    shape = [part.stop - part.start for part in window]
    if interpolation == "bspline":
        volume = coefficients(volume)
    kinds = {"bspline": (_cubic, cubic_by_torch), "linear": (_linear, linear_by_torch)}
    on_cpu, by_torch = kinds[interpolation]
    bordered = _bordered(volume, mirrored=interpolation == "bspline")
    if volume.device.type != "cpu":
        return by_torch(bordered, source, shape, fill)
    moved = np.empty((len(volume), *shape), np.float32)
    on_cpu(bordered.numpy().ravel(), source.numpy(), np.array(sizes), _FLOAT(fill), moved)
    return torch.from_numpy(moved)


def coefficients(volume: Float[Tensor, "c d h w"]) -> Float[Tensor, "c d h w"]:
    """Weights of the cubic B-splines whose sum goes through the voxels.

    Unser et al. (1993), with mirrored borders (c b | a b c): along each axis, the solution of
    equations of 1/6, 2/3, 1/6. On a CPU it is found by elimination, elsewhere by an inverse.
    """
    if volume.device.type != "cpu":
        return coefficients_by_torch(volume)
    solved = volume.contiguous().numpy().copy()
    for axis in (1, 2, 3):
        size = solved.shape[axis]
        if size > 1:
            rows = solved.reshape(math.prod(solved.shape[:axis]), size, -1)  # a view
            _eliminate(rows, *_elimination(size))
    return torch.from_numpy(solved)


def coefficients_by_torch(volume: Float[Tensor, "c d h w"]) -> Float[Tensor, "c d h w"]:
    """``coefficients`` as one product with an inverse matrix along each axis."""
    for axis in (1, 2, 3):
        if volume.shape[axis] > 1:
            inverse = torch.from_numpy(_inverse(volume.shape[axis])).to(volume)
            volume = (
                volume @ inverse.T
                if axis == 3
                else (inverse @ volume.flatten(axis + 1)).reshape(volume.shape)
            )
    return volume


@lru_cache(maxsize=64)
def _inverse(size: int) -> np.ndarray:
    return np.linalg.inv(_splines_at_voxels(size))


@lru_cache(maxsize=64)
def _elimination(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Thomas's algorithm needs of the matrix: below its diagonal, inverse pivots, ratios."""
    splines = _splines_at_voxels(size)
    below, above = (np.append(0, splines.diagonal(-1)), np.append(splines.diagonal(1), 0))
    inverse, ratio = np.zeros(size), np.zeros(size)
    for i in range(size):
        inverse[i] = 1 / (splines[i, i] - below[i] * ratio[i - 1])
        ratio[i] = above[i] * inverse[i]
    return below.astype(np.float32), inverse.astype(np.float32), ratio.astype(np.float32)


def _splines_at_voxels(size: int) -> np.ndarray:
    """Row i holds the value at voxel i of each voxel's spline."""
    splines = np.diag(np.full(size, 2 / 3))
    for offset in (-1, 1):
        neighbours = _mirrored(np.arange(size) + offset, size)
        np.add.at(splines, (np.arange(size), neighbours), 1 / 6)
    return splines


def _mirrored(index: np.ndarray, size: int) -> np.ndarray:
    """Indices beyond the grid reflected at its outermost voxels: -1 is 1."""
    if size == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * (size - 1))
    return np.where(index < size, index, 2 * (size - 1) - index)


def _bordered(volume: Tensor, mirrored: bool) -> Tensor:
    """The volume with ``BORDER`` voxels more on each side: mirrored, or the outermost repeated."""
    sizes = volume.shape[1:]
    wide = volume.new_empty(len(volume), *(size + 2 * BORDER for size in sizes))
    wide[:, BORDER:-BORDER, BORDER:-BORDER, BORDER:-BORDER] = volume
    for axis, size in enumerate(sizes, start=1):
        for beyond in (*range(-BORDER, 0), *range(size, size + BORDER)):
            index = np.array(beyond)
            index = _mirrored(index, size) if mirrored else index.clip(0, size - 1)
            wide.select(axis, beyond + BORDER).copy_(wide.select(axis, int(index) + BORDER))
    return wide


def _to_source(
    matrix: Float[Tensor, "4 4"],
    sizes: Sequence[int],
    spacing_mm: Sequence[float | int],
    window: Box,
) -> Float[Tensor, "3 4"]:
    """From indices of the window to indices of the volume that is moved, in double precision."""
    to_mm = torch.eye(4, dtype=torch.float64)
    to_mm[:3, :3] = torch.diag(torch.tensor(spacing_mm, dtype=torch.float64))
    centre = torch.tensor([(size - 1) / 2 for size in sizes], dtype=torch.float64)
    to_mm[:3, 3] = -to_mm[:3, :3] @ centre
    start = torch.eye(4, dtype=torch.float64)
    start[:3, 3] = torch.tensor([float(part.start) for part in window])
    back = torch.linalg.inv(to_mm) @ torch.linalg.inv(matrix.double()) @ to_mm @ start
    return back[:3].contiguous()


def cubic_by_torch(
    bordered: Float[Tensor, "c d h w"],
    source: Float[Tensor, "3 4"],
    shape: Sequence[int],
    fill: float,
) -> Float[Tensor, "c d_out h_out w_out"]:
    """Sums of splines at the places of a window, as eight trilinear look-ups each.

    Sigg and Hadwiger (2005): two neighbouring splines' weights are one linear interpolation between
    their coefficients, times the sum of both.

    Args:
        bordered: coefficients with ``BORDER`` voxels more on each side.
        source: from indices of the window to those of the volume.
        shape: of the window.
        fill: where the place is outside of the volume.
    """
    places, inside = _places(bordered, source, shape)
    below = places.floor()
    part = places - below
    w0, w1, w2, w3 = _weights(part)
    low, high = w0 + w1, w2 + w3
    ends = (below - 1 + w1 / low, below + 1 + w3 / high)
    total = torch.zeros(len(bordered), *shape, device=bordered.device)
    for corner in range(8):
        sides = [corner >> axis & 1 for axis in range(3)]
        at = torch.stack([ends[side][axis] for axis, side in enumerate(sides)])
        weight = torch.stack([(low, high)[side][axis] for axis, side in enumerate(sides)]).prod(0)
        total += weight * _looked_up(bordered, at)
    return torch.where(inside, total, fill)


def linear_by_torch(
    bordered: Float[Tensor, "c d h w"],
    source: Float[Tensor, "3 4"],
    shape: Sequence[int],
    fill: float,
) -> Float[Tensor, "c d_out h_out w_out"]:
    """Trilinear look-ups at the places of a window, by the arguments of ``cubic_by_torch``."""
    places, inside = _places(bordered, source, shape)
    return torch.where(inside, _looked_up(bordered, places), fill)


def _places(bordered: Tensor, source: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each voxel of the window comes from, ``3 d h w``, and whether that is in the volume."""
    device = bordered.device
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in shape]
    rows = source.to(device, torch.float32)
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    places = torch.stack([row[0] * d + row[1] * h + row[2] * w + row[3] for row in rows])
    sizes = torch.tensor([size - 2 * BORDER for size in bordered.shape[1:]], device=device)
    last = (sizes - 0.5).reshape(3, 1, 1, 1)
    return places, ((places >= -0.5) & (places <= last)).all(0)


def _weights(part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the four splines around a place that is ``part`` of a voxel beyond the second of them."""
    rest = 1 - part
    return (
        rest**3 / 6,
        2 / 3 - part**2 * (2 - part) / 2,
        2 / 3 - rest**2 * (2 - rest) / 2,
        part**3 / 6,
    )


def _looked_up(bordered: Tensor, places: Tensor) -> Tensor:
    sizes = torch.tensor(bordered.shape[1:], device=bordered.device).reshape(3, 1, 1, 1)
    grid = 2 * (places + BORDER) / (sizes - 1) - 1
    grid = grid.flip(0).movedim(0, -1)[None]
    return F.grid_sample(bordered[None], grid, "bilinear", "border", align_corners=True)[0]


@njit(inline="always")
@no_type_check
def _four_weights(part):
    rest = _ONE - part
    return (
        rest * rest * rest * _SIXTH,
        _TWO_THIRDS - part * part * (_TWO - part) * _HALF,
        _TWO_THIRDS - rest * rest * (_TWO - rest) * _HALF,
        part * part * part * _SIXTH,
    )


@compiled
@no_type_check
def _cubic(values, source, sizes, fill, moved):
    """``cubic_by_torch`` on a CPU: of ``values``, the volume with its border as one row."""
    channels, depth, height, width = moved.shape
    last_d, last_h, last_w = sizes[0] - 0.5, sizes[1] - 0.5, sizes[2] - 0.5
    row = _INDEX(sizes[2] + 2 * BORDER)
    plane = row * _INDEX(sizes[1] + 2 * BORDER)
    channel = plane * _INDEX(sizes[0] + 2 * BORDER)
    for d in range(depth):
        for h in range(height):
            d0 = source[0, 0] * d + source[0, 1] * h + source[0, 3]
            h0 = source[1, 0] * d + source[1, 1] * h + source[1, 3]
            w0 = source[2, 0] * d + source[2, 1] * h + source[2, 3]
            for w in range(width):
                at_d = d0 + source[0, 2] * w
                at_h = h0 + source[1, 2] * w
                at_w = w0 + source[2, 2] * w
                if not (
                    -0.5 <= at_d <= last_d and -0.5 <= at_h <= last_h and -0.5 <= at_w <= last_w
                ):
                    for c in range(channels):
                        moved[c, d, h, w] = fill
                    continue
                i, j, k = int(at_d + BORDER), int(at_h + BORDER), int(at_w + BORDER)
                weights_d = _four_weights(_FLOAT(at_d + BORDER - i))
                weights_h = _four_weights(_FLOAT(at_h + BORDER - j))
                a, b, e, f = _four_weights(_FLOAT(at_w + BORDER - k))
                first = _INDEX(i - 1) * plane + _INDEX(j - 1) * row + _INDEX(k - 1)
                for c in range(channels):
                    s, t, u, v = _ZERO, _ZERO, _ZERO, _ZERO
                    for m in range(4):
                        for n in range(4):
                            at = first + _INDEX(m) * plane + _INDEX(n) * row
                            weight = weights_d[m] * weights_h[n]
                            s += weight * values[at]
                            t += weight * values[at + _INDEX(1)]
                            u += weight * values[at + _INDEX(2)]
                            v += weight * values[at + _INDEX(3)]
                    moved[c, d, h, w] = a * s + b * t + e * u + f * v
                    first += channel


@compiled
@no_type_check
def _linear(values, source, sizes, fill, moved):
    """``linear_by_torch`` on a CPU."""
    channels, depth, height, width = moved.shape
    last_d, last_h, last_w = sizes[0] - 0.5, sizes[1] - 0.5, sizes[2] - 0.5
    row = _INDEX(sizes[2] + 2 * BORDER)
    plane = row * _INDEX(sizes[1] + 2 * BORDER)
    channel = plane * _INDEX(sizes[0] + 2 * BORDER)
    for d in range(depth):
        for h in range(height):
            d0 = source[0, 0] * d + source[0, 1] * h + source[0, 3]
            h0 = source[1, 0] * d + source[1, 1] * h + source[1, 3]
            w0 = source[2, 0] * d + source[2, 1] * h + source[2, 3]
            for w in range(width):
                at_d = d0 + source[0, 2] * w
                at_h = h0 + source[1, 2] * w
                at_w = w0 + source[2, 2] * w
                if not (
                    -0.5 <= at_d <= last_d and -0.5 <= at_h <= last_h and -0.5 <= at_w <= last_w
                ):
                    for c in range(channels):
                        moved[c, d, h, w] = fill
                    continue
                i, j, k = int(at_d + BORDER), int(at_h + BORDER), int(at_w + BORDER)
                a = _FLOAT(at_d + BORDER - i)
                b = _FLOAT(at_h + BORDER - j)
                e = _FLOAT(at_w + BORDER - k)
                first = _INDEX(i) * plane + _INDEX(j) * row + _INDEX(k)
                for c in range(channels):
                    near = (_ONE - b) * _between(values, first, e) + b * _between(
                        values, first + row, e
                    )
                    far = (_ONE - b) * _between(values, first + plane, e) + b * _between(
                        values, first + plane + row, e
                    )
                    moved[c, d, h, w] = (_ONE - a) * near + a * far
                    first += channel


@njit(inline="always")
@no_type_check
def _between(values, at, part):
    return (_ONE - part) * values[at] + part * values[at + _INDEX(1)]


@compiled
@no_type_check
def _eliminate(rows, below, inverse, ratio):
    """Thomas's algorithm along the middle axis, in place."""
    before, size, after = rows.shape
    for p in range(before):
        for j in range(after):
            rows[p, 0, j] *= inverse[0]
        for i in range(1, size):
            for j in range(after):
                rows[p, i, j] = (rows[p, i, j] - below[i] * rows[p, i - 1, j]) * inverse[i]
        for i in range(size - 2, -1, -1):
            for j in range(after):
                rows[p, i, j] -= ratio[i] * rows[p, i + 1, j]
