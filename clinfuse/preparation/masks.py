"""Brain, bone and lesion of a registered pair: where the masks come from, and if they can be right.

A provider is called with MRI and CT on the study's grid and with the user's own masks, already on
that grid. ``Classical`` and ``Files`` are here, ``TotalSegmentator`` in a module of its own.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool
from scipy.ndimage import distance_transform_edt

from clinfuse import __version__
from clinfuse.functional.intensity import looks_like_hu
from clinfuse.preparation.grids import is_on
from clinfuse.preparation.images import read_image
from clinfuse.roi import masks as classical
from clinfuse.roi.masks import bone_mask, brain_mask, enclosed

log = logging.getLogger(__name__)

BRAIN_ML = (900.0, 1800.0)
"""From two standard deviations under a woman's brain (1143 ± 105 ml) to three over a man's
intracranial space, which masks from CT give (1469 ± 102 ml). Matsumae et al. (1996), 49 adults."""

BONE_ML = (100.0, 1200.0)
"""A shell 6.5 mm thick around 1400 ml, the vault of the skull, is 400 ml: from a quarter of it in
view to three times as much, with the face, the neck and the partial volume of thick slices."""

ENCLOSED = 0.9
"""Share of the brain that must see bone around it in its slice."""

OVERLAP = 0.02
"""Share of the brain that may be bone too."""

SCALP_MM, LESION_OUTSIDE = 15.0, 0.05
"""The head ends this far outside the skull; beyond it may be this share of a lesion."""

CUT = 0.25
"""A first or last slice with this share of the brain's largest section cuts the brain."""


@dataclass(frozen=True)
class Masks:
    """The regions of a study on its grid, as uint8 images of 0 and 1.

    Attributes:
        brain: what the skull encloses, or the brain itself: that depends on the tool.
        bone: the skull, with face and vertebrae where they are in view.
        lesion: None where nobody drew one; an empty mask says that there is none.
        provenance: for each mask that there is, what made it: ``tool``, ``version``, ``task``,
            ``parameters``; for a file ``sha256`` instead, as its name may say whose it is.
    """

    brain: sitk.Image
    bone: sitk.Image
    lesion: sitk.Image | None
    provenance: Mapping[str, Mapping[str, Any]]


@runtime_checkable
class MaskProvider(Protocol):
    """Anything that makes the masks of a study."""

    def __call__(self, mri: sitk.Image, ct: sitk.Image, files: Mapping[str, Path]) -> Masks:
        """The masks of one registered pair.

        Args:
            mri: on the study's grid.
            ct: on the same grid, in HU or in an 8-bit window.
            files: the user's masks on that grid, under ``brain_mask``, ``bone_mask`` and
                ``lesion_mask``.
        """
        ...


@dataclass(frozen=True)
class Classical:
    """Brain and bone by thresholds and morphology of the CT; a lesion only from its file."""

    def __call__(self, mri: sitk.Image, ct: sitk.Image, files: Mapping[str, Path]) -> Masks:
        """The masks of one registered pair; MRI is not looked at.

        Raises:
            FileNotFoundError: no lesion mask where one is named.
            ValueError: no bone or no brain is found, or the lesion mask cannot be used.
        """
        bone, bone_made = _classical_bone(ct)
        brain, brain_made = _classical_brain(ct, bone)
        lesion, drawn = lesion_of(files, ct)
        return Masks(brain, bone, lesion, {"brain": brain_made, "bone": bone_made, **drawn})


@dataclass(frozen=True)
class Files:
    """The user's own masks.

    Attributes:
        missing: what to do about a brain or bone that has no file, "refuse" or "classical".
    """

    missing: str = "refuse"

    def __post_init__(self) -> None:
        if self.missing not in ("refuse", "classical"):
            raise ValueError(f"expected missing=refuse or missing=classical, got {self.missing!r}")

    def __call__(self, mri: sitk.Image, ct: sitk.Image, files: Mapping[str, Path]) -> Masks:
        """The masks of one registered pair.

        Raises:
            FileNotFoundError: no mask where one is named, or none is named and that is refused.
            ValueError: a mask that is not an image, not on the study's grid, or empty though it
                is of brain or bone; nothing found for one that is missing.
        """
        lacking = [name for name in ("brain", "bone") if f"{name}_mask" not in files]
        if lacking and self.missing == "refuse":
            raise FileNotFoundError(
                f"expected a file for every mask, got none for {' and '.join(lacking)}: "
                "masks.missing=classical segments what is missing"
            )
        if lacking:
            log.info("no file for %s: classical masks instead", " and ".join(lacking))
        bone, bone_made = (
            _classical_bone(ct) if "bone" in lacking else read_mask("bone", files["bone_mask"], ct)
        )
        brain, brain_made = (
            _classical_brain(ct, bone)
            if "brain" in lacking
            else read_mask("brain", files["brain_mask"], ct)
        )
        lesion, drawn = lesion_of(files, ct)
        return Masks(brain, bone, lesion, {"brain": brain_made, "bone": bone_made, **drawn})


def lesion_of(
    files: Mapping[str, Path], grid: sitk.Image
) -> tuple[sitk.Image | None, dict[str, dict[str, Any]]]:
    """The lesion that the user drew, and its provenance under ``lesion``; none where none is."""
    if "lesion_mask" not in files:
        return None, {}
    lesion, made = read_mask("lesion", files["lesion_mask"], grid)
    return lesion, {"lesion": made}


def read_mask(name: str, path: Path, grid: sitk.Image) -> tuple[sitk.Image, dict[str, Any]]:
    """A mask from its file, 1 where the file is above one half, and its provenance.

    Args:
        name: of the mask, for messages; a lesion may be empty.
        grid: of the study.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, another grid, or an empty mask that is not of a lesion.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a {name} mask, found no file: {path}")
    try:
        image = read_image(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"expected a {name} mask, got no image ({reason}): {path}") from error
    mask = placed(image, grid, f"{name} mask", path)
    if name != "lesion" and not sitk.GetArrayViewFromImage(mask).any():
        raise ValueError(f"expected a {name} mask with voxels in it, got an all-zero one: {path}")
    return mask, {"tool": "file", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def placed(image: sitk.Image, grid: sitk.Image, what: str, path: Path) -> sitk.Image:
    """The image as a uint8 mask on the grid that it is said to be on; nothing is resampled.

    Raises:
        ValueError: it lies on other voxels, or has several values a voxel.
    """
    if image.GetNumberOfComponentsPerPixel() != 1:
        count = image.GetNumberOfComponentsPerPixel()
        raise ValueError(f"expected one value a voxel of the {what}, got {count}: {path}")
    if not is_on(image, grid):
        raise ValueError(
            f"expected the {what} on the study's grid, {_described(grid)}, "
            f"got {_described(image)}: {path}"
        )
    mask = sitk.Cast(image > 0.5, sitk.sitkUInt8)
    mask.CopyInformation(grid)
    return mask


def plausibility(masks: Masks) -> list[str]:
    """What a reader of the quality report should doubt about the masks; empty if nothing.

    Volumes against those of adults, the brain inside the skull and beside it, the lesion inside
    the head: ``BRAIN_ML`` and the other constants of this module say what is plausible and why.
    """
    brain, bone = as_array(masks.brain), as_array(masks.bone)
    spacing_mm = masks.brain.GetSpacing()
    voxel_ml = math.prod(spacing_mm) / 1000
    doubts = [_brain_volume(brain, voxel_ml), _bone_volume(bone, voxel_ml)]
    ring = enclosed(bone)
    if brain.any():
        inside, shared = (ring & brain).sum() / brain.sum(), (bone & brain).sum() / brain.sum()
        if inside < ENCLOSED:
            doubts.append(
                f"{inside:.0%} of the brain is inside the skull, expected at least {ENCLOSED:.0%}"
            )
        if shared > OVERLAP:
            doubts.append(f"{shared:.1%} of the brain is bone too, expected at most {OVERLAP:.0%}")
    if masks.lesion is not None:
        doubts.append(_lesion_place(masks, ring | bone | brain))
    return [doubt for doubt in doubts if doubt]


def as_array(image: sitk.Image) -> Bool[np.ndarray, "d h w"]:
    """A mask as the functions of ``clinfuse.roi`` take it, d from inferior to superior."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "RAS")) > 0


def _brain_volume(brain: np.ndarray, voxel_ml: float) -> str:
    volume_ml, (low, high) = brain.sum() * voxel_ml, BRAIN_ML
    if low <= volume_ml <= high:
        return ""
    sections = brain.sum(axis=(1, 2))
    is_cut = max(sections[0], sections[-1]) > CUT * max(sections.max(), 1)
    return f"the brain is {volume_ml:.0f} ml, expected {low:.0f} to {high:.0f} ml of an adult" + (
        ": the scan ends within it" if is_cut else ""
    )


def _bone_volume(bone: np.ndarray, voxel_ml: float) -> str:
    volume_ml, (low, high) = bone.sum() * voxel_ml, BONE_ML
    if low <= volume_ml <= high:
        return ""
    return f"the bone is {volume_ml:.0f} ml, expected {low:.0f} to {high:.0f} ml of a skull" + (
        ": hardly any is in view" if volume_ml < low else ""
    )


def _lesion_place(masks: Masks, skull: np.ndarray) -> str:
    assert masks.lesion is not None
    lesion = as_array(masks.lesion)
    if not lesion.any():
        return ""
    spacing_mm = sitk.DICOMOrient(masks.lesion, "RAS").GetSpacing()[::-1]
    beyond_mm = distance_transform_edt(~skull, spacing_mm)
    outside = (beyond_mm[lesion] > SCALP_MM).mean() if skull.any() else 1.0
    if outside <= LESION_OUTSIDE:
        return ""
    return f"{outside:.0%} of the lesion is outside the head, expected at most {LESION_OUTSIDE:.0%}"


def _classical_bone(ct: sitk.Image) -> tuple[sitk.Image, dict[str, Any]]:
    array, spacing_mm, is_hu = _canonical(ct)
    found = bone_mask(array, spacing_mm, is_hu)
    return _found("bone", found, ct), _made_classically(is_hu)


def _classical_brain(ct: sitk.Image, bone: sitk.Image) -> tuple[sitk.Image, dict[str, Any]]:
    array, spacing_mm, is_hu = _canonical(ct)
    found = brain_mask(array, as_array(bone), spacing_mm)
    return _found("brain", found, ct), _made_classically(is_hu)


def _canonical(ct: sitk.Image) -> tuple[np.ndarray, tuple[float, float, float], bool]:
    oriented = sitk.DICOMOrient(ct, "RAS")
    x, y, z = oriented.GetSpacing()
    array = sitk.GetArrayFromImage(oriented)
    return array, (z, y, x), looks_like_hu(torch.from_numpy(array.astype(np.float32)))


def _found(name: str, mask: np.ndarray, grid: sitk.Image) -> sitk.Image:
    if not mask.any():
        raise ValueError(
            f"expected to find {name} in the CT, segmented no voxel: bring a {name} mask"
        )
    oriented = sitk.GetImageFromArray(mask.astype(np.uint8))
    oriented.CopyInformation(sitk.DICOMOrient(grid, "RAS"))
    stored = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.GetDirection())
    image = sitk.DICOMOrient(oriented, stored)
    assert is_on(image, grid)
    image.CopyInformation(grid)
    return image


def _made_classically(is_hu: bool) -> dict[str, Any]:
    low, high = classical.TISSUE_HU if is_hu else classical.TISSUE_8BIT
    bone = (
        {"bone_hu": classical.BONE_HU, "table_hu": classical.TABLE_HU}
        if is_hu
        else {"bone_8bit": classical.BONE_8BIT}
    )
    return {
        "tool": "clinfuse.roi.masks",
        "version": __version__,
        "task": "thresholds and morphology of the CT",
        "parameters": {**bone, "tissue_from": low, "tissue_to": high},
    }


def _described(image: sitk.Image) -> str:
    size, spacing, origin = (
        " x ".join(f"{value:g}" for value in np.round(values, 3))
        for values in (image.GetSize(), image.GetSpacing(), image.GetOrigin())
    )
    axes = ", ".join(f"{value:.3g}" for value in image.GetDirection())
    return f"{size} voxels of {spacing} mm at ({origin}) along ({axes})"
