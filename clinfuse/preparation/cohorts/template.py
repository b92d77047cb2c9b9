"""One's own scans: a folder for each patient, in any format, unregistered.

::

    PATIENT/mri.nii.gz         .nii, .nrrd, .nhdr, .mha or .mhd, or a folder mri/ of DICOM
    PATIENT/ct/                a folder of DICOM, or ct.nii.gz and so on
    PATIENT/brain_mask.nrrd    these three if there are any
    PATIENT/bone_mask.nii.gz
    PATIENT/lesion_mask.nii.gz

A patient who was scanned more than once has a folder for each session, as
``PATIENT/SESSION/mri.nii.gz``: sessions are cases of their own, and stay together in splits.
Images of other names are not used, which the log says. The licence is yours.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from clinfuse.preparation.cohorts.inventory import (
    IMAGE_SUFFIXES,
    PAIR,
    collect,
    images_named,
    is_same,
    required,
)
from clinfuse.preparation.scan import CaseFiles

log = logging.getLogger(__name__)

DRAWN_ON: Mapping[str, Literal["mri", "ct"]] = {
    "brain_mask": "mri",
    "bone_mask": "ct",
    "lesion_mask": "mri",
}
"""The image on whose grid a mask lies, unless it is said otherwise."""

MASKS = tuple(DRAWN_ON)


def cases(
    root: Path,
    work: Path,
    drawn_on: Mapping[str, Literal["mri", "ct"]] | None = None,
    is_registered: bool = False,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """The patients' pairs, with such masks as they have.

    Args:
        root: the folder of the patients.
        work: passed over if it lies in ``root``: nothing is converted.
        drawn_on: for masks, the image on whose grid they lie; ``DRAWN_ON`` for those not named.
        is_registered: whether all CTs are aligned to their MRI already.
        skip_incomplete: leave cases without MRI or CT out.

    Raises:
        FileNotFoundError: no patients, or images missing.
        ValueError: one image in several files, a mask of another name, or an id found twice.
    """
    lies_on = {**DRAWN_ON, **(drawn_on or {})}
    unknown = sorted(set(lies_on) - set(MASKS))
    if unknown:
        raise ValueError(f"expected masks of {MASKS}, got {unknown}")
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of a cohort, found none at {root}")

    def case(found: tuple[str, str, Path]) -> CaseFiles:
        case_id, patient, folder = found
        files = _files(folder)
        required(files, PAIR, case_id, folder)
        on = {name: lies_on[name] for name in MASKS if name in files}
        return CaseFiles(case_id, patient, files, on, is_registered)

    layout = "PATIENT/mri.* and PATIENT/ct.*"
    return collect(root, _folders(root, work), case, layout, skip_incomplete)


def _folders(root: Path, work: Path) -> Iterator[tuple[str, str, Path]]:
    """Id, patient and folder of each case: the patient's own, or those of the sessions in it."""
    for patient in _subfolders(root):
        if is_same(patient, work):
            continue
        sessions = [folder for folder in _subfolders(patient) if folder.name not in PAIR]
        if _holds_any(patient) or not sessions:
            yield patient.name, patient.name, patient
            continue
        for session in sessions:
            yield f"{patient.name}_{session.name}", patient.name, session


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _holds_any(folder: Path) -> bool:
    names = {name + suffix for name in (*PAIR, *MASKS) for suffix in ("", *IMAGE_SUFFIXES)}
    return any(path.name in names for path in folder.iterdir())


def _files(folder: Path) -> dict[str, Path]:
    files = images_named(folder, {name: name for name in (*PAIR, *MASKS)})
    for name in PAIR:
        series = folder / name
        if not series.is_dir() or not any(series.iterdir()):
            continue
        if name in files:
            raise ValueError(f"expected one {name}, got {files[name].name} and {name}/: {folder}")
        files[name] = series
    images = (
        p for p in sorted(folder.iterdir()) if p.is_file() and p.name.endswith(IMAGE_SUFFIXES)
    )
    if others := [path.name for path in images if path not in files.values()]:
        log.warning("%s: expected images of %s, left %s alone", folder, (*PAIR, *MASKS), others)
    return files
