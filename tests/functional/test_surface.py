import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, gaussian_filter
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_dice_at_tolerance,
)
from surface_distance import compute_surface_distances as deepmind_distances

from clinfuse.functional.surface import (
    NO_SURFACE_MM,
    border_of,
    dice,
    hd95,
    nsd,
    signed_distance_mm,
    surface_agreement,
)

SPACING_MM = (5.0, 0.9, 1.2)


def blobs(seed, shape=(10, 32, 30)):
    noise = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(gaussian_filter(noise, (1, 3, 3)) > 0.04)[None, None]


def ball(radius_mm, shift_mm=0.0, spacing_mm=(1.0, 1.0, 1.0), shape=(41, 41, 41)):
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    d, h, w = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(d**2 + h**2 + (w - shift_mm) ** 2 <= radius_mm**2)[None, None]


def batch(*masks):
    return torch.cat(masks)


def test_dice_of_a_hand_drawn_case():
    pred, target = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    pred[..., :2], target[..., 1:2] = True, True  # 8 voxels, 4 voxels, 4 shared
    assert dice(pred[None], target[None]).item() == pytest.approx(2 * 4 / 12)


@pytest.mark.parametrize("seed", range(4))
def test_surface_scores_agree_with_monai(seed):
    pred, target = blobs(seed), blobs(seed + 10)
    monai_hd95 = compute_hausdorff_distance(
        pred.float(), target.float(), include_background=True, percentile=95, spacing=SPACING_MM
    )
    monai_nsd = compute_surface_dice(
        pred.float(), target.float(), [2.0], include_background=True, spacing=SPACING_MM
    )
    assert hd95(pred, target, SPACING_MM).item() == pytest.approx(monai_hd95.item(), rel=1e-5)
    assert nsd(pred, target, SPACING_MM, 2.0).item() == pytest.approx(monai_nsd.item(), rel=1e-5)


@pytest.mark.parametrize(("radius_mm", "shift_mm"), [(10, 2), (12, 5), (15, 0)])
def test_on_balls_surface_scores_are_within_a_voxel_of_deepminds(radius_mm, shift_mm):
    pred, target = ball(10, shift_mm), ball(radius_mm)
    theirs = deepmind_distances(target[0, 0].numpy(), pred[0, 0].numpy(), (1.0, 1.0, 1.0))
    ours = hd95(pred, target, (1.0, 1.0, 1.0)).item()
    assert ours == pytest.approx(compute_robust_hausdorff(theirs, 95), abs=0.75)
    # Their border runs between voxels and ours through centres: as much as 3/4 of a voxel apart.
    share = nsd(pred, target, (1.0, 1.0, 1.0), 2.0).item()
    assert compute_surface_dice_at_tolerance(theirs, 1.25) <= share
    assert share <= compute_surface_dice_at_tolerance(theirs, 2.75)


def test_all_scores_come_from_one_agreement_that_finds_each_surface_once(monkeypatch):
    pred, target = batch(blobs(0), blobs(1)), batch(blobs(2), blobs(3))
    spacing_mm = torch.tensor([SPACING_MM, (2.0, 1.0, 1.0)])
    found = []
    monkeypatch.setattr(
        "clinfuse.functional.surface.border_of", lambda m: found.append(m) or border_of(m)
    )
    agreement = surface_agreement(pred, target, spacing_mm)
    scores = agreement.dice, agreement.nsd(2.0), agreement.hd95()
    assert len(found) == 4  # two masks in two cases
    expected = (
        dice(pred, target),
        nsd(pred, target, spacing_mm, 2.0),
        hd95(pred, target, spacing_mm),
    )
    for ours, alone in zip(scores, expected, strict=True):
        torch.testing.assert_close(ours, alone)


@pytest.mark.parametrize("shape", [(10, 32, 30), (1, 9, 8), (12, 11), (7,)])
def test_a_border_is_what_erosion_takes_away(shape):
    mask = np.random.default_rng(0).random(shape) < 0.8
    ours = border_of(torch.from_numpy(mask))
    np.testing.assert_array_equal(ours, mask & ~binary_erosion(mask))
    assert not border_of(torch.zeros(0, *shape, dtype=torch.bool)).any()


def test_hd95_of_concentric_balls_is_the_difference_of_their_radii():
    spacing_mm = (2.0, 1.0, 1.0)
    pred, target = (ball(r, spacing_mm=spacing_mm, shape=(21, 41, 41)) for r in (16.0, 10.0))
    assert hd95(pred, target, spacing_mm).item() == pytest.approx(6, abs=1.0)  # a voxel


def test_distances_of_two_points_are_what_a_ruler_says():
    pred, target = torch.zeros(2, 4, 8, 8, dtype=torch.bool)
    pred[0, 1, 1] = target[2, 4, 5] = True
    agreement = surface_agreement(pred[None, None], target[None, None], SPACING_MM)
    forth, back = agreement.forth_mm[0], agreement.back_mm[0]
    expected = np.sqrt((2 * 5.0) ** 2 + (3 * 0.9) ** 2 + (4 * 1.2) ** 2)
    np.testing.assert_allclose([*forth, *back], [expected] * 2)
    both = pred[None, None], target[None, None], SPACING_MM
    assert hd95(*both).item() == pytest.approx(expected)
    assert [nsd(*both, tau).item() for tau in (expected - 0.01, expected + 0.01)] == [0, 1]


def test_identical_masks_are_perfect():
    mask = blobs(0)
    assert dice(mask, mask).item() == nsd(mask, mask, SPACING_MM, 0.0).item() == 1
    assert hd95(mask, mask, SPACING_MM).item() == 0


def test_undefined_is_nan_and_one_empty_mask_scores_zero():
    lesion = blobs(0)
    none = torch.zeros_like(lesion)
    pred, target = batch(none, none, lesion), batch(none, lesion, none)
    expected = {"dice": [np.nan, 0, 0], "nsd": [np.nan, 0, 0], "hd95": [np.nan] * 3}
    scores = {
        "dice": dice(pred, target),
        "nsd": nsd(pred, target, SPACING_MM, 2.0),
        "hd95": hd95(pred, target, SPACING_MM),
    }
    for name, score in scores.items():
        np.testing.assert_array_equal(score, expected[name], err_msg=name)


def test_slices_and_per_case_spacings_work():
    a, b = blobs(1)[:, :, 5], blobs(2)[:, :, 5]
    spacings = torch.tensor([[0.9, 1.2], [2.0, 2.0]])
    both = hd95(batch(a, a), batch(b, b), spacings)
    for case, row in enumerate(spacings.tolist()):
        assert both[case].item() == pytest.approx(hd95(a, b, row).item())


def test_signed_distance_is_zero_on_the_border_and_negative_inside():
    mask = batch(blobs(3), ball(8, shape=(10, 32, 30)))
    distance = signed_distance_mm(mask, SPACING_MM)
    torch.testing.assert_close(distance <= 0, mask)
    assert (distance[mask] == 0).any() and distance.dtype == torch.float32


def test_signed_distance_is_what_surface_scores_measure():
    pred, target = blobs(4), blobs(5)
    (forth,) = surface_agreement(pred, target, SPACING_MM).forth_mm
    border = signed_distance_mm(pred, SPACING_MM) == 0
    measured = signed_distance_mm(target, SPACING_MM)[border].abs()
    np.testing.assert_allclose(measured, forth, rtol=1e-5)


def test_signed_distance_of_a_ball_is_the_distance_to_its_sphere():
    points = torch.stack(torch.meshgrid(*[torch.arange(41.0) - 20] * 3, indexing="ij"))
    exact = points.norm(dim=0) - 12
    found = signed_distance_mm(ball(12), (1.0, 1.0, 1.0))[0, 0]
    assert (found - exact).abs().max() < 1.0  # border voxels' centres lie up to a voxel inside


def test_an_empty_mask_is_far_away_everywhere():
    empty = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    assert (signed_distance_mm(empty, (1.0, 1.0, 1.0)) == NO_SURFACE_MM).all()
