"""Verdicts: right results pass, and results known to be wrong are found out."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.grids import on_grid
from clinfuse.preparation.registration_quality import Quality, measured
from clinfuse.preparation.registration_search import in_one_thread, pyramid, search

STILL = sitk.Transform(3, sitk.sitkIdentity)

GOOD = Quality(
    mutual_information_before=0.3,
    mutual_information=0.8,
    disagreement_mm=0.2,
    mutual_information_elsewhere=0.8,
    sharpness=0.4,
    stretch_mm=0.5,
    head_overlap=0.98,
    covered=1.0,
    mirrored_gain=-0.05,
    moved_mm=12.0,
    turned_deg=6.0,
    smallest_jacobian=1.0,
    is_given=False,
)


@pytest.fixture(scope="module")
def head():
    return make_phantom(3, seed=1, shape=(36, 60, 52), spacing_mm=(4.0, 4.0, 4.0), contrast="t1")


@pytest.fixture(scope="module")
def searched(head, image_of):
    """The head's pyramid, and where another search ended."""
    with in_one_thread():
        both = pyramid(*(image_of(scan, head.spacing_mm) for scan in (head.mri, head.ct_hu)))
        return both, search(both, seed=1)[0]


def test_a_good_registration_passes_without_a_word():
    assert (GOOD.verdict, GOOD.reasons) == ("pass", ())


@pytest.mark.parametrize(
    ("measure", "verdict", "words"),
    [
        ({"disagreement_mm": 1.5}, "warn", "another search ended 1.5 mm away"),
        ({"disagreement_mm": 7.0}, "fail", "another search ended 7.0 mm away"),
        ({"head_overlap": 0.5}, "fail", "only 50% of the smaller head lies in the other"),
        ({"sharpness": 0.05}, "fail", "moving the CT by 10 mm costs only 5%"),
        ({"stretch_mm": 12.0}, "fail", "the heads differ in shape: an affine fit ends 12.0 mm"),
        ({"covered": 0.4}, "warn", "only 40% of the head in the MRI is in view of the CT"),
        ({"mirrored_gain": 0.08}, "warn", "the CT fits better mirrored left to right: by 8.0%"),
        ({"turned_deg": 180.0}, "warn", "turned by 180 degrees"),
        ({"smallest_jacobian": -0.1}, "fail", "the transform folds"),
    ],
)
def test_every_measure_out_of_its_range_is_said(measure, verdict, words):
    doubtful = replace(GOOD, **measure)
    assert doubtful.verdict == verdict
    assert len(doubtful.reasons) == 1 and words in doubtful.reasons[0]


def test_the_worst_finding_decides_and_all_are_said():
    bad = replace(GOOD, disagreement_mm=1.5, head_overlap=0.5)
    assert bad.verdict == "fail" and len(bad.reasons) == 2


def test_an_alignment_that_came_with_the_scans_may_be_off_by_more():
    assert replace(GOOD, disagreement_mm=2.5, is_given=True).verdict == "pass"
    assert replace(GOOD, disagreement_mm=12.0, is_given=True).verdict == "fail"


def test_the_true_place_passes(searched):
    quality = measured(searched[0], STILL, searched[1], seed=0)
    assert quality.verdict == "pass", quality.reasons
    assert quality.turned_deg == pytest.approx(0, abs=1e-3)
    assert quality.smallest_jacobian == pytest.approx(1)


@pytest.mark.parametrize("move_mm", [(-4, 3, 4), (0, 0, 15)])
def test_a_result_that_is_off_by_more_than_a_voxel_does_not_pass(searched, move_mm):
    move = sitk.TranslationTransform(3, [float(mm) for mm in move_mm])
    quality = measured(searched[0], move, searched[1], seed=0)
    assert quality.verdict == "fail"
    assert quality.disagreement_mm == pytest.approx(np.linalg.norm(move_mm), abs=1.0)


def test_the_stretch_is_how_far_a_scale_moves_the_head(head, image_of):
    mri, ct = (image_of(scan, head.spacing_mm) for scan in (head.mri, head.ct_hu))
    factors = (1.08, 1.0, 0.95)
    with in_one_thread():
        centre_mm = pyramid(mri, ct).centre_mm
        scale = sitk.AffineTransform(3)
        scale.SetCenter(centre_mm.tolist())
        scale.Scale(factors)
        both = pyramid(mri, on_grid(ct, ct, scale.GetInverse(), fill=-1000))
        quality = measured(both, STILL, STILL, seed=0)
    moved_mm = (both.points_mm - centre_mm) * (np.array(factors) - 1)
    expected_mm = np.sqrt(np.mean(np.sum(moved_mm**2, axis=1)))
    assert quality.stretch_mm == pytest.approx(expected_mm, abs=1.0)  # a quarter of a voxel
    assert any("the heads differ in shape" in reason for reason in quality.reasons)


def test_a_ct_stored_the_wrong_way_round_is_told_from_one_that_is_not(head, searched, image_of):
    right = measured(searched[0], STILL, searched[1], seed=0)
    turned_round = np.ascontiguousarray(head.ct_hu[:, :, ::-1])
    with in_one_thread():
        both = pyramid(*(image_of(scan, head.spacing_mm) for scan in (head.mri, turned_round)))
        found = search(both, seed=0, levels=2)[0]
        wrong = measured(both, found, found, seed=0)
    assert right.mirrored_gain < 0
    assert not any("mirrored" in reason for reason in right.reasons)
    assert any("mirrored left to right" in reason for reason in wrong.reasons), wrong


def test_noise_fails(head, image_of):
    mri = image_of(head.mri, head.spacing_mm)
    noise = np.random.default_rng(0).normal(100, 30, head.mri.shape)
    with in_one_thread():
        both = pyramid(mri, image_of(noise, head.spacing_mm))
        one, other = (search(both, seed, levels=2)[0] for seed in (0, 1))
        assert measured(both, one, other, seed=0).verdict == "fail"
