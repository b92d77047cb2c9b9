"""DICOM series: what a folder holds, whether it makes a volume, and the volume itself.

Series are told apart by what the files say, never by their names. Nothing is repaired silently:
slices that are missing, doubled or shifted are refused; a gantry tilt is taken out, with a note.
"""

import itertools
import logging
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.misc import is_dicom
from pydicom.uid import (
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
)

from clinfuse.preparation.scan import Modality, Scan

log = logging.getLogger(__name__)

FEWEST_SLICES = 5
"""Fewer are a localiser or a sample, not a volume."""

POSITION_TOLERANCE_MM = 0.01
"""Positions are decimal strings that scanners round, to this or better."""

DRIFT_TOLERANCE_MM = 0.1
"""Slices that run sideways by less than this over the whole stack are not called tilted."""

PARALLEL_TOLERANCE = 5e-4
"""Direction cosines of the slices of one stack may differ by this much (rounding)."""

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """One slice: where its pixels are stored, and where they lie in the patient.

    Attributes:
        file: a single-frame file, or the one that holds this among other frames.
        index: of the frame in its file, from 0.
        instance_uid: SOP Instance UID of the file.
        class_uid: SOP Class UID of the file.
        size: (columns, rows).
        position_mm: centre of the first pixel, LPS; empty where the file says nothing.
        cosines: direction of the rows and of the columns, LPS; empty where the file says nothing.
        pixel_mm: pixel size (along a row, along a column); empty where the file says nothing.
        slope, intercept: stored value to the scanner's units (HU for CT).
    """

    file: Path
    index: int
    instance_uid: str
    class_uid: str
    size: tuple[int, int]
    position_mm: Vector
    cosines: Vector
    pixel_mm: Vector
    slope: float
    intercept: float


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
        gaps_mm = np.diff(np.sort(_along_normal(self.frames)))
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
            f"({_some(list(patients.values()))}): {source}"
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


def read_series(series: Series, source: Path) -> Scan:
    """The volume of a series, float32, in HU for CT, its voxels where they are in the patient.

    A gantry tilt is taken out: see ``upright``. Of identical copies of a slice one is kept.
    Declared padding below -1024 HU becomes air (-1000 HU). Each with a note.

    Args:
        series: one whose ``unfit`` is empty.
        source: the folder or file it is of, for ``Scan.source`` and messages.

    Raises:
        ValueError: MONOCHROME1, slices of several sizes, no voxel size, missing, shifted or
            differing slices at one position, pixels that are cut off or cannot be decoded.
    """
    _check_slices(series, source)
    along = _along_normal(series.frames)
    frames = [series.frames[k] for k in np.argsort(along, kind="stable")]
    voxels, padded = _voxels(frames, series.modality)
    notes = []
    kept = _without_copies(frames, voxels, source)
    if len(kept) < len(frames):
        notes.append(f"{len(frames) - len(kept)} identical copies of slices were dropped")
        frames, voxels = [frames[k] for k in kept], voxels[kept]
    if padded:
        notes.append(f"{padded} voxels of padding were set to air, -1000 HU")
    if series.modality == "CT" and not series.is_rescaled:
        notes.append("the files state no rescaling: stored values were taken for HU")
    affine, tilt_deg = _affine(frames, source)
    image = image_at(voxels, affine)
    if tilt_deg:
        image = upright(image, outside=-1000.0 if series.modality == "CT" else 0.0)
        notes.append(f"a gantry tilt of {tilt_deg:.1f} degrees was taken out, by resampling")
    elif abs(series.gantry_tilt_deg) > 0.1:
        notes.append(
            f"the file states a gantry tilt of {series.gantry_tilt_deg:.1f} degrees, "
            "which the positions of its slices do not have"
        )
    return Scan(
        image=image,
        source=source,
        modality=cast(Modality, series.modality),
        patient=series.patient or None,
        description=series.description,
        series_uid=series.uid,
        frame_of_reference_uid=series.frame_of_reference_uid,
        notes=tuple(notes),
    )


def read_header(path: Path) -> FileDataset:
    """All that a DICOM file says, less its pixels.

    Raises:
        ValueError: the file is truncated or corrupt.
    """
    return _read(path, stop_before_pixels=True)


def image_at(array: Float[np.ndarray, "k j i"], affine_lps: Float[np.ndarray, "4 4"]) -> sitk.Image:
    """An image from its voxels and from where index (i, j, k) lies in LPS millimetres."""
    spacing_mm = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(affine_lps[:3, 3].tolist())
    image.SetSpacing(spacing_mm.tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing_mm).ravel().tolist())
    return image


def affine_of(image: sitk.Image) -> Float[np.ndarray, "4 4"]:
    """Index (i, j, k) to LPS millimetres: the inverse of ``image_at``."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def upright(image: sitk.Image, outside: float | int) -> sitk.Image:
    """An image with sheared axes resampled, linearly, onto perpendicular ones.

    Rows and columns keep their directions and the slices their planes, so that of a tilted scan no
    slice is mixed with its neighbour: each is only shifted within its plane, the first not at all.
    The field of view grows until it holds every voxel.

    Args:
        outside: value of voxels that were not scanned.
    """
    affine = affine_of(image)
    axes, shear = np.linalg.qr(affine[:3, :3])
    sign = np.sign(np.diag(shear))
    axes, shear = axes * sign, shear * sign[:, None]
    spacing_mm = np.diag(shear)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in image.GetSize()))))
    steps = corners @ shear.T / spacing_mm
    low = np.floor(steps.min(0) + 1e-6).astype(int)
    high = np.ceil(steps.max(0) - 1e-6).astype(int)
    return sitk.Resample(
        image,
        (high - low + 1).tolist(),
        sitk.Transform(),
        sitk.sitkLinear,
        (affine[:3, 3] + axes @ (low * spacing_mm)).tolist(),
        spacing_mm.tolist(),
        axes.ravel().tolist(),
        outside,
        sitk.sitkFloat32,
    )


# --- headers ------------------------------------------------------------------------------------


def _series_of(paths: Iterator[Path] | Sequence[Path]) -> list[Series]:
    slices: dict[tuple[Any, ...], list[Frame]] = defaultdict(list)
    headers: dict[tuple[Any, ...], Dataset] = {}
    echoes: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if content := _header(path):
            try:  # pydicom parses values when they are asked for
                uid, echo = str(content.SeriesInstanceUID), str(content.get("EchoNumbers") or "")
                key = (_number(content), uid, _patient(content), _is_localiser(content), echo)
                slices[key] += _frames(content, path)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise ValueError(
                    f"expected a readable DICOM header, got {_one_line(error)}: {path}"
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


def _read(path: Path, stop_before_pixels: bool = False) -> FileDataset:
    try:
        with warnings.catch_warnings(action="ignore"):
            return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"expected a DICOM file, got a truncated or corrupt one ({_one_line(error)}): {path}"
        ) from error


def _frames(header: Dataset, path: Path) -> Iterator[Frame]:
    for index in range(int(header.get("NumberOfFrames") or 1)):
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


def _named(found: Sequence[Series], wanted: str) -> list[Series]:
    by_uid = [one for one in found if one.uid == wanted]
    if by_uid:
        return [one for one in by_uid if not one.unfit] or by_uid
    if wanted.isdecimal() and 1 <= int(wanted) <= len(found):
        return [found[int(wanted) - 1]]
    return [one for one in found if wanted.casefold() in one.description.casefold()]


# --- geometry -----------------------------------------------------------------------------------


def _axes(frame: Frame) -> Float[np.ndarray, "3 3"]:
    """Unit vectors along rows, along columns and across slices, as columns of a matrix."""
    row, column = np.reshape(frame.cosines, (2, 3))
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1)


def _along_normal(frames: Sequence[Frame]) -> Float[np.ndarray, " n"]:
    return np.array([frame.position_mm for frame in frames]) @ _axes(frames[0])[:, 2]


def _check_slices(series: Series, source: Path) -> None:
    if series.photometric != "MONOCHROME2":
        raise ValueError(
            f"expected MONOCHROME2, got {series.photometric}, in which white is low and values "
            f"may be inverted: {source}"
        )
    sizes = sorted({frame.size for frame in series.frames})
    if len(sizes) > 1:
        raise ValueError(f"expected slices of one size, got {_some(sizes)}: {source}")
    for frame in series.frames:
        if len(frame.pixel_mm) != 2 or not min(frame.pixel_mm) > 0:
            raise ValueError(
                f"expected a pixel size above zero, got {list(frame.pixel_mm) or 'none'}: "
                f"{frame.file}"
            )
        if not np.allclose(frame.pixel_mm, series.frames[0].pixel_mm, rtol=1e-3, atol=0):
            raise ValueError(
                f"expected slices of one pixel size, got {series.frames[0].pixel_mm} and "
                f"{frame.pixel_mm}: {frame.file}"
            )


def _without_copies(
    frames: Sequence[Frame], voxels: Float[np.ndarray, "k j i"], source: Path
) -> list[int]:
    """Indices of the slices less identical copies, of slices that are sorted by position."""
    along = _along_normal(frames)
    kept: list[int] = []
    for k in range(len(frames)):
        if not kept or along[k] - along[kept[-1]] > POSITION_TOLERANCE_MM:
            kept.append(k)
        elif not np.array_equal(voxels[k], voxels[kept[-1]]):
            raise ValueError(
                f"expected one slice at each position, got two that differ at "
                f"{along[k]:.2f} mm ({_one_name(frames[kept[-1]])} and {_one_name(frames[k])}), "
                f"as of two echoes, times or reconstructions: {source}"
            )
    return kept


def _affine(frames: Sequence[Frame], source: Path) -> tuple[Float[np.ndarray, "4 4"], float]:
    """Index (i, j, k) to LPS millimetres for evenly spaced slices, and their tilt in degrees."""
    if len(frames) < FEWEST_SLICES:
        raise ValueError(
            f"expected at least {FEWEST_SLICES} slices, got {len(frames)} positions: {source}"
        )
    axes, along = _axes(frames[0]), _along_normal(frames)
    gaps_mm = np.diff(along)
    usual_mm = float(np.median(gaps_mm))
    tolerance_mm = 0.01 * usual_mm + POSITION_TOLERANCE_MM
    odd = np.flatnonzero(np.abs(gaps_mm - usual_mm) > tolerance_mm)
    if odd.size:
        gaps = [f"{gaps_mm[k]:.2f} mm from {along[k]:.2f} to {along[k + 1]:.2f} mm" for k in odd]
        raise ValueError(
            f"expected slices {usual_mm:.2f} mm apart, got {_some(gaps)} along their normal, as "
            f"where slices are missing: {source}"
        )
    positions = np.array([frame.position_mm for frame in frames])
    steps = np.arange(len(frames))[:, None]
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    shifted = np.linalg.norm(positions - (positions[0] + steps * step), axis=1)
    if shifted.max() > tolerance_mm:
        raise ValueError(
            f"expected slices in one line, got {_one_name(frames[int(shifted.argmax())])} "
            f"{shifted.max():.2f} mm beside it: {source}"
        )
    across = step - (step @ axes[:, 2]) * axes[:, 2]
    drift = across * (len(frames) - 1)
    origin, tilt_deg = positions[0], 0.0
    if np.linalg.norm(drift) > DRIFT_TOLERANCE_MM:
        tilt_deg = float(np.degrees(np.arctan2(np.linalg.norm(across), step @ axes[:, 2])))
    else:
        origin, step = origin + drift / 2, step - across
    i_mm, j_mm = frames[0].pixel_mm
    affine = np.eye(4)
    affine[:3] = np.stack([axes[:, 0] * i_mm, axes[:, 1] * j_mm, step, origin], axis=1)
    return affine, tilt_deg


# --- pixels -------------------------------------------------------------------------------------


def _voxels(frames: Sequence[Frame], modality: str) -> tuple[Float[np.ndarray, "k j i"], int]:
    """The slices in the scanner's units, and how many voxels of padding became air."""
    columns, rows = frames[0].size
    voxels = np.empty((len(frames), rows, columns), np.float32)
    wanted: dict[Path, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        wanted[frame.file].append(k)
    padded = 0
    for file, ks in wanted.items():
        dataset = _read(file)
        stored = _stored(dataset, file)
        for k in ks:
            plane = stored[frames[k].index]
            voxels[k] = plane * frames[k].slope + frames[k].intercept
            if modality == "CT" and (padding := _padding(dataset)):
                outside = (plane >= padding[0]) & (plane <= padding[1]) & (voxels[k] < -1024)
                voxels[k][outside] = -1000
                padded += int(outside.sum())
    return voxels, padded


def _padding(dataset: Dataset) -> tuple[int, int] | None:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return None
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    return low, high


def _stored(dataset: FileDataset, file: Path) -> np.ndarray:
    """Stored values (frame, row, column): by pydicom, and by GDCM what pydicom cannot decode."""
    if "PixelData" not in dataset:
        raise ValueError(f"expected pixels, got a file cut off before them: {file}")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        with warnings.catch_warnings(action="ignore"):
            stored = dataset.pixel_array
    except Exception as error:  # whatever a plug-in raises on bytes that make no image
        if not syntax.is_compressed or not syntax.is_encapsulated:
            raise ValueError(
                f"expected {dataset.Rows} x {dataset.Columns} pixels, got a truncated or corrupt "
                f"file ({_one_line(error)}): {file}"
            ) from error
        stored = _by_gdcm(dataset, file)
    return stored.reshape(-1, dataset.Rows, dataset.Columns)


def _by_gdcm(dataset: FileDataset, file: Path) -> np.ndarray:
    """Frames decoded one by one through a bare image of each, for GDCM would rescale the whole."""
    syntax = dataset.file_meta.TransferSyntaxUID
    frames = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            count = int(dataset.get("NumberOfFrames") or 1)
            for frame in generate_frames(dataset.PixelData, number_of_frames=count):
                bare = _bare(dataset)
                bare.PixelData = encapsulate([frame])
                bare["PixelData"].is_undefined_length = True
                bare.save_as(Path(folder) / "frame", enforce_file_format=True)
                reader = sitk.ImageFileReader()
                reader.SetImageIO("GDCMImageIO")
                reader.SetFileName(str(Path(folder) / "frame"))
                frames.append(sitk.GetArrayFromImage(reader.Execute()))
        return np.concatenate(frames)
    except (RuntimeError, ValueError, EOFError) as error:
        raise ValueError(
            f"expected pixels that pydicom or GDCM can decode, got {syntax.name}, which neither "
            f"can here (or a truncated file); convert it to {ExplicitVRLittleEndian.name}: {file}"
        ) from error


def _bare(dataset: FileDataset) -> Dataset:
    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    bare.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    bare.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    bare.SOPClassUID, bare.SOPInstanceUID = SecondaryCaptureImageStorage, dataset.SOPInstanceUID
    for name in (
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
    ):
        setattr(bare, name, dataset[name].value)
    return bare


# --- words --------------------------------------------------------------------------------------


def _some(things: Sequence[object], most: int = 3) -> str:
    text = ", ".join(str(thing) for thing in things[:most])
    return text if len(things) <= most else f"{text} and {len(things) - most} more"


def _one_name(frame: Frame) -> str:
    return f"{frame.file.name} frame {frame.index + 1}" if frame.index else frame.file.name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
