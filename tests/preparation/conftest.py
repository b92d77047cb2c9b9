"""DICOM written as scanners write it: single- and multi-frame, tilted, compressed, or broken."""

import io
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from clinfuse.preparation.dicom.headers import list_series
from clinfuse.preparation.dicom.series import choose_series
from clinfuse.preparation.dicom.volume import read_series
from clinfuse.preparation.scan import Scan

GDCM_COMPRESSORS = {JPEG2000Lossless: "JPEG2000", JPEGLosslessSV1: "JPEG"}


def lps_affine(
    spacing_mm: Sequence[float] = (0.9, 0.9, 5.0),
    tilt_deg: float = 0.0,
    turn: np.ndarray | None = None,
    origin_mm: Sequence[float] = (-40.0, -50.0, -30.0),
) -> np.ndarray:
    """Index (i, j, k) to LPS mm of a scan whose slices are ``spacing_mm[2]`` apart on the table.

    The gantry, and so the slices, lean by ``tilt_deg`` about the x axis; the table does not. Then
    all is turned by the rotation ``turn``.
    """
    lean = np.radians(tilt_deg)
    axes = np.array([[1, 0, 0], [0, np.cos(lean), np.sin(lean)], [0, 0, 1.0]]).T
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ axes * spacing_mm
    affine[:3, 3] = origin_mm
    return affine


@dataclass(frozen=True)
class Header:
    """What a written series says of itself."""

    modality: str = "CT"
    slope: float | Sequence[float] = 1.0
    intercept: float = -1024.0
    patient_id: str = "MRN-0042"
    patient_name: str = "Doe^Jane"
    number: int = 2
    description: str = "axial head"
    series_uid: str = field(default_factory=generate_uid)
    study_uid: str = field(default_factory=generate_uid)
    frame_uid: str = field(default_factory=generate_uid)
    multi_frame: bool = False
    syntax: str = ExplicitVRLittleEndian
    bits: int = 16


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    skip: Collection[int] = (),
    changes: dict[str, Any] | None = None,
    **header: Any,
) -> Header:
    """Write an array (k, j, i), in the scanner's units, as a DICOM series; say what was written.

    Args:
        affine: index (i, j, k) to LPS mm, sheared where the gantry was tilted.
        skip: slices that are left out.
        changes: attributes set in the end in every file, or removed where None.
        header: of ``Header``; the slope may be one for every slice.
    """
    about = Header(**header)
    folder.mkdir(parents=True, exist_ok=True)
    slopes = np.broadcast_to(np.asarray(about.slope, float), len(array))
    dtype = np.uint8 if about.bits == 8 else np.int16
    stored = np.rint((array - about.intercept) / slopes[:, None, None]).astype(dtype)
    kept = [k for k in range(len(array)) if k not in skip]
    for number, ks in enumerate([kept] if about.multi_frame else [[k] for k in kept], start=1):
        dataset = _dataset(about, number, stored[ks])
        _place(dataset, about, affine, ks, slopes)
        for name, value in (changes or {}).items():
            if value is not None:
                setattr(dataset, name, value)
            elif name in dataset:
                delattr(dataset, name)
        path = folder / f"{about.modality}{about.number:02d}_{number:04d}"
        dataset.save_as(path, enforce_file_format=True)
    return about


def _dataset(about: Header, number: int, stored: np.ndarray) -> Dataset:
    dataset = Dataset()
    classes = {
        ("CT", False): CTImageStorage,
        ("MR", False): MRImageStorage,
        ("CT", True): EnhancedCTImageStorage,
        ("MR", True): EnhancedMRImageStorage,
    }
    dataset.SOPClassUID = classes.get((about.modality, about.multi_frame), CTImageStorage)
    dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PatientID, dataset.PatientName = about.patient_id, about.patient_name
    dataset.PatientBirthDate, dataset.PatientSex = "19610203", "F"
    dataset.StudyDate, dataset.StudyTime = "20240131", "101500"
    dataset.AccessionNumber, dataset.StudyID = "ACC-991", "S-7"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = about.study_uid, about.series_uid
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = about.frame_uid, ""
    dataset.Modality, dataset.SeriesDescription = about.modality, about.description
    dataset.SeriesNumber, dataset.InstanceNumber = about.number, number
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape[1:]
    dataset.BitsAllocated = dataset.BitsStored = about.bits
    dataset.HighBit, dataset.PixelRepresentation = about.bits - 1, int(about.bits == 16)
    if about.multi_frame:
        dataset.NumberOfFrames = len(stored)
    if about.syntax == ExplicitVRLittleEndian:
        dataset.PixelData = stored.tobytes()
        dataset["PixelData"].VR = "OB" if about.bits == 8 else "OW"
    else:
        dataset.PixelData = encapsulate([_encoded(plane, about.syntax) for plane in stored])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = about.syntax
    return dataset


def _place(
    dataset: Dataset, about: Header, affine: np.ndarray, ks: Sequence[int], slopes: np.ndarray
) -> None:
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing_mm
    pixel = [f"{spacing_mm[1]:.8g}", f"{spacing_mm[0]:.8g}"]
    cosines = [f"{value:.10f}" for value in (*axes[:, 0], *axes[:, 1])]
    places = [[f"{value:.6f}" for value in (affine @ (0, 0, k, 1))[:3]] for k in ks]
    if not about.multi_frame:
        dataset.PixelSpacing, dataset.ImageOrientationPatient = pixel, cosines
        dataset.ImagePositionPatient = places[0]
        dataset.RescaleSlope = f"{slopes[ks[0]]:.10g}"
        dataset.RescaleIntercept = f"{about.intercept:.10g}"
        return
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = pixel, cosines
    shared.PixelMeasuresSequence = [measures]
    shared.PlaneOrientationSequence = [orientation]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = []
    for k, place in zip(ks, places, strict=True):
        own, position, scale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = place
        scale.RescaleSlope, scale.RescaleIntercept = f"{slopes[k]:.10g}", f"{about.intercept:.10g}"
        scale.RescaleType = "HU" if about.modality == "CT" else "US"
        own.PlanePositionSequence, own.PixelValueTransformationSequence = [position], [scale]
        dataset.PerFrameFunctionalGroupsSequence.append(own)


def _encoded(plane: np.ndarray, syntax: str) -> bytes:
    """One frame as GDCM, Pillow or pydicom compresses it; for other syntaxes meaningless bytes."""
    if syntax == JPEGBaseline8Bit:
        buffer = io.BytesIO()
        Image.fromarray(plane).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()
    if syntax == RLELossless:
        raw = Dataset()
        raw.Rows, raw.Columns = plane.shape
        raw.SamplesPerPixel, raw.PhotometricInterpretation = 1, "MONOCHROME2"
        raw.BitsAllocated = raw.BitsStored = plane.itemsize * 8
        raw.HighBit, raw.PixelRepresentation = plane.itemsize * 8 - 1, 1
        raw.file_meta = FileMetaDataset()
        raw.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        raw.SOPClassUID, raw.SOPInstanceUID = CTImageStorage, generate_uid()
        raw.compress(RLELossless, plane, generate_instance_uid=False)
        return next(generate_frames(raw.PixelData, number_of_frames=1))
    if syntax not in GDCM_COMPRESSORS:
        return bytes(range(64))
    return _by_gdcm(plane, GDCM_COMPRESSORS[syntax])


def _by_gdcm(plane: np.ndarray, compressor: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(f"{folder}/frame.dcm")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(plane[None]))
        return next(generate_frames(pydicom.dcmread(f"{folder}/frame.dcm").PixelData))


def hounsfield(shape: Sequence[int] = (8, 20, 24), seed: int = 0) -> np.ndarray:
    """Whole numbers from air to bone."""
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.float32)


def read_folder(folder: Path, series: str | int | None = None) -> Scan:
    """A folder of DICOM, listed, chosen from and read."""
    return read_series(choose_series(list_series(folder), folder, series), folder)


def voxels_of(scan: Scan) -> np.ndarray:
    """The voxels of a scan, (k, j, i)."""
    return sitk.GetArrayFromImage(scan.image)


@dataclass(frozen=True)
class DicomFiles:
    """The functions above for the tests of this folder."""

    write = staticmethod(write_series)
    affine = staticmethod(lps_affine)
    hounsfield = staticmethod(hounsfield)
    read = staticmethod(read_folder)
    voxels = staticmethod(voxels_of)


@pytest.fixture(scope="session")
def dicom() -> DicomFiles:
    """Writes DICOM series from arrays, and reads them back."""
    return DicomFiles()


@pytest.fixture(scope="session")
def image_of() -> Callable[[np.ndarray, Sequence[float]], sitk.Image]:
    """A phantom's array (d, h, w), of voxels of a size, where its study folder would put it."""
    from clinfuse.data.phantoms import ras_affine

    def placed(array: np.ndarray, spacing_mm: Sequence[float]) -> sitk.Image:
        image = sitk.GetImageFromArray(array.astype(np.float32))
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras_affine(array.shape, spacing_mm)
        image.SetSpacing([float(size) for size in spacing_mm[::-1]])
        image.SetOrigin(affine[:3, 3].tolist())
        image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
        return image

    return placed
