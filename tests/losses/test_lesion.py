"""The lesion terms are right on hard masks, rank like the metrics, and have true gradients."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import spearmanr
from surface_distance import (
    compute_robust_hausdorff,
    compute_surface_dice_at_tolerance,
    compute_surface_distances,
)
from torch import Tensor, nn

from clinfuse.functional.surface import dice, hd95, nsd, signed_distance_mm
from clinfuse.losses.lesion import soft_dice_loss, soft_hd95_loss, soft_hd95_mm, soft_nsd_loss

STROKE_MM = (5.0, 0.9, 0.9)
GRIDS = {STROKE_MM: (14, 56, 56), (4.0, 2.0, 2.0): (18, 32, 32)}


def ellipsoid(shape, spacing_mm, centre_mm, radii_mm) -> np.ndarray:
    axes = [np.arange(n) * size for n, size in zip(shape, spacing_mm, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return (((points - centre_mm) / radii_mm) ** 2).sum(-1) <= 1


def batched(volume: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(volume))[None, None]


def ball(shape=(9, 24, 24), spacing_mm=STROKE_MM, radius_mm=8.0) -> Tensor:
    centre_mm = np.array(shape) * spacing_mm / 2
    return batched(ellipsoid(shape, spacing_mm, centre_mm, radius_mm))


def signed(mask: np.ndarray, spacing_mm) -> np.ndarray:
    outside, inside = (
        ndimage.distance_transform_edt(m, sampling=spacing_mm) for m in (~mask, mask)
    )
    return outside - inside


def perturbed_lesions(spacing_mm, count: int):
    """Pairs (lesion, soft prediction): shifted, dilated, eroded, torn, with extra blobs; noisy."""
    rng, shape = np.random.default_rng(0), GRIDS[spacing_mm]
    extent_mm = np.array(shape) * spacing_mm
    for case in range(count):
        centre_mm = extent_mm * rng.uniform(0.42, 0.58, 3)
        lesion = ellipsoid(shape, spacing_mm, centre_mm, rng.uniform(5, 14, 3))
        kind = ("shift", "grow", "shrink", "blob", "tear", "all")[case % 6]
        border_mm = signed(lesion, spacing_mm)
        if kind in ("shift", "all"):
            offset = rng.uniform(-8, 8, 3) / spacing_mm
            border_mm = signed(ndimage.shift(lesion * 1.0, offset, order=1) > 0.5, spacing_mm)
        if kind in ("grow", "all"):
            border_mm = border_mm - rng.uniform(0, 6)
        if kind == "shrink":
            border_mm = border_mm + rng.uniform(0, 4)
        if kind in ("blob", "all"):
            extra = extent_mm * rng.uniform(0.2, 0.8, 3), rng.uniform(3, 8, 3)
            border_mm = np.minimum(
                border_mm, signed(ellipsoid(shape, spacing_mm, *extra), spacing_mm)
            )
        if kind == "tear":
            hole = centre_mm + rng.uniform(-8, 8, 3), rng.uniform(4, 10, 3)
            border_mm = np.maximum(
                border_mm, -signed(ellipsoid(shape, spacing_mm, *hole), spacing_mm)
            )
        border_mm = border_mm + rng.uniform(0, 3) * ndimage.gaussian_filter(
            rng.normal(size=shape), 1
        )
        probability = 1 / (1 + np.exp(border_mm / rng.uniform(0.3, 1.5)))
        if (probability > 0.5).any():
            yield lesion, probability.astype(np.float32)


@pytest.mark.parametrize("spacing_mm", GRIDS, ids=str)
def test_soft_nsd_and_hd95_rank_predictions_as_the_exact_metrics_do(spacing_mm):
    """Against our metrics and the surface-distance package, which weighs borders by their area."""
    scores = []
    for lesion, probability in perturbed_lesions(spacing_mm, 204):
        s, p = batched(lesion), batched(probability)
        distance_mm = signed_distance_mm(s, spacing_mm)
        theirs = compute_surface_distances(lesion, probability > 0.5, spacing_mm)
        scores.append(
            (
                -soft_nsd_loss(p, s, distance_mm, spacing_mm).item(),
                nsd(p > 0.5, s, spacing_mm, 2.0).item(),
                compute_surface_dice_at_tolerance(theirs, 2.0),
                soft_hd95_mm(p, s, distance_mm, spacing_mm).item(),
                hd95(p > 0.5, s, spacing_mm).item(),
                compute_robust_hausdorff(theirs, 95),
            )
        )
    soft_nsd, our_nsd, their_nsd, soft_hd, our_hd, their_hd = np.array(scores).T
    assert len(scores) >= 195
    assert spearmanr(soft_nsd, our_nsd).statistic >= 0.93
    assert spearmanr(soft_nsd, their_nsd).statistic >= 0.9
    assert spearmanr(soft_hd, our_hd).statistic >= 0.92
    assert spearmanr(soft_hd, their_hd).statistic >= 0.9


@pytest.mark.parametrize("voxels", range(6))
@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("tau_mm", [1.0, 2.0, 5.0])
def test_soft_nsd_of_a_hard_shifted_mask_is_at_least_the_exact_nsd_and_within_the_fade(
    axis, voxels, tau_mm
):
    lesion = ball(shape=(15, 36, 36))
    shifted = lesion.roll(voxels, axis)
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    soft = 1 - soft_nsd_loss(shifted.float(), lesion, distance_mm, STROKE_MM, tau_mm)
    strict = nsd(shifted, lesion, STROKE_MM, tau_mm)
    lenient = nsd(shifted, lesion, STROKE_MM, 3 * tau_mm)
    assert strict - 1e-5 <= soft <= lenient + 1e-3


@pytest.mark.parametrize("tau_mm", [0.5, 2.0, 3.0])
def test_soft_nsd_of_a_hard_mask_is_the_exact_nsd_where_no_border_lies_in_the_fade(tau_mm):
    """Some border moves by less than tau and some appears far away: no stray at tau to 3 tau."""
    lesion = torch.zeros(1, 1, 12, 60, 60, dtype=torch.bool)
    lesion[..., 5:8, 10:25, 10:25] = True
    predicted = lesion.clone()
    predicted[..., 5:8, 10:25, 24:26] |= tau_mm > 0.9
    predicted[..., 1:3, 42:52, 42:52] = True
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    soft = 1 - soft_nsd_loss(predicted.float(), lesion, distance_mm, STROKE_MM, tau_mm)
    exact = nsd(predicted, lesion, STROKE_MM, tau_mm)
    assert 0.2 < exact < 0.95
    torch.testing.assert_close(soft, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_lesions_border_is_reached_exactly_where_predicted_border_lies_within_tau(seed):
    """The half of NSD that reads no distance map: on ragged masks it adds just its own count."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(1, 1, 8, 20, 20, generator=generator)
    lesion, predicted = ball((8, 20, 20)), noise > 0.7
    nowhere_near = torch.full_like(noise, 1e3)
    reached = 1 - soft_nsd_loss(predicted.float(), lesion, nowhere_near, STROKE_MM, 2.0)
    border = [m & ~batched(ndimage.binary_erosion(m[0, 0].numpy())) for m in (lesion, predicted)]
    to_predicted = ndimage.distance_transform_edt(~border[1][0, 0].numpy(), sampling=STROKE_MM)
    count = (batched(to_predicted) <= 2.0)[border[0]].sum()
    torch.testing.assert_close(reached, (count / (border[0].sum() + border[1].sum()))[None])


def test_a_shift_of_one_slice_breaks_a_tolerance_that_a_shift_of_two_pixels_keeps():
    """5 mm against 1.8 mm: a tolerance counted in voxels would have it the other way round."""
    lesion = ball(shape=(15, 36, 36))
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    along, across = (
        soft_nsd_loss(lesion.roll(n, axis).float(), lesion, distance_mm, STROKE_MM).item()
        for n, axis in ((2, 4), (1, 2))
    )
    assert along == pytest.approx(0, abs=1e-5)
    assert across > 0.1


@pytest.mark.parametrize("mm", [2.0, 4.0, 10.0, 24.0])
def test_soft_hd95_of_a_distant_copy_is_about_the_distance(mm):
    """A slab moved by a known distance along its normal: HD95 is that distance, in mm."""
    lesion = torch.zeros(1, 1, 60, 20, 20, dtype=torch.bool)
    lesion[:, :, 5:10] = True
    spacing_mm = (1.0, 2.0, 2.0)
    distance_mm = signed_distance_mm(lesion, spacing_mm)
    moved = lesion.roll(int(mm), 2)
    soft = soft_hd95_mm(moved.float(), lesion, distance_mm, spacing_mm)
    assert soft.item() == pytest.approx(hd95(moved, lesion, spacing_mm).item(), rel=0.1)
    assert soft.item() == pytest.approx(mm, rel=0.1)


def test_soft_hd95_ignores_a_speckle_below_five_percent_of_the_border_and_not_one_above():
    lesion = ball(shape=(20, 40, 40), spacing_mm=(2.0, 2.0, 2.0), radius_mm=16.0)
    distance_mm = signed_distance_mm(lesion, (2.0, 2.0, 2.0))
    speckled, blotted = lesion.clone(), lesion.clone()
    speckled[..., 2, 2, 2] = True
    blotted[..., 2:6, 2:8, 2:8] = True
    few, many = (
        soft_hd95_mm(m.float(), lesion, distance_mm, (2.0, 2.0, 2.0)).item()
        for m in (speckled, blotted)
    )
    assert few < 1 and many > 20


def test_a_perfect_prediction_costs_nothing():
    lesion = ball()
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    p = lesion.float()
    assert soft_dice_loss(p, lesion).item() == 0
    assert soft_nsd_loss(p, lesion, distance_mm, STROKE_MM).item() == pytest.approx(0, abs=1e-6)
    assert soft_hd95_mm(p, lesion, distance_mm, STROKE_MM).item() == pytest.approx(0, abs=1e-6)


def test_soft_dice_of_a_hard_mask_is_the_exact_dice():
    lesion = ball()
    predicted = lesion.roll(2, 4)
    exact = dice(predicted, lesion)
    torch.testing.assert_close(1 - soft_dice_loss(predicted.float(), lesion), exact)


def test_faint_background_does_not_drown_the_border_of_a_small_lesion():
    """Probabilities of about 0.002 over 300 000 voxels: no threshold near one half sees them."""
    shape = (32, 96, 96)
    lesion = ball(shape=shape, radius_mm=6.0)
    faint = 0.004 * torch.rand(1, 1, *shape) + 0.99 * lesion
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    assert soft_nsd_loss(faint, lesion, distance_mm, STROKE_MM).item() < 0.2
    assert soft_dice_loss(faint, lesion).item() < 0.05


def soft_case(dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A random probability, a lesion in the corner of a small anisotropic grid, its distances."""
    lesion = torch.zeros(2, 1, 4, 6, 5, dtype=torch.bool)
    lesion[0, :, 1:3, 1:5, 2:4] = True
    lesion[1, :, 0, 0, 0] = True
    distance_mm = signed_distance_mm(lesion, STROKE_MM).to(dtype)
    return torch.rand(2, 1, 4, 6, 5, dtype=dtype).requires_grad_(), lesion, distance_mm


def test_every_lesion_gradient_agrees_with_finite_differences():
    probability, lesion, distance_mm = soft_case()
    assert torch.autograd.gradcheck(lambda p: soft_dice_loss(p, lesion), probability)
    for loss in (soft_nsd_loss, soft_hd95_loss):
        assert torch.autograd.gradcheck(
            lambda p, loss=loss: loss(p, lesion, distance_mm, STROKE_MM), probability
        )


def test_gradient_descent_on_the_border_terms_brings_a_displaced_prediction_home():
    """A gradient that is right in every voxel but points nowhere useful would fail here."""
    lesion = ball()
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    displaced = -signed_distance_mm(lesion.roll(3, 4), STROKE_MM) / 2
    logits = displaced.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        p = logits.sigmoid()
        border = soft_nsd_loss(p, lesion, distance_mm, STROKE_MM)
        far = soft_hd95_loss(p, lesion, distance_mm, STROKE_MM)
        (border + far).sum().backward()
        optimiser.step()
    before, after = displaced > 0, logits.detach() > 0
    assert nsd(after, lesion, STROKE_MM, 2.0) > nsd(before, lesion, STROKE_MM, 2.0) + 0.1
    assert hd95(after, lesion, STROKE_MM) < hd95(before, lesion, STROKE_MM)


def test_gradients_pass_through_a_frozen_head_to_the_fused_image():
    lesion = ball()
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    head = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.Sigmoid()).requires_grad_(False)
    for loss in (soft_nsd_loss, soft_hd95_loss):
        fused = torch.randn(1, 1, 9, 24, 24).requires_grad_()
        loss(head(fused), lesion, distance_mm, STROKE_MM).sum().backward()
        assert fused.grad.abs().sum() > 0
        assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("level", [0.0, 1.0, 0.5, 1e-30, 1 - 1e-7])
@pytest.mark.parametrize("voxels", [0, 1, 40, "all"])
def test_values_and_gradients_are_finite_for_flat_predictions_and_extreme_lesions(level, voxels):
    lesion = torch.zeros(1, 1, 5, 8, 8, dtype=torch.bool)
    lesion.view(-1)[: None if voxels == "all" else voxels] = True
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    probability = torch.full((1, 1, 5, 8, 8), level, requires_grad=True)
    values = torch.stack(
        [
            soft_dice_loss(probability, lesion),
            soft_nsd_loss(probability, lesion, distance_mm, STROKE_MM),
            soft_hd95_loss(probability, lesion, distance_mm, STROKE_MM),
        ]
    )
    values.sum().backward()
    assert values.isfinite().all() and (values >= -1e-6).all()
    assert probability.grad.isfinite().all()


def test_an_empty_lesion_contributes_neither_loss_nor_gradient_beside_a_present_one():
    lesion = torch.cat([ball(), torch.zeros_like(ball())])
    distance_mm = signed_distance_mm(lesion, STROKE_MM)
    probability = torch.rand(lesion.shape).requires_grad_()
    for loss in (
        soft_dice_loss(probability, lesion),
        soft_nsd_loss(probability, lesion, distance_mm, STROKE_MM),
        soft_hd95_mm(probability, lesion, distance_mm, STROKE_MM),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), probability)
        assert loss[0] > 0 and loss[1] == 0
        assert gradient[0].any() and not gradient[1].any()


def test_a_missed_lesion_costs_the_most_and_growing_back_costs_ever_less():
    lesion = ball(spacing_mm=(2.0, 1.0, 1.0), radius_mm=9.0)
    distance_mm = signed_distance_mm(lesion, (2.0, 1.0, 1.0))
    cores = [(distance_mm <= -depth).float() for depth in (99.0, 6.0, 4.0, 2.0, 0.0)]
    for loss in (soft_nsd_loss, soft_hd95_mm):
        costs = [loss(c, lesion, distance_mm, (2.0, 1.0, 1.0)).item() for c in cores]
        assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_slices_are_scored_like_volumes_of_one_slice_thickness_apart():
    """2-D has no neighbours in depth; scores are those of the plane alone."""
    lesion = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    lesion[..., 8:16, 8:16] = True
    predicted = lesion.roll(4, 3)
    distance_mm = signed_distance_mm(lesion, (1.0, 1.0))
    soft = soft_nsd_loss(predicted.float(), lesion, distance_mm, (1.0, 1.0), 1.0)
    assert nsd(predicted, lesion, (1.0, 1.0), 1.0) - 1e-5 <= 1 - soft
    assert 1 - soft <= nsd(predicted, lesion, (1.0, 1.0), 3.0)


def test_half_precision_probabilities_are_scored_in_single_precision():
    probability, lesion, distance_mm = soft_case(torch.float32)
    half = probability.detach().to(torch.bfloat16)
    for loss in (soft_nsd_loss, soft_hd95_loss):
        value = loss(half, lesion, distance_mm, STROKE_MM)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(half.float(), lesion, distance_mm, STROKE_MM))
