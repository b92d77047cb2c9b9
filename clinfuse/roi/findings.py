"""What only the CT shows inside the brain: haemorrhage and calcification."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.ndimage import (
    binary_erosion,
    distance_transform_edt,
    gaussian_filter,
    gaussian_filter1d,
    label,
)

BLOOD_HU = 50.0
"""Fresh blood is 50 to 100 HU, grey matter under 45; calcium is above 100."""

BRAIN_HU = 45.0
"""Voxels under it are brain, even where they are smoothed together with calcium beside them."""

GREY_HU, NOISE_STDS = 40.0, 4.5
"""A finding is denser than grey matter by so many standard deviations of the noise left: of 20,000
voxels of a coarse brain, fewer than one in ten brains has one by chance."""

SMOOTHING_MM, TRUNCATE = 1.5, 4.0
SMALLEST_ML = 0.03
"""Noise of 8 HU in voxels of 4 mm³, smoothed so, does not reach blood over this volume."""

RIM_MM, RIM_VOXELS = 4.0, 2
"""Along the skull, partial volume and blur of bone look like blood, at least this far."""

SMALLEST_AT_RIM_ML = 0.5
"""What ends at that rim may be more of the same, unless it is as large as this."""

LARGEST_SLAB = 2**22
"""Voxels that are smoothed, or whose distances are measured, at once: some forty bytes each."""

Box = tuple[slice, ...]


def ct_dense_findings(
    ct_hu: Shaped[np.ndarray, "d h w"],
    brain: Bool[np.ndarray, "d h w"],
    spacing_mm: Sequence[float],
) -> Bool[np.ndarray, "d h w"]:
    """Haemorrhage (50-100 HU) and calcification (above 100 HU) inside the brain.

    The brain's rim is left out, the rest is smoothed against noise, and specks are dropped. A
    thin subdural bleed lies within the rim and is not found. In a scan so noisy that grey matter
    would reach 50 HU by chance, what is found is denser than that.

    Args:
        ct_hu: in HU; an 8-bit window does not say how dense its brightest voxels are.
        brain: the intracranial space.
        spacing_mm: voxel size.
    """
    sigmas = [SMOOTHING_MM / size if size < 2 * SMOOTHING_MM else 0.0 for size in spacing_mm]
    found = np.zeros(brain.shape, bool)
    if brain.any():
        box = _box(brain, [_reach(sigma) + 2 for sigma in sigmas])
        found[box] = _findings(ct_hu[box], brain[box], spacing_mm, sigmas)
    return found


def _findings(
    ct_hu: np.ndarray, brain: np.ndarray, spacing_mm: Sequence[float], sigmas: Sequence[float]
) -> np.ndarray:
    inside = _without_rim(brain, spacing_mm)
    level_hu = max(BLOOD_HU, GREY_HU + NOISE_STDS * noise_left(ct_hu, inside, sigmas))

    def is_dense(ct_hu: np.ndarray, inside: np.ndarray) -> np.ndarray:
        return inside & (_smoothed(ct_hu, inside, sigmas) > level_hu) & (ct_hu > BRAIN_HU)

    dense = _slab_by_slab(is_dense, _reach(sigmas[0]), ct_hu, inside)
    if not dense.any():
        return dense
    box = _box(dense)
    parts, _ = label(dense[box], np.ones((3, 3, 3)))
    volume_ml = np.bincount(parts.ravel()) * np.prod(spacing_mm) / 1000
    at_rim = np.unique(parts[(inside & ~_eroded(inside))[box]])
    kept = volume_ml >= SMALLEST_ML
    kept[at_rim] &= volume_ml[at_rim] >= SMALLEST_AT_RIM_ML
    kept[0] = False
    dense[box] = kept[parts]
    return dense


def _without_rim(brain: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    rim_mm = max(RIM_MM, RIM_VOXELS * max(spacing_mm[1:]))

    def is_deep(brain: np.ndarray) -> np.ndarray:
        if brain.all():
            return brain
        return distance_transform_edt(brain, spacing_mm) > rim_mm

    padded = np.pad(brain, 1, mode="edge")
    deep = _slab_by_slab(is_deep, int(rim_mm / spacing_mm[0]) + 1, padded)
    return deep[1:-1, 1:-1, 1:-1] & _eroded(brain)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Less one layer of voxels, except where the scan ends."""
    return binary_erosion(mask, border_value=1)


def noise_left(
    ct_hu: Shaped[np.ndarray, "d h w"],
    inside: Bool[np.ndarray, "d h w"],
    sigmas: Sequence[float],
) -> float:
    """Standard deviation, in HU, of what a Gaussian of ``sigmas`` voxels leaves of white noise.

    Immerkær (1996), "Fast noise variance estimation": second differences along both axes of a
    slice, which ramps and straight edges don't have, and of their sizes the median.
    """
    rows = max(LARGEST_SLAB // ct_hu[0].size, 1)
    parts = []
    for start in range(0, len(ct_hu), rows):
        differences = ct_hu[start : start + rows].astype(np.float32)
        for axis in (1, 1, 2, 2):
            differences = np.diff(differences, axis=axis)
        is_within = binary_erosion(inside[start : start + rows], np.ones((1, 3, 3)))
        parts.append(np.abs(differences[is_within[:, 1:-1, 1:-1]]))
    sizes = np.concatenate(parts)
    if not len(sizes):
        return 0.0
    noise_hu = 1.4826 / 6 * np.median(sizes, overwrite_input=True)
    impulse = np.eye(1, 65, 32)[0]
    gains = [np.linalg.norm(gaussian_filter1d(impulse, sigma)) for sigma in sigmas if sigma]
    return float(noise_hu * np.prod(gains))


def _smoothed(
    ct_hu: np.ndarray, inside: np.ndarray, sigmas: Sequence[float]
) -> Float[np.ndarray, "d h w"]:
    """Mean density of the neighbourhood, of voxels inside only; not across thick slices."""
    inside_hu = np.where(inside, ct_hu, 0).astype(np.float32)
    weight = gaussian_filter(inside.astype(np.float32), sigmas, truncate=TRUNCATE)
    total = gaussian_filter(inside_hu, sigmas, truncate=TRUNCATE)
    return total / np.maximum(weight, 1e-3)


def _reach(sigma: float) -> int:
    """Voxels that a Gaussian sees to either side, as ``gaussian_filter`` counts them."""
    return int(TRUNCATE * sigma + 0.5)


def _box(mask: np.ndarray, margin: Sequence[int] = (0, 0, 0)) -> Box:
    """The least box around a mask that is not empty, and so many voxels more within the scan."""
    box = []
    for axis, more in enumerate(margin):
        seen = np.flatnonzero(mask.any(tuple(each for each in range(3) if each != axis)))
        box.append(slice(max(seen[0] - more, 0), seen[-1] + 1 + more))
    return tuple(box)


def _slab_by_slab(
    of: Callable[..., np.ndarray], reach: int, *volumes: np.ndarray
) -> Bool[np.ndarray, "d h w"]:
    """What ``of`` says of the volumes, from ``LARGEST_SLAB`` voxels at once.

    Args:
        of: says of each voxel what depends on those up to ``reach`` slices away.
        reach: in slices of the first axis.
        volumes: of one shape.
    """
    depth, rows = len(volumes[0]), max(LARGEST_SLAB // volumes[0][0].size, 1)
    said = np.empty(volumes[0].shape, bool)
    for start in range(0, depth, rows):
        stop, low = min(start + rows, depth), max(start - reach, 0)
        part = of(*(volume[low : stop + reach] for volume in volumes))
        said[start:stop] = part[start - low : stop - low]
    return said
