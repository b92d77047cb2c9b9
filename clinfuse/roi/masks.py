"""Head, bone and brain from intensities alone: classical masks for studies that bring none.

Arrays are (d, h, w) with d from inferior to superior. They are made to work on clinical slices
(0.9 x 0.9 x 5 mm) as on isotropic 1 to 4 mm, on HU and on 8-bit windowed CT, where bone saturates.
They are no match for a trained segmentation: what they give is said to be ``segmented`` in tables.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Shaped
from scipy.ndimage import binary_fill_holes, binary_opening, distance_transform_edt, label

BONE_HU, BONE_8BIT = 300.0, 240.0
"""Bone is above: trabecular bone and partial volume of thin plates are; blood and contrast not."""

TABLE_HU = 550.0
"""Half-way from soft tissue to compact bone: a voxel at the skull's edge that is half bone."""

DIPLOE_MM = 5.0
"""Half-width of spongy bone, which may be under ``TABLE_HU``, between the skull's tables."""

TISSUE_HU, TISSUE_8BIT = (-30.0, 120.0), (12.0, 240.0)
"""Brain, CSF and fresh blood are between; fat and air below, thin bone and calcium above."""

RIM_MM = 1.5
"""Between brain and bone partial volume is neither; the brain is grown this far into it."""

NECK_MM = 3.0
"""Half-width of the passages that are cut: optic nerve, fissures and foramina of the skull base."""


def head_mask(volume: Shaped[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The patient in an MRI or CT: the largest object that is not background, filled per slice.

    Background is what lies under 15 % of the way from the minimum to the 99th percentile. The
    table and the head frame are cut off where they touch in less than three voxels.
    """
    low, high = np.percentile(volume, (0, 99))
    object_ = volume > low + 0.15 * (high - low)
    opened = binary_opening(object_, np.ones((1, 3, 3), bool))
    return _filled(_largest(opened if opened.any() else object_))


def bone_mask(
    ct: Shaped[np.ndarray, "d h w"], spacing_mm: Sequence[float], is_hu: bool
) -> Bool[np.ndarray, "d h w"]:
    """The skull, with face and vertebrae where they are in view.

    Dense voxels of the head, less small specks and less what floats inside the skull without
    touching it: calcification, haemorrhage, coils. In HU the edge is where a voxel is half bone,
    which on thick slices is far within what is dense, and spongy bone counts between two tables.
    An 8-bit window does not tell, and bone comes out thicker. A head frame that touches counts.

    Args:
        ct: in HU, or in an 8-bit window.
        spacing_mm: voxel size.
        is_hu: which of the two.
    """
    dense = (ct > (BONE_HU if is_hu else BONE_8BIT)) & head_mask(ct)
    parts, count = label(dense, np.ones((3, 3, 3)))
    if count == 0:
        return dense
    volume_ml = np.bincount(parts.ravel()) * np.prod(spacing_mm) / 1000
    volume_ml[0] = 0
    skull = parts == volume_ml.argmax()
    outside = np.unique(parts[dense & ~_filled(skull)])
    kept = np.intersect1d(outside, np.flatnonzero(volume_ml > 0.5))
    bone = skull | np.isin(parts, kept)
    return bone & _closed(bone & (ct > TABLE_HU), spacing_mm) if is_hu else bone


def brain_mask(
    ct: Shaped[np.ndarray, "d h w"], bone: Bool[np.ndarray, "d h w"], spacing_mm: Sequence[float]
) -> Bool[np.ndarray, "d h w"]:
    """What the skull encloses: brain, CSF and all that is in them, without bone.

    Soft tissue that sees bone in nearly all directions of its slice, cut at narrow passages, of
    which the largest piece is kept and its holes (air, dark CSF) are filled. Population averages,
    whose skull base is blurred away, give a brain with gaps there.

    Args:
        ct: in HU, or in an 8-bit window; which one shows in its minimum.
        bone: as ``bone_mask`` gives it.
        spacing_mm: voxel size.
    """
    low, high = TISSUE_HU if ct.min() < -200 else TISSUE_8BIT
    inside = (ct > low) & ~bone & enclosed(bone | (ct >= high))
    core = _largest(distance_transform_edt(inside & (ct < high), spacing_mm) > NECK_MM)
    if not core.any():
        return core
    near = distance_transform_edt(~core, spacing_mm) <= NECK_MM + RIM_MM
    return _filled(near & inside) & ~bone


def _closed(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """The mask with gaps of up to ``DIPLOE_MM`` to both sides closed."""
    radius = [int(DIPLOE_MM / size + 1e-6) for size in reversed(spacing_mm)]
    closed = sitk.BinaryMorphologicalClosing(
        sitk.GetImageFromArray(mask.astype(np.uint8)), radius, sitk.sitkBall
    )
    return sitk.GetArrayFromImage(closed) > 0


def enclosed(bone: Bool[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """Voxels from which 6 of 8 rays in the slice meet bone: gaps are fissures or a craniotomy."""
    rays = [ray for ray in product((-1, 0, 1), repeat=2) if ray != (0, 0)]
    hits = np.zeros(bone.shape, np.uint8)
    for ray in rays:
        hits += _shadow(bone, *ray)
    return hits >= 6


def _shadow(bone: np.ndarray, dh: int, dw: int) -> np.ndarray:
    """Whether there is bone somewhere towards (dh, dw) of each voxel."""
    if dh == 0:
        flipped = bone if dw < 0 else bone[..., ::-1]
        shadow = np.logical_or.accumulate(flipped, axis=2)
        return shadow if dw < 0 else shadow[..., ::-1]
    rows = bone if dh < 0 else bone[:, ::-1]
    shadow = rows.copy()
    for row in range(1, rows.shape[1]):
        before = shadow[:, row - 1]
        if dw < 0:
            shadow[:, row, 1:] |= before[:, :-1]
        elif dw > 0:
            shadow[:, row, :-1] |= before[:, 1:]
        else:
            shadow[:, row] |= before
    return shadow if dh < 0 else shadow[:, ::-1]


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, count = label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask with its holes filled slice by slice."""
    return np.stack([binary_fill_holes(plane) for plane in mask])
