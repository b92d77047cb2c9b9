import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.preparation.cohorts.inventory import (
    PAIR,
    check_contrast,
    collect,
    folders_named,
    image_named,
    images_named,
    is_current,
    read_image,
    required,
    write_image,
)
from clinfuse.preparation.scan import CaseFiles


def case_of(folder: Path) -> CaseFiles:
    files = required(images_named(folder, PAIR), PAIR, folder.name, folder)
    return CaseFiles(folder.name, folder.name, files)


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cohort(root: Path, lacking: tuple[str, ...] = ()) -> list[Path]:
    folders = [root / name for name in ("b", "a", "c")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "mri.nii.gz").touch()
        if folder.name not in lacking:
            (folder / "ct.nrrd").touch()
    return folders


def test_cases_come_in_the_order_of_their_names(tmp_path):
    found = collect(tmp_path, cohort(tmp_path), case_of, "NAME/{mri,ct}")
    assert [case.case_id for case in found] == ["a", "b", "c"]
    assert found[0].files["ct"] == tmp_path / "a" / "ct.nrrd"


def test_all_cases_that_lack_a_file_are_named_at_once(tmp_path):
    folders = cohort(tmp_path, lacking=("a", "c"))
    with pytest.raises(FileNotFoundError) as refused:
        collect(tmp_path, folders, case_of, "NAME/{mri,ct}")
    message = str(refused.value)
    assert "case a: expected ct, found ['mri']" in message
    assert "case c: expected ct" in message and "case b" not in message


def test_incomplete_cases_can_be_left_out_and_are_named_in_the_log(tmp_path, caplog):
    folders = cohort(tmp_path, lacking=("a",))
    with caplog.at_level(logging.WARNING):
        found = collect(tmp_path, folders, case_of, "NAME/{mri,ct}", skip_incomplete=True)
    assert [case.case_id for case in found] == ["b", "c"]
    assert "left out: case a: expected ct" in caplog.text


def test_a_cohort_of_incomplete_cases_alone_is_refused_in_any_case(tmp_path):
    folders = cohort(tmp_path, lacking=("a", "b", "c"))
    with pytest.raises(FileNotFoundError, match="got 3 that are not"):
        collect(tmp_path, folders, case_of, "NAME/{mri,ct}", skip_incomplete=True)


def test_an_empty_folder_is_refused_with_the_layout_that_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected cases as NAME/\{mri,ct\}, found none"):
        collect(tmp_path, [], case_of, "NAME/{mri,ct}")


def test_a_case_that_is_there_twice_is_refused_with_both_places(tmp_path):
    folders = cohort(tmp_path / "one")[:1] + cohort(tmp_path / "two")[:1]
    with pytest.raises(ValueError, match="expected each case once") as refused:
        collect(tmp_path, folders, case_of, "NAME/{mri,ct}")
    assert str(folders[0]) in str(refused.value) and str(folders[1]) in str(refused.value)


def test_an_image_in_two_formats_is_refused_rather_than_chosen_from(tmp_path):
    (tmp_path / "mri.nii.gz").touch()
    (tmp_path / "mri.mha").touch()
    with pytest.raises(ValueError, match=r"expected one mri, got \['mri.nii.gz', 'mri.mha'\]"):
        image_named(tmp_path, "mri")


def test_folders_are_found_at_any_depth_but_not_inside_of_each_other_or_hidden(tmp_path):
    for name in ("x/y/case_1", "case_2/case_3", ".trash/case_4", "not_case_5"):
        (tmp_path / name).mkdir(parents=True)
    found = [folder.relative_to(tmp_path) for folder in folders_named(tmp_path, r"case_\d")]
    assert sorted(map(str, found)) == ["case_2", "x/y/case_1"]


def test_converted_files_in_the_cohorts_folder_are_not_taken_for_the_cohort(tmp_path):
    (tmp_path / "case_1").mkdir()
    (tmp_path / "work" / "case_1").mkdir(parents=True)
    found = list(folders_named(tmp_path, r"case_\d", tmp_path / "case_1" / ".." / "work"))
    assert found == [tmp_path / "case_1"]


def test_a_folder_may_be_given_as_the_root_itself(tmp_path):
    (tmp_path / "case_1").mkdir()
    assert list(folders_named(tmp_path / "case_1", r"case_\d")) == [tmp_path / "case_1"]


def test_a_root_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a cohort"):
        list(folders_named(tmp_path / "nowhere", "x"))


def test_an_unknown_contrast_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"expected a contrast of \['t1', 't2'\], got 'pd'"):
        check_contrast("pd", ("t1", "t2"))


def test_a_conversion_is_current_until_its_source_is_newer(tmp_path):
    source, converted = tmp_path / "source", tmp_path / "converted"
    source.touch()
    assert not is_current(converted, source)
    converted.touch()
    os.utime(source, (1, 1))
    assert is_current(converted, source)
    os.utime(converted, (0, 0))
    assert not is_current(converted, source)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "x.nii.gz").write_text("no image")
    with pytest.raises(ValueError, match="got something unreadable"):
        read_image(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("name", ["x.nii.gz", "x.mha"])
def test_an_image_that_finds_no_room_leaves_no_file_behind(tmp_path, name):
    voxels = np.random.default_rng(0).integers(0, 2**15, (16, 64, 64)).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    with little_room(50_000), pytest.raises(OSError, match=f"expected to write an image.*{name}"):
        write_image(image, tmp_path / "work" / name)
    assert list((tmp_path / "work").iterdir()) == []
    write_image(image, tmp_path / "work" / name)
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "work" / name)), voxels
    )
