from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.cohorts.brats import cases

OLD = ("t1", "t1ce", "t2", "flair")
NEW = ("t1n", "t1c", "t2w", "t2f")


def draw(root: Path, name: str, labels: list[int], write, suffix: str = ".nii.gz") -> Path:
    mark, contrasts = ("-", NEW) if name.startswith("BraTS-") else ("_", OLD)
    for contrast in contrasts:
        write(root / name / f"{name}{mark}{contrast}{suffix}")
    segmentation = np.zeros((2, 3, 4), np.uint8)
    segmentation.flat[: len(labels)] = labels
    write(root / name / f"{name}{mark}seg{suffix}", segmentation)
    return root / name


def lesion(case) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(case.files["lesion_mask"]))


@pytest.mark.parametrize(
    ("name", "labels", "suffix"),
    [
        ("BraTS20_Training_001", [1, 2, 4], ".nii"),
        ("BraTS2021_00000", [1, 2, 4], ".nii.gz"),
        ("BraTS-GLI-00000-000", [1, 2, 3], ".nii.gz"),
        ("BraTS-MET-00002-000", [1, 2, 3], ".nii.gz"),
    ],
)
def test_every_years_names_give_one_contrast_the_others_and_one_mask(
    name, labels, suffix, tmp_path, write
):
    draw(tmp_path / "data", name, labels, write, suffix)
    (case,) = cases(tmp_path / "data", tmp_path / "work", contrast="t1c")
    assert case.files["mri"].name.endswith((f"_t1ce{suffix}", f"-t1c{suffix}"))
    assert set(case.files) == {"mri", "t1", "t2", "flair", "lesion_mask"}
    assert lesion(case).ravel()[:4].tolist() == [1, 1, 1, 0]
    assert case.files["lesion_mask"].is_relative_to(tmp_path / "work")


def test_visits_of_one_patient_share_the_patient(tmp_path, write):
    for name in ("BraTS-GLI-00008-000", "BraTS-GLI-00008-001", "BraTS-GLI-00009-000"):
        draw(tmp_path, name, [1], write)
    found = cases(tmp_path, tmp_path / "work")
    assert [case.patient for case in found] == [
        "BraTS-GLI-00008",
        "BraTS-GLI-00008",
        "BraTS-GLI-00009",
    ]


def test_a_label_beyond_the_years_is_refused_until_it_is_said_what_is_lesion(tmp_path, write):
    draw(tmp_path, "BraTS-GLI-02060-100", [1, 2, 3, 4], write)
    with pytest.raises(ValueError, match=r"expected labels of \[1, 2, 3\], got \[4\] too"):
        cases(tmp_path, tmp_path / "work")
    (case,) = cases(tmp_path, tmp_path / "work", labels=[1, 3])
    assert lesion(case).ravel()[:5].tolist() == [1, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="got \\[4\\] too"):
        cases(tmp_path, tmp_path / "work")


def test_a_mask_that_was_merged_once_is_not_merged_again(tmp_path, write):
    draw(tmp_path, "BraTS2021_00000", [1], write)
    (case,) = cases(tmp_path, tmp_path / "work")
    written = case.files["lesion_mask"].stat().st_mtime_ns
    cases(tmp_path, tmp_path / "work")
    assert case.files["lesion_mask"].stat().st_mtime_ns == written


def test_a_validation_case_lacks_its_segmentation(tmp_path, write):
    (draw(tmp_path, "BraTS2021_00001", [1], write) / "BraTS2021_00001_seg.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="case BraTS2021_00001: expected seg, found"):
        cases(tmp_path, tmp_path / "work")


def test_an_unknown_contrast_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a contrast of"):
        cases(tmp_path, tmp_path, contrast="dwi")
