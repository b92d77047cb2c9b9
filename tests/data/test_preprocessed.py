import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from clinfuse.data import preprocessed
from clinfuse.data.paired_volumes import PairedVolumes
from clinfuse.data.preprocessed import preprocessed_study
from clinfuse.data.studies import Study, load_study


def noisy(array):
    return array + np.random.default_rng(1).normal(0, 9, array.shape)


KINDS = {
    "plain": {},
    "of two sources": {"clean": True},
    "with its own reference": {"reference": np.random.default_rng(0).uniform(-1, 1, (14, 20, 26))},
    "without a lesion": {"without": ("lesion_mask",)},
    "without masks": {"without": ("brain_mask", "bone_mask")},
}


@pytest.fixture
def make(make_study, head_of):
    def make_kind(kind, case="case_01"):
        options = dict(KINDS[kind])
        if options.pop("clean", False):
            arrays = head_of()
            options |= {f"clean_{name}": arrays[name] for name in ("mri", "ct")}
            options |= {name: noisy(arrays[name]) for name in ("mri", "ct")}
        return make_study(case, **options)

    return make_kind


def assert_same(kept, read):
    for field in fields(Study):
        ours, theirs = getattr(kept, field.name), getattr(read, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
        elif field.name == "grid":
            np.testing.assert_array_equal(ours.affine, theirs.affine)
            assert ours.shape == theirs.shape and ours.header == theirs.header
        else:
            assert ours == theirs, field.name
    assert (kept.clean_mri is kept.mri) == (read.clean_mri is read.mri)
    assert (kept.clean_ct is kept.ct) == (read.clean_ct is read.ct)


def kept_folders(cache):
    return [path.parent for path in sorted(cache.glob("preprocessed/*/*/facts.json"))]


def is_mapped(volume):
    """Whether the voxels lie where a file is mapped: they are pages of the kernel's, not ours."""
    where = volume.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
        if start <= where < end:
            return line.endswith(".npy")
    return False


@pytest.mark.parametrize("resample_mm", [None, (3.0, 3.0, 3.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_study_is_the_study(make, tmp_path, kind, resample_mm):
    folder, cache = make(kind), tmp_path / "cache"
    read = load_study(folder, resample_mm=resample_mm)
    for _ in range(2):  # as it is made, and as it is found
        assert_same(preprocessed_study(folder, "piecewise", cache, resample_mm), read)
    assert len(kept_folders(cache)) == 1


def test_what_a_kept_study_writes_is_what_the_study_writes(make, tmp_path):
    folder = make("plain")
    preprocessed_study(folder, cache_dir=tmp_path / "cache")
    kept = preprocessed_study(folder, cache_dir=tmp_path / "cache")
    for name, study in {"kept": kept, "read": load_study(folder)}.items():
        study.write(tmp_path / f"{name}.nii", study.mri, units="mri")
    assert (tmp_path / "kept.nii").read_bytes() == (tmp_path / "read.nii").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="mappings are read in /proc")
def test_studies_of_a_cohort_are_mapped_and_not_held(make, tmp_path):
    for case in range(4):
        folder = make("of two sources", f"case_{case}")
    splits = {"train": [f"case_{case}" for case in range(4)]}
    data = PairedVolumes(folder.parent, splits=splits, cache_dir=tmp_path / "cache")
    for study in data.studies("train"):
        volumes = [v for v in vars(study).values() if isinstance(v, torch.Tensor)]
        assert len(volumes) == 8 and all(map(is_mapped, volumes))
    held = PairedVolumes(folder.parent, splits=splits).studies("train")[0]
    assert not is_mapped(held.mri)


def test_what_is_done_to_a_kept_study_is_not_done_to_what_is_kept(make, tmp_path):
    folder = make("plain")
    for _ in range(2):
        study = preprocessed_study(folder, cache_dir=tmp_path / "cache")
        assert_same(study, load_study(folder))
        study.mri.zero_(), study.roi.fill_(True)


def test_another_file_or_reading_or_code_makes_another_study(make, tmp_path, monkeypatch):
    folder, cache = make("plain"), tmp_path / "cache"

    def study(**options):
        return preprocessed_study(folder, cache_dir=cache, **options)

    before = study()
    window = study(ct_map="window_40_400")
    assert_same(window, load_study(folder, "window_40_400"))
    assert len(kept_folders(cache)) == 2  # each of its own reading

    image = nib.load(folder / "mri.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata()[::-1], image.affine), folder / "mri.nii.gz")
    assert not torch.equal(study().mri, before.mri)
    assert_same(study(), load_study(folder))

    (folder / "lesion_mask.nii.gz").unlink()
    assert not study().has_lesion and study().mask_source["lesion"] == "absent"
    (folder / "study.json").write_text(json.dumps({"patient": "anna"}))
    assert study().patient_id == "anna"
    assert len(kept_folders(cache)) == 2  # what is of no use any more is gone

    (known,) = {
        path for path in kept_folders(cache) if json.loads(facts(path))["patient_id"] == "anna"
    }
    monkeypatch.setattr(preprocessed, "_code", lambda: "of tomorrow")
    assert_same(study(), load_study(folder))
    assert not known.exists()


def facts(kept):
    return (kept / "facts.json").read_text()


def shortened(kept):
    os.truncate(kept / "images.npy", 5000)


def of_another_type(kept):
    np.save(kept / "images.npy", np.zeros((4, 14, 20, 26)))


def of_another_grid(kept):
    np.save(kept / "masks.npy", np.zeros((4, 14, 20, 27), bool))


def with_too_few(kept):
    np.save(kept / "masks.npy", np.zeros((2, 14, 20, 26), bool))


def of_another_study(kept):
    (kept / "facts.json").write_text(facts(kept).replace(kept.name, "0" * 16))


def without_a_fact(kept):
    (kept / "facts.json").write_text(json.dumps({"made_of": kept.name, "volumes": {}}))


def half_written(kept):
    (kept / "facts.json").write_text(facts(kept)[:40])


def without_images(kept):
    (kept / "images.npy").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        shortened,
        of_another_type,
        of_another_grid,
        with_too_few,
        of_another_study,
        without_a_fact,
        half_written,
        without_images,
    ],
)
def test_what_is_spoilt_is_made_anew(make, tmp_path, spoil):
    folder, cache = make("plain"), tmp_path / "cache"
    preprocessed_study(folder, cache_dir=cache)
    (kept,) = kept_folders(cache)
    spoil(kept)
    for _ in range(2):
        assert_same(preprocessed_study(folder, cache_dir=cache), load_study(folder))
    assert kept_folders(cache) == [kept] and len(list(kept.parent.iterdir())) == 1


def test_who_asks_at_once_gets_the_same_and_one_makes_it(make, tmp_path, caplog):
    folder, cache = make("plain"), tmp_path / "cache"
    with caplog.at_level(logging.DEBUG), ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(preprocessed_study, folder, cache_dir=cache) for _ in range(4)]
        found = [each.result() for each in asked]
    assert sum("case_01: preprocessed in" in message for message in caplog.messages) == 1
    for study in found:
        assert_same(study, load_study(folder))


def test_without_a_place_to_keep_it_the_study_is_read(make, tmp_path):
    folder = make("plain")
    before = sorted(tmp_path.rglob("*"))
    assert_same(preprocessed_study(folder), load_study(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_studies_are_refused_as_ever(make_study, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="study folder, found none"):
        preprocessed_study(tmp_path / "case_99", cache_dir=cache)
    folder = make_study(without=("ct",))
    with pytest.raises(FileNotFoundError, match=r"expected ct\.nii\.gz"):
        preprocessed_study(folder, cache_dir=cache)
    assert not kept_folders(cache)
