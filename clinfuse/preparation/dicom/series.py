"""A DICOM series before any pixel is read: whether it may be a volume, and which one is meant."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from clinfuse.preparation.dicom.sentences import some
from clinfuse.preparation.dicom.stack import (
    FEWEST_SLICES,
    POSITION_TOLERANCE_MM,
    Frame,
    along_normal,
)

PARALLEL_TOLERANCE = 5e-4
"""Direction cosines of the slices of one stack may differ by this much (rounding)."""


@dataclass(frozen=True)
class Series:
    """The slices of a DICOM series (of one echo of it, where it has several), before any pixel.

    Attributes:
        uid: Series Instance UID.
        modality: as the files say it: "CT", "MR", "SR".
        description: Series Description, with the echo where there are several.
        number: Series Number, 0 where there is none.
        patient: Patient ID, else Patient's Name; never to be shown.
        identities: all that names the patient or the visit in the files; never to be shown.
        frame_of_reference_uid: None where the files say nothing.
        frames: slices in no particular order.
        is_localiser: whether the image type says so.
        photometric: how samples become grey: "MONOCHROME2".
        gantry_tilt_deg: as the files state it, which is not always what the positions say.
        is_rescaled: whether the files state how stored values become the scanner's units.
    """

    uid: str
    modality: str
    description: str
    number: int
    patient: str = field(repr=False)
    identities: tuple[str, ...] = field(repr=False)
    frame_of_reference_uid: str | None
    frames: tuple[Frame, ...] = field(repr=False)
    is_localiser: bool = False
    photometric: str = "MONOCHROME2"
    gantry_tilt_deg: float = 0.0
    is_rescaled: bool = True

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files, each once, in order of their names."""
        return tuple(sorted({frame.file for frame in self.frames}))

    @property
    def n_slices(self) -> int:
        """Slices, whether in one file or in many."""
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows of a slice."""
        return self.frames[0].size

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Voxel size along rows, columns and slices; None where the files do not place them."""
        if self.unfit or len(self.frames[0].pixel_mm) != 2:
            return None
        gaps_mm = np.diff(np.sort(along_normal(self.frames)))
        gaps_mm = gaps_mm[gaps_mm > POSITION_TOLERANCE_MM]
        i, j = self.frames[0].pixel_mm
        return (i, j, float(np.median(gaps_mm))) if gaps_mm.size else None

    @property
    def unfit(self) -> str:
        """Why this can be no volume; empty where it may be one."""
        if self.modality not in ("CT", "MR"):
            return f"{self.modality or 'no modality'}, neither CT nor MR"
        if self.is_localiser:
            return "a localiser"
        if not self.photometric.startswith("MONOCHROME"):
            return f"a colour image, {self.photometric}"
        if self.n_slices < FEWEST_SLICES:
            return f"{self.n_slices} slices, fewer than {FEWEST_SLICES}"
        if any(len(f.position_mm) != 3 or len(f.cosines) != 6 for f in self.frames):
            return "slices without a position in the patient"
        cosines = np.array([f.cosines for f in self.frames])
        if np.abs(cosines - cosines[0]).max() > PARALLEL_TOLERANCE:
            return "slices that are not parallel, as of a localiser"
        row, column = cosines[0, :3], cosines[0, 3:]
        if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 0.01:
            return "rows and columns that are not perpendicular"
        return ""

    def __str__(self) -> str:
        columns, rows = self.size
        text = f"{self.modality} {self.description!r}, {self.n_slices} of {columns} x {rows}"
        if self.spacing_mm:
            i, j, k = self.spacing_mm
            text += f" at {i:.2f} x {j:.2f} x {k:.2f} mm"
        return f"{text} ({self.unfit})" if self.unfit else text


def choose_series(found: Sequence[Series], source: Path, series: str | int | None = None) -> Series:
    """The series that is meant: the one named, else the only one that can be a volume.

    Args:
        found: as ``list_series`` gives it.
        source: where they were found, for messages.
        series: UID, number in the list (from 1), or a part of one description.

    Raises:
        FileNotFoundError: there is none at all.
        ValueError: several patients, several volumes to choose from, no volume, or a name that
            fits none or several.
    """
    if not found:
        raise FileNotFoundError(f"expected DICOM images, found none in {source}")
    patients = {one.patient: one.files[0].name for one in found}
    if len(patients) > 1:
        raise ValueError(
            f"expected the files of one patient, got {len(patients)} patients "
            f"({some(list(patients.values()))}): {source}"
        )
    listed = "; ".join(f"{number}. {one}" for number, one in enumerate(found, start=1))
    if series is None:
        fit = [one for one in found if not one.unfit]
        if not fit:
            raise ValueError(f"expected a volume, got only {listed}: {source}")
        wanted = "expected one series, or to be told which by series=NUMBER (or UID, or words)"
    else:
        fit = _named(found, str(series))
        wanted = f"expected series={series} to name one series"
    if len(fit) != 1:
        raise ValueError(f"{wanted}, got {len(fit)} among {listed}: {source}")
    if fit[0].unfit:
        raise ValueError(f"expected a volume, got series={series}, {fit[0]}: {source}")
    return fit[0]


def _named(found: Sequence[Series], wanted: str) -> list[Series]:
    by_uid = [one for one in found if one.uid == wanted]
    if by_uid:
        return [one for one in by_uid if not one.unfit] or by_uid
    if wanted.isdecimal() and 1 <= int(wanted) <= len(found):
        return [found[int(wanted) - 1]]
    return [one for one in found if wanted.casefold() in one.description.casefold()]
