import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_erosion

from clinfuse.data.jitter import fixed_misregistration
from clinfuse.data.paired_slices import PairedSlices, fixed_in_plane, slice_item
from clinfuse.data.paired_volumes import PairedVolumes, study_item
from clinfuse.data.perturbation import (
    HOLE_RADIUS_MM,
    PERTURBATIONS,
    Condition,
    conditions_of,
    dilated,
    perturbed,
    riddled,
)
from clinfuse.data.slices import Slice
from clinfuse.data.studies import load_study
from clinfuse.functional.surface import NO_SURFACE_MM, signed_distance_mm
from clinfuse.types import FusionBatch

AMOUNTS = {
    "rotation_deg": 3.0,
    "mask_shift_mm": 3.0,
    "mask_dilation_mm": 4.0,
    "mask_holes": 0.3,
    "noise_std": 0.1,
    "without_lesion": 1.0,
}
OF_MASKS = [name for name in AMOUNTS if name.startswith("mask_")]
SPACING_MM = (5.0, 2.0, 0.9)
TRUTH = ("reference", "clean_mri", "clean_ct", "clean_roi", "findings")


def ball(shape, spacing_mm, radius_mm, centre_mm=(0.0, 0.0, 0.0)):
    """Voxels whose centre lies within a ball about a point, measured from the grid's centre."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    apart = zip(np.meshgrid(*axes, indexing="ij"), centre_mm, strict=False)
    return sum((x - c) ** 2 for x, c in apart) <= radius_mm**2


@pytest.fixture
def item(make_study):
    study = load_study(make_study())
    return study_item(study, torch.eye(4, dtype=torch.float64))


def picture():
    """A pair with brain and bone, of pixels of 2 x 0.9 mm."""
    spacing_mm, shape = SPACING_MM[1:], (40, 70)
    brain, bone = (torch.from_numpy(ball(shape, spacing_mm, r))[None] for r in (16, 24))
    bone = bone & ~brain
    mri, ct = torch.where(brain, 0.5, -1.0), torch.where(bone, 0.9, -1.0)
    roi = torch.cat((brain, bone, torch.zeros_like(bone)))
    return slice_item(
        Slice("20005", mri, ct, None, roi, spacing_mm, is_ct=True),
        torch.eye(3, dtype=torch.float64),
    )


def given_to_methods(batch):
    return {"mri": batch.mri, "ct": batch.ct, "roi": batch.roi, "mm": batch.lesion_distance_mm}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("kind", [name for name in AMOUNTS if name != "rotation_deg"])
@pytest.mark.parametrize("axes", [2, 3])
def test_inputs_go_wrong_and_what_a_case_truly_is_does_not(kind, axes, item):
    item = item if axes == 3 else picture()
    before = {name: getattr(item, name) for name in TRUTH}
    copies = {name: None if v is None else v.clone() for name, v in before.items()}
    original = {name: v.clone() for name, v in given_to_methods(item).items()}
    wrong = perturbed(item, Condition(0.0, kind, AMOUNTS[kind]), seed=0)
    assert type(wrong) is type(item)
    has_lesion = axes == 3
    assert same(given_to_methods(wrong), original) == (kind == "without_lesion" and not has_lesion)
    assert same(given_to_methods(item), original)  # the next perturbation starts from the same
    for name, value in copies.items():
        now = getattr(wrong, name)
        assert (now is None and value is None) or torch.equal(now, value)
    assert all(torch.equal(a, b) for a, b in zip(wrong.truth(), item.truth(), strict=True))


def test_the_truth_of_a_batch_without_clean_fields_is_what_it_was(item):
    bare = replace(item, clean_mri=None, clean_ct=None, clean_roi=None)
    truth = [part.clone() for part in bare.truth()]
    for kind in ("noise_std", "mask_holes"):
        wrong = perturbed(bare, Condition(0.0, kind, AMOUNTS[kind]), seed=0)
        assert all(torch.equal(a, b) for a, b in zip(wrong.truth(), truth, strict=True))


@pytest.mark.parametrize("kind", ["mask_shift_mm", "mask_holes", "noise_std"])
def test_a_perturbation_is_the_same_each_time_and_other_for_another_case_or_seed(kind, item):
    condition = Condition(0.0, kind, AMOUNTS[kind])
    torch.manual_seed(1)
    one = given_to_methods(perturbed(item, condition, seed=0))
    torch.manual_seed(2)
    assert same(one, given_to_methods(perturbed(item, condition, seed=0)))
    assert not same(one, given_to_methods(perturbed(item, condition, seed=1)))
    other = replace(item, case_id=["another"])
    assert not same(one, given_to_methods(perturbed(other, condition, seed=0)))


def test_noise_has_the_standard_deviation_asked_for_and_one_realisation_at_all_levels():
    grey = torch.zeros(1, 1, 20, 40, 50)
    roi = torch.zeros(1, 3, 20, 40, 50, dtype=torch.bool)
    batch = FusionBatch(grey, grey.clone(), roi, torch.tensor([SPACING_MM]), ["a"])
    weak, strong = (perturbed(batch, Condition(0.0, "noise_std", s), seed=0) for s in (0.05, 0.1))
    for name in ("mri", "ct"):
        noise = getattr(strong, name)
        assert float(noise.std()) == pytest.approx(0.1, rel=0.02)  # 40 000 voxels: 0.35 % of it
        torch.testing.assert_close(getattr(weak, name), noise / 2)
    assert abs(float(torch.corrcoef(torch.stack([strong.mri, strong.ct]).flatten(1))[0, 1])) < 0.02
    assert perturbed(batch, Condition(0.0, "noise_std", 5.0), 0).ct.abs().max() == 1


@pytest.mark.parametrize("shift_mm", [1.3, 4.0])
@pytest.mark.parametrize("axes", [2, 3])
def test_masks_move_together_by_the_millimetres_asked_for(axes, shift_mm):
    spacing_mm, shape = (1.0, 0.75, 0.5)[3 - axes :], (40, 52, 80)[3 - axes :]
    masks = torch.from_numpy(np.stack([ball(shape, spacing_mm, r) for r in (14, 11, 8)]))[None]
    grey = torch.zeros(1, 1, *shape)
    batch = FusionBatch(grey, grey, masks, torch.tensor([spacing_mm]), ["a"])
    wrong = perturbed(batch, Condition(0.0, "mask_shift_mm", shift_mm), seed=0)

    def centre_mm(mask):
        return mask.nonzero().double().mean(0) * torch.tensor(spacing_mm)

    pairs = zip(wrong.roi[0], masks[0], strict=True)
    shifts = [centre_mm(new) - centre_mm(old) for new, old in pairs]
    half_a_voxel_mm = sum(spacing_mm) / len(spacing_mm) / 2
    for shift in shifts:
        assert float(shift.norm()) == pytest.approx(shift_mm, abs=half_a_voxel_mm)
        assert float((shift - shifts[0]).norm()) < half_a_voxel_mm


@given(radius_mm=st.floats(0.5, 12), seed=st.integers(0, 5))
def test_dilation_is_that_by_a_ball_in_millimetres_and_erosion_its_opposite(radius_mm, seed):
    mask = np.random.default_rng(seed).random((7, 12, 20)) > 0.93
    reach = [math.floor(radius_mm / size) for size in SPACING_MM]
    structure = ball([2 * r + 1 for r in reach], SPACING_MM, radius_mm)
    expected = binary_dilation(mask, structure)
    np.testing.assert_array_equal(dilated(mask, radius_mm, SPACING_MM), expected)
    eroded = binary_erosion(~mask, structure, border_value=1)  # beyond the grid is no background
    np.testing.assert_array_equal(dilated(~mask, -radius_mm, SPACING_MM), eroded)


def test_a_dilation_finer_than_voxels_changes_nothing_and_the_log_says_so(item, caplog):
    wrong = perturbed(item, Condition(0.0, "mask_dilation_mm", -1.9), seed=0)
    assert torch.equal(wrong.roi, item.roi)
    (message,) = caplog.messages
    assert (
        message == "mask_dilation_mm -1.9 changes nothing in case_01, whose voxels are 4 x 3 x 2 mm"
    )
    assert not torch.equal(
        perturbed(item, Condition(0.0, "mask_dilation_mm", -2.0), 0).roi, item.roi
    )
    assert len(caplog.messages) == 1


def test_an_empty_mask_stays_empty_and_a_full_one_full():
    full = np.ones((3, 4, 5), bool)
    for radius_mm in (-3, 0, 3):
        assert dilated(full, radius_mm, SPACING_MM).all()
        assert not dilated(~full, radius_mm, SPACING_MM).any()
    generator = torch.Generator().manual_seed(0)
    assert not riddled(~full, 0.5, SPACING_MM, generator).any()


@pytest.mark.parametrize("shape", [(12, 40, 70), (40, 70)])
def test_holes_take_the_share_asked_for_in_balls_and_more_of_them_go_on_from_fewer(shape):
    spacing_mm = SPACING_MM[3 - len(shape) :]
    mask = ball(shape, spacing_mm, 22)
    generators = (torch.Generator().manual_seed(3) for _ in range(4))
    shares = (0.0, 0.1, 0.3, 0.6)
    left = [riddled(mask, s, spacing_mm, g) for s, g in zip(shares, generators, strict=True)]
    for share, rest in zip(shares, left, strict=True):
        assert rest.sum() == mask.sum() - round(share * mask.sum()) and not (rest & ~mask).any()
    for more, fewer in pairwise(left):
        assert not (fewer & ~more).any()
    centres = np.argwhere(mask & ~left[1])
    apart_mm = np.linalg.norm((centres[:, None] - centres[None]) * spacing_mm, axis=2)
    is_near = apart_mm <= HOLE_RADIUS_MM
    full = np.array([ball_in(mask, centre, spacing_mm).sum() for centre in centres])
    in_a_ball = is_near[:, is_near.sum(1) == full].any(1)  # about a voxel all of the mask is lost
    assert in_a_ball.any() and (~in_a_ball).sum() < full.max()  # the last ball may be cut short


def ball_in(mask, centre, spacing_mm):
    places = np.indices(mask.shape).reshape(mask.ndim, -1).T
    near = np.linalg.norm((places - centre) * spacing_mm, axis=1) <= HOLE_RADIUS_MM
    return mask & near.reshape(mask.shape)


@pytest.mark.parametrize("kind", OF_MASKS)
def test_the_distance_that_a_method_is_told_belongs_to_the_lesion_it_is_told(kind, item):
    wrong = perturbed(item, Condition(0.0, kind, AMOUNTS[kind]), seed=0)
    assert wrong.lesion.any() and not torch.equal(wrong.lesion, item.lesion)
    expected = signed_distance_mm(wrong.lesion, wrong.spacing_mm)
    torch.testing.assert_close(wrong.lesion_distance_mm, expected.float())
    assert not torch.equal(wrong.brain, item.brain) and not torch.equal(wrong.bone, item.bone)


def test_a_lesion_that_is_withheld_leaves_no_trace_and_one_that_is_given_is(item):
    none = perturbed(item, Condition(0.0, "without_lesion", 1.0), seed=0)
    assert not none.lesion.any() and (none.lesion_distance_mm == NO_SURFACE_MM).all()
    assert torch.equal(none.roi[:, :2], item.roi[:, :2]) and none.clean_roi[:, 2].any()
    given_ = perturbed(item, Condition(0.0, "without_lesion", 0.0), seed=0)
    assert same(given_to_methods(given_), given_to_methods(item))


# Conditions.


def test_one_thing_is_wrong_at_a_time_and_where_nothing_is_all_axes_share_it():
    asked = {"noise_std": [0, 0.1], "rotation_deg": [0, 2], "mask_shift_mm": None}
    conditions = conditions_of([0, 2], asked)
    assert conditions == [
        Condition(0.0), Condition(2.0),
        Condition(0.0, "noise_std", 0.1), Condition(0.0, "rotation_deg", 2.0),
    ]  # fmt: skip
    assert conditions_of([0, 2, 0]) == [Condition(0.0), Condition(2.0)]
    at_two = conditions_of([4], asked, perturbed_at_mm=2)
    assert at_two == [
        Condition(4.0), Condition(2.0), Condition(2.0, "noise_std", 0.1),
        Condition(0.0), Condition(0.0, "rotation_deg", 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"blur": [1]}, "perturbations of rotation_deg, .*without_lesion, got 'blur'"),
        ({"noise_std": 0.1}, "a list of amounts for noise_std, got 0.1"),
        ({"noise_std": []}, r"a list of amounts for noise_std, got \[\]"),
        ({"noise_std": "0.1"}, "a list of amounts for noise_std, got '0.1'"),
        ({"noise_std": [-0.1]}, "standard deviations of at least 0 for noise_std, got -0.1"),
        ({"noise_std": [math.nan]}, "standard deviations of at least 0 for noise_std, got nan"),
        ({"mask_holes": [1.0]}, r"shares of a mask in \[0, 1\) for mask_holes, got 1.0"),
        ({"mask_dilation_mm": ["wide"]}, "millimetres for mask_dilation_mm, got 'wide'"),
        ({"without_lesion": [0.5]}, r"0 \(given\) or 1 \(withheld\) for without_lesion, got 0.5"),
    ],
)
def test_what_cannot_go_wrong_is_refused(asked, words):
    with pytest.raises(ValueError, match=f"^expected {words}$"):
        conditions_of([0.0], asked)


def test_a_place_for_perturbations_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="perturbed_at_mm to be a number, got 'here'"):
        conditions_of([0.0], {}, "here")


# Data modules.


def test_a_turned_ct_is_the_one_rotated_without_a_shift(make_study):
    folder = make_study()
    data = PairedVolumes(
        folder.parent, splits={"test": [folder.name]}, misregistration_mm=[0],
        perturbations={"rotation_deg": [0, 4]}, misregistration_deg_per_mm=2.0,
    )  # fmt: skip
    still, turned = (next(iter(loader)) for loader in data.test_dataloader())
    matrix = turned.misregistration[0].double()
    assert matrix[:3, 3].abs().max() == 0
    assert math.degrees(math.acos((matrix[:3, :3].trace() - 1) / 2)) == pytest.approx(4, abs=0.02)
    expected = study_item(data.study(folder.name), fixed_misregistration(folder.name, 0.0, 4.0))
    assert torch.equal(turned.ct, expected.ct) and torch.equal(turned.roi, expected.roi)
    assert torch.equal(turned.mri, still.mri) and not torch.equal(turned.ct, still.ct)
    torch.testing.assert_close(still.misregistration, torch.eye(4)[None])


def test_the_loaders_of_a_test_follow_the_conditions(make_study):
    folder = make_study()
    data = PairedVolumes(
        folder.parent, splits={"test": [folder.name]}, misregistration_mm=[0, 2],
        perturbations={name: [amount] for name, amount in AMOUNTS.items()}, perturbed_at_mm=2,
    )  # fmt: skip
    study = data.study(folder.name)
    assert len(data.conditions) == 8 == len(data.test_dataloader())
    for condition, loader in zip(data.conditions, data.test_dataloader(), strict=True):
        (batch,) = loader
        mm, kind = condition.misregistration_mm, condition.perturbation
        assert mm == (0 if condition == Condition(0.0) or kind == "rotation_deg" else 2)
        degrees = condition.amount if kind == "rotation_deg" else mm
        moved = study_item(study, fixed_misregistration(folder.name, mm, degrees))
        expected = perturbed(moved, condition, data.misregistration_seed)
        assert same(given_to_methods(batch), given_to_methods(expected))
        (again,) = data.test_batches(mm, kind, condition.amount)
        assert same(given_to_methods(batch), given_to_methods(again))


def test_every_perturbation_is_tested_here():
    assert AMOUNTS.keys() == PERTURBATIONS.keys()


@pytest.mark.parametrize(
    "kind, perturbation, words",
    [
        ("spect_mri", "mask_holes", r"pairs with masks \(kind ct_mri\) for mask_holes, got spect"),
        ("ct_mri", "without_lesion", "volumes for without_lesion: no 2-D pair has a lesion"),
    ],
)
def test_pairs_cannot_lose_masks_that_they_do_not_have(kind, perturbation, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        PairedSlices(tmp_path, kind, perturbations={perturbation: [0, AMOUNTS[perturbation]]})


def test_pairs_are_turned_and_perturbed_in_their_plane(phantoms):
    from hydra.utils import instantiate

    cfg = phantoms.config(
        "data=phantom_slices", "phantom_slices.patients=3", "phantom_slices.slices=1",
        "phantom_slices.shape=[48,48]", "data.misregistration_mm=[0]",
    )  # fmt: skip
    amounts = {name: [0, v] for name, v in AMOUNTS.items() if name != "without_lesion"}
    data = instantiate(cfg.data, perturbations=amounts, _convert_="all")
    data.prepare_data()
    still, *others = (next(iter(loader)) for loader in data.test_dataloader())
    (pair,) = data.slices("test")
    assert [c.perturbation for c in data.conditions] == ["", *amounts]
    turned = others[0]
    expected = slice_item(pair, fixed_in_plane(pair.case_id, 0.0, 3.0))
    assert torch.equal(turned.ct, expected.ct) and not torch.equal(turned.ct, still.ct)
    for batch in others:
        assert torch.equal(batch.clean_ct, still.clean_ct)
        assert torch.equal(batch.clean_roi, still.clean_roi)
    for batch in others[1:4]:  # shifted, dilated, riddled
        assert torch.equal(batch.ct, still.ct) and not torch.equal(batch.bone, still.bone)
    assert not torch.equal(others[4].ct, still.ct) and torch.equal(others[4].roi, still.roi)
