"""Masks by their providers, on phantoms, ellipsoids and grids that are turned and mirrored."""

import hashlib

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.grids import is_on
from clinfuse.preparation.masks import (
    Classical,
    Files,
    Masks,
    as_array,
    plausibility,
    read_mask,
)

SPACING_MM = (4.0, 2.0, 2.0)


def image_of(array, spacing_mm=SPACING_MM):
    """An image in RAS, as the arrays of the package lie, from (d, h, w)."""
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(spacing_mm[::-1])
    image.SetDirection(np.diag([-1.0, -1.0, 1.0]).ravel().tolist())
    image.SetOrigin((90.0, 100.0, -60.0))
    return image


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(0, seed=1)


@pytest.fixture
def pair(phantom):
    return image_of(phantom.mri), image_of(phantom.ct_hu)


@pytest.fixture
def own(tmp_path, phantom):
    """The phantom's true masks as files."""
    files = {f"{n}_mask": tmp_path / f"{n}_mask.nii.gz" for n in ("brain", "bone", "lesion")}
    for name, path in files.items():
        sitk.WriteImage(image_of(getattr(phantom, name.removesuffix("_mask"))), path)
    return files


def head(brain_mm=60.0, gap_mm=0.0, bone_mm=6.0):
    """Arrays (brain, bone) of a spherical head on voxels of 4 x 2 x 2 mm."""
    shape = (44, 96, 96)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, SPACING_MM, strict=True)]
    radius = np.sqrt(sum(x**2 for x in np.meshgrid(*axes, indexing="ij")))
    brain = radius < brain_mm
    return brain, (radius >= brain_mm + gap_mm) & (radius < brain_mm + gap_mm + bone_mm)


def masks_of(brain, bone, lesion=None):
    return Masks(image_of(brain), image_of(bone), None if lesion is None else image_of(lesion), {})


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR"])
def test_classical_masks_are_true_and_on_the_grid_of_the_study(phantom, orientation):
    mri, ct = (
        sitk.DICOMOrient(image_of(volume), orientation) for volume in (phantom.mri, phantom.ct_hu)
    )
    masks = Classical()(mri, ct, {})
    for mask, truth, enough in (
        (masks.brain, phantom.brain, 0.95),
        (masks.bone, phantom.bone, 0.90),
    ):
        assert is_on(mask, ct) and mask.GetPixelID() == sitk.sitkUInt8
        assert set(np.unique(sitk.GetArrayFromImage(mask))) == {0, 1}
        assert dice(as_array(mask), truth) > enough
    assert masks.lesion is None


def test_an_oblique_grid_stays_as_it_is(phantom):
    mri, ct = image_of(phantom.mri), image_of(phantom.ct_hu)
    turn = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.05, 0.2)
    for image in (mri, ct):
        direction = np.array(turn.GetMatrix()).reshape(3, 3) @ np.diag([-1.0, -1.0, 1.0])
        image.SetDirection(direction.ravel().tolist())
    masks = Classical()(mri, ct, {})
    assert is_on(masks.brain, ct)
    assert dice(as_array(masks.brain), phantom.brain) > 0.95


def test_classical_masks_say_so_in_their_provenance(pair, own):
    masks = Classical()(*pair, {"lesion_mask": own["lesion_mask"]})
    assert masks.provenance["brain"]["tool"] == "clinfuse.roi.masks"
    assert masks.provenance["bone"]["parameters"]["bone_hu"] == 300
    assert masks.provenance["lesion"]["tool"] == "file"
    assert masks.lesion is not None


def test_a_windowed_ct_is_segmented_as_one(phantom):
    window = (np.clip((phantom.ct_hu + 40) / 160, 0, 1) * 255).astype(np.uint8)
    masks = Classical()(image_of(phantom.mri), image_of(window), {})
    assert "bone_8bit" in masks.provenance["bone"]["parameters"]
    assert dice(as_array(masks.brain), phantom.brain) > 0.93


def test_a_ct_without_a_head_is_refused(phantom):
    ct = image_of(np.full_like(phantom.ct_hu, -1000) + np.float32(1) * (phantom.ct_hu > 0))
    with pytest.raises(ValueError, match="expected to find bone in the CT, segmented no voxel"):
        Classical()(image_of(phantom.mri), ct, {})


def test_files_are_taken_as_they_are_with_their_digest(pair, own, phantom):
    masks = Files()(*pair, own)
    for name in ("brain", "bone", "lesion"):
        assert (as_array(getattr(masks, name)) == getattr(phantom, name)).all()
        digest = hashlib.sha256(own[f"{name}_mask"].read_bytes()).hexdigest()
        assert masks.provenance[name] == {"tool": "file", "sha256": digest}


def test_a_missing_file_is_refused_or_segmented_as_asked(pair, own, phantom):
    for name in ("brain", "bone"):
        files = {key: path for key, path in own.items() if key != f"{name}_mask"}
        with pytest.raises(FileNotFoundError, match=f"got none for {name}: masks.missing"):
            Files()(*pair, files)
        masks = Files(missing="classical")(*pair, files)
        assert masks.provenance[name]["tool"] == "clinfuse.roi.masks"
        assert dice(as_array(getattr(masks, name)), getattr(phantom, name)) > 0.9
        other = {"brain": "bone", "bone": "brain"}[name]
        assert (as_array(getattr(masks, other)) == getattr(phantom, other)).all()
    with pytest.raises(ValueError, match="expected missing=refuse or missing=classical"):
        Files(missing="guess")


def test_no_path_gets_into_the_provenance(pair, own):
    masks = Files()(*pair, own)
    assert str(own["brain_mask"].parent) not in str(masks.provenance)
    assert "brain_mask" not in str(masks.provenance)


def test_an_empty_lesion_is_a_fact_and_an_empty_brain_is_not(pair, own, tmp_path):
    empty = pair[1] < -5000
    sitk.WriteImage(empty, tmp_path / "empty.nii.gz")
    masks = Files()(*pair, {**own, "lesion_mask": tmp_path / "empty.nii.gz"})
    assert masks.lesion is not None and not as_array(masks.lesion).any()
    with pytest.raises(ValueError, match=r"brain mask with voxels in it.*empty\.nii\.gz"):
        Files()(*pair, {**own, "brain_mask": tmp_path / "empty.nii.gz"})


def test_a_mask_that_cannot_be_used_is_named(pair, own, tmp_path):
    _, ct = pair
    shifted = sitk.ReadImage(own["brain_mask"])
    shifted.SetOrigin([x + 1 for x in shifted.GetOrigin()])
    flipped = sitk.Flip(sitk.ReadImage(own["brain_mask"]), (True, False, False))
    for name, image in (
        ("shifted", shifted), ("flipped", flipped), ("cropped", shifted[:, :, 1:]),
        ("colour", sitk.Compose([ct, ct, ct])),
    ):  # fmt: skip
        sitk.WriteImage(image, tmp_path / f"{name}.nrrd")
        with pytest.raises(ValueError, match=rf"{name}\.nrrd"):
            read_mask("brain", tmp_path / f"{name}.nrrd", ct)
    (tmp_path / "text.nii.gz").write_text("no image")
    with pytest.raises(ValueError, match=r"expected a brain mask, got no image .*text\.nii\.gz"):
        read_mask("brain", tmp_path / "text.nii.gz", ct)
    with pytest.raises(FileNotFoundError, match=r"expected a brain mask, found no file"):
        read_mask("brain", tmp_path / "nowhere.nii.gz", ct)


def test_header_rounding_is_the_same_grid_and_the_masks_get_the_studys(pair, own):
    _, ct = pair
    rounded = sitk.ReadImage(own["brain_mask"])
    rounded.SetOrigin([x + 0.004 for x in ct.GetOrigin()])
    path = own["brain_mask"].with_name("rounded.nrrd")
    sitk.WriteImage(rounded, path)
    mask, _ = read_mask("brain", path, ct)
    assert mask.GetOrigin() == ct.GetOrigin()


def test_a_true_head_raises_no_doubt(phantom):
    assert plausibility(masks_of(phantom.brain, phantom.bone, phantom.lesion)) == []
    assert plausibility(masks_of(*head(brain_mm=66))) == []


def test_a_small_and_a_large_brain_are_doubted_with_their_volume():
    for radius_mm in (50.0, 80.0):
        brain, bone = head(brain_mm=radius_mm)
        (doubt,) = plausibility(masks_of(brain, bone))
        volume_ml = 4 / 3 * np.pi * (radius_mm / 10) ** 3
        assert float(doubt.split(" ml")[0].split()[-1]) == pytest.approx(volume_ml, rel=0.02)
        assert "expected 900 to 1800 ml" in doubt and "the scan ends" not in doubt


def test_a_brain_that_the_scan_cuts_is_said_to_be_cut():
    brain, bone = head(brain_mm=66)
    (doubt,) = plausibility(masks_of(brain[22:], bone[22:]))
    assert doubt.endswith("the scan ends within it")


def test_missing_bone_is_doubted():
    brain, bone = head(brain_mm=66)
    bone[..., 8:] = False
    doubts = plausibility(masks_of(brain, bone))
    assert any("hardly any is in view" in doubt for doubt in doubts)
    assert any("0% of the brain is inside the skull" in doubt for doubt in doubts)


def test_a_brain_beside_the_skull_or_in_it_is_doubted():
    brain, bone = head(brain_mm=66)
    (outside,) = plausibility(masks_of(np.roll(brain, 24, axis=1), bone & ~np.roll(brain, 24, 1)))
    assert "of the brain is inside the skull" in outside
    grown, _ = head(brain_mm=70)
    (shared,) = plausibility(masks_of(grown, bone))
    assert "of the brain is bone too" in shared


def test_a_lesion_outside_the_head_is_doubted_and_one_in_the_scalp_is_not():
    brain, bone = head(brain_mm=66)
    for column, is_doubted in ((0, True), (10, False), (48, False)):  # 94, 74 and 1 mm off centre
        lesion = np.zeros_like(brain)
        lesion[20:24, 46:50, column : column + 2] = True
        doubts = plausibility(masks_of(brain, bone, lesion))
        assert bool(doubts) == is_doubted, column
        assert all("100% of the lesion is outside the head" in doubt for doubt in doubts)
    assert plausibility(masks_of(brain, bone, np.zeros_like(brain))) == []
