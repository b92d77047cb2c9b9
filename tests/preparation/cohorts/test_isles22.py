from pathlib import Path

import pytest

from clinfuse.preparation.cohorts.isles22 import cases


def rawdata(root: Path, patient: str, session: str, write) -> None:
    name = f"{patient}_{session}"
    for what in ("flair", "dwi", "adc"):
        write(root / "rawdata" / patient / session / f"{name}_{what}.nii.gz")
    write(root / "derivatives" / patient / session / f"{name}_msk.nii.gz")


def bids(root: Path, patient: str, session: str, write) -> None:
    name = f"{patient}_{session}"
    write(root / patient / session / "anat" / f"{name}_FLAIR.nii.gz")
    for what in ("dwi", "adc"):
        write(root / patient / session / "dwi" / f"{name}_{what}.nii.gz")
    write(root / "derivatives" / patient / session / f"{name}_msk.nii.gz")


def flat(root: Path, patient: str, session: str, write) -> None:
    for what in ("flair", "dwi", "adc", "msk"):
        write(root / f"{patient}_{session}_{what}.nii.gz")


@pytest.mark.parametrize("layout", [rawdata, bids, flat])
def test_every_layout_gives_the_chosen_contrast_the_others_and_the_mask(layout, tmp_path, write):
    layout(tmp_path, "sub-strokecase0001", "ses-0001", write)
    (case,) = cases(tmp_path, tmp_path, contrast="dwi")
    assert case.case_id == "sub-strokecase0001_ses-0001"
    assert case.files["mri"].name.endswith("_dwi.nii.gz")
    assert set(case.files) == {"mri", "flair", "adc", "lesion_mask"}
    assert case.drawn_on == {"lesion_mask": "mri"} and not case.is_registered


def test_sessions_of_one_patient_share_the_patient(tmp_path, write):
    for session in ("ses-0001", "ses-0002"):
        rawdata(tmp_path, "sub-strokecase0001", session, write)
    rawdata(tmp_path, "sub-strokecase0002", "ses-0001", write)
    assert [case.patient for case in cases(tmp_path, tmp_path / "work")] == [
        "sub-strokecase0001",
        "sub-strokecase0001",
        "sub-strokecase0002",
    ]


def test_a_session_without_its_mask_is_named_with_what_it_has(tmp_path, write):
    flat(tmp_path, "sub-strokecase0001", "ses-0001", write)
    (tmp_path / "sub-strokecase0001_ses-0001_msk.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected msk, found \['adc', 'dwi', 'flair'\]"):
        cases(tmp_path, tmp_path / "work")


def test_a_file_in_two_places_is_refused(tmp_path, write):
    flat(tmp_path / "a", "sub-strokecase0001", "ses-0001", write)
    flat(tmp_path / "b", "sub-strokecase0001", "ses-0001", write)
    with pytest.raises(ValueError, match="expected each file once"):
        cases(tmp_path, tmp_path / "work")


def test_a_folder_without_the_cohort_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected cases as sub-strokecase0001"):
        cases(tmp_path, tmp_path / "work")
    with pytest.raises(ValueError, match=r"expected a contrast of \['flair', 'dwi', 'adc'\]"):
        cases(tmp_path, tmp_path, contrast="t1")


def test_a_mask_lies_on_dwi_whatever_is_chosen(tmp_path, write):
    flat(tmp_path, "sub-strokecase0001", "ses-0001", write)
    (on_flair,) = cases(tmp_path, tmp_path)
    (on_adc,) = cases(tmp_path, tmp_path, contrast="adc")
    assert on_flair.drawn_on == {"lesion_mask": "dwi"} and "dwi" in on_flair.files
    assert on_adc.drawn_on == {"lesion_mask": "mri"}  # which shares the grid of DWI


def test_the_real_case_is_found(shared_data, tmp_path):
    (case,) = cases(shared_data / "isles22_case", tmp_path)
    assert case.patient == "sub-strokecase0009"
    assert case.files["mri"].name == "sub-strokecase0009_ses-0001_flair.nii.gz"
    assert all(path.is_file() for path in case.files.values())
