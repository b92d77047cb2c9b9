"""Test cases with something wrong in what methods see: turned CT, noise, bad masks, no lesion.

What a case truly is, its ``clean_*`` fields, reference and findings, is never touched. Every
perturbation is a function of case, seed and amount, and larger amounts go on from smaller ones: the
same noise is scaled, the same direction followed, holes are added to those that were there.
"""

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from clinfuse.data.augmentation import with_noise
from clinfuse.data.jitter import move_mask
from clinfuse.functional.surface import NO_SURFACE_MM, signed_distance_mm
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)

ROTATION = "rotation_deg"
"""The CT and what was segmented in it turned about the grid's centre and not shifted, in place of
the misregistration: the one perturbation that is made where the CT is moved, in one resampling."""

HOLE_RADIUS_MM = 5.0
"""Of the balls that ``with_holes`` takes out."""


@dataclass(frozen=True)
class Condition:
    """How test cases are given to a method.

    Attributes:
        misregistration_mm: the CT's shift, which its turn goes with.
        perturbation: of ``PERTURBATIONS``, or "" for none.
        amount: of it; 0 for none.
    """

    misregistration_mm: float | int
    perturbation: str = ""
    amount: float | int = 0.0

    def turn_deg(self, deg_per_mm: float | int) -> float | int:
        """How far the CT is turned where ``deg_per_mm`` goes with each millimetre of shift."""
        if self.perturbation == ROTATION:
            return self.amount
        return self.misregistration_mm * deg_per_mm


def conditions_of(
    misregistration_mm: Sequence[float | int],
    perturbations: Mapping[str, Any] | None = None,
    perturbed_at_mm: Any = 0.0,
) -> list[Condition]:
    """The conditions of a test: each misregistration, then each amount of each perturbation.

    One thing is wrong at a time, beside a misregistration of ``perturbed_at_mm``. Where an amount
    is 0 nothing is perturbed, so that several axes share one condition, that of the misregistration
    alone; it is added if it is not among the amplitudes.

    Args:
        misregistration_mm: amplitudes.
        perturbations: lists of amounts by name of ``PERTURBATIONS``, or None for none of that name;
            a configuration may bring anything.
        perturbed_at_mm: where cases are perturbed otherwise than by a rotation.

    Raises:
        ValueError: for a perturbation that is not of ``PERTURBATIONS``, amounts that are no list,
            or one that cannot be.
    """
    if not _is_finite(perturbed_at_mm):
        raise ValueError(f"expected perturbed_at_mm to be a number, got {perturbed_at_mm!r}")
    found = [Condition(float(amplitude)) for amplitude in misregistration_mm]
    for kind, amounts in (perturbations or {}).items():
        if amounts is None:
            continue
        _check(kind, amounts)
        at_mm = 0.0 if kind == ROTATION else float(perturbed_at_mm)
        found += [
            Condition(at_mm, kind, float(amount)) if amount else Condition(at_mm)
            for amount in amounts
        ]
    return list(dict.fromkeys(found))


def _check(kind: str, amounts: Any) -> None:
    if kind not in PERTURBATIONS:
        raise ValueError(f"expected perturbations of {', '.join(PERTURBATIONS)}, got {kind!r}")
    allowed, is_allowed = PERTURBATIONS[kind]
    if isinstance(amounts, str) or not isinstance(amounts, Sequence) or not amounts:
        raise ValueError(f"expected a list of amounts for {kind}, got {amounts!r}")
    for amount in amounts:
        if not (_is_finite(amount) and is_allowed(amount)):
            raise ValueError(f"expected {allowed} for {kind}, got {amount!r}")


def _is_finite(number: object) -> bool:
    return isinstance(number, float | int) and math.isfinite(number)


PERTURBATIONS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    ROTATION: ("degrees of at least 0", lambda amount: amount >= 0),
    "mask_shift_mm": ("millimetres of at least 0", lambda amount: amount >= 0),
    "mask_dilation_mm": ("millimetres", lambda _: True),
    "mask_holes": ("shares of a mask in [0, 1)", lambda amount: 0 <= amount < 1),
    "noise_std": ("standard deviations of at least 0", lambda amount: amount >= 0),
    "without_lesion": ("0 (given) or 1 (withheld)", lambda amount: amount in (0, 1)),
}
"""What can be wrong besides misregistration, and which amounts it has."""


def perturbed(item: FusionBatch, condition: Condition, seed: int) -> FusionBatch:
    """A batch of one case as a condition gives it to methods; its CT is moved already.

    Masks go wrong all alike, brain, bone and a lesion that is there, whoever drew them: experts'
    contours differ by millimetres as tools' do, and a method that copies the mask it is given shows
    in its lesion scores, which are against the true one.
    """
    change = _CHANGES.get(condition.perturbation)
    if change is None:
        return item
    mri, ct, roi = item.truth()  # of a batch without clean fields: what it was before
    kept = replace(item, clean_mri=mri, clean_ct=ct, clean_roi=roi)
    generator = case_generator(item.case_id[0], condition.perturbation, seed)
    return change(kept, condition.amount, generator)


def case_generator(case_id: str, perturbation: str, seed: int) -> torch.Generator:
    """The randomness of one perturbation of one case."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{perturbation}/{case_id}".encode()))


def with_noisy_sources(
    item: FusionBatch, std: float | int, generator: torch.Generator
) -> FusionBatch:
    """Gaussian noise of standard deviation ``std``, in model space, on MRI and CT; then clipped."""
    mri = with_noise(item.mri[0], std, generator)[None]
    return replace(item, mri=mri, ct=with_noise(item.ct[0], std, generator)[None])


def with_shifted_masks(
    item: FusionBatch, shift_mm: float | int, generator: torch.Generator
) -> FusionBatch:
    """All masks moved together by ``shift_mm``, as if drawn on a scan in another position.

    The direction is uniform on the sphere, of slices in their plane. A mask lands on the grid as
    those of a moved CT do (``move_mask``), which is to half a voxel.
    """
    axes = item.mri.ndim - 2
    direction = torch.randn(axes, generator=generator, dtype=torch.float64)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[3 - axes : 3, 3] = shift_mm * direction / direction.norm()
    spacing_mm = [1.0] * (3 - axes) + item.spacing_mm[0].tolist()
    volumes = item.roi[0] if axes == 3 else item.roi[0][:, None]  # a slice is a volume of one
    moved = [move_mask(mask[None], matrix, spacing_mm) for mask in volumes]
    return _with_masks(item, torch.cat(moved).reshape(item.roi.shape))


def with_dilated_masks(
    item: FusionBatch, radius_mm: float | int, _: torch.Generator
) -> FusionBatch:
    """Each mask dilated by a ball of ``radius_mm``, or eroded by one of minus that."""
    spacing_mm = item.spacing_mm[0].tolist()
    if abs(radius_mm) + 1e-4 < min(spacing_mm):
        log.warning(
            "mask_dilation_mm %g changes nothing in %s, whose voxels are %s mm",
            radius_mm, item.case_id[0], " x ".join(f"{size:g}" for size in spacing_mm),
        )  # fmt: skip
    masks = [dilated(mask, radius_mm, spacing_mm) for mask in item.roi[0].numpy()]
    return _with_masks(item, torch.from_numpy(np.stack(masks))[None])


def with_holes(item: FusionBatch, share: float | int, generator: torch.Generator) -> FusionBatch:
    """Each mask without ``share`` of its voxels, lost in balls of ``HOLE_RADIUS_MM``."""
    spacing_mm = item.spacing_mm[0].tolist()
    masks = [riddled(mask, share, spacing_mm, generator) for mask in item.roi[0].numpy()]
    return _with_masks(item, torch.from_numpy(np.stack(masks))[None])


def without_lesion(item: FusionBatch, is_withheld: float | int, _: torch.Generator) -> FusionBatch:
    """The lesion's mask withheld: an empty one, and no border anywhere near."""
    if not is_withheld:
        return item
    brain, bone, lesion = item.roi.split(1, 1)
    return _with_masks(item, torch.cat((brain, bone, torch.zeros_like(lesion)), 1))


_CHANGES: Mapping[str, Callable[[FusionBatch, float, torch.Generator], FusionBatch]] = {
    "mask_shift_mm": with_shifted_masks,
    "mask_dilation_mm": with_dilated_masks,
    "mask_holes": with_holes,
    "noise_std": with_noisy_sources,
    "without_lesion": without_lesion,
}


def dilated(
    mask: Bool[np.ndarray, "*dhw"], radius_mm: float | int, spacing_mm: Sequence[float | int]
) -> Bool[np.ndarray, "*dhw"]:
    """Voxels whose centre is within ``radius_mm`` of one of the mask's; a negative radius erodes.

    Erosion is dilation of what is not the mask. Beyond the grid lies neither: a mask that is cut by
    the grid's edge is not eroded from there. A radius below the voxel size changes nothing along
    that axis.
    """
    if radius_mm < 0:
        return ~dilated(~mask, -radius_mm, spacing_mm)
    if not mask.any():
        return mask
    near: np.ndarray = distance_transform_edt(~mask, sampling=spacing_mm) <= radius_mm + 1e-4
    return near


def riddled(
    mask: Bool[np.ndarray, "*dhw"],
    share: float | int,
    spacing_mm: Sequence[float | int],
    generator: torch.Generator,
) -> Bool[np.ndarray, "*dhw"]:
    """The mask without ``share`` of its voxels, to the voxel, lost in balls of ``HOLE_RADIUS_MM``.

    Balls lie about random voxels that are left, one after another; of the last one the nearest
    voxels are taken.
    """
    left, places = mask.copy(), np.argwhere(mask)
    order = torch.randperm(len(places), generator=generator).numpy()
    excess = round(share * len(places))
    reach = [int(HOLE_RADIUS_MM / size + 1e-4) for size in spacing_mm]
    for centre in places[order]:
        if excess <= 0:
            break
        if not left[tuple(centre)]:
            continue
        start = np.maximum(centre - reach, 0)
        box = left[tuple(slice(s, c + r + 1) for s, c, r in zip(start, centre, reach, strict=True))]
        inside = np.argwhere(box)
        distance_mm = np.linalg.norm((inside + start - centre) * spacing_mm, axis=1)
        ball = np.argsort(distance_mm, kind="stable")[: (distance_mm <= HOLE_RADIUS_MM).sum()]
        lost = inside[ball[:excess]]
        box[tuple(lost.T)] = False
        excess -= len(lost)
    return left


def _with_masks(item: FusionBatch, roi: Bool[Tensor, "b r *dhw"]) -> FusionBatch:
    """The batch with other masks for methods to see, and distances that belong to their lesion."""
    lesion, distance_mm = roi[:, 2:3], item.lesion_distance_mm
    if distance_mm is not None and not lesion.any():
        distance_mm = torch.full_like(distance_mm, NO_SURFACE_MM)
    elif distance_mm is not None:
        distance_mm = signed_distance_mm(lesion, item.spacing_mm).to(distance_mm)
    return replace(item, roi=roi, lesion_distance_mm=distance_mm)
