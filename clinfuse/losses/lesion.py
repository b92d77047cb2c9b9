"""The lesion terms of Eq. 2, differentiable in the predicted probability p.

NSD and HD95 are statements about the border of a thresholded mask {p > t}, and thresholding has no
gradient. The surrogates here average over the threshold t instead, and that is plain arithmetic:

- a voxel is border of {p > t} when p > t there and p <= t at some neighbour: for a share
  p - erosion(p) of the thresholds;
- {p > t} has border inside a ball when it holds a voxel of the ball but not the ball grown by one
  voxel: for a share max p - min erosion(p) over the ball.

Both are exact, border being what ``functional.surface`` says it is. For a hard mask all thresholds
give the same mask, and the averages are the statements themselves.

Only the fixed lesion's distance map is ever read. It is computed once per study, so nothing here
runs a distance transform or waits for the device. What that costs is said at ``soft_hd95_mm``.

The thresholds are not uniform but have density 6 t (1 - t), whose cumulative distribution is
``_focus``: metrics threshold at one half, and a million background voxels that differ around
p = 0.001 would otherwise have more border between them than the lesion has.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from clinfuse.functional.spacing import SpacingMm, shared_spacing

HD_TAIL = 0.05
"""Share of a border that HD95 lets lie farther off."""

LONGEST_DISTANCE_MM = 300.0
DISTANCE_LEVELS = 160


def soft_dice_loss(
    probability: Float[Tensor, "b 1 *dhw"], lesion: Bool[Tensor, "b 1 *dhw"]
) -> Float[Tensor, " b"]:
    """One minus the soft Dice overlap, 1 - 2 sum(p s) / (sum(p^2) + sum(s^2)), in [0, 1].

    Milletari et al. (2016), V-Net. With squares in the denominator it equals the exact Dice loss
    on hard masks, and a faint background does not drown a lesion of one voxel.
    Zero, with zero gradient, where the lesion is empty: overlap is undefined there.
    """
    p = at_least_single(probability)
    overlap = reduce(p * lesion, "b ... -> b", "sum")
    size = reduce(p.square() + lesion, "b ... -> b", "sum")
    return _where_present(lesion, 1 - 2 * overlap / size.clamp(min=1))


def soft_nsd_loss(
    probability: Float[Tensor, "b 1 *dhw"],
    lesion: Bool[Tensor, "b 1 *dhw"],
    lesion_distance_mm: Float[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    tau_mm: float = 2.0,
) -> Float[Tensor, " b"]:
    """One minus the share of both borders that lies within tau of the other, in [0, 1].

    Nikolov et al. (2021), averaged over thresholds. The predicted border is judged by the lesion's
    distance map, the lesion's border by whether the ball of radius tau around it holds predicted
    border. One deviation: predicted border beyond tau is not worthless at once but fades over
    another tau, exp(-2 (excess / tau)^2), so that a border just out of tolerance is pulled in.
    Zero, with zero gradient, where the lesion is empty.

    Args:
        probability: the lesion head's soft prediction, in [0, 1].
        lesion: the reference mask.
        lesion_distance_mm: its ``functional.surface.signed_distance_mm``.
        spacing_mm: voxel size, the same for all cases. A sequence costs no device sync.
        tau_mm: tolerance, in mm.
    """
    soft = _focus(probability)
    eroded = _erode(soft)
    predicted, true = soft - eroded, lesion.to(soft) - _erode(lesion.to(soft))
    excess_mm = (lesion_distance_mm.to(soft).abs() - tau_mm).clamp(min=0)
    accepted = predicted * (-2 * (excess_mm / tau_mm).square()).exp()
    ball = _ball(shared_spacing(spacing_mm), tau_mm)
    reached = true * (_dilate(soft, ball) + _dilate(-eroded, ball))
    agreed = reduce(accepted + reached, "b ... -> b", "sum")
    border = reduce(predicted + true, "b ... -> b", "sum")
    return _where_present(lesion, 1 - agreed / border.clamp(min=1))


def soft_hd95_mm(
    probability: Float[Tensor, "b 1 *dhw"],
    lesion: Bool[Tensor, "b 1 *dhw"],
    lesion_distance_mm: Float[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
) -> Float[Tensor, " b"]:
    """A smooth stand-in for the 95 % Hausdorff distance, in mm.

    A quantile is the integral of its tail: with P(r) and S(r) the shares of predicted and of true
    border farther than r from the other, HD95 = integral over r of [P(r) > 5 % or S(r) > 5 %].
    Here [x > 5 %] becomes y^2 / (1 + y^2) with y = x / 5 %, and "or" becomes the probabilistic one.

    P(r) weighs the lesion's distance map by predicted border, as the one-sided loss of Karimi &
    Salcudean (2019) weighs it by error. S(r) would need the prediction's own distance map, which
    has no gradient in p. In its place stands the missed share of the lesion's core, its voxels
    deeper than r: erosion by e misses part of every core up to e, and nothing deeper. So a missed
    part counts with its own depth, however far off the nearest prediction is; that it is missed at
    all, Dice and NSD say. Zero, with zero gradient, where the lesion is empty.

    Args:
        probability: the lesion head's soft prediction, in [0, 1].
        lesion: the reference mask.
        lesion_distance_mm: its ``functional.surface.signed_distance_mm``.
        spacing_mm: voxel size, the same for all cases. A sequence costs no device sync.
    """
    soft = _focus(probability)
    border, inside = soft - _erode(soft), lesion.to(soft)
    levels, distance_mm = _distance_levels(soft), lesion_distance_mm.to(soft).abs()
    depth_mm = distance_mm + min(shared_spacing(spacing_mm))
    stray = _beyond(levels, distance_mm, border)
    core, missed = (_beyond(levels, depth_mm, part) for part in (inside, inside * (1 - soft)))
    too_far = _exceeds(_share(stray, border.flatten(1).sum(1, keepdim=True)))
    too_deep = _exceeds(_share(missed, core))
    either = too_far + too_deep - too_far * too_deep
    return _where_present(lesion, (either[:, :-1] * levels.diff()).sum(1))


def soft_hd95_loss(
    probability: Float[Tensor, "b 1 *dhw"],
    lesion: Bool[Tensor, "b 1 *dhw"],
    lesion_distance_mm: Float[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    tau_mm: float = 2.0,
) -> Float[Tensor, " b"]:
    """``soft_hd95_mm`` in tolerances, on a log scale: log(1 + HD95 / tau), 0.7 at tau, 3 at 20 tau.

    Millimetres run to a hundred where Dice and NSD end at one; the logarithm keeps the order, and a
    gradient everywhere, without letting one far speckle outweigh the rest of Eq. 2.
    """
    distance_mm = soft_hd95_mm(probability, lesion, lesion_distance_mm, spacing_mm)
    return (distance_mm / tau_mm).log1p()


def at_least_single(t: Tensor) -> Tensor:
    """The tensor in single precision, or in double if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _focus(probability: Tensor) -> Tensor:
    p = at_least_single(probability)
    return p.square() * (3 - 2 * p)


def _where_present(lesion: Tensor, value: Tensor) -> Tensor:
    return torch.where(lesion.flatten(1).any(1), value, torch.zeros_like(value))


def _erode(volume: Tensor) -> Tensor:
    """Minimum over a voxel and its face neighbours; beyond the grid is nothing, 0."""
    lowest, padded = volume, pad(volume, [1, 1] * (volume.ndim - 2))
    for axis in range(2, volume.ndim):
        for side in (0, 2):
            neighbour = padded
            for other in range(2, volume.ndim):
                start = side if other == axis else 1
                neighbour = neighbour.narrow(other, start, volume.shape[other])
            lowest = torch.minimum(lowest, neighbour)
    return lowest


def _dilate(volume: Tensor, offsets: Sequence[tuple[int, ...]]) -> Tensor:
    """Maximum over a voxel and its neighbours at the offsets, the first among equals.

    The search runs without a graph and keeps indices; one gather then carries the gradient.
    """
    values = volume.detach()
    highest = values.clone()
    index = torch.arange(values[0].numel(), device=values.device).view(1, *values.shape[1:])
    index = index.expand_as(values)
    source = index.clone()
    for offset in offsets:
        here, there = _overlap(offset, values.shape[2:])
        higher = values[there] > highest[here]
        highest[here] = torch.where(higher, values[there], highest[here])
        source[here] = torch.where(higher, index[there], source[here])
    return volume.flatten(1).gather(1, source.flatten(1)).view_as(volume)


def _ball(spacing_mm: Sequence[float], radius_mm: float) -> list[tuple[int, ...]]:
    """Voxel offsets within the radius, nearest first, without the centre."""
    within_mm = radius_mm + 1e-4
    reaches = [math.floor(within_mm / size) for size in spacing_mm]
    lengths_mm = {
        offset: math.hypot(*(k * size for k, size in zip(offset, spacing_mm, strict=True)))
        for offset in itertools.product(*(range(-reach, reach + 1) for reach in reaches))
    }
    inside = [offset for offset, mm in lengths_mm.items() if 0 < mm <= within_mm]
    return sorted(inside, key=lambda offset: lengths_mm[offset])


def _overlap(
    offset: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of the voxels that have a neighbour at the offset, and of those neighbours."""
    lengths = [max(size - abs(k), 0) for k, size in zip(offset, shape, strict=True)]
    here = tuple(slice(max(0, -k), max(0, -k) + n) for k, n in zip(offset, lengths, strict=True))
    there = tuple(slice(max(0, k), max(0, k) + n) for k, n in zip(offset, lengths, strict=True))
    return (slice(None), slice(None), *here), (slice(None), slice(None), *there)


def _distance_levels(like: Tensor) -> Tensor:
    """Radii from 0 to 300 mm, 0.04 mm apart at first and 4 % apart in the end."""
    top = math.log1p(LONGEST_DISTANCE_MM)
    return torch.linspace(0, top, DISTANCE_LEVELS, device=like.device, dtype=like.dtype).expm1()


def _beyond(levels: Tensor, distance_mm: Tensor, weight: Tensor) -> Tensor:
    """Total weight of the voxels farther than each level."""
    bins = torch.bucketize(distance_mm.to(levels).flatten(1), levels)
    histogram = weight.new_zeros(len(weight), len(levels) + 1)
    histogram = histogram.scatter_add(1, bins, weight.flatten(1))
    return histogram.flip(1).cumsum(1).flip(1)[:, 1:]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp(min=1e-3)


def _exceeds(share: Tensor) -> Tensor:
    odds = (share / HD_TAIL).square()
    return odds / (1 + odds)
