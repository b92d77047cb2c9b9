import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation

from clinfuse.preparation.affines import affine_of, image_at
from clinfuse.preparation.dicom.writing import write_scan
from clinfuse.preparation.reading import read_scan


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("turn_deg", [0.0, 12.0])
def test_what_was_written_is_read_back_where_it_was(modality, turn_deg, dicom, tmp_path):
    turn = Rotation.from_euler("xyz", [turn_deg, -turn_deg, 0], degrees=True).as_matrix()
    affine = dicom.affine(spacing_mm=(0.9, 1.1, 5.0), turn=turn)
    array = dicom.hounsfield()
    files = write_scan(tmp_path / "scan", image_at(array, affine), modality, patient="A")
    scan = read_scan(tmp_path / "scan")
    assert len(files) == len(array)
    assert (scan.modality, scan.patient) == (modality, "A")
    np.testing.assert_array_equal(dicom.voxels(scan), array)
    np.testing.assert_allclose(affine_of(scan.image), affine, atol=1e-6)


def test_two_scans_of_one_study_share_that_and_no_frame_of_reference(dicom, tmp_path):
    image, study = image_at(dicom.hounsfield(), dicom.affine()), "1.2.3"
    first, second = (
        pydicom.dcmread(write_scan(tmp_path / name, image, "MR", study_uid=study)[0])
        for name in "ab"
    )
    assert first.StudyInstanceUID == second.StudyInstanceUID == study
    assert first.FrameOfReferenceUID != second.FrameOfReferenceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID


@pytest.mark.parametrize("value", [-1025.0, 70_000.0, np.nan])
def test_values_that_cannot_be_stored_are_refused(value, dicom, tmp_path):
    array = dicom.hounsfield()
    array[0, 0, 0] = value
    with pytest.raises(ValueError, match="expected values from -1024 to 64511"):
        write_scan(tmp_path / "scan", image_at(array, dicom.affine()), "CT")
    assert not (tmp_path / "scan").exists()


def test_a_folder_with_files_is_refused(dicom, tmp_path):
    (tmp_path / "other.txt").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_scan(tmp_path, image_at(dicom.hounsfield(), dicom.affine()), "CT")
