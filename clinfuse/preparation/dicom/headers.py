"""The series that a folder or a file holds, by what the headers of the files say."""

import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.misc import is_dicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from clinfuse.preparation.dicom.sentences import one_line
from clinfuse.preparation.dicom.series import Series
from clinfuse.preparation.dicom.stack import Frame, Vector

MOST_INFLATED, MOST_FRAMES = 1 << 30, 100_000
"""Bytes that a deflated file may unpack to, and frames of one: far more than any has."""


def list_series(folder: Path) -> list[Series]:
    """The image series in a folder and below, by Series Number; empty if there are none.

    Files are known as DICOM by their content ("DICM" after 128 bytes); others, DICOMDIR and what
    holds no image (reports, presentation states) are passed over. Slices marked as a localiser and
    the echoes of a series are series of their own.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a DICOM image whose header is cut off.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of DICOM files, found none at {folder}")
    return _series_of(path for path in sorted(folder.rglob("*")) if path.is_file())


def series_of_file(path: Path) -> list[Series]:
    """The same for one file, as of a multi-frame image."""
    return _series_of([path])


def read_header(path: Path) -> FileDataset:
    """All that a DICOM file says, less its pixels.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    return read_file(path, stop_before_pixels=True)


def read_file(path: Path, stop_before_pixels: bool = False) -> FileDataset:
    """All that a DICOM file says, its pixels still as they are stored.

    Raises:
        ValueError: the file is truncated or corrupt, or unpacks to more than ``MOST_INFLATED``.
    """
    _check_deflated(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except Exception as error:  # of bytes that are no DICOM; it may quote them, and so the patient
        raise ValueError(
            f"expected a DICOM file, got a truncated or corrupt one ({type(error).__name__}): "
            f"{path}"
        ) from error


def _check_deflated(path: Path) -> None:
    """Refuse a file that is packed as a whole and small, and would fill the memory."""
    with path.open("rb") as file:
        start = file.read(1024)
        if DeflatedExplicitVRLittleEndian.encode() not in start or len(start) < 144:
            return
        file.seek(144 + int.from_bytes(start[140:144], "little"))  # behind what is never packed
        packed = file.read()
    try:
        inflated = len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, MOST_INFLATED + 1))
    except zlib.error:  # as pydicom will say
        return
    if inflated > MOST_INFLATED:
        raise ValueError(
            f"expected a DICOM file that unpacks to at most {MOST_INFLATED} bytes, got more: {path}"
        )


def _series_of(paths: Iterator[Path] | Sequence[Path]) -> list[Series]:
    slices: dict[tuple[Any, ...], list[Frame]] = defaultdict(list)
    headers: dict[tuple[Any, ...], Dataset] = {}
    echoes: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        try:  # pydicom parses values when they are asked for
            if (content := _header(path)) is None:
                continue
            uid, echo = str(content.SeriesInstanceUID), str(content.get("EchoNumbers") or "")
            key = (_number(content), uid, _patient(content), _is_localiser(content), echo)
            slices[key] += _frames(content, path)
        except Exception as error:
            if isinstance(error, ValueError) and str(path) in str(error):
                raise
            raise ValueError(
                f"expected a readable DICOM header, got {one_line(error)}: {path}"
            ) from error
        headers.setdefault(key, content)
        echoes[uid].add(echo)
    found = []
    for key in sorted(slices):
        number, uid, patient, is_localiser, echo = key
        header = headers[key]
        scale = _macro(header, 0, "PixelValueTransformationSequence")
        description = str(header.get("SeriesDescription") or "")
        if len(echoes[uid] - {""}) > 1:
            description = f"{description} echo {echo}".strip()
        found.append(
            Series(
                uid=uid,
                modality=str(header.get("Modality") or ""),
                description=description,
                number=number,
                patient=patient,
                identities=_identities(header),
                frame_of_reference_uid=str(header.get("FrameOfReferenceUID") or "") or None,
                frames=tuple(slices[key]),
                is_localiser=is_localiser,
                photometric=str(header.get("PhotometricInterpretation") or "MONOCHROME2"),
                gantry_tilt_deg=float(header.get("GantryDetectorTilt") or 0),
                is_rescaled=scale.get("RescaleIntercept") is not None,
            )
        )
    return found


def _header(path: Path) -> FileDataset | None:
    """What a DICOM image says of itself; None for any other file."""
    if path.stat().st_size == 0 and path.suffix.lower() in (".dcm", ".ima"):
        raise ValueError(f"expected a DICOM file, got an empty one: {path}")
    if not is_dicom(path):
        return None
    header = read_header(path)
    class_uid = header.file_meta.get("MediaStorageSOPClassUID", header.get("SOPClassUID", ""))
    if class_uid == MediaStorageDirectoryStorage:
        return None
    says_image = "Image Storage" in getattr(class_uid, "name", "")
    if not class_uid or (says_image and ("Rows" not in header or "Columns" not in header)):
        raise ValueError(
            f"expected a DICOM image, got one without rows and columns, as if cut off: {path}"
        )
    return header if "Rows" in header and "SeriesInstanceUID" in header else None


def _frames(header: Dataset, path: Path) -> Iterator[Frame]:
    count = int(header.get("NumberOfFrames") or 1)
    if count > MOST_FRAMES:
        raise ValueError(f"expected at most {MOST_FRAMES} frames, got {count}: {path}")
    for index in range(count):
        pixels = _macro(header, index, "PixelMeasuresSequence").get("PixelSpacing")
        scale = _macro(header, index, "PixelValueTransformationSequence")
        plane = _macro(header, index, "PlaneOrientationSequence")
        place = _macro(header, index, "PlanePositionSequence")
        slope, intercept = scale.get("RescaleSlope"), scale.get("RescaleIntercept")
        yield Frame(
            file=path,
            index=index,
            instance_uid=str(header.get("SOPInstanceUID", "")),
            class_uid=str(header.get("SOPClassUID", "")),
            size=(int(header.Columns), int(header.Rows)),
            position_mm=_numbers(place.get("ImagePositionPatient")),
            cosines=_numbers(plane.get("ImageOrientationPatient")),
            pixel_mm=_numbers(pixels)[::-1],  # DICOM has the distance of rows first
            slope=1.0 if slope is None else float(slope),
            intercept=0.0 if intercept is None else float(intercept),
        )


def _macro(header: Dataset, index: int, name: str) -> Dataset:
    """A frame's own functional group, else the one all frames share, else the file itself."""
    own = (header.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
    shared = (header.get("SharedFunctionalGroupsSequence") or [])[:1]
    for groups in (*own, *shared):
        if groups.get(name):
            return groups[name].value[0]
    return header


def _is_localiser(header: Dataset) -> bool:
    return "LOCALIZER" in [str(kind).upper() for kind in header.get("ImageType") or ()]


def _numbers(value: Any) -> Vector:
    return () if value is None else tuple(float(number) for number in value)


def _number(header: Dataset) -> int:
    return int(header.get("SeriesNumber") or 0)


def _patient(header: Dataset) -> str:
    names = (str(header.get(name) or "").strip() for name in ("PatientID", "PatientName"))
    return next(filter(None, names), "")


def _identities(header: Dataset) -> tuple[str, ...]:
    names = ("PatientID", "PatientName", "PatientBirthDate", "AccessionNumber", "StudyID")
    return tuple(text for name in names if (text := str(header.get(name) or "").strip()))
