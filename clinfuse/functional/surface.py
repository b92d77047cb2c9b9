"""Overlap and surface distance of masks: metrics, computed without gradients.

A mask's surface is its border voxels: those with a face on the outside of the mask or of the grid.
Distances join voxel centres, in mm. This is MONAI's definition; the ``surface-distance`` package
weights border elements by area instead and agrees within about a voxel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.distances import distance_between, distance_to
from clinfuse.functional.regional import bounding_box
from clinfuse.functional.spacing import SpacingMm, spacing_of_each

NO_SURFACE_MM = 1e3
"""Distance to the border of an empty mask: far beyond any head."""


@dataclass(frozen=True)
class SurfaceAgreement:
    """How two masks agree: each surface found once, and the distances between them, for all scores.

    Attributes:
        dice: 2 |P ∩ T| / (|P| + |T|), in [0, 1]; NaN where both are empty. Dice (1945).
        forth_mm: for each case, the distances from each border voxel of P to the border of T;
            infinite where T is empty.
        back_mm: those from T to P.
    """

    dice: Float[Tensor, " b"]
    forth_mm: Sequence[Float[np.ndarray, " _"]]
    back_mm: Sequence[Float[np.ndarray, " _"]]

    def nsd(self, tau_mm: float) -> Float[Tensor, " b"]:
        """Share of both surfaces that lies within ``tau_mm`` of the other, in [0, 1].

        Normalised surface distance, Nikolov et al. (2021). NaN where both masks are empty, 0 where
        one is.
        """

        def share(forth: np.ndarray, back: np.ndarray) -> float:
            distances = np.concatenate((forth, back))
            return float((distances <= tau_mm).mean()) if len(distances) else float("nan")

        return self._of_each(share)

    def hd95(self) -> Float[Tensor, " b"]:
        """The larger of the two directed 95th percentiles of surface distance, in mm.

        Huttenlocher et al. (1993), robust form. NaN where either mask is empty: no distance is
        defined then, and a large stand-in would only measure itself.
        """

        def larger(forth: np.ndarray, back: np.ndarray) -> float:
            if not (len(forth) and len(back)):
                return float("nan")
            return float(max(np.percentile(forth, 95), np.percentile(back, 95)))

        return self._of_each(larger)

    def _of_each(self, score: Callable[[np.ndarray, np.ndarray], float]) -> Tensor:
        scores = [score(*case) for case in zip(self.forth_mm, self.back_mm, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=self.dice.device)


def surface_agreement(
    pred: Bool[Tensor, "b 1 *dhw"], target: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> SurfaceAgreement:
    """What Dice, surface Dice and Hausdorff distance are made of, worked out once.

    All of it within the box around both masks; distances on a GPU where ``distances`` can.
    """
    rows = spacing_of_each(spacing_mm, len(pred))
    overlaps, forth_mm, back_mm = [], [], []
    for ours, theirs, row in zip(pred[:, 0], target[:, 0], rows, strict=True):
        box = bounding_box(ours | theirs)
        ours, theirs = ours[box], theirs[box]
        shared, sizes = (ours & theirs).sum(), ours.sum() + theirs.sum()
        overlaps.append(2 * shared / sizes)
        surfaces = border_of(ours), border_of(theirs)
        forth_mm.append(distance_between(*surfaces, row).cpu().numpy())
        back_mm.append(distance_between(*surfaces[::-1], row).cpu().numpy())
    return SurfaceAgreement(torch.stack(overlaps), forth_mm, back_mm)


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
    """Surface Dice at a tolerance: ``SurfaceAgreement.nsd``, for those who want no other score."""
    return surface_agreement(pred, target, spacing_mm).nsd(tau_mm)


def hd95(
    pred: Bool[Tensor, "b 1 *dhw"], target: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, " b"]:
    """95 % Hausdorff distance: ``SurfaceAgreement.hd95``, for those who want no other score."""
    return surface_agreement(pred, target, spacing_mm).hd95()


def signed_distance_mm(
    mask: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, "b 1 *dhw"]:
    """Distance in mm to the mask's border voxels: 0 on them, negative further inside.

    Its absolute value is the distance that ``nsd`` and ``hd95`` measure; the mask is where it is
    <= 0. Everywhere ``NO_SURFACE_MM`` where the mask is empty.
    """
    rows = spacing_of_each(spacing_mm, len(mask))
    return torch.stack([_signed(*case)[None] for case in zip(mask[:, 0], rows, strict=True)])


def border_of(mask: Bool[Tensor, "*dhw"]) -> Bool[Tensor, "*dhw"]:
    """Voxels of the mask with a face on the outside of it or of the grid."""
    inside = mask.clone()
    if not mask.numel():
        return inside
    for axis, size in enumerate(mask.shape):
        inside.narrow(axis, 1, size - 1).logical_and_(mask.narrow(axis, 0, size - 1))
        inside.narrow(axis, 0, size - 1).logical_and_(mask.narrow(axis, 1, size - 1))
        for end in (0, size - 1):
            inside.select(axis, end).fill_(False)
    return mask & ~inside


def _signed(mask: Tensor, spacing_mm: Sequence[float]) -> Tensor:
    if not mask.any():
        return torch.full(mask.shape, NO_SURFACE_MM, device=mask.device)
    distance = distance_to(border_of(mask), spacing_mm)
    return torch.where(mask, -distance, distance).float()
