"""The pipeline on a phantom whose CT was scanned in another pose, on another grid."""

import gzip
import json
import resource
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.data.phantoms import make_phantom
from clinfuse.data.studies import load_study
from clinfuse.preparation.grids import is_on
from clinfuse.preparation.identifiers import hashed
from clinfuse.preparation.masks import Classical, Masks
from clinfuse.preparation.pipeline import FACTS, Preparation, grid_of
from clinfuse.preparation.registration import register
from clinfuse.preparation.scan import CaseFiles

PATIENT = "Doe^Jane"


def image_of(array, spacing_mm=(4.0, 2.0, 2.0)):
    """An array (d, h, w), w to the right and h to the front, on a grid about the origin."""
    image = sitk.GetImageFromArray(array.astype(np.uint8 if array.dtype == bool else np.float32))
    image.SetSpacing(spacing_mm[::-1])
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    x, y, z = ((n - 1) * s / 2 for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True))
    image.SetOrigin((x, y, -z))
    return image


def array_of(image):
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "RAS"))


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(1, seed=5)


@pytest.fixture(scope="module")
def pose():
    """Points of the MRI to points of the CT."""
    return sitk.Euler3DTransform((0, 0, 0), 0.08, -0.05, 0.1, (6.0, -9.0, 5.0))


@pytest.fixture(scope="module")
def case(phantom, pose, tmp_path_factory):
    """MRI with a lesion drawn on it, CT with bone drawn on it, as one's own scans would lie."""
    folder = tmp_path_factory.mktemp("scans") / PATIENT
    folder.mkdir()
    scanner = sitk.Image([110, 110, 48], sitk.sitkFloat32)
    scanner.SetSpacing((2.0, 2.0, 3.0))
    scanner.SetOrigin((-113.0, -103.0, -66.0))
    ct, bone = (
        sitk.Resample(image_of(volume), scanner, pose.GetInverse(), how, outside)
        for volume, how, outside in (
            (phantom.ct_hu, sitk.sitkLinear, -1000.0),
            (phantom.bone, sitk.sitkNearestNeighbor, 0),
        )
    )
    images = {
        "mri": image_of(phantom.mri), "ct": ct,
        "lesion_mask": image_of(phantom.lesion), "bone_mask": bone,
    }  # fmt: skip
    files = {name: folder / f"{name}.nii.gz" for name in images}
    for name, image in images.items():
        sitk.WriteImage(image, files[name])
    return CaseFiles("Doe_2024-01-31", PATIENT, files, {"bone_mask": "ct", "lesion_mask": "mri"})


PREPARATION = Preparation(partial(register, kind="rigid", seed=0), Classical())


@pytest.fixture(scope="module")
def prepared(case, tmp_path_factory):
    return PREPARATION(case, tmp_path_factory.mktemp("studies"))


def without(case, *names):
    return replace(case, files={n: path for n, path in case.files.items() if n not in names})


def unregistered(case, *names):
    """Cases for which registration is beside the point: it only judges, which is quicker."""
    return replace(without(case, *names), is_registered=True)


def test_the_study_is_read_as_it_is_and_its_ct_lies_on_the_mri(prepared, phantom):
    assert prepared.quality.verdict != "fail" and not prepared.was_there
    study = load_study(prepared.folder)
    assert study.mask_source == {"brain": "segmented", "bone": "file", "lesion": "file"}
    assert study.patient_id == hashed(PATIENT) and study.spacing_mm == (4.0, 2.0, 2.0)
    ct = array_of(sitk.ReadImage(prepared.folder / "ct.nii.gz"))
    inside = phantom.brain | phantom.bone
    moved = np.abs(ct - phantom.ct_hu)[inside]
    assert np.median(moved) < 15  # noise of 6 HU, interpolated twice
    bone = study.roi[1].numpy()
    dice = 2 * (bone & phantom.bone).sum() / (bone.sum() + phantom.bone.sum())
    assert dice > 0.9  # the mask drawn on the CT has come along


def test_what_lies_on_the_grid_already_keeps_its_values(prepared, case):
    for name in ("mri", "lesion_mask"):
        given, kept = (
            sitk.ReadImage(path) for path in (case.files[name], prepared.folder / f"{name}.nii.gz")
        )
        assert np.array_equal(array_of(given), array_of(kept)) and is_on(kept, given)


def test_the_transform_kept_is_the_pose_of_the_ct(prepared, pose, phantom):
    found = sitk.ReadTransform(prepared.folder / "ct_to_mri.tfm")
    points = np.argwhere(phantom.brain)[::500, ::-1]
    mri = sitk.ReadImage(prepared.folder / "mri.nii.gz")
    positions = [mri.TransformIndexToPhysicalPoint(p.tolist()) for p in points]
    apart = [np.subtract(found.TransformPoint(p), pose.TransformPoint(p)) for p in positions]
    assert np.linalg.norm(apart, axis=1).max() < 1.0


def test_nothing_that_is_written_names_the_patient_or_a_date(prepared):
    for path in prepared.folder.rglob("*"):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        for name in (b"Doe", b"doe", b"Jane", b"2024"):
            assert name not in content[:400] and name not in path.name.encode()
            assert path.suffix == ".gz" or name not in content
    assert prepared.case_id == hashed("Doe_2024-01-31") == prepared.folder.name


def test_names_are_kept_where_that_is_asked_for():
    keeping = replace(PREPARATION, keep_ids=True)
    assert keeping.names(CaseFiles("a_1", "a", {})) == ("a_1", "a")
    assert replace(PREPARATION, salt="x").names(CaseFiles("a", "a", {}))[0] == hashed("a", "x")


def test_masks_say_where_they_are_from(prepared, case):
    facts = json.loads((prepared.folder / FACTS).read_text())
    assert facts["masks"]["brain_mask"]["tool"] == "clinfuse.roi.masks"
    assert facts["masks"]["bone_mask"]["tool"] == "file"
    assert len({m["sha256"] for n, m in facts["masks"].items() if n != "brain_mask"}) == 2
    assert facts["registration"]["registration"] == "rigid"


def test_a_study_that_is_there_is_left_alone_and_one_made_otherwise_is_not_taken_for_it(
    prepared, case
):
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    again = PREPARATION(case, prepared.folder.parent)
    assert again.was_there and again.quality.reasons == prepared.quality.reasons
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()} == before
    with pytest.raises(ValueError, match="got one made from others: remove it"):
        replace(PREPARATION, spacing_mm=(4.0, 4.0, 4.0))(case, prepared.folder.parent)
    with pytest.raises(ValueError, match="got one made from others"):
        PREPARATION(without(case, "bone_mask"), prepared.folder.parent)


def test_a_folder_that_is_no_study_is_not_overwritten(case, tmp_path):
    mine = tmp_path / hashed(case.case_id)
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="got something else of that name"):
        PREPARATION(case, tmp_path)
    assert (mine / "thesis.txt").read_text() == "all of it"


def test_what_fails_midway_leaves_nothing_and_the_next_run_goes_on(case, tmp_path):
    short = unregistered(case, "bone_mask")
    (tmp_path / f".{hashed(case.case_id)}.partial").mkdir()  # of a run that was killed
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file may be larger
    try:
        with pytest.raises(OSError):
            PREPARATION(short, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_scans_that_were_swapped_are_refused(case, tmp_path):
    swapped = {"mri": case.files["ct"], "ct": case.files["mri"]}
    with pytest.raises(ValueError, match="got them swapped"):
        PREPARATION(CaseFiles("x", "x", swapped), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mask_elsewhere_than_its_scan_is_refused(case, tmp_path):
    wrong = replace(unregistered(case), drawn_on={"bone_mask": "mri"})
    with pytest.raises(ValueError, match="expected a mask on the grid of"):
        PREPARATION(wrong, tmp_path)


def test_a_ct_that_does_not_lie_on_the_mri_is_put_aside_until_it_is_accepted(case, tmp_path):
    given = unregistered(case, "bone_mask")  # said to be registered, and 12 mm off
    aside = PREPARATION(given, tmp_path)
    assert aside.is_refused and aside.folder.parent == tmp_path / "refused"
    assert aside.quality.verdict == "fail" and aside.quality.reasons
    assert PREPARATION(given, tmp_path).was_there
    taken = replace(PREPARATION, accept=[aside.case_id])(given, tmp_path)
    assert not taken.is_refused and taken.folder == tmp_path / aside.case_id


def test_masks_that_the_case_brings_need_no_provider(case, phantom, tmp_path):
    brain = tmp_path / "brain.nii.gz"
    sitk.WriteImage(image_of(phantom.brain), brain)
    files = {**case.files, "brain_mask": brain}

    def provider(mri: sitk.Image, ct: sitk.Image, files) -> Masks:
        raise AssertionError("asked for masks that were given")

    own = replace(unregistered(case), files=files)
    study = Preparation(partial(register, kind="rigid"), provider)(own, tmp_path / "out")
    kept = array_of(sitk.ReadImage(study.folder / "brain_mask.nii.gz"))
    assert np.array_equal(kept > 0, phantom.brain)


def test_a_case_without_ct_keeps_its_other_contrasts_and_its_lesion(case, tmp_path, phantom):
    other = tmp_path / "adc.nii.gz"
    sitk.WriteImage(sitk.Shrink(image_of(phantom.clean_mri), (2, 2, 1)), other)
    files = {n: case.files[n] for n in ("mri", "lesion_mask")} | {"adc": other}
    study = PREPARATION(CaseFiles("x", "x", files), tmp_path / "out")
    assert {path.name for path in study.folder.iterdir()} == {
        "mri.nii.gz", "adc.nii.gz", "lesion_mask.nii.gz", FACTS,
    }  # fmt: skip
    mri, adc = (sitk.ReadImage(study.folder / f"{name}.nii.gz") for name in ("mri", "adc"))
    assert is_on(adc, mri)


@pytest.mark.parametrize("spacing_mm", [(5.0, 0.9, 0.9), (2.0, 3.0, 4.0), (4.0, 2.0, 2.0)])
def test_another_voxel_size_keeps_the_field_of_view(spacing_mm, phantom):
    mri = image_of(phantom.mri)
    mri = sitk.PermuteAxes(mri, (2, 0, 1))  # stored sagittally
    grid = grid_of(mri, spacing_mm)
    canonical = sitk.DICOMOrient(mri, "RAS")
    np.testing.assert_allclose(grid.GetSpacing()[::-1], spacing_mm, rtol=0.03)
    for image in (grid, canonical):
        assert image.GetDirection() == canonical.GetDirection()
    corners = [
        [
            image.TransformContinuousIndexToPhysicalPoint(corner)
            for corner in ((-0.5,) * 3, [n - 0.5 for n in image.GetSize()])
        ]
        for image in (grid, canonical)
    ]
    np.testing.assert_allclose(*corners, atol=1e-6)


def test_no_voxel_size_is_the_mris_own_grid_and_nonsense_is_refused(phantom):
    mri = image_of(phantom.mri)
    assert grid_of(mri, None) is mri
    with pytest.raises(ValueError, match="expected three positive voxel sizes"):
        grid_of(mri, (1.0, 0.0, 1.0))


def test_an_image_that_shows_nothing_is_refused_with_its_file(case, tmp_path):
    nothing = tmp_path / "ct.nii.gz"
    sitk.WriteImage(sitk.ReadImage(case.files["ct"]) * 0, nothing)
    with pytest.raises(ValueError, match=f"expected an image, got 0 in every voxel: {nothing}"):
        PREPARATION(replace(case, files={**case.files, "ct": nothing}), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
