"""Mean local similarity on a CPU, compiled by numba: ``ssim.ssim_map`` defines it.

A window is applied axis by axis, and always to whole rows of voxels: a compiler makes vector
instructions of loops over them, and the rows that a window sees stay in a core's cache.
"""

from collections.abc import Sequence
from typing import NamedTuple, no_type_check  # numba reads types itself, no checker before it

import numpy as np
from jaxtyping import Bool, Float, Int

from clinfuse.functional.compiled import PLACE, compiled
from clinfuse.functional.cores import on_every_core
from clinfuse.functional.gaussian import is_one_voxel, mirrored, window_taps

LEAST_SHARE = 1e-4
"""Of a window that voxels of the mask make up at least, so that no division is by nothing."""

PARTS = 32
"""That an axis is worked on in, at most: enough for all cores to be busy until the end."""

_TOGETHER = 4
"""Pairs of rows that are weighted in one go."""


class Window(NamedTuple):
    """What voxels of a box see along one axis.

    Attributes:
        weights: of the voxel itself, then of both voxels 1, 2, ... away; zeros fill up the last
            ``_TOGETHER``.
        seen: where in the box the first voxel's first neighbour is, and so on up to the last one's
            last: mirrored at the border of the grid, and the box's size for what lies outside it.
    """

    weights: Float[np.ndarray, " k"]
    seen: Int[np.ndarray, " n"]


def mean_similarity(
    a: Float[np.ndarray, "d h w"],
    b: Float[np.ndarray, "d h w"],
    mask: Bool[np.ndarray, "d h w"],
    box: Sequence[slice],
    sigma: Sequence[float],
    numbers: tuple[float, float, float],
) -> float:
    """``ssim.ssim`` of one case, of single or double precision.

    Args:
        a: one image.
        b: the other.
        mask: voxels to average over.
        box: around the mask: what lies outside it is nothing to a window.
        sigma: standard deviations of the window in voxels.
        numbers: the two constants of the formula, and the value that is black.
    """
    count, height_width = np.count_nonzero(mask), a.shape[1] * a.shape[2]
    axes = zip(a.shape, sigma, box, strict=True)
    along_d, along_h, along_w = (_window(*axis, dtype=a.dtype) for axis in axes)
    depth, height, width = (side.stop - side.start for side in box)
    start = [side.start for side in box]
    rows = start[0] * height_width + start[1] * a.shape[2] + start[2], height_width, a.shape[2]
    x, y, inside = (np.ascontiguousarray(volume).reshape(-1) for volume in (a, b, mask))
    constants = np.array([*numbers, LEAST_SHARE], a.dtype)
    # Where the mask is all of the grid, windows see nothing else. Beyond the last slice: zeros.
    means = np.empty((height, 4 if count == mask.size else 5, depth + 1, width), a.dtype)
    means[:, :, depth] = 0

    def across(slices: tuple[int, int]) -> None:
        _smooth_slices(x, y, inside, rows, slices, along_h, along_w, constants, means)

    def along(lines: tuple[int, int]) -> float:
        return float(_sum_of_lines(inside, rows, lines, along_d, constants, means))

    on_every_core(across, _parts(depth))
    return sum(on_every_core(along, _parts(height))) / count


def _window(size: int, sigma: float, side: slice, dtype: np.dtype) -> Window:
    taps = np.ones(1) if is_one_voxel(size, sigma) else window_taps(sigma)
    half = taps[len(taps) // 2 :]
    weights = np.pad(half, (0, -(len(half) - 1) % _TOGETHER)).astype(dtype)
    reach, length = len(weights) - 1, side.stop - side.start
    seen = mirrored(np.arange(side.start - reach, side.stop + reach), size) - side.start
    return Window(weights, np.where((seen >= 0) & (seen < length), seen, length))


def _parts(size: int) -> list[tuple[int, int]]:
    step = -(-size // PARTS)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@compiled
@no_type_check
def _smooth_row(source, start, step, window, place, row):
    """What the window around a place makes of the rows that start at ``start + step * seen``."""
    weights, seen = window.weights, window.seen
    width, middle = len(row) & PLACE, place + len(weights) - 1
    weight, at = weights[0], (start + step * seen[middle]) & PLACE
    for x in range(width):
        row[x] = weight * source[at + x]
    for k in range(1, len(weights), _TOGETHER):
        w_1, w_2, w_3, w_4 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        a_1 = (start + step * seen[middle - k]) & PLACE
        a_2 = (start + step * seen[middle - k - 1]) & PLACE
        a_3 = (start + step * seen[middle - k - 2]) & PLACE
        a_4 = (start + step * seen[middle - k - 3]) & PLACE
        b_1 = (start + step * seen[middle + k]) & PLACE
        b_2 = (start + step * seen[middle + k + 1]) & PLACE
        b_3 = (start + step * seen[middle + k + 2]) & PLACE
        b_4 = (start + step * seen[middle + k + 3]) & PLACE
        for x in range(width):
            row[x] += (
                w_1 * (source[a_1 + x] + source[b_1 + x])
                + w_2 * (source[a_2 + x] + source[b_2 + x])
                + w_3 * (source[a_3 + x] + source[b_3 + x])
                + w_4 * (source[a_4 + x] + source[b_4 + x])
            )


@compiled
@no_type_check
def _moments_of_row(a, b, mask, start, black, reach, moments):
    """Into the middle of their rows: a, b, a^2 + b^2, a b, and whether a voxel counts at all."""
    width, start, reach = (moments.shape[1] - 2 * reach) & PLACE, start & PLACE, reach & PLACE
    nothing = black - black
    for x in range(width):
        inside = mask[start + x]
        value_a = a[start + x] - black if inside else nothing
        value_b = b[start + x] - black if inside else nothing
        moments[0, reach + x] = value_a
        moments[1, reach + x] = value_b
        moments[2, reach + x] = value_a * value_a + value_b * value_b
        moments[3, reach + x] = value_a * value_b
    for x in range(width if len(moments) > 4 else 0):
        moments[4, reach + x] = mask[start + x]


@compiled
@no_type_check
def _smooth_slices(a, b, mask, rows, slices, along_h, along_w, constants, means):
    """Moments of some slices, smoothed along both their axes."""
    height, moments, depth, width = means.shape
    flat, reach = means.reshape(-1), len(along_w.weights) - 1
    near = np.zeros((moments, width + 2 * reach), means.dtype)
    length, size = near.shape[1], (height + 1) * width
    lines = np.zeros(moments * size, means.dtype)  # the last of each moment lies outside the box
    in_turn = Window(along_w.weights, np.arange(length))
    for z in range(slices[0], slices[1]):
        for y in range(height):
            start = rows[0] + z * rows[1] + y * rows[2]
            _moments_of_row(a, b, mask, start, constants[2], reach, near)
            for m in range(moments):
                for k in range(reach):
                    for place in (k, length - 1 - k):
                        if along_w.seen[place] < width:
                            near[m, place] = near[m, reach + along_w.seen[place]]
                to = m * size + y * width
                _smooth_row(near[m], 0, 1, in_turn, 0, lines[to : to + width])
        for y in range(height):
            for m in range(moments):
                to = ((y * moments + m) * depth + z) * width
                _smooth_row(lines, m * size, width, along_h, y, flat[to : to + width])


@compiled
@no_type_check
def _similarity_of_row(means, constants, found):
    """``ssim._similarity`` of a row's moments, which may be destroyed."""
    c_1, c_2, least, width = constants[0], constants[1], constants[3], len(found)
    for x in range(width if len(means) > 4 else 0):
        share = means[4, x] if means[4, x] > least else least
        means[0, x] /= share
        means[1, x] /= share
        means[2, x] /= share
        means[3, x] /= share
    for x in range(width):
        mean_a, mean_b, squares = means[0, x], means[1, x], means[2, x]
        product, squared_means = mean_a * mean_b, mean_a * mean_a + mean_b * mean_b
        luminance = (product + product + c_1) / (squared_means + c_1)
        covariance = means[3, x] - product
        found[x] = luminance * (covariance + covariance + c_2) / (squares - squared_means + c_2)


@compiled
@no_type_check
def _sum_of_lines(mask, rows, lines, along_d, constants, means):
    """Similarities over the mask in some lines of all slices, once smoothed along the slices."""
    _, moments, depth, width = means.shape
    flat = means.reshape(-1)
    smooth, found = np.empty((moments, width), means.dtype), np.empty(width, means.dtype)
    total = 0.0
    for y in range(lines[0], lines[1]):
        for z in range(depth - 1):
            for m in range(moments):
                start = (y * moments + m) * depth * width
                _smooth_row(flat, start, width, along_d, z, smooth[m])
            _similarity_of_row(smooth, constants, found)
            start = rows[0] + z * rows[1] + y * rows[2]
            for x in range(width):
                total += found[x] if mask[start + x] else 0.0
    return total
