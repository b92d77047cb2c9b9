"""The rigid motion between two scans of a head: many coarse starts, few refined.

Mattes mutual information (Mattes et al. 2003) by SimpleITK, on a pyramid in millimetres, so that
thick slices are smoothed only within their plane. Run it ``in_one_thread``: ITK adds the parts of a
histogram in the order in which threads finish, and two runs of one seed then differ in last bits.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from scipy.ndimage import binary_dilation

from clinfuse.roi.masks import head_mask

HU_WINDOW = (-1000.0, 1000.0)
"""Air to bone. Cut at -200 HU instead, the edge of the skin in CT lies outside that in MRI."""

HU_BELOW = -200.0
"""A scan with values below is in HU."""

LEVELS_MM = (8.0, 4.0, 2.0)
"""Voxel sizes of the pyramid; axes that are coarser already stay as they are."""

RIM_MM = 12.0
"""How far about the head of the fixed scan is looked at: skin against air, but not the table."""

HEAD_RADIUS_MM = 60.0
"""A turn by one radian moves a head about as much as this translation."""

COARSE_STARTS, FINE_STARTS = 6, 3
"""How many starts are followed at the coarsest level, and how many at the next."""

SAMPLES, BINS = 60_000, 50
"""Points and histogram bins of the metric: fewer lead an ADC map, which shows no scalp, astray."""


POINTS = 250
"""At about so many points of the head motions are compared."""


@dataclass(frozen=True)
class Level:
    """Both scans at one voxel size, and where in the fixed one the metric looks."""

    fixed: sitk.Image
    moving: sitk.Image
    mask: sitk.Image
    spacing_mm: float
    seen: sitk.Image | None = None
    """Where the moving scan was measured; not asked where None."""


@dataclass(frozen=True)
class Pyramid:
    """Two scans prepared for searching.

    Attributes:
        levels: from coarse to fine.
        fixed_head, moving_head: on the grids of the scans, as 8-bit images.
        points_mm: of the fixed head, evenly spread, at which motions are compared.
        moving_centre_mm: of the moving head.
    """

    levels: tuple[Level, ...]
    fixed_head: sitk.Image
    moving_head: sitk.Image
    points_mm: Float[np.ndarray, "n 3"]
    moving_centre_mm: Float[np.ndarray, " 3"]

    @property
    def centre_mm(self) -> Float[np.ndarray, " 3"]:
        """Of the fixed head: what motions turn about."""
        return self.points_mm.mean(axis=0)


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Everything of ITK in one thread, so that the same call gives the same bits."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def pyramid(fixed: sitk.Image, moving: sitk.Image) -> Pyramid:
    """Both scans windowed, smoothed and resampled to ``LEVELS_MM``.

    At the finest level the padding of the moving scan is left out, and one voxel beside it: where
    a scan was cut, its edge is as strong as the skull and is not the patient's. The coarser levels
    look at it, since a scan whose air is constant has no skin without it.
    """
    fixed_head, moving_head = head_image(fixed), head_image(moving)
    measured = _measured(moving)
    fixed, moving = _windowed(fixed), _windowed(moving)
    levels = []
    for spacing_mm in LEVELS_MM:
        coarse = _coarser(fixed, spacing_mm)
        near = sitk.Resample(fixed_head, coarse, sitk.Transform(), sitk.sitkNearestNeighbor)
        mask = _dilated(near, RIM_MM)
        levels.append(Level(coarse, _coarser(moving, spacing_mm), mask, spacing_mm))
    levels[-1] = replace(levels[-1], seen=_seen(measured, LEVELS_MM[-1]))
    points_mm = _points_mm(levels[0].fixed, fixed_head)
    moving_centre_mm = _points_mm(_coarser(moving, LEVELS_MM[0]), moving_head).mean(axis=0)
    return Pyramid(tuple(levels), fixed_head, moving_head, points_mm, moving_centre_mm)


def mirrored(pyramid: Pyramid) -> Pyramid:
    """The same with the moving scan exchanged left for right about the middle of its grid."""
    levels = tuple(
        replace(
            level,
            moving=_mirrored(level.moving),
            seen=None if level.seen is None else _mirrored(level.seen),
        )
        for level in pyramid.levels
    )
    head = _mirrored(pyramid.moving_head)
    centre_mm = _points_mm(levels[0].moving, head).mean(axis=0)
    return replace(pyramid, levels=levels, moving_head=head, moving_centre_mm=centre_mm)


def _mirrored(image: sitk.Image) -> sitk.Image:
    upright = sitk.DICOMOrient(image, "RAS")
    flipped = sitk.GetImageFromArray(sitk.GetArrayFromImage(upright)[:, :, ::-1])
    flipped.CopyInformation(upright)
    return flipped


def search(pyramid: Pyramid, seed: int, levels: int | None = None) -> list[sitk.Euler3DTransform]:
    """Rigid motions from fixed to moving points that fit best, the best one first.

    All starts are looked at and ``COARSE_STARTS`` of them followed at the coarsest level; of where
    they arrive, up to ``FINE_STARTS`` different places are followed at the next, and the best of
    those to the end. What comes after the best are the others, for judging how clear it was.

    Args:
        pyramid: of both scans.
        seed: of the starts and of the points the metric looks at.
        levels: stop after that many.
    """
    coarse, middle, *fine = pyramid.levels[:levels]
    starts = _best(coarse, list(_starts(pyramid, seed)))[:COARSE_STARTS]
    arrived = _best(coarse, [refined(coarse, start, seed) for start in starts])
    places = _different(arrived, pyramid.points_mm, least_mm=middle.spacing_mm)[:FINE_STARTS]
    best, *others = _best(middle, [refined(middle, place, seed) for place in places])
    for level in fine:
        best = refined(level, best, seed)
    return [best, *_different([best, *others], pyramid.points_mm, least_mm=middle.spacing_mm)[1:]]


def refined(level: Level, start: sitk.Euler3DTransform, seed: int) -> sitk.Euler3DTransform:
    """The rigid motion that gradient descent of mutual information from ``start`` arrives at.

    Args:
        level: both scans at one voxel size.
        start: stays as it is.
        seed: of the points the metric looks at.
    """
    method = metric(level)
    share = min(SAMPLES / level.fixed.GetNumberOfPixels(), 1.0)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(share, seed + 1)  # ITK takes zero for the clock
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=level.spacing_mm / 2,
        minStep=level.spacing_mm / 100,
        numberOfIterations=100,
        relaxationFactor=0.7,  # at 0.5 a few zigzags end it early
        gradientMagnitudeTolerance=1e-8,
    )
    method.SetOptimizerScales([HEAD_RADIUS_MM**2] * 3 + [1.0] * 3)
    transform = sitk.Euler3DTransform(start)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(level.fixed, level.moving)
    except RuntimeError:  # the scans came apart
        return start
    return transform


def mutual_information(level: Level, transform: sitk.Transform) -> float:
    """Mattes mutual information in nats over the fixed head; zero where the scans do not meet."""
    method = metric(level)
    method.SetInitialTransform(transform)
    try:
        return -float(method.MetricEvaluate(level.fixed, level.moving))
    except RuntimeError:
        return 0.0


def metric(level: Level) -> sitk.ImageRegistrationMethod:
    """A registration that has its metric and nothing else yet."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(level.mask)
    if level.seen is not None:
        method.SetMetricMovingMask(level.seen)
    method.MetricUseFixedImageGradientFilterOff()  # it smooths by the widest voxel side:
    method.MetricUseMovingImageGradientFilterOff()  # at 5 mm its gradients led downhill
    method.SetInterpolator(sitk.sitkLinear)
    return method


def target_error_mm(
    found: sitk.Transform, true: sitk.Transform, points_mm: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, " n"]:
    """How far apart two transforms put each point: the target registration error where one is true.

    Args:
        found, true: from fixed to moving points.
        points_mm: of the fixed image, LPS.
    """
    apart = [
        np.subtract(found.TransformPoint(point), true.TransformPoint(point))
        for point in points_mm.tolist()
    ]
    return np.linalg.norm(apart, axis=1)


def apart_mm(one: sitk.Transform, other: sitk.Transform, points_mm: np.ndarray) -> float:
    """Root mean square of ``target_error_mm``: one number for a head."""
    return float(np.sqrt(np.mean(target_error_mm(one, other, points_mm) ** 2)))


def head_points_mm(image: sitk.Image) -> Float[np.ndarray, "n 3"]:
    """Points evenly spread over the head of a scan, for ``target_error_mm``."""
    return _points_mm(_coarser(_windowed(image), LEVELS_MM[0]), head_image(image))


def moved_by(image: sitk.Image, motion: sitk.Transform) -> sitk.Image:
    """The image moved(q) = image(motion(q)), by its origin and direction alone.

    Args:
        image: stays as it is.
        motion: rigid, Euler3DTransform or its inverse.
    """
    back = motion.GetInverse()
    start, *ends = (
        np.array(back.TransformPoint(point.tolist()))
        for point in np.vstack([np.zeros(3), np.eye(3)]) + image.GetOrigin()
    )
    turn = np.stack([end - start for end in ends], axis=1)
    moved = sitk.Image(image)
    moved.SetOrigin(start.tolist())
    moved.SetDirection((turn @ np.array(image.GetDirection()).reshape(3, 3)).ravel().tolist())
    return moved


def head_image(image: sitk.Image) -> sitk.Image:
    """``clinfuse.roi.masks.head_mask`` of a scan, on its grid."""
    upright = sitk.DICOMOrient(image, "RAS")
    mask = sitk.GetImageFromArray(head_mask(sitk.GetArrayFromImage(upright)).astype(np.uint8))
    mask.CopyInformation(upright)
    return sitk.Resample(mask, image, sitk.Transform(), sitk.sitkNearestNeighbor)


def _windowed(image: sitk.Image) -> sitk.Image:
    values = sitk.GetArrayViewFromImage(image)
    if values.min() < HU_BELOW:
        return sitk.Clamp(image, sitk.sitkFloat32, *HU_WINDOW)
    low, high = np.percentile(values, (0.1, 99.9))
    return sitk.Clamp(image, sitk.sitkFloat32, float(low), float(high))


def _measured(image: sitk.Image) -> sitk.Image:
    """One where a scan has values, zero in the padding about it, whose value is the smallest."""
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.BinaryFillhole(sitk.Cast(image > lowest, sitk.sitkUInt8), False, 1.0)


def _seen(measured: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Voxels of which everything was measured, and the voxels beside them too."""
    whole = _coarser(sitk.Cast(measured, sitk.sitkFloat32), spacing_mm) > 0.99
    return sitk.BinaryErode(whole, [1, 1, 1], sitk.sitkBox, 0.0, 1.0, True)


def _coarser(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """The same field of view in voxels of about ``spacing_mm``; coarser axes stay as they are.

    Smoothed by sigma = sqrt((k² - 1) / (8 ln 2)) voxels at k times the size (Cardoso et al. 2015).
    """
    old_mm, old_size = np.array(image.GetSpacing()), np.array(image.GetSize())
    size = np.maximum(np.rint(old_size * old_mm / np.maximum(spacing_mm, old_mm)), 1).astype(int)
    new_mm = old_size * old_mm / size
    wider = np.maximum(new_mm / old_mm, 1.0)
    sigma_mm = np.sqrt((wider**2 - 1) / (8 * math.log(2))) * old_mm
    smooth = sitk.DiscreteGaussian(image, (sigma_mm**2).tolist(), maximumKernelWidth=64)
    origin = image.TransformContinuousIndexToPhysicalPoint(((new_mm / old_mm - 1) / 2).tolist())
    return sitk.Resample(
        smooth, size.tolist(), sitk.Transform(), sitk.sitkLinear, origin, new_mm.tolist(),
        image.GetDirection(), 0.0, sitk.sitkFloat32,
    )  # fmt: skip


def _dilated(mask: sitk.Image, rim_mm: float) -> sitk.Image:
    voxels = sitk.GetArrayFromImage(mask).astype(bool)
    steps = [max(round(rim_mm / size), 1) for size in reversed(mask.GetSpacing())]
    for axis, count in enumerate(steps):
        line = np.ones([2 * count + 1 if axis == a else 1 for a in range(3)], bool)
        voxels = binary_dilation(voxels, line)
    grown = sitk.GetImageFromArray(voxels.astype(np.uint8))
    grown.CopyInformation(mask)
    return grown


def _points_mm(grid: sitk.Image, head: sitk.Image) -> Float[np.ndarray, "n 3"]:
    """Centres of the voxels of ``grid`` that lie in the head; of all where there is none."""
    inside = sitk.Resample(head, grid, sitk.Transform(), sitk.sitkNearestNeighbor)
    indices = np.argwhere(sitk.GetArrayFromImage(inside))[:, ::-1]
    if len(indices) == 0:
        indices = np.argwhere(np.ones(grid.GetSize(), bool))
    indices = indices[:: max(len(indices) // POINTS, 1)]
    axes = np.array(grid.GetDirection()).reshape(3, 3) * grid.GetSpacing()
    return np.array(grid.GetOrigin()) + indices @ axes.T


def _starts(pyramid: Pyramid, seed: int) -> Iterator[sitk.Euler3DTransform]:
    """Head on head, turned about every axis and shifted along the body, all a little jittered."""
    jitter = np.random.default_rng(seed)
    centre = pyramid.centre_mm
    turns_deg, shifts_mm = (-20.0, 0.0, 20.0), (-30.0, 0.0, 30.0)
    for *turn_deg, shift_mm in product(turns_deg, turns_deg, turns_deg, shifts_mm):
        turn = np.radians(np.array(turn_deg) + jitter.uniform(-4, 4, 3))
        move = pyramid.moving_centre_mm - centre + (0, 0, shift_mm) + jitter.uniform(-4, 4, 3)
        yield sitk.Euler3DTransform(centre.tolist(), *turn.tolist(), move.tolist())


def _best(level: Level, transforms: Sequence[sitk.Euler3DTransform]) -> list[sitk.Euler3DTransform]:
    return sorted(transforms, key=lambda each: -mutual_information(level, each))


def _different(
    transforms: Sequence[sitk.Euler3DTransform], points_mm: np.ndarray, least_mm: float
) -> list[sitk.Euler3DTransform]:
    """The transforms without those that lie close to one before them."""
    kept: list[sitk.Euler3DTransform] = []
    for each in transforms:
        if all(apart_mm(each, other, points_mm) > least_mm for other in kept):
            kept.append(each)
    return kept
