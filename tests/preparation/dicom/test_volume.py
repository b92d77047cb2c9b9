import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from clinfuse.preparation.affines import affine_of

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()


@pytest.mark.parametrize("turn", [None, OBLIQUE, np.diag([-1.0, -1, 1]), np.diag([1.0, -1, -1])])
def test_a_series_reads_as_gdcm_reads_it(dicom, tmp_path, turn):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(turn=turn))
    scan = dicom.read(tmp_path)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    theirs = reader.Execute()
    np.testing.assert_array_equal(dicom.voxels(scan), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(affine_of(scan.image), affine_of(theirs), atol=1e-5)
    assert scan.image.GetPixelID() == sitk.sitkFloat32
    assert (scan.modality, scan.patient, scan.notes) == ("CT", "MRN-0042", ())


def test_the_order_of_files_does_not_matter(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    files = sorted(tmp_path.iterdir())
    for file, name in zip(files, (5, 2, 7, 0, 1, 6, 3, 4), strict=True):
        file.rename(tmp_path / f"x{name}")
    np.testing.assert_array_equal(dicom.voxels(dicom.read(tmp_path)), dicom.hounsfield())


def test_a_ct_without_rescaling_is_noted(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), changes={"RescaleIntercept": None})
    scan = dicom.read(tmp_path)
    assert scan.notes == ("the files state no rescaling: stored values were taken for HU",)
    np.testing.assert_array_equal(dicom.voxels(scan), dicom.hounsfield() + 1024)


@pytest.mark.parametrize("spacing", [["0", "0"], ["0.9", "0"], None])
def test_a_pixel_size_of_zero_or_none_is_refused(dicom, tmp_path, spacing):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), changes={"PixelSpacing": spacing})
    with pytest.raises(ValueError, match="expected a pixel size above zero"):
        dicom.read(tmp_path)


def test_inverted_grey_is_refused(dicom, tmp_path):
    inverted = {"PhotometricInterpretation": "MONOCHROME1"}
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine(), changes=inverted)
    with pytest.raises(ValueError, match="expected MONOCHROME2, got MONOCHROME1"):
        dicom.read(tmp_path)


def test_slices_of_two_sizes_are_refused(dicom, tmp_path):
    header = dicom.write(tmp_path / "a", dicom.hounsfield(), dicom.affine())
    affine = dicom.affine(origin_mm=(-40, -50, 10))
    dicom.write(tmp_path / "b", dicom.hounsfield((2, 9, 9)), affine, series_uid=header.series_uid)
    with pytest.raises(ValueError, match=r"slices of one size, got \(9, 9\), \(24, 20\)"):
        dicom.read(tmp_path)


def test_a_tilted_scan_gets_perpendicular_axes_and_a_note_of_the_angle(dicom, tmp_path):
    affine = dicom.affine((1, 1, 5), tilt_deg=15)
    dicom.write(tmp_path, dicom.hounsfield(), affine)
    scan = dicom.read(tmp_path)
    axes = np.reshape(scan.image.GetDirection(), (3, 3))
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    assert scan.image.GetSpacing() == pytest.approx((1, 1, 5 * np.cos(np.radians(15))), abs=1e-5)
    assert scan.notes == ("a gantry tilt of 15.0 degrees was taken out, by resampling",)
    np.testing.assert_array_equal(
        dicom.voxels(scan)[0, :20], dicom.hounsfield()[0]
    )  # only others move


def test_a_linear_field_survives_the_tilt_exactly(dicom, tmp_path):
    affine = dicom.affine((1, 1, 5), tilt_deg=-20, turn=OBLIQUE)
    k, j, i = np.indices((8, 30, 20))
    points = np.stack([i, j, k, np.ones_like(i)], axis=-1) @ affine.T
    field = points[..., :3] @ (3.0, -5.0, 2.0)  # HU a mm along each axis of the patient
    dicom.write(tmp_path, field, affine, slope=0.01, intercept=0)
    image = dicom.read(tmp_path).image
    found = sitk.GetArrayFromImage(image)
    k, j, i = np.indices(found.shape)
    points = np.stack([i, j, k, np.ones_like(i)], axis=-1) @ affine_of(image).T
    scanned = found != -1000
    assert scanned.sum() > 0.9 * field.size
    inside = scanned & np.roll(scanned, 1, 1) & np.roll(scanned, -1, 1)
    inside[:, [0, -1]] = False
    error = np.abs(found - points[..., :3] @ (3.0, -5.0, 2.0))[inside]
    assert error.max() < 0.01  # of which 0.005 is storing


def test_a_tilt_that_only_the_header_states_is_noted(dicom, tmp_path):
    dicom.write(
        tmp_path, dicom.hounsfield(), dicom.affine(), changes={"GantryDetectorTilt": "12.5"}
    )
    assert "states a gantry tilt of 12.5 degrees" in dicom.read(tmp_path).notes[0]
