"""The Whole Brain Atlas of Harvard Medical School: CT and MRI as 2-D slices, stacked to studies.

Johnson and Becker, https://www.med.harvard.edu/aanlib. We found no licence: do not redistribute.
The slices go round, as PNG of 256 x 256 with 8 bits, in the folders that papers on 2-D fusion
share::

    CT-MRI/CT/20005.png     case 20, slice 5: the case's number, then three digits
    CT-MRI/MRI/20005.png

Eight patients are complete enough to be stacked. CT is a soft-tissue window, not HU: bone
saturates. MRI is T2- or PD-weighted. The atlas shows the pairs aligned, which is true to a few
pixels at best, so they are registered like all others. Voxels of 0.9 x 0.9 x 5 mm are assumed (a
head of 230 mm in 256 pixels), slices count from below, and a picture's left is the patient's right.
No masks, no lesions.

Slices are missing inside of three stacks: 4 and 5 of case 32, 9 of case 33 and 17 of case 41.
What lies above a gap would sit 5 or 10 mm too low if the rest were pushed together, and a slice
made up between its neighbours is no measurement, so a case is its longest unbroken run, which its
notes say: slices 6 to 22, 10 to 23 and 3 to 16 of these. Stacks that others made, as
``case_33/{mri,ct}.nii.gz``, are taken as they are, with a note where they close a gap.

A case number is a person, ``harvard_28``, across the sets of CT and SPECT: 28 is in both, with the
very same MRI. All of PET-MRI is one head in three views, whatever its cases are called.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.cohorts.inventory import (
    PAIR,
    collect,
    folders_named,
    images_named,
    is_current,
    read_image,
    required,
    write_image,
)
from clinfuse.preparation.scan import CaseFiles

SPACING_MM = (0.9, 0.9, 5.0)
"""Assumed, (column, row, slice)."""

SLICE_NAME = re.compile(r"(\d+)(\d{3})\.png")

MISSING = {32: (4, 5), 33: (9,), 41: (17,)}
"""Slices that the CT-MRI folders lack between others, by case."""

Slices = Mapping[int, Path]


def cases(
    root: Path,
    work: Path,
    spacing_mm: Sequence[float | int] = SPACING_MM,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """The patients of the CT-MRI slices, or of stacks of them.

    Args:
        root: a folder above ``CT-MRI``, or above ``case_NN/{mri,ct}.nii.gz``.
        work: where slices are stacked, as ``case_NN/{mri,ct}.nii.gz``.
        spacing_mm: assumed for slices, (column, row, slice); files that are stacked keep theirs.
        skip_incomplete: leave cases out of which one image lacks slices.

    Raises:
        FileNotFoundError: no cases, or slices of one image without those of the other.
        ValueError: pictures that are not grey, of 8 bits and of one size, or a case found twice.
    """
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"expected three positive voxel sizes, got {list(spacing_mm)}")
    collections = list(folders_named(root, "CT-MRI", work))
    if not collections:
        stacks = folders_named(root, r"case_\d+", work)
        layout = "CT-MRI/{CT,MRI}/20005.png or case_20/{mri,ct}.nii.gz"
        return collect(root, stacks, _stacked_case, layout, skip_incomplete)
    read = partial(_sliced_case, work=work, spacing_mm=spacing_mm)
    found = [case for folder in collections for case in _sliced(folder)]
    return collect(root, found, read, "CT-MRI/{CT,MRI}/20005.png", skip_incomplete)


def patient_of(collection: str, case: int) -> str:
    """Whose a case of ``CT-MRI``, ``SPECT-MRI`` or ``PET-MRI`` is.

    Raises:
        ValueError: another collection.
    """
    if collection not in ("CT-MRI", "SPECT-MRI", "PET-MRI"):
        raise ValueError(f"expected CT-MRI, SPECT-MRI or PET-MRI, got {collection!r}")
    return "harvard_pet" if collection == "PET-MRI" else f"harvard_{case:02d}"


def longest_run(numbers: Sequence[int]) -> list[int]:
    """The longest stretch of consecutive numbers, the first of several."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if not runs or runs[-1][-1] + 1 != number:
            runs.append([])
        runs[-1].append(number)
    return max(runs, key=len, default=[])


def write_stack(
    slices: Sequence[Path], to: Path, spacing_mm: Sequence[float | int], note: str
) -> Path:
    """Write pictures, from the lowest slice upwards, as one NIfTI file.

    Columns run to the patient's left and rows to the back. The note goes into the header.

    Raises:
        ValueError: a picture that is not grey, of 8 bits and of the size of the first.
    """
    planes = [_plane(path) for path in slices]
    for plane, path in zip(planes, slices, strict=True):
        if plane.shape != planes[0].shape:
            raise ValueError(
                f"expected {planes[0].shape} pixels, as in {slices[0].name}, got {plane.shape}: "
                f"{path}"
            )
    image = sitk.GetImageFromArray(np.stack(planes))
    image.SetSpacing([float(size) for size in spacing_mm])
    image.SetMetaData("ITK_FileNotes", note[:79])  # descrip of the header
    return write_image(image, to)


def _plane(path: Path) -> np.ndarray:
    image = read_image(path)
    if image.GetDimension() != 2 or image.GetPixelID() != sitk.sitkUInt8:
        raise ValueError(
            f"expected a grey picture of 8 bits, got {image.GetPixelIDTypeAsString()}: {path}"
        )
    return sitk.GetArrayFromImage(image)


def _sliced(collection: Path) -> Iterator[tuple[int, Slices, Slices]]:
    """Number, MRI slices and CT slices of each case."""
    images = [_slices_of(collection / name) for name in ("MRI", "CT")]
    for number in sorted(set().union(*images)):
        mri, ct = (image.get(number, {}) for image in images)
        yield number, mri, ct


def _slices_of(folder: Path) -> dict[int, dict[int, Path]]:
    cases: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := SLICE_NAME.fullmatch(path.name):
            cases.setdefault(int(match.group(1)), {})[int(match.group(2))] = path
    return cases


def _sliced_case(
    found: tuple[int, Slices, Slices], work: Path, spacing_mm: Sequence[float | int]
) -> CaseFiles:
    number, mri, ct = found
    name = f"case_{number:02d}"
    alone = sorted(set(mri) ^ set(ct))
    if alone:
        sides = ", ".join(f"{k} of {'MRI' if k in mri else 'CT'} alone" for k in alone)
        raise FileNotFoundError(f"case {name}: expected slices in pairs, found {sides}")
    kept = longest_run(list(mri))
    lost = sorted(set(mri) - set(kept))
    missing = sorted(set(range(min(mri), max(mri))) - set(mri))
    notes = (
        f"slices {missing} are missing: of {len(mri)}, the unbroken run {kept[0]} to {kept[-1]} "
        "is kept",
    )
    note = f"slices {kept[0]}-{kept[-1]} of {len(kept) + len(lost)}; voxel size is assumed"
    files = {}
    for what, slices in (("mri", mri), ("ct", ct)):
        paths = [slices[k] for k in kept]
        mm = "x".join(f"{size:g}" for size in spacing_mm)
        to = work / name / f"{what}_{mm}mm.nii.gz"
        if not is_current(to, *paths):
            write_stack(paths, to, spacing_mm, note)
        files[what] = to
    return CaseFiles(name, patient_of("CT-MRI", number), files, notes=notes if missing else ())


def _stacked_case(folder: Path) -> CaseFiles:
    name, number = folder.name, int(folder.name.removeprefix("case_"))
    files = required(images_named(folder, PAIR), PAIR, name, folder)
    notes = (
        f"slices {list(MISSING.get(number, ()))} are missing: a stack of all the others puts what "
        "is above them too low",
    )
    kept = notes if number in MISSING else ()
    return CaseFiles(name, patient_of("CT-MRI", number), files, notes=kept)
