from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.cohorts.apis import cases


@pytest.fixture
def root(tmp_path: Path, write) -> Path:
    one, two = np.zeros((2, 2, 3, 4), np.uint8)
    one[0, 0, :2] = 1
    two[0, 0, 1:3] = 1
    for case in ("train_000", "train_001"):
        folder = tmp_path / "APIS" / case
        for what in ("ncct", "adc"):
            write(folder / f"{case}_{what}.nii.gz")
        for expert, mask in (("r1", one), ("r2", two)):
            write(folder / "masks" / f"{case}_{expert}_mask.nii.gz", mask)
    write(tmp_path / "APIS" / "test_000" / "test_000_ncct.nii.gz")
    return tmp_path / "APIS"


def voxels(path: Path) -> int:
    return int(sitk.GetArrayFromImage(sitk.ReadImage(path)).sum())


def test_training_cases_come_as_registered_pairs_and_the_ct_only_test_cases_not_at_all(
    root, tmp_path
):
    first, second = cases(root, tmp_path / "work")
    assert (first.case_id, second.case_id) == ("train_000", "train_001")
    assert first.patient != second.patient
    assert first.files["mri"].name == "train_000_adc.nii.gz"
    assert first.files["ct"].name == "train_000_ncct.nii.gz"
    assert first.drawn_on == {"lesion_mask": "mri"} and first.is_registered


@pytest.mark.parametrize(("expert", "size"), [("r1", 2), ("r2", 2), ("both", 1), ("either", 3)])
def test_the_lesion_is_one_experts_or_made_of_both(root, tmp_path, expert, size):
    found = cases(root, tmp_path / "work", expert=expert)
    assert [voxels(case.files["lesion_mask"]) for case in found] == [size, size]


def test_the_cohorts_own_files_are_named_where_nothing_has_to_be_converted(root, tmp_path):
    assert cases(root, tmp_path / "work")[0].files["lesion_mask"].is_relative_to(root)
    assert not (tmp_path / "work").exists()


def test_a_case_without_adc_is_named(root, tmp_path):
    (root / "train_001" / "train_001_adc.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case train_001: expected adc, found \['ncct'"):
        cases(root, tmp_path)
    assert len(cases(root, tmp_path, skip_incomplete=True)) == 1


def test_masks_on_two_grids_are_not_put_together(root, tmp_path, write):
    mask = np.zeros((2, 3, 5), np.uint8)
    write(root / "train_000" / "masks" / "train_000_r2_mask.nii.gz", mask)
    with pytest.raises(ValueError, match="expected two masks on one grid"):
        cases(root, tmp_path, expert="both")


def test_an_unknown_expert_is_refused(root, tmp_path):
    with pytest.raises(Exception, match="r3"):
        cases(root, tmp_path, expert="r3")
