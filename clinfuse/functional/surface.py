"""Overlap and surface distance of masks: metrics, computed on CPU and without gradients.

A mask's surface is its border voxels: those with a face on the outside of the mask or of the grid.
Distances join voxel centres, in mm. This is MONAI's definition; the ``surface-distance`` package
weights border elements by area instead and agrees within about a voxel.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from torch import Tensor

from clinfuse.functional.spacing import SpacingMm, spacing_of_each

NO_SURFACE_MM = 1e3
"""Distance to the border of an empty mask: far beyond any head."""


def dice(pred: Bool[Tensor, "b 1 *dhw"], target: Bool[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """2 |P ∩ T| / (|P| + |T|), in [0, 1]; NaN where both are empty.

    Dice (1945).
    """
    overlap = (pred & target).flatten(1).sum(1)
    return 2 * overlap / (pred.flatten(1).sum(1) + target.flatten(1).sum(1))


def nsd(
    pred: Bool[Tensor, "b 1 *dhw"],
    target: Bool[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    tau_mm: float,
) -> Float[Tensor, " b"]:
    """Share of both surfaces that lies within ``tau_mm`` of the other, in [0, 1].

    Normalised surface distance, Nikolov et al. (2021). NaN where both masks are empty, 0 where
    one is.
    """

    def share(forth: np.ndarray, back: np.ndarray) -> float:
        distances = np.concatenate((forth, back))
        return float((distances <= tau_mm).mean()) if len(distances) else float("nan")

    return _for_each(pred, target, spacing_mm, share)


def hd95(
    pred: Bool[Tensor, "b 1 *dhw"], target: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, " b"]:
    """The larger of the two directed 95th percentiles of surface distance, in mm.

    Huttenlocher et al. (1993), robust form. NaN where either mask is empty: no distance is
    defined then, and a large stand-in would only measure itself.
    """

    def larger(forth: np.ndarray, back: np.ndarray) -> float:
        if not (len(forth) and len(back)):
            return float("nan")
        return float(max(np.percentile(forth, 95), np.percentile(back, 95)))

    return _for_each(pred, target, spacing_mm, larger)


def surface_distances(
    pred: Bool[np.ndarray, "*dhw"],
    target: Bool[np.ndarray, "*dhw"],
    spacing_mm: Sequence[float | int],
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " t"]]:
    """Distances in mm from each border voxel of ``pred`` to the border of ``target``, and back.

    Infinite where the other mask is empty.
    """
    box = _bounding_box(pred | target)
    ours, theirs = _border(pred, box), _border(target, box)
    return _distance_to(theirs, spacing_mm)[ours], _distance_to(ours, spacing_mm)[theirs]


def signed_distance_mm(
    mask: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, "b 1 *dhw"]:
    """Distance in mm to the mask's border voxels: 0 on them, negative further inside.

    Its absolute value is the distance that ``nsd`` and ``hd95`` measure; the mask is where it is
    <= 0. Everywhere ``NO_SURFACE_MM`` where the mask is empty.
    """
    rows = spacing_of_each(spacing_mm, len(mask))
    cases = zip(mask.detach().cpu().numpy()[:, 0], rows, strict=True)
    return torch.stack([torch.from_numpy(_signed(*case))[None] for case in cases]).to(mask.device)


def _signed(mask: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    if not mask.any():
        return np.full(mask.shape, NO_SURFACE_MM, np.float32)
    distance = _distance_to(mask & ~binary_erosion(mask), spacing_mm)
    return np.where(mask, -distance, distance).astype(np.float32)


def _for_each(
    pred: Tensor,
    target: Tensor,
    spacing_mm: SpacingMm,
    score: Callable[[np.ndarray, np.ndarray], float],
) -> Tensor:
    rows = spacing_of_each(spacing_mm, len(pred))
    masks = (mask.detach().cpu().numpy()[:, 0] for mask in (pred, target))
    scores = [score(*surface_distances(*case)) for case in zip(*masks, rows, strict=True)]
    return torch.tensor(scores, dtype=torch.float32, device=pred.device)


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    boxes = find_objects(mask.astype(np.uint8))
    return boxes[0] if boxes else tuple(slice(0, 1) for _ in mask.shape)


def _border(mask: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
    cropped = mask[box]
    return cropped & ~binary_erosion(cropped)


def _distance_to(border: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    if not border.any():
        return np.full(border.shape, np.inf)
    return distance_transform_edt(~border, sampling=spacing_mm)
