from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.cohorts.harvard import MISSING, cases, longest_run, patient_of


def draw(root: Path, case: int, numbers: list[int], names: tuple[str, ...] = ("CT", "MRI")) -> None:
    """Slices whose top left pixel, front and right of the patient, is the slice's number."""
    for name in names:
        folder = root / "CT-MRI" / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            pixels = np.full((6, 8), 200 if name == "CT" else 100, np.uint8)
            pixels[0, 0] = number
            path = folder / f"{case}{number:03d}.png"
            sitk.WriteImage(sitk.GetImageFromArray(pixels), path)


def array(path: Path) -> np.ndarray:
    """Values as (d, h, w) towards head, front and right."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(path), "RAS"))


def test_slices_are_stacked_from_below_with_their_left_on_the_patients_right(tmp_path):
    draw(tmp_path, 20, [7, 5, 6])
    (case,) = cases(tmp_path, tmp_path / "work")
    assert (case.case_id, case.patient, case.is_registered) == ("case_20", "harvard_20", False)
    assert array(case.files["mri"])[:, -1, -1].tolist() == [5, 6, 7]
    assert array(case.files["ct"])[0, 0, 0] == 200 and array(case.files["mri"])[0, 0, 0] == 100
    image = sitk.ReadImage(case.files["ct"])
    np.testing.assert_allclose(image.GetSpacing(), (0.9, 0.9, 5.0), rtol=1e-6)
    assert image.GetMetaData("descrip") == "slices 5-7 of 3; voxel size is assumed"


def test_case_and_slice_are_told_apart_by_the_last_three_digits(tmp_path):
    draw(tmp_path, 2, [20, 21])
    draw(tmp_path, 20, [20, 21])
    assert [case.case_id for case in cases(tmp_path, tmp_path / "work")] == ["case_02", "case_20"]


def test_a_case_that_lacks_slices_keeps_its_longest_unbroken_run_and_says_so(tmp_path):
    draw(tmp_path, 33, [6, 7, 8, 10, 11, 12, 13])
    (case,) = cases(tmp_path, tmp_path / "work")
    assert array(case.files["mri"])[:, -1, -1].tolist() == [10, 11, 12, 13]
    assert case.notes == ("slices [9] are missing: of 7, the unbroken run 10 to 13 is kept",)


def test_longest_run_of_several_is_the_first():
    assert longest_run([9, 1, 2, 4, 5, 7]) == [1, 2]
    assert longest_run([]) == []


def test_another_voxel_size_is_another_file_and_the_same_one_is_kept(tmp_path):
    draw(tmp_path, 20, [5, 6])
    (first,) = cases(tmp_path, tmp_path / "work")
    written = first.files["ct"].stat().st_mtime_ns
    (again,) = cases(tmp_path, tmp_path / "work")
    assert again.files == first.files and first.files["ct"].stat().st_mtime_ns == written
    (other,) = cases(tmp_path, tmp_path / "work", spacing_mm=(1.0, 1.0, 6.0))
    assert sitk.ReadImage(other.files["ct"]).GetSpacing() == (1.0, 1.0, 6.0)


def test_slices_without_a_partner_are_named(tmp_path):
    draw(tmp_path, 20, [5, 6])
    draw(tmp_path, 20, [7], names=("CT",))
    with pytest.raises(FileNotFoundError, match=r"case case_20: expected .* found 7 of CT alone"):
        cases(tmp_path, tmp_path / "work")


def test_colour_and_other_sizes_are_refused(tmp_path):
    draw(tmp_path, 20, [5, 6])
    path = tmp_path / "CT-MRI" / "CT" / "20006.png"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 5), np.uint8)), path)
    with pytest.raises(ValueError, match=r"expected \(6, 8\) pixels, as in 20005.png"):
        cases(tmp_path, tmp_path / "work")
    colour = sitk.GetImageFromArray(np.zeros((6, 8, 3), np.uint8), isVector=True)
    sitk.WriteImage(colour, path)
    with pytest.raises(ValueError, match="expected a grey picture of 8 bits"):
        cases(tmp_path, tmp_path / "work")


def test_stacks_are_taken_as_they_are_with_a_note_where_they_close_a_gap(tmp_path, write):
    for case in ("case_20", "case_41"):
        write(tmp_path / case / "mri.nii.gz")
        write(tmp_path / case / "ct.nii.gz")
    found = cases(tmp_path, tmp_path / "work")
    assert [case.patient for case in found] == ["harvard_20", "harvard_41"]
    assert found[0].files["mri"] == tmp_path / "case_20" / "mri.nii.gz"
    assert not found[0].notes and "slices [17] are missing" in found[1].notes[0]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected cases as CT-MRI"):
        cases(tmp_path, tmp_path / "work")
    (tmp_path / "CT-MRI" / "CT").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="expected cases as CT-MRI"):
        cases(tmp_path, tmp_path / "work")


def test_the_eight_real_patients_are_stacked_where_they_have_no_gap(shared_data, tmp_path):
    found = {case.case_id: case for case in cases(shared_data / "harvard_aanlib", tmp_path)}
    theirs = {case.case_id: case for case in cases(shared_data / "harvard_studies", tmp_path)}
    assert set(found) == set(theirs) and len(found) == 8
    for case_id, case in found.items():
        for what in ("mri", "ct"):
            assert sitk.ReadImage(case.files[what]).GetSpacing() == pytest.approx((0.9, 0.9, 5.0))
            if int(case_id[-2:]) not in MISSING:
                mine, given = (array(c.files[what]) for c in (case, theirs[case_id]))
                np.testing.assert_array_equal(mine, given)
    sizes = {c: sitk.ReadImage(found[c].files["ct"]).GetSize()[2] for c in found}
    assert (sizes["case_32"], sizes["case_33"], sizes["case_41"]) == (17, 14, 14)


def test_the_gaps_stated_are_those_of_the_real_folders(shared_data):
    for case, missing in MISSING.items():
        names = (shared_data / "harvard_aanlib" / "CT-MRI" / "CT").glob(
            f"{case}[0-9][0-9][0-9].png"
        )
        numbers = [int(path.stem[-3:]) for path in names]
        assert sorted(set(range(min(numbers), max(numbers))) - set(numbers)) == list(missing)


def test_a_person_in_two_sets_has_one_name_because_the_mri_is_the_same(shared_data):
    assert patient_of("CT-MRI", 28) == patient_of("SPECT-MRI", 28)
    assert patient_of("PET-MRI", 25) == patient_of("PET-MRI", 41) != patient_of("CT-MRI", 41)
    with pytest.raises(ValueError, match="expected CT-MRI, SPECT-MRI or PET-MRI"):
        patient_of("GFP-PC", 1)
    one, other = (shared_data / "harvard_aanlib" / s / "MRI" for s in ("CT-MRI", "SPECT-MRI"))
    shared = sorted(path.name for path in one.glob("28[0-9][0-9][0-9].png"))
    assert len(shared) == 16
    for name in shared:
        np.testing.assert_array_equal(
            *(sitk.GetArrayFromImage(sitk.ReadImage(folder / name)) for folder in (one, other))
        )
