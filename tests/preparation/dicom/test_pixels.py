import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)


@pytest.mark.parametrize("multi_frame", [False, True])
def test_every_slice_is_scaled_by_its_own_slope(dicom, tmp_path, multi_frame):
    slopes = np.linspace(0.3, 2.7, 8)
    signal = np.abs(dicom.hounsfield())
    dicom.write(
        tmp_path, signal, dicom.affine(), modality="MR", slope=slopes, intercept=7,
        multi_frame=multi_frame,
    )  # fmt: skip
    error = np.abs(dicom.voxels(dicom.read(tmp_path)) - signal).max(axis=(1, 2))
    assert (error <= slopes / 2 + 1e-3).all()  # what storing as whole numbers costs


@pytest.mark.parametrize("multi_frame", [False, True])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, RLELossless])
def test_lossless_compression_changes_nothing(dicom, tmp_path, syntax, multi_frame):
    dicom.write(
        tmp_path, dicom.hounsfield(), dicom.affine(), syntax=syntax, multi_frame=multi_frame
    )
    np.testing.assert_array_equal(dicom.voxels(dicom.read(tmp_path)), dicom.hounsfield())


def five_of(name, folder, **changes):
    """A series of five slices that all hold the pixels of a file that comes with pydicom."""
    path = get_testdata_file(name, download=False)
    folder.mkdir()
    for k in range(5):
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.SeriesInstanceUID, dataset.PatientID = "1.2.3", "1"
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [0, 0, 3 * k]
        for attribute, value in changes.items():
            setattr(dataset, attribute, value)
        dataset.save_as(folder / f"{k}")
    return folder


@pytest.mark.parametrize(
    "name",
    ["bigendian", "implicit", "expb", "RLE", "jp2klossless", "jpeg_ls_lossless", "padded"],
)
def test_what_others_encoded_reads_as_what_they_encoded(dicom, tmp_path, name):
    scan = dicom.read(five_of(f"MR_small_{name}.dcm", tmp_path / "series"))
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array
    np.testing.assert_array_equal(dicom.voxels(scan), np.stack([expected] * 5))


def test_what_others_truncated_is_refused(dicom, tmp_path):
    with pytest.raises(ValueError, match="got a truncated or corrupt file"):
        dicom.read(five_of("MR_truncated.dcm", tmp_path / "series"))


def test_jpeg_of_twelve_bits_is_decoded(dicom, tmp_path):
    folder = five_of("JPGExtended.dcm", tmp_path / "series", Modality="MR", PixelSpacing=[1, 1])
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(folder / "0"))
    np.testing.assert_array_equal(dicom.voxels(dicom.read(folder))[0], theirs[0])
    assert theirs.max() > 255


def test_jpeg_is_decoded(dicom, tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.float32), (8, 20, 24))
    dicom.write(tmp_path, ramp, dicom.affine(), syntax=JPEGBaseline8Bit, bits=8, intercept=0)
    assert np.abs(dicom.voxels(dicom.read(tmp_path)) - ramp).max() <= 4  # of quality 95


def test_compression_that_nothing_here_decodes_is_named(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), syntax=HTJ2KLossless)
    with pytest.raises(ValueError, match=r"got High-Throughput JPEG 2000.*which neither can here"):
        dicom.read(tmp_path)


def test_padding_outside_the_circle_becomes_air_and_is_noted(dicom, tmp_path):
    ct = dicom.hounsfield()
    ct[:, :2] = -3024
    dicom.write(tmp_path, ct, dicom.affine(), changes={"PixelPaddingValue": -2000})
    scan = dicom.read(tmp_path)
    assert (dicom.voxels(scan)[:, :2] == -1000).all()
    np.testing.assert_array_equal(dicom.voxels(scan)[:, 2:], ct[:, 2:])
    assert scan.notes == (f"{8 * 2 * 24} voxels of padding were set to air, -1000 HU",)


@pytest.mark.parametrize("kept", [0, 200, 700, 0.6, 0.98])
@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, JPEG2000Lossless])
def test_a_truncated_file_is_refused_wherever_it_ends(dicom, tmp_path, kept, syntax):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), syntax=syntax)
    file = sorted(tmp_path.iterdir())[-1].rename(tmp_path / "last.dcm")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"(truncated|cut off|empty).*last\.dcm"):
        dicom.read(tmp_path)
