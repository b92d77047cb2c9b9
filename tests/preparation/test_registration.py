"""Registration from end to end, on phantom heads, and what is written of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.grids import on_grid
from clinfuse.preparation.registration import (
    register,
    write_transform,
)
from clinfuse.preparation.registration_search import (
    apart_mm,
    head_points_mm,
    moved_by,
    target_error_mm,
)

STILL = sitk.Transform(3, sitk.sitkIdentity)
OPTIONS = Path(__file__).parents[2] / "conf" / "registration"
MOTION = sitk.Euler3DTransform([0.0, 0.0, 0.0], 0.15, -0.1, 0.2, [12.0, -8.0, 10.0])


@pytest.fixture(scope="module")
def scans(image_of):
    head = make_phantom(3, seed=1, shape=(36, 60, 52), spacing_mm=(4.0, 4.0, 4.0), contrast="t1")
    return image_of(head.mri, head.spacing_mm), image_of(head.ct_hu, head.spacing_mm)


@pytest.fixture(scope="module")
def registration(scans):
    mri, ct = scans
    return register(mri, moved_by(ct, MOTION), seed=3)


def test_a_moved_head_is_registered_and_passes(scans, registration):
    error_mm = target_error_mm(
        registration.transform, MOTION.GetInverse(), head_points_mm(scans[0])
    )
    assert error_mm.mean() < 1.0
    assert registration.verdict == "pass", registration.reasons
    assert registration.quality.smallest_jacobian == pytest.approx(1)
    assert registration.quality.mutual_information > registration.quality.mutual_information_before


def test_what_was_measured_is_plain_numbers_and_words(registration):
    facts = registration.facts()
    assert facts["registration"] == "rigid" and facts["verdict"] == "pass"
    assert facts["seed"] == 3 and facts["seconds"] > 0
    assert all(type(value) in (str, float) for value in facts.values())
    turned_deg = np.degrees(np.arccos((np.trace(np.reshape(MOTION.GetMatrix(), (3, 3))) - 1) / 2))
    assert facts["turned_deg"] == pytest.approx(turned_deg, abs=1)


def test_the_ct_resampled_by_what_was_found_lies_on_the_mri(scans, registration):
    mri, ct = scans
    moved = moved_by(ct, MOTION)
    back = on_grid(moved, mri, registration.transform, fill=-1000)
    inner = (slice(4, -4),) * 3
    difference = sitk.GetArrayFromImage(back)[inner] - sitk.GetArrayFromImage(ct)[inner]
    unmoved = on_grid(moved, mri, fill=-1000)
    before = sitk.GetArrayFromImage(unmoved)[inner] - sitk.GetArrayFromImage(ct)[inner]
    assert np.abs(difference).mean() < np.abs(before).mean() / 5


def test_no_registration_keeps_the_files_alignment_and_fails_one_that_is_off(scans):
    mri, ct = scans
    given = register(mri, moved_by(ct, MOTION), kind="none")
    assert target_error_mm(given.transform, STILL, head_points_mm(mri)).max() == 0
    assert given.verdict == "fail" and "another search ended" in given.reasons[0]


@pytest.mark.slow
def test_an_affine_registration_finds_a_scale_that_a_rigid_one_cannot(scans):
    mri, ct = scans
    points_mm = head_points_mm(mri)
    scale = sitk.AffineTransform(3)
    scale.Scale((1.0, 1.06, 0.94))
    wider = on_grid(ct, ct, scale.GetInverse(), fill=-1000)
    rigid, affine = (register(mri, wider, kind=kind) for kind in ("rigid", "affine"))
    assert apart_mm(affine.transform, scale, points_mm) < 1.0
    assert apart_mm(affine.transform, scale, points_mm) < apart_mm(
        rigid.transform, scale, points_mm
    )


@pytest.mark.slow
def test_a_deformation_fits_better_and_does_not_fold(scans):
    mri, ct = scans
    bend = sitk.BSplineTransformInitializer(ct, [4, 4, 4])
    wild = np.random.default_rng(0).normal(0, 5, len(bend.GetParameters()))
    bend.SetParameters(wild.tolist())
    bent = on_grid(ct, ct, bend, fill=-1000)
    rigid, deformed = (register(mri, bent, kind=kind) for kind in ("rigid", "deformable"))
    assert deformed.quality.mutual_information > rigid.quality.mutual_information
    assert deformed.quality.smallest_jacobian >= 0.3


@pytest.mark.slow
def test_elastix_finds_the_same_place(scans, registration):
    pytest.importorskip("itk", reason="itk-elastix is not installed: pip install itk-elastix")
    mri, ct = scans
    found = register(mri, moved_by(ct, MOTION), engine="elastix")
    assert apart_mm(found.transform, registration.transform, head_points_mm(mri)) < 1.0


@pytest.mark.skipif(importlib.util.find_spec("itk") is not None, reason="itk-elastix is installed")
def test_elastix_that_is_not_installed_is_asked_for_in_a_sentence(scans):
    with pytest.raises(ModuleNotFoundError, match=r"expected the package itk-elastix.*pip install"):
        register(*scans, engine="elastix")


@pytest.mark.parametrize("option", sorted(path.stem for path in OPTIONS.glob("*.yaml")))
def test_every_option_is_a_registration_with_the_runs_seed(option):
    cfg = OmegaConf.create({"registration": OmegaConf.load(OPTIONS / f"{option}.yaml"), "seed": 7})
    registering = instantiate(cfg.registration, _convert_="all")
    assert registering.func is register and registering.keywords["seed"] == 7
    expected = ("rigid", "elastix") if option == "elastix" else (option, "simpleitk")
    asked = registering.keywords
    assert (asked["kind"], asked.get("engine", "simpleitk")) == expected


def test_a_kind_that_an_engine_has_not_is_refused(scans):
    with pytest.raises(ValueError, match=r"expected one of .*got \('deformable', 'elastix'\)"):
        register(*scans, kind="deformable", engine="elastix")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((8, 8, 8)), "expected finite and different values in the moving scan, got 0.0"),
        (np.full((8, 8, 8), np.nan), "expected finite and different values in the moving scan"),
        (np.random.rand(2, 8, 8), "expected at least 4 voxels along every axis of the moving scan"),
        (np.random.rand(8, 8), "expected a moving scan of one value a voxel in 3-D, got 1 in 2-D"),
    ],
)
def test_an_image_that_cannot_be_registered_is_refused(scans, array, words):
    with pytest.raises(ValueError, match=words):
        register(scans[0], sitk.GetImageFromArray(array))


def test_a_transform_is_read_as_it_was_written(tmp_path, registration):
    path = write_transform(registration.transform, tmp_path / "new" / "ct_to_mri.tfm")
    again = sitk.ReadTransform(path)
    point = (12.0, -40.0, 33.0)
    np.testing.assert_allclose(
        again.TransformPoint(point), registration.transform.TransformPoint(point), atol=1e-9
    )
    assert [file.name for file in path.parent.iterdir()] == ["ct_to_mri.tfm"]


def test_a_transform_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.tfm"):
        write_transform(MOTION, tmp_path / "transform.txt")
    (tmp_path / "taken.tfm").mkdir()
    with pytest.raises(OSError):
        write_transform(MOTION, tmp_path / "taken.tfm")
    assert [file.name for file in tmp_path.iterdir()] == ["taken.tfm"]
