import numpy as np
import pydicom
import pytest

from clinfuse.preparation.affines import affine_of


def test_identical_copies_are_dropped_with_a_note(dicom, tmp_path):
    header = dicom.write(tmp_path / "once", dicom.hounsfield(), dicom.affine())
    dicom.write(
        tmp_path / "again", dicom.hounsfield(), dicom.affine(), skip=(0, 1, 3, 4, 5, 7),
        series_uid=header.series_uid,
    )  # fmt: skip
    scan = dicom.read(tmp_path)
    np.testing.assert_array_equal(dicom.voxels(scan), dicom.hounsfield())
    assert scan.notes == ("2 identical copies of slices were dropped",)


def test_slices_that_differ_at_one_position_are_refused(dicom, tmp_path):
    header = dicom.write(tmp_path / "once", dicom.hounsfield(), dicom.affine())
    dicom.write(
        tmp_path / "again", dicom.hounsfield(seed=1), dicom.affine(), skip=range(7),
        series_uid=header.series_uid,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"one slice at each position.*at 5\.00 mm"):
        dicom.read(tmp_path)


def test_missing_slices_are_refused_with_their_place(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield((12, 8, 8)), dicom.affine(), skip=(4, 8, 9))
    expected = r"5.00 mm apart, got 10.00 mm from -15.00 to -5.00 mm, 15.00 mm from 5.00 to 20.00"
    with pytest.raises(ValueError, match=expected):
        dicom.read(tmp_path)


@pytest.mark.parametrize("off_mm", [0.05, 0.07])
def test_uneven_slices_are_refused_from_one_percent_and_a_hundredth_on(dicom, tmp_path, off_mm):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    last = sorted(tmp_path.iterdir())[-1]
    dataset = pydicom.dcmread(last)
    dataset.ImagePositionPatient = [-40, -50, 5.0 + off_mm]  # 5 mm apart: 0.06 mm are allowed
    dataset.save_as(last)
    if off_mm < 0.06:
        assert dicom.read(tmp_path).image.GetSpacing()[2] == pytest.approx(5, abs=0.01)
    else:
        with pytest.raises(ValueError, match=r"got 5.07 mm from 0.00 to 5.07 mm"):
            dicom.read(tmp_path)


def test_a_slice_shifted_sideways_is_refused(dicom, tmp_path):
    dicom.write(tmp_path, dicom.hounsfield(), dicom.affine())
    file = sorted(tmp_path.iterdir())[3]
    dataset = pydicom.dcmread(file)
    dataset.ImagePositionPatient = [-37, -50, -15]
    dataset.save_as(file)
    with pytest.raises(ValueError, match=f"{file.name} 3.00 mm beside it"):
        dicom.read(tmp_path)


def test_a_drift_of_rounding_is_no_tilt(dicom, tmp_path):
    affine = dicom.affine()
    affine[1, 2] += 0.08 / 7
    dicom.write(tmp_path, dicom.hounsfield(), affine)
    scan = dicom.read(tmp_path)
    np.testing.assert_array_equal(dicom.voxels(scan), dicom.hounsfield())
    off_mm = (affine_of(scan.image) - affine) @ [[0, 0], [0, 0], [0, 7], [1, 1]]
    assert np.abs(off_mm).max() < 0.05 and scan.notes == ()
