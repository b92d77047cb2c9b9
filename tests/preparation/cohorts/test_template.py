import logging
from pathlib import Path

import pytest

from clinfuse.preparation.cohorts.template import cases


def series(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "IM0001").touch()


@pytest.fixture
def root(tmp_path: Path, write) -> Path:
    root = tmp_path / "mine"
    write(root / "ann" / "mri.nii.gz")
    write(root / "ann" / "ct.nrrd")
    write(root / "ann" / "bone_mask.mha")
    write(root / "ann" / "lesion_mask.nii")
    series(root / "bob" / "mri")
    series(root / "bob" / "ct")
    return root


def test_every_format_and_folders_of_dicom_are_taken(root):
    ann, bob = cases(root, root / "work")
    assert {name: path.name for name, path in ann.files.items()} == {
        "mri": "mri.nii.gz",
        "ct": "ct.nrrd",
        "bone_mask": "bone_mask.mha",
        "lesion_mask": "lesion_mask.nii",
    }
    assert ann.drawn_on == {"bone_mask": "ct", "lesion_mask": "mri"} and not ann.is_registered
    assert bob.files == {"mri": root / "bob" / "mri", "ct": root / "bob" / "ct"}


def test_the_grid_of_a_mask_can_be_said(root):
    ann, _ = cases(root, root / "work", drawn_on={"lesion_mask": "ct"})
    assert ann.drawn_on == {"bone_mask": "ct", "lesion_mask": "ct"}
    with pytest.raises(ValueError, match=r"got \['tumour'\]"):
        cases(root, root / "work", drawn_on={"tumour": "ct"})


def test_sessions_share_their_patient(root, write):
    for session in ("before", "after"):
        write(root / "cleo" / session / "mri.nii.gz")
        write(root / "cleo" / session / "ct.nii.gz")
    found = {case.case_id: case.patient for case in cases(root, root / "work")}
    assert found == {"ann": "ann", "bob": "bob", "cleo_after": "cleo", "cleo_before": "cleo"}


def test_sessions_may_hold_dicom_folders_too(tmp_path):
    series(tmp_path / "dan" / "day_1" / "mri")
    series(tmp_path / "dan" / "day_1" / "ct")
    (case,) = cases(tmp_path, tmp_path / "work")
    assert (case.case_id, case.patient) == ("dan_day_1", "dan")


def test_all_patients_without_mri_or_ct_are_named(root, write):
    write(root / "eve" / "mri.nii.gz")
    (root / "fay").mkdir()
    with pytest.raises(FileNotFoundError) as refused:
        cases(root, root / "work")
    assert "case eve: expected ct, found ['mri']" in str(refused.value)
    assert "case fay: expected mri, found no image" in str(refused.value)
    assert len(cases(root, root / "work", skip_incomplete=True)) == 2


def test_an_empty_folder_is_no_series(tmp_path, write):
    write(tmp_path / "ann" / "mri.nii.gz")
    (tmp_path / "ann" / "ct").mkdir()
    with pytest.raises(FileNotFoundError, match="case ann: expected ct"):
        cases(tmp_path, tmp_path / "work")


def test_two_images_of_one_name_are_refused(root):
    series(root / "ann" / "ct")
    with pytest.raises(ValueError, match=r"expected one ct, got ct\.nrrd and ct/"):
        cases(root, root / "work")


def test_images_under_other_names_are_said_to_be_left_alone(root, write, caplog):
    write(root / "ann" / "lesion.nii.gz")
    with caplog.at_level(logging.WARNING):
        cases(root, root / "work")
    assert "left ['lesion.nii.gz'] alone" in caplog.text


def test_a_folder_that_is_empty_or_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected cases as PATIENT"):
        cases(tmp_path, tmp_path / "work")
    with pytest.raises(FileNotFoundError, match="expected the folder of a cohort"):
        cases(tmp_path / "nowhere", tmp_path / "work")
