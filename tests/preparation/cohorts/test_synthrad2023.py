from pathlib import Path

import pytest

from clinfuse.preparation.cohorts.synthrad2023 import cases


@pytest.fixture
def root(tmp_path: Path, write) -> Path:
    for case in ("1BA001", "1BB012", "1BC005"):
        for what in ("mr", "ct", "mask"):
            write(tmp_path / "Task1" / "brain" / case / f"{what}.nii.gz")
    write(tmp_path / "Task1" / "pelvis" / "1PA001" / "mr.nii.gz")
    (tmp_path / "Task1" / "brain" / "overview").mkdir()
    return tmp_path


def test_brains_come_registered_and_their_outline_is_not_called_a_brain_mask(root):
    found = cases(root, root)
    assert [case.case_id for case in found] == ["1BA001", "1BB012", "1BC005"]
    assert all(set(case.files) == {"mri", "ct"} and case.is_registered for case in found)
    assert found[0].files["mri"] == root / "Task1/brain/1BA001/mr.nii.gz"


def test_cases_of_one_centre_can_be_asked_for(root):
    found = cases(root, root, centres=["B", "C"])
    assert [case.case_id for case in found] == ["1BB012", "1BC005"]
    with pytest.raises(ValueError, match="expected centres of"):
        cases(root, root, centres=["D"])


def test_a_validation_case_lacks_its_ct(root, write):
    write(root / "Task1_val" / "brain" / "1BA002" / "mr.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"case 1BA002: expected ct, found \['mr'\]"):
        cases(root, root)
    assert len(cases(root, root, skip_incomplete=True)) == 3
    assert len(cases(root / "Task1", root)) == 3
