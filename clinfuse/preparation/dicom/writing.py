"""A volume written as a scanner would have: for trying out what reads DICOM, without a patient."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Integer
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from clinfuse.preparation.affines import affine_of
from clinfuse.preparation.scan import Modality


def write_scan(
    folder: Path,
    image: sitk.Image,
    modality: Modality,
    patient: str = "PHANTOM-0001",
    description: str = "synthetic, no patient",
    study_uid: str | None = None,
) -> list[Path]:
    """One file a slice, in a series and a frame of reference of their own; the files, by slice.

    Values are stored as whole numbers from -1024 on: fractions are lost.

    Args:
        folder: new or empty.
        image: 3-D, with perpendicular axes; a CT in HU.
        modality: CT or MR.
        patient: name and number.
        description: of the series.
        study_uid: of the study that the series belongs to; None for a new one.

    Raises:
        ValueError: the folder holds files, or values that 16 bits cannot store.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"expected a new or empty folder for a DICOM series, got files: {folder}")
    stored = np.rint(sitk.GetArrayFromImage(image)) + 1024
    if not (np.isfinite(stored).all() and stored.min() >= 0 and stored.max() < 2**16):
        raise ValueError(
            f"expected values from -1024 to {2**16 - 1025}, got {stored.min() - 1024:g} to "
            f"{stored.max() - 1024:g}: {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    common = _common(modality, patient, description, study_uid or generate_uid())
    affine, files = affine_of(image), []
    for k, plane in enumerate(stored.astype(np.uint16)):
        files.append(folder / f"{modality}_{k + 1:04d}.dcm")
        slice_of(common, affine, plane, k).save_as(files[-1], enforce_file_format=True)
    return files


def slice_of(
    common: Dataset,
    affine: Float[np.ndarray, "4 4"],
    plane: Integer[np.ndarray, "j i"],
    k: int,
) -> Dataset:
    """One slice of a series with an instance of its own: where it lies and what it shows.

    Args:
        common: what all slices of the series say.
        affine: from voxel numbers (i, j, k) to patient coordinates in mm, as DICOM has them.
        plane: stored values, of 16 bits.
        k: number of the slice, from 0.
    """
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / spacing_mm
    one = Dataset()
    one.update(common)
    one.SOPInstanceUID = generate_uid()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
    one.InstanceNumber = k + 1
    one.ImagePositionPatient = decimals(affine[:3, 3] + k * affine[:3, 2])
    one.ImageOrientationPatient = decimals(axes[:, :2].T.ravel())
    one.PixelSpacing = decimals(spacing_mm[[1, 0]])
    one.SliceThickness = decimals(spacing_mm)[2]
    one.Rows, one.Columns = plane.shape
    one.PixelData = plane.tobytes()
    one["PixelData"].VR = "OW"
    return one


def _common(modality: Modality, patient: str, description: str, study_uid: str) -> Dataset:
    """What all slices say."""
    common = Dataset()
    common.SpecificCharacterSet = "ISO_IR 192"
    common.SOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    common.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    common.PatientName = common.PatientID = patient
    common.PatientBirthDate = common.PatientSex = ""
    common.StudyDate = common.StudyTime = common.StudyID = ""
    common.AccessionNumber = common.ReferringPhysicianName = ""
    common.StudyInstanceUID, common.SeriesInstanceUID = study_uid, generate_uid()
    common.FrameOfReferenceUID, common.PositionReferenceIndicator = generate_uid(), ""
    common.Modality, common.SeriesDescription = modality, description
    common.SeriesNumber, common.Manufacturer = 1, "clinfuse"
    common.SamplesPerPixel, common.PhotometricInterpretation = 1, "MONOCHROME2"
    common.BitsAllocated, common.BitsStored, common.HighBit = 16, 16, 15
    common.PixelRepresentation = 0
    common.RescaleSlope, common.RescaleIntercept = "1", "-1024"
    common.RescaleType = "HU" if modality == "CT" else "US"
    return common


def decimals(values: Float[np.ndarray, " n"]) -> list[str]:
    """Decimal strings of at most 16 characters, to the last digit that these hold."""
    return [format_number_as_ds(float(value)) for value in values]
