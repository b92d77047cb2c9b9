import gzip
import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform

from clinfuse.data.studies import load_study, study_folders
from clinfuse.functional.intensity import ct_from_model, ct_to_model

SPACING_MM = (4.0, 3.0, 2.0)


def stored(folder, name):
    """An array in tensor order, read by nibabel alone."""
    return np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj).transpose(2, 1, 0)


def change(folder, name, how, affine=None):
    path = folder / f"{name}.nii.gz"
    image = nib.load(path)
    data = how(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(data, image.affine if affine is None else affine), path)


def refused(folder, kind, *words, **options):
    with pytest.raises(kind) as error:
        load_study(folder, **options)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and str(folder) in message
    for word in words:
        assert word in message, message


def test_a_study_is_brought_into_model_space_with_its_masks(make_study):
    folder = make_study()
    study = load_study(folder)
    assert study.case_id == study.patient_id == "case_01"
    assert study.spacing_mm == SPACING_MM and study.ct_units == "HU"
    for channel, name in enumerate(("brain_mask", "bone_mask", "lesion_mask")):
        np.testing.assert_array_equal(study.roi[channel], stored(folder, name))
    ct_hu = torch.from_numpy(stored(folder, "ct"))
    torch.testing.assert_close(study.ct[0], ct_to_model(ct_hu))
    torch.testing.assert_close(ct_from_model(study.ct[0]), ct_hu, atol=0.01, rtol=0)
    assert study.mri.min() == -1 and study.mri.max() == 1
    brain = study.roi[0]
    rank = np.corrcoef(study.mri[0][brain], stored(folder, "mri")[brain])[0, 1]
    assert rank > 0.99
    assert dict(study.mask_source) == {"brain": "file", "bone": "file", "lesion": "file"}


def test_without_a_clean_pair_the_sources_are_the_truth(make_study):
    study = load_study(make_study())
    assert study.clean_mri is study.mri and study.clean_ct is study.ct
    assert not study.has_clean_pair


def test_a_clean_pair_is_read_in_the_units_of_the_noisy_one(make_study):
    folder = make_study()
    noisy = stored(folder, "mri") + np.random.default_rng(1).normal(0, 30, (14, 20, 26))
    folder = make_study("case_02", mri=noisy, clean_mri=stored(folder, "mri"))
    study = load_study(folder)
    low, high = study.mri_limits
    expected = np.clip(2 * (stored(folder, "clean_mri") - low) / (high - low) - 1, -1, 1)
    np.testing.assert_allclose(study.clean_mri[0], expected, atol=1e-5)
    assert study.has_clean_pair


def test_the_reference_is_ct_in_bone_and_mri_deep_in_the_brain(make_study):
    study = load_study(make_study())
    brain, bone, _ = study.roi
    torch.testing.assert_close(study.reference[0][bone], study.ct[0][bone])
    deep = brain & (torch.linspace(-1, 1, 26).abs() < 0.2)
    deep &= (torch.linspace(-1, 1, 20).abs() < 0.2)[:, None]
    deep &= (torch.linspace(-1, 1, 14).abs() < 0.2)[:, None, None]
    torch.testing.assert_close(study.reference[0][deep], study.mri[0][deep], atol=1e-3, rtol=0)
    assert not study.has_own_reference


def test_a_haemorrhage_is_found_and_shown_in_the_reference(make_study):
    folder = make_study()
    ct, blood = stored(folder, "ct").copy(), np.zeros((14, 20, 26), bool)
    blood[6:9, 8:12, 10:15] = True
    ct[blood] = 75
    study = load_study(make_study("case_02", ct=ct))
    assert study.findings[0][torch.from_numpy(blood)].float().mean() > 0.8
    assert not study.findings[0][~study.roi[0]].any()
    found = study.findings[0]
    assert (study.reference[0][found] >= study.mri[0][found] - 1e-6).all()
    assert (study.reference[0][found] > 0.3).all()


def test_a_reference_that_the_study_ships_is_used(make_study):
    reference = np.random.default_rng(0).uniform(-1, 1, (14, 20, 26))
    study = load_study(make_study(reference=reference))
    np.testing.assert_allclose(study.reference[0], reference, atol=1e-6)
    assert study.has_own_reference


def test_a_reference_in_other_units_is_refused(make_study):
    folder = make_study(reference=np.random.default_rng(0).uniform(0, 255, (14, 20, 26)))
    refused(folder, ValueError, "[-1, 1]", "reference.nii.gz")


def test_the_lesion_distance_is_negative_inside_only_and_in_millimetres(make_study):
    study = load_study(make_study())
    lesion, distance = study.roi[2], study.lesion_distance_mm[0]
    assert ((distance <= 0) == lesion).all()
    d, h, w = np.nonzero(lesion.numpy())
    far_mm = min(  # from a corner voxel to the nearest lesion voxel, by hand
        np.hypot(np.hypot(z * 4.0, y * 3.0), x * 2.0) for z, y, x in zip(d, h, w, strict=True)
    )
    assert float(distance[0, 0, 0]) == pytest.approx(far_mm, rel=1e-5)


@pytest.mark.parametrize("how", ["absent", "empty"])
def test_no_lesion_is_a_clinical_fact(make_study, how):
    empty = np.zeros((14, 20, 26), bool)
    options = {"without": ("lesion_mask",)} if how == "absent" else {"lesion_mask": empty}
    study = load_study(make_study(**options))
    assert not study.lesion.any() and (study.lesion_distance_mm == 1000).all()
    assert study.mask_source["lesion"] == ("absent" if how == "absent" else "file")


@pytest.mark.parametrize("name", ["mri", "ct"])
def test_a_missing_modality_is_named(make_study, name):
    refused(make_study(without=(name,)), FileNotFoundError, f"{name}.nii.gz")


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "case_99", FileNotFoundError)


@pytest.mark.parametrize("name", ["ct", "brain_mask", "lesion_mask"])
def test_files_on_another_grid_are_refused_with_both_affines(make_study, name):
    folder = make_study()
    moved = nib.load(folder / f"{name}.nii.gz").affine.copy()
    moved[0, 3] = -23.5
    change(folder, name, lambda data: data, moved)
    refused(folder, ValueError, f"{name}.nii.gz", "mri.nii.gz", "-23.5", "-25.0")


def test_another_storage_order_of_the_same_grid_is_fine(make_study):
    folder = make_study()
    expected = load_study(folder)
    image = nib.load(folder / "ct.nii.gz")
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt("PSL"))
    nib.save(image.as_reoriented(turn), folder / "ct.nii.gz")
    assert torch.equal(load_study(folder).ct, expected.ct)


@pytest.mark.parametrize("name", ["brain", "bone"])
def test_an_all_zero_mask_is_refused(make_study, name):
    folder = make_study(**{f"{name}_mask": np.zeros((14, 20, 26), bool)})
    refused(folder, ValueError, "all-zero", f"{name}_mask.nii.gz")


@pytest.mark.parametrize("name", ["mri", "ct"])
def test_a_uniform_image_is_refused(make_study, name):
    folder = make_study(**{name: np.full((14, 20, 26), -500.0)})
    refused(folder, ValueError, "-500 in every voxel", f"{name}.nii.gz")


def test_bad_files_are_refused_by_name(make_study):
    folder = make_study()
    change(folder, "ct", lambda data: np.where(data > 900, np.nan, data))
    refused(folder, ValueError, "NaN", "ct.nii.gz")
    change(folder, "ct", lambda data: np.stack([data, data], -1))
    refused(folder, ValueError, "3-D", "ct.nii.gz")


def test_a_file_without_a_voxel_size_is_refused_by_name(make_study):
    folder = make_study()
    image = nib.load(folder / "ct.nii.gz")
    content = bytearray(image.to_bytes())
    content[80:84] = bytes(4)  # pixdim[1], which nibabel would take for 1 mm
    (folder / "ct.nii.gz").write_bytes(gzip.compress(bytes(content)))
    refused(folder, ValueError, "[0.0, 3.0, 4.0] mm", "ct.nii.gz")


def test_windowed_ct_is_taken_as_it_is(make_study):
    ct_hu = stored(make_study(), "ct")
    window = np.clip((ct_hu + 60) / 200, 0, 1) * 255
    study = load_study(make_study("case_02", ct=window))
    assert study.ct_map == "window_8bit" and study.ct_units == "8-bit window"
    np.testing.assert_allclose(study.ct[0], 2 * window / 255 - 1, atol=1e-5)
    assert not study.findings.any()


def test_ct_in_unknown_units_is_refused_with_its_range(make_study):
    shifted = np.abs(stored(make_study(), "ct") + 1024)
    refused(make_study("case_02", ct=shifted), ValueError, "24 to 2024", "HU", "ct.nii.gz")


def test_missing_masks_are_segmented_said_kept_and_not_written_to_the_study(
    make_study, tmp_path, caplog
):
    folder = make_study(without=("brain_mask", "bone_mask"))
    before = sorted(folder.iterdir())
    with caplog.at_level(logging.INFO):
        study = load_study(folder, cache_dir=tmp_path / "cache")
    assert "case_01 has no brain and no bone mask: segmented from CT" in caplog.text
    assert study.mask_source["brain"] == study.mask_source["bone"] == "segmented"
    true = {name: torch.from_numpy(load_mask(make_study, name)) for name in ("brain", "bone")}
    for channel, name in enumerate(("brain", "bone")):
        overlap = 2 * (study.roi[channel] & true[name]).sum()
        assert overlap / (study.roi[channel].sum() + true[name].sum()) > 0.8
    assert sorted(folder.iterdir()) == before

    (kept,) = (tmp_path / "cache").rglob("bone_mask.nii.gz")
    image = nib.load(kept)  # a reader shows what is in the cache, so change it there
    data = np.asarray(image.dataobj).copy()
    data[:, :, 0] = 1
    nib.save(nib.Nifti1Image(data, image.affine), kept)
    assert load_study(folder, cache_dir=tmp_path / "cache").roi[1, 0].all()

    change(folder, "ct", lambda data: data + (data == data.max()))  # another CT, another mask
    assert not load_study(folder, cache_dir=tmp_path / "cache").roi[1, 0].all()


def load_mask(make_study, name):
    folder = make_study(f"for_{name}")
    return stored(folder, f"{name}_mask").astype(bool)


def test_a_ct_without_bone_says_what_to_add(make_study):
    soft = np.where(stored(make_study(), "ct") > 0, 30.0, -1000.0)
    folder = make_study("case_02", without=("bone_mask",), ct=soft)
    refused(folder, ValueError, "bone_mask.nii.gz", "ct.nii.gz")


def test_resampling_keeps_the_field_of_view_and_where_things_are(make_study):
    folder = make_study()
    fine, coarse = load_study(folder), load_study(folder, resample_mm=(2.0, 2.0, 4.0))
    assert coarse.mri.shape == (1, 28, 30, 13)
    assert coarse.spacing_mm == pytest.approx((2, 2, 4))
    for channel in range(3):
        centres = []
        for study in (fine, coarse):
            voxels = np.argwhere(study.roi[channel].numpy())
            middle = (np.array(study.mri.shape[1:]) - 1) / 2
            centres.append((voxels.mean(0) - middle) * study.spacing_mm)
        np.testing.assert_allclose(*centres, atol=1.0)  # mm, a quarter of the coarsest voxel


@pytest.mark.parametrize("resample_mm", [None, (2.0, 2.0, 4.0)])
@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SLP"])
def test_results_are_written_on_the_grid_the_mri_came_on(
    make_study, tmp_path, orientation, resample_mm
):
    folder = make_study()
    path = folder / "mri.nii.gz"
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    nib.save(nib.load(path).as_reoriented(turn), path)
    study = load_study(folder, resample_mm=resample_mm)
    study.write(tmp_path / "out.nii.gz", study.mri, units="mri")
    out, mri = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
    np.testing.assert_allclose(out.affine, mri.affine)
    assert out.shape == mri.shape
    if resample_mm is None:
        clipped = np.clip(mri.get_fdata(), *study.mri_limits)
        np.testing.assert_allclose(out.get_fdata(), clipped, atol=0.01)
    else:
        assert np.corrcoef(out.get_fdata().ravel(), mri.get_fdata().ravel())[0, 1] > 0.9


def test_a_mask_is_written_as_a_mask(make_study, tmp_path):
    folder = make_study()
    study = load_study(folder)
    study.write(tmp_path / "brain.nii.gz", study.roi[:1])
    back = np.asarray(nib.load(tmp_path / "brain.nii.gz").dataobj)
    np.testing.assert_array_equal(back, nib.load(folder / "brain_mask.nii.gz").get_fdata())


def test_patients_are_named_by_study_json(make_study):
    folder = make_study()
    (folder / "study.json").write_text(json.dumps({"patient": "anna"}))
    assert load_study(folder).patient_id == "anna"


def test_folders_without_images_are_passed_over_but_half_a_pair_is_not(make_study, tmp_path):
    make_study("b")
    make_study("a", without=("ct",))
    (tmp_path / "cohort" / "notes").mkdir()
    (tmp_path / "cohort" / "splits.json").write_text("{}")
    assert [folder.name for folder in study_folders(tmp_path / "cohort")] == ["a", "b"]
    with pytest.raises(FileNotFoundError, match="study folders"):
        study_folders(tmp_path / "cohort" / "notes")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        study_folders(tmp_path / "nowhere")


def test_a_real_patient_loads(shared_data, tmp_path):
    folder = shared_data / "harvard_studies" / "case_28"
    if not folder.is_dir():
        pytest.skip(f"no study at {folder}")
    study = load_study(folder, cache_dir=tmp_path)
    assert study.mri.shape == (1, 16, 256, 256) and study.ct_units == "8-bit window"
    brain_ml, bone_ml, _ = study.roi.sum((1, 2, 3)) * np.prod(study.spacing_mm) / 1000
    assert 700 < brain_ml < 1900  # most of an adult brain
    assert 150 < bone_ml < 1200
    assert not (study.roi[0] & study.roi[1]).any()


def test_a_record_of_masks_that_names_no_tool_is_refused(make_study):
    folder = make_study()
    for made in ({"brain_mask": "a tool"}, {"bone_mask": {}}):
        (folder / "study.json").write_text(json.dumps({"masks": made}))
        with pytest.raises(ValueError, match=r"expected the tool that made each mask.*study\.json"):
            load_study(folder)
    (folder / "study.json").write_text("[" * 5000)
    with pytest.raises(ValueError, match=r"expected JSON.*study\.json"):
        load_study(folder)
