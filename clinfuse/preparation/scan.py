"""What every step of a preparation passes on: a scan on its own grid, and the files of a case."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import SimpleITK as sitk

Modality = Literal["CT", "MR"]


@dataclass(frozen=True)
class Scan:
    """A 3-D image as a scanner made it, and what its file says of it.

    Attributes:
        image: float32, on the grid of the file (origin, spacing and direction in LPS millimetres,
            as ITK has them); CT in HU.
        source: the file, or the folder of the series.
        modality: what the file says it is; None where it says nothing.
        patient: as the file names the patient; None where it says nothing. Never to be shown or
            written: ``identifiers`` makes of it what may be.
        description: of the series, for choosing among several.
        series_uid: DICOM's, None for other formats.
        frame_of_reference_uid: DICOM's; scans that share it need no registration.
        notes: sentences on what reading found and mended ("a gantry tilt of 12.0 degrees was
            taken out"), for the quality report.
    """

    image: sitk.Image
    source: Path
    modality: Modality | None = None
    patient: str | None = None
    description: str = ""
    series_uid: str | None = None
    frame_of_reference_uid: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseFiles:
    """One study of a cohort, before anything of it is read.

    Attributes:
        case_id: what its study folder will be called, unique in the cohort.
        patient: as the cohort identifies the patient, whom several cases may share: splits are by
            this, so that they cannot leak.
        files: what there is, by the names of a study folder: ``mri`` and ``ct``; perhaps
            ``brain_mask``, ``bone_mask``, ``lesion_mask``. A file or the folder of a DICOM series.
        drawn_on: for each mask, the image of ``files`` on whose grid it was drawn.
        is_registered: whether the cohort says that MRI and CT are aligned already.
        notes: sentences on what the files lack, for the quality report.
    """

    case_id: str
    patient: str
    files: Mapping[str, Path]
    drawn_on: Mapping[str, str] = field(default_factory=dict)
    is_registered: bool = False
    notes: tuple[str, ...] = ()
