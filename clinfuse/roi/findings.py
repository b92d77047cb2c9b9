"""What only the CT shows inside the brain: haemorrhage and calcification."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter, label

BLOOD_HU = 50.0
"""Fresh blood is 50 to 100 HU, grey matter under 45; calcium is above 100."""

BRAIN_HU = 45.0
"""Voxels under it are brain, even where they are smoothed together with calcium beside them."""

SMOOTHING_MM = 1.5
SMALLEST_ML = 0.03
"""Noise of 8 HU in voxels of 4 mm³, smoothed so, does not reach blood over this volume."""

RIM_MM, RIM_VOXELS = 4.0, 2
"""Along the skull, partial volume and blur of bone look like blood, at least this far."""

SMALLEST_AT_RIM_ML = 0.5
"""What ends at that rim may be more of the same, unless it is as large as this."""


def ct_dense_findings(
    ct_hu: Shaped[np.ndarray, "d h w"],
    brain: Bool[np.ndarray, "d h w"],
    spacing_mm: Sequence[float],
) -> Bool[np.ndarray, "d h w"]:
    """Haemorrhage (50-100 HU) and calcification (above 100 HU) inside the brain.

    The brain's rim is left out, the rest is smoothed against noise, and specks are dropped. A
    thin subdural bleed lies within the rim and is not found.

    Args:
        ct_hu: in HU; an 8-bit window does not say how dense its brightest voxels are.
        brain: the intracranial space.
        spacing_mm: voxel size.
    """
    inside = _without_rim(brain, spacing_mm)
    dense = inside & (_smoothed(ct_hu, inside, spacing_mm) > BLOOD_HU) & (ct_hu > BRAIN_HU)
    parts, _ = label(dense, np.ones((3, 3, 3)))
    volume_ml = np.bincount(parts.ravel()) * np.prod(spacing_mm) / 1000
    at_rim = np.unique(parts[inside & ~_eroded(inside)])
    kept = volume_ml >= SMALLEST_ML
    kept[at_rim] &= volume_ml[at_rim] >= SMALLEST_AT_RIM_ML
    kept[0] = False
    return kept[parts]


def _without_rim(brain: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    rim_mm = max(RIM_MM, RIM_VOXELS * max(spacing_mm[1:]))
    padded = np.pad(brain, 1, mode="edge")
    deep = distance_transform_edt(padded, spacing_mm)[1:-1, 1:-1, 1:-1] > rim_mm
    return deep & _eroded(brain)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Less one layer of voxels, except where the scan ends."""
    return binary_erosion(mask, border_value=1)


def _smoothed(
    ct_hu: np.ndarray, inside: np.ndarray, spacing_mm: Sequence[float]
) -> Float[np.ndarray, "d h w"]:
    """Mean density of the neighbourhood, of voxels inside only; not across thick slices."""
    sigma = [SMOOTHING_MM / size if size < 2 * SMOOTHING_MM else 0 for size in spacing_mm]
    weight = gaussian_filter(inside.astype(np.float32), sigma)
    total = gaussian_filter(np.where(inside, ct_hu, 0).astype(np.float32), sigma)
    return total / np.maximum(weight, 1e-3)
