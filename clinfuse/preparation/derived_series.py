"""A volume we made, written as a DICOM series beside the one it was made from."""

import datetime
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Int16
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from clinfuse import __version__
from clinfuse.preparation.affines import affine_of
from clinfuse.preparation.dicom.headers import list_series, read_header, series_of_file
from clinfuse.preparation.dicom.series import Series, choose_series
from clinfuse.preparation.dicom.stack import Frame
from clinfuse.preparation.dicom.writing import slice_of
from clinfuse.preparation.identifiers import hashed

WARNING = "RESEARCH USE ONLY"

DESCRIPTION_LENGTH = 64
"""Of a Series Description: value representation LO (DICOM PS3.5, 6.2)."""

NUMBER_OFFSET = 9000
"""Added to the Series Number of the source: far from what a scanner counts to."""

KEPT = (
    "FrameOfReferenceUID",
    "PatientPosition",
    "PatientSex",
    "PositionReferenceIndicator",
    "StudyInstanceUID",
)
"""What the series shares with its source in any case: with it viewers lay one over the other."""

IDENTIFYING = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)
"""What it shares if the patient may be named; required, so empty otherwise (type 2)."""

ACQUISITION = ("ScanningSequence", "SequenceVariant", "ScanOptions", "MRAcquisitionType")
"""Required of an MR image; the source's, where it is one."""


def write_derived_series(
    folder: Path,
    image: sitk.Image,
    like: Path,
    series: str | int | None = None,
    description: str = "fused",
    derivation: str = "MRI-CT fusion",
    keep_ids: bool = False,
    salt: str = "",
) -> list[Path]:
    """Write a volume as a derived MR series of the study it was made in; the files, by slice.

    New series and instances in the source's study and frame of reference, one file a slice on the
    image's own grid, 16 bit with rescaling: values are kept to within half of (maximum - minimum)
    / 65534. Slices name the slices of the source next to them. That this is for research is said in
    the description and in Content Qualification, never in the pixels.

    Args:
        folder: new or empty; it appears whole or not at all.
        image: any grid of perpendicular axes, in any units.
        like: DICOM folder or file it was made from.
        series: which series there, as in ``read_scan``.
        description: what it is, a few words that name no one.
        derivation: how it was made.
        keep_ids: keeps name, number and dates of the patient, as an archive needs to file it.
            Otherwise the patient is ``hashed`` and dates are left out; the UIDs of the study and
            the frame of reference remain, by which the archive itself still knows the patient.
        salt: of the hash.

    Raises:
        FileNotFoundError: no DICOM at ``like``.
        ValueError: the folder holds files, voxels are NaN or infinite, axes are sheared, or the
            source is not one series.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"expected a new or empty folder for a DICOM series, got files: {folder}")
    found = list_series(like) if like.is_dir() else series_of_file(like)
    source = choose_series(found, like, series)
    affine, stored, slope, intercept = _checked(image, folder)
    common = _common(source, f"clinfuse {description}", derivation, keep_ids, salt)
    common.RescaleSlope, common.RescaleIntercept, common.RescaleType = slope, intercept, "US"
    common.WindowCenter = intercept
    common.WindowWidth = format_number_as_ds(float(slope) * 65534)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    names = [f"slice_{number:04d}.dcm" for number in range(1, len(stored) + 1)]
    try:
        partial.mkdir(parents=True)
        for k, (name, plane) in enumerate(zip(names, stored, strict=True)):
            slice_ = _slice(common, affine, plane, k, source.frames)
            slice_.save_as(partial / name, enforce_file_format=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / name for name in names]


def _checked(
    image: sitk.Image, folder: Path
) -> tuple[Float[np.ndarray, "4 4"], Int16[np.ndarray, "k j i"], str, str]:
    """Where the voxels are, the voxels as stored, and the slope and intercept as written."""
    affine = affine_of(image)
    axes = np.reshape(image.GetDirection(), (3, 3))
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise ValueError(f"expected perpendicular axes, got a sheared image for {folder}")
    array = sitk.GetArrayFromImage(image).astype(np.float64)
    if array.ndim != 3:
        raise ValueError(f"expected a 3-D image of one value a voxel, got {array.ndim}-D")
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ValueError(f"expected finite voxels, got {bad} that are NaN or infinite: {folder}")
    low, high = array.min(), array.max()
    slope = format_number_as_ds((high - low) / 65534 or 1.0)
    intercept = format_number_as_ds((low + high) / 2)
    stored = np.rint((array - float(intercept)) / float(slope)).clip(-32768, 32767)
    return affine, stored.astype(np.int16), slope, intercept


def _common(source: Series, title: str, derivation: str, keep_ids: bool, salt: str) -> Dataset:
    """What all slices of the new series say."""
    header = read_header(source.files[0])
    now = datetime.datetime.now()
    new = Dataset()
    new.SpecificCharacterSet = "ISO_IR 192"
    for name in KEPT:
        setattr(new, name, _text(header, name))
    new.FrameOfReferenceUID = new.FrameOfReferenceUID or generate_uid()
    for name in IDENTIFYING:
        setattr(new, name, _text(header, name) if keep_ids else "")
    if not keep_ids and source.patient:
        new.PatientID = new.PatientName = hashed(source.patient, salt)
    if keep_ids:
        new.SeriesDate = new.ContentDate = now.strftime("%Y%m%d")
        new.SeriesTime = new.ContentTime = now.strftime("%H%M%S")
    new.Modality, new.SOPClassUID = "MR", MRImageStorage
    new.SeriesInstanceUID = generate_uid()
    new.SeriesNumber = NUMBER_OFFSET + source.number
    new.SeriesDescription = f"{title[: DESCRIPTION_LENGTH - len(WARNING) - 1]} {WARNING}"
    new.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    new.DerivationDescription = f"{derivation}, clinfuse {__version__}; {WARNING}"
    new.Manufacturer, new.SoftwareVersions = "clinfuse", __version__
    new.BurnedInAnnotation, new.ContentQualification = "NO", "RESEARCH"
    for name in ACQUISITION:
        setattr(new, name, header.get(name) or "" if source.modality == "MR" else "")
    new.ScanningSequence = new.ScanningSequence or "RM"  # research mode
    new.SequenceVariant = new.SequenceVariant or "NONE"
    new.EchoTime = new.RepetitionTime = new.EchoTrainLength = None
    new.SamplesPerPixel, new.PhotometricInterpretation = 1, "MONOCHROME2"
    new.BitsAllocated, new.BitsStored, new.HighBit, new.PixelRepresentation = 16, 16, 15, 1
    return new


def _slice(
    common: Dataset,
    affine: Float[np.ndarray, "4 4"],
    plane: Int16[np.ndarray, "j i"],
    k: int,
    sources: Sequence[Frame],
) -> Dataset:
    one = slice_of(common, affine, plane, k)
    one.SpacingBetweenSlices = one.SliceThickness
    i, j = affine[:3, 0], affine[:3, 1]
    normal = np.cross(i, j) / (np.linalg.norm(i) * np.linalg.norm(j))
    position = affine[:3, 3] + k * affine[:3, 2]
    one.SliceLocation = format_number_as_ds(float(position @ normal))
    one.SourceImageSequence = list(_references(affine, plane.shape, k, sources))
    return one


def _references(
    affine: Float[np.ndarray, "4 4"], shape: tuple[int, ...], k: int, sources: Sequence[Frame]
) -> Iterator[Dataset]:
    """The slice of the source that lies nearest to the centre of this one."""
    centre = (affine @ [(shape[1] - 1) / 2, (shape[0] - 1) / 2, k, 1])[:3]
    row, column = np.reshape(sources[0].cosines, (2, 3))
    off_mm = (np.array([frame.position_mm for frame in sources]) - centre) @ np.cross(row, column)
    nearest = sources[int(np.abs(off_mm).argmin())]
    item, purpose = Dataset(), Dataset()
    code = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator = code.value, code.scheme_designator
    purpose.CodeMeaning = code.meaning
    item.ReferencedSOPClassUID = nearest.class_uid
    item.ReferencedSOPInstanceUID = nearest.instance_uid
    if sum(frame.file == nearest.file for frame in sources) > 1:
        item.ReferencedFrameNumber = nearest.index + 1
    item.PurposeOfReferenceCodeSequence = [purpose]
    yield item


def _text(header: Dataset, name: str) -> str:
    return str(header.get(name) or "")
