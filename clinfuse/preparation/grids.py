"""Images and masks carried onto another grid: smoothed where it is coarser, volumes kept."""

import logging
import math
from itertools import product

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float

log = logging.getLogger(__name__)

VOLUME_TOLERANCE = 0.02
"""A mask may gain or lose this fraction of its volume on another grid."""

GRID_TOLERANCE_MM = 0.05
"""Corners of two grids may differ by this much (header rounding) and still be called one grid."""

SAMPLES = 3
"""Samples of the smaller voxel along each axis, from which partial volume is counted."""

COUNTING_ERROR = 0.005
"""What the volume so counted may be off."""


def on_grid(
    image: sitk.Image,
    grid: sitk.Image,
    transform: sitk.Transform | None = None,
    is_label: bool = False,
    fill: float | int = 0.0,
) -> sitk.Image:
    """The image on the voxels of ``grid``, where the two lie in millimetres.

    Images are interpolated linearly, in float32; along axes that get coarser they are smoothed
    first by the Gaussian that the wider voxel calls for, sigma = sqrt((k² - 1) / (8 ln 2)) voxels
    at k times the size (Cardoso et al. 2015).

    Labels keep their values and their type. They are carried with nearest neighbour. On voxels as
    thick as a lesion that is a lottery, a few per cent of volume won or lost: where a mask of one
    label would come out off by 2 % or so, it is instead given to the voxels it fills most, as many
    as keep its volume. A mask that the grid shows in part keeps the volume of that part.
    What no number of whole voxels keeps within 2 % is said in the log.

    Args:
        grid: where to; its voxels are not looked at.
        transform: from points of ``grid`` to points of ``image`` in LPS millimetres, as a
            registration with ``grid`` as the fixed image gives it; None for one common frame.
        is_label: whether values are names.
        fill: value of an image outside its field of view (air, for CT in HU: -1024). Masks are 0.

    Raises:
        ValueError: for images that are not 3-D.
    """
    for what, given in (("image", image), ("grid", grid)):
        if given.GetDimension() != 3:
            raise ValueError(f"expected a 3-D {what}, got {given.GetDimension()}-D")
    transform = sitk.Transform(3, sitk.sitkIdentity) if transform is None else transform
    if not is_label:
        smooth = _smoothed(sitk.Cast(image, sitk.sitkFloat32), grid)
        return sitk.Resample(smooth, grid, transform, sitk.sitkLinear, fill, sitk.sitkFloat32)
    nearest = sitk.Resample(image, grid, transform, sitk.sitkNearestNeighbor, 0)
    labels = np.unique(sitk.GetArrayViewFromImage(image))
    labels = labels[labels != 0]
    if len(labels) != 1:
        return nearest
    return _volume_kept(image != 0, nearest, transform, labels[0].item())


def is_on(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform | None = None) -> bool:
    """Whether an image lies on a grid already, but for the rounding of headers.

    Args:
        image: what may lie there.
        grid: its voxels are not looked at.
        transform: as in ``on_grid``.
    """
    if image.GetSize() != grid.GetSize():
        return False
    corners = product(*((0, n - 1) for n in grid.GetSize()))
    way = sitk.Transform(3, sitk.sitkIdentity) if transform is None else transform
    return all(
        math.dist(
            image.TransformIndexToPhysicalPoint(c),
            way.TransformPoint(grid.TransformIndexToPhysicalPoint(c)),
        )
        <= GRID_TOLERANCE_MM
        for c in corners
    )


def volume_ml(mask: sitk.Image) -> float:
    """Volume of the voxels that are not zero."""
    return int(np.count_nonzero(sitk.GetArrayViewFromImage(mask))) * _voxel_ml(mask)


def _voxel_ml(image: sitk.Image) -> float:
    return math.prod(image.GetSpacing()) / 1000


def _smoothed(image: sitk.Image, grid: sitk.Image) -> sitk.Image:
    coarser = np.maximum(_extent_mm(grid, image) / np.array(image.GetSpacing()), 1.0)
    variance = (coarser**2 - 1) / (8 * math.log(2))
    variance[variance < 0.01] = 0.0  # rounding of headers
    if not variance.any():
        return image
    # the kernel of the widest Gaussian, cut at 1 % of its sum
    width = 2 * math.ceil(4 * math.sqrt(variance.max())) + 1
    return sitk.DiscreteGaussian(image, variance.tolist(), width, 0.01, False)


def _extent_mm(grid: sitk.Image, image: sitk.Image) -> Float[np.ndarray, " 3"]:
    """How wide a voxel of ``grid`` is along each axis of ``image``."""
    from_grid = _axes(image).T @ _axes(grid)
    return np.linalg.norm(from_grid * np.array(grid.GetSpacing()), axis=1)


def _axes(image: sitk.Image) -> Float[np.ndarray, "3 3"]:
    return np.array(image.GetDirection()).reshape(3, 3)


def _volume_kept(
    mask: sitk.Image, nearest: sitk.Image, transform: sitk.Transform, label: float | int
) -> sitk.Image:
    """``nearest`` if it keeps the volume that the mask has on its grid, else the fullest voxels."""
    window = _window(mask, nearest, transform)
    if window is None:
        return nearest
    start, size = window
    part = sitk.RegionOfInterest(nearest, size, start)
    filled = sitk.GetArrayFromImage(_filled_fraction(mask, part, transform))
    voxels = float(filled.sum())
    kept = int(np.count_nonzero(sitk.GetArrayViewFromImage(part)))
    if voxels == 0 or abs(kept / voxels - 1) <= VOLUME_TOLERANCE - COUNTING_ERROR:
        return nearest
    count = max(round(voxels), 1)
    if abs(count / voxels - 1) > VOLUME_TOLERANCE:
        log.warning(
            "a mask of %.3g ml is %.3g ml on voxels of %.3g ml each",
            voxels * _voxel_ml(nearest), count * _voxel_ml(nearest), _voxel_ml(nearest),
        )  # fmt: skip
    fullest = np.argsort(-filled, axis=None, kind="stable")[:count]
    array = np.zeros(filled.shape, sitk.GetArrayViewFromImage(nearest).dtype)
    array.flat[fullest] = label
    result = sitk.Image(nearest.GetSize(), nearest.GetPixelID())
    result.CopyInformation(nearest)
    return sitk.Paste(result, sitk.GetImageFromArray(array), size, destinationIndex=start)


def _window(
    mask: sitk.Image, grid: sitk.Image, transform: sitk.Transform
) -> tuple[list[int], list[int]] | None:
    """First voxel and size of the box of ``grid`` that the mask reaches into."""
    reach = np.ceil(_extent_mm(grid, mask) / np.array(mask.GetSpacing())).astype(int) + 1
    wide = sitk.BinaryDilate(mask, reach.tolist(), sitk.sitkBox)
    there = sitk.Resample(wide, grid, transform, sitk.sitkNearestNeighbor, 0)
    voxels = np.nonzero(sitk.GetArrayFromImage(there))
    if not voxels[0].size:
        return None
    start = [int(axis.min()) for axis in voxels[::-1]]
    return start, [int(axis.max()) - low + 1 for axis, low in zip(voxels[::-1], start, strict=True)]


def _filled_fraction(mask: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> sitk.Image:
    """How much of each voxel of ``grid`` the mask fills, from 0 to 1, by counting samples in it."""
    ratio = np.array(grid.GetSpacing()) / _extent_mm(mask, grid)
    samples = (SAMPLES * np.ceil(ratio)).astype(int)
    step = np.array(grid.GetSpacing()) / samples
    size = (np.array(grid.GetSize()) * samples).tolist()
    fine = sitk.Resample(
        mask,
        size,
        transform,
        sitk.sitkNearestNeighbor,
        grid.TransformContinuousIndexToPhysicalPoint((-0.5 + 0.5 / samples).tolist()),
        step.tolist(),
        grid.GetDirection(),
        0,
    )
    counts = sitk.GetArrayFromImage(fine).reshape(
        [n for axis in (2, 1, 0) for n in (grid.GetSize()[axis], int(samples[axis]))]
    )
    fraction = sitk.GetImageFromArray(counts.mean(axis=(1, 3, 5), dtype=np.float32))
    fraction.CopyInformation(grid)
    return fraction
