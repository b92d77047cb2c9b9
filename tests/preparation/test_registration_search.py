"""The search for a rigid motion, on phantom heads moved by known ones."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.registration_search import (
    apart_mm,
    head_points_mm,
    in_one_thread,
    mirrored,
    moved_by,
    mutual_information,
    pyramid,
    refined,
    search,
    target_error_mm,
)

STILL = sitk.Transform(3, sitk.sitkIdentity)


@pytest.fixture(scope="module")
def scans(image_of):
    head = make_phantom(3, seed=1, shape=(36, 60, 52), spacing_mm=(4.0, 4.0, 4.0), contrast="t1")
    return image_of(head.mri, head.spacing_mm), image_of(head.ct_hu, head.spacing_mm)


def motion_about(centre, turn_deg, move_mm):
    turn = np.radians(turn_deg).tolist()
    return sitk.Euler3DTransform(list(centre), *turn, [float(mm) for mm in move_mm])


@pytest.mark.parametrize(
    ("turn_deg", "move_mm"), [((15, -10, 20), (30, -20, 15)), ((-20, 15, 5), (-5, 60, 25))]
)
def test_a_head_is_found_where_it_was_moved(scans, turn_deg, move_mm):
    mri, ct = scans
    motion = motion_about((0, 0, 0), turn_deg, move_mm)
    with in_one_thread():
        both = pyramid(mri, moved_by(ct, motion))
        found = search(both, seed=0)[0]
    error_mm = target_error_mm(found, motion.GetInverse(), both.points_mm)
    assert error_mm.mean() < 1.0  # a quarter of a voxel; the phantom's truth is exact


def test_the_same_seed_gives_the_same_bits(scans):
    found = []
    for _ in range(2):
        with in_one_thread():
            both = pyramid(*scans)
            found.append(search(both, seed=5, levels=2)[0].GetParameters())
    assert found[0] == found[1]


def test_another_seed_looks_at_other_samples_and_agrees(scans):
    with in_one_thread():
        both = pyramid(*scans)
        start = motion_about(both.centre_mm, (3, 3, 3), (3, 3, 3))
        one, other = (refined(both.levels[1], start, seed) for seed in (0, 1))
    assert one.GetParameters() != other.GetParameters()
    assert apart_mm(one, other, both.points_mm) < 1.0


def test_refining_leaves_the_start_as_it_was(scans):
    both = pyramid(*scans)
    start = motion_about(both.centre_mm, (3, 3, 3), (3, 3, 3))
    before = start.GetParameters()
    refined(both.levels[0], start, seed=0)
    assert start.GetParameters() == before


def test_mutual_information_peaks_at_the_true_place_and_is_zero_where_scans_do_not_meet(scans):
    level = pyramid(*scans).levels[1]
    far = sitk.TranslationTransform(3, [1000.0, 0.0, 0.0])
    near = sitk.TranslationTransform(3, [0.0, 6.0, 0.0])
    here, aside, away = (mutual_information(level, motion) for motion in (STILL, near, far))
    assert here > aside > away == 0


def test_in_one_thread_puts_the_number_of_threads_back():
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    with pytest.raises(KeyError), in_one_thread():
        assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == 1
        raise KeyError
    assert sitk.ProcessObject.GetGlobalDefaultNumberOfThreads() == before


@given(st.tuples(*[st.floats(-80, 80)] * 3))
def test_the_error_of_a_translation_is_its_length(move_mm):
    points_mm = np.random.default_rng(0).normal(size=(5, 3)) * 50
    moved = sitk.TranslationTransform(3, move_mm)
    np.testing.assert_allclose(
        target_error_mm(moved, STILL, points_mm), np.linalg.norm(move_mm), atol=1e-9
    )


@given(st.floats(-170, 170))
def test_the_error_of_a_turn_is_its_chord(turn_deg):
    turned = motion_about((0, 0, 0), (0, 0, turn_deg), (0, 0, 0))
    points_mm = np.array([[70.0, 0.0, 12.0], [0.0, 0.0, 40.0]])
    chord_mm = 2 * 70 * abs(np.sin(np.radians(turn_deg) / 2))
    np.testing.assert_allclose(target_error_mm(turned, STILL, points_mm), [chord_mm, 0], atol=1e-9)


def test_a_header_moves_an_image_as_its_motion_says(scans):
    _, ct = scans
    motion = motion_about((10, -20, 5), (8, -12, 20), (9, 14, -6))
    moved = moved_by(ct, motion)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(moved), sitk.GetArrayFromImage(ct))
    for index in ((0, 0, 0), (20, 31, 7)):
        here = moved.TransformIndexToPhysicalPoint(index)
        there = ct.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(motion.TransformPoint(here), there, atol=1e-6)


def test_mirrored_twice_is_as_before(scans):
    both = pyramid(*scans)
    again = mirrored(mirrored(both))
    for level, twice in zip(both.levels, again.levels, strict=True):
        upright = sitk.GetArrayFromImage(sitk.DICOMOrient(level.moving, "RAS"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(twice.moving), upright)
    np.testing.assert_allclose(again.moving_centre_mm, both.moving_centre_mm, atol=4.0)


def test_the_finest_level_leaves_out_padding_and_the_voxel_beside_it(scans):
    mri, ct = scans
    cut = sitk.GetArrayFromImage(ct)
    cut[:, :, 40:] = -2000.0  # not the air of the scan, which is in no way left out
    padded = sitk.GetImageFromArray(cut)
    padded.CopyInformation(ct)
    coarse, middle, fine = pyramid(mri, padded).levels
    assert coarse.seen is middle.seen is None
    seen = sitk.GetArrayFromImage(fine.seen).astype(bool)
    assert seen[:, :, :39].all() and not seen[:, :, 39:].any()


def test_where_a_scan_was_cut_does_not_draw_the_head_away(scans):
    mri, ct = scans
    cut = sitk.GetArrayFromImage(ct)
    slice_, row, _ = np.indices(cut.shape)
    cut[slice_ < 16 - 0.2 * row] = -1024.0  # lean, as the gantry's slices after a turn of the head
    below = sitk.GetImageFromArray(cut)
    below.CopyInformation(ct)
    with in_one_thread():
        both = pyramid(mri, below)
        start = motion_about(both.centre_mm, (0, 0, 0), (0, 0, 0))
        left_out, looked_at = (
            apart_mm(refined(level, start, seed=0), STILL, both.points_mm)
            for level in (both.levels[-1], replace(both.levels[-1], seen=None))
        )
    assert left_out < 0.75 * looked_at


def test_thick_slices_stay_and_planes_get_coarser(image_of):
    head = make_phantom(0, shape=(16, 180, 160), spacing_mm=(8.0, 1.2, 1.2))
    image = image_of(head.mri, head.spacing_mm)
    spacings = [level.fixed.GetSpacing() for level in pyramid(image, image).levels]
    np.testing.assert_allclose(spacings, [(8, 8, 8), (4, 4, 8), (2, 2, 8)], rtol=0.05)


def test_points_lie_in_the_head(scans):
    mri, _ = scans
    points_mm = head_points_mm(mri)
    values = [mri.GetPixel(mri.TransformPhysicalPointToIndex(p)) for p in points_mm.tolist()]
    assert 200 < len(points_mm) < 600
    assert np.mean(np.array(values) > 0) > 0.9  # the rest is bone and air inside
