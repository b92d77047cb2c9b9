"""Eq. 2 against hand-made terms: what counts, where it counts, and that it can be followed."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from clinfuse.functional.surface import signed_distance_mm
from clinfuse.losses.lesion import soft_dice_loss, soft_hd95_loss, soft_nsd_loss
from clinfuse.losses.roi import ClinicalRoiLoss

SPACING_MM = (4.0, 2.0, 2.0)
SHAPE = (2, 1, 6, 12, 12)


def masks() -> tuple[Tensor, Tensor, Tensor]:
    brain, bone, lesion = torch.zeros(3, *SHAPE, dtype=torch.bool)
    brain[..., 1:5, 3:9, 3:9] = True
    bone[..., 1:5, 1:11, 1] = True
    lesion[..., 2:4, 4:8, 4:7] = True
    return brain, bone, lesion


def volumes(count: int, dtype=torch.float32) -> Tensor:
    return (
        torch.rand(count, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1
    )


def lesion_inputs(probability: Tensor, lesion: Tensor) -> dict[str, Tensor]:
    return {
        "lesion_probability": probability,
        "lesion": lesion,
        "lesion_distance_mm": signed_distance_mm(lesion, SPACING_MM).to(probability),
    }


def test_the_total_is_equation_2_with_its_weights():
    fused, mri, ct = volumes(3)
    brain, bone, lesion = masks()
    probability = volumes(4)[3].abs()
    loss = ClinicalRoiLoss(1.5, 0.5, 3.0, lambdas=(1.0, 2.0, 0.5), tau_mm=3.0, fidelity=(7.0, 11.0))
    inputs = lesion_inputs(probability, lesion)
    terms = loss(fused, mri, ct, brain, bone, SPACING_MM, **inputs)
    border = (probability, lesion, inputs["lesion_distance_mm"], SPACING_MM, 3.0)
    torch.testing.assert_close(terms.dice, soft_dice_loss(probability, lesion))
    torch.testing.assert_close(terms.nsd, soft_nsd_loss(*border))
    torch.testing.assert_close(terms.hd95, soft_hd95_loss(*border))
    lesion_term = terms.dice + 2 * terms.nsd + 0.5 * terms.hd95
    paper = 1.5 * terms.brain + 0.5 * terms.bone + 3 * lesion_term
    fidelity = 7 * terms.fidelity_brain + 11 * terms.fidelity_bone
    torch.testing.assert_close(terms.total, paper + fidelity)
    assert torch.equal(sum(terms.by_region), terms.total)


def test_brain_and_bone_terms_agree_with_scikit_image_on_whole_images():
    """Isotropic so that scikit-image can; whole, as its windows know no mask."""
    fused, mri, ct = (torch.rand(3, 1, 1, 18, 18, 18) * 2 - 1).double()
    brain, bone = torch.ones(2, 1, 1, 18, 18, 18, dtype=torch.bool)
    terms = ClinicalRoiLoss(sigma_mm=3.0)(fused, mri, ct, brain, bone, (2.0, 2.0, 2.0))
    for term, source in ((terms.brain, mri), (terms.bone, ct)):
        _, similarity = structural_similarity(
            fused[0, 0].numpy() + 1,
            source[0, 0].numpy() + 1,
            data_range=2.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        assert term.item() == pytest.approx(1 - similarity.mean(), abs=1e-6)


def test_terms_average_over_the_region_and_not_over_the_volume():
    """Padding the grid with background changes the share of the region, not what it looks like."""
    fused, mri, ct = volumes(3)
    brain, bone, _ = masks()
    mean_error = ((fused - mri).square()[brain]).view(2, -1).mean(1)
    loss = ClinicalRoiLoss(sigma_mm=0.1)
    terms = loss(fused, mri, ct, brain, bone, SPACING_MM)
    torch.testing.assert_close(terms.fidelity_brain, mean_error)
    pad = [10] * 6
    wide = [nn.functional.pad(v, pad) for v in (fused, mri, ct, brain, bone)]
    padded = loss(*wide, SPACING_MM)
    for name in ("brain", "bone", "fidelity_brain", "fidelity_bone"):
        torch.testing.assert_close(getattr(padded, name), getattr(terms, name))


def test_brain_listens_to_the_mri_alone_and_bone_to_the_ct_alone():
    """With one-voxel windows, a change anywhere else changes nothing."""
    fused, mri, ct = volumes(3)
    brain, bone, _ = masks()
    loss = ClinicalRoiLoss(sigma_mm=0.1)
    before = loss(fused, mri, ct, brain, bone, SPACING_MM)
    outside = torch.where(brain | bone, fused, 0.3)
    after = loss(outside, mri * brain, ct * bone, brain, bone, SPACING_MM)
    torch.testing.assert_close(after.total, before.total)
    swapped = loss(fused, ct, mri, brain, bone, SPACING_MM)
    for name in ("fidelity_brain", "fidelity_bone"):
        assert (getattr(swapped, name) - getattr(before, name)).abs().min() > 1e-3


def test_shares_count_as_their_mask_does_and_halves_by_half():
    fused, mri, ct = volumes(3)
    brain, bone, _ = masks()
    bone[1] = False
    loss = ClinicalRoiLoss(fidelity=(1.0, 1.0))
    by_mask = loss(fused, mri, ct, brain, bone, SPACING_MM)
    by_shares = loss(fused, mri, ct, brain.float(), bone.float(), SPACING_MM)
    for name in ("total", "brain", "bone", "fidelity_brain", "fidelity_bone"):
        torch.testing.assert_close(getattr(by_shares, name), getattr(by_mask, name))
    assert torch.equal(by_shares.defined, by_mask.defined)
    half = bone * torch.where(torch.arange(SHAPE[-2]) < 6, 0.5, 1.0)[:, None]
    error = (fused - ct).square()
    expected = (half * error).sum() / half.sum()
    shared = loss(fused, mri, ct, brain, half, SPACING_MM)
    torch.testing.assert_close(shared.fidelity_bone[0], expected)
    assert (shared.bone - by_mask.bone)[0].abs() > 1e-4 and shared.bone[1] == 0


def test_an_inverted_brain_costs_more_than_an_unrelated_one():
    """SSIM below zero is not clamped, so inversion keeps a gradient."""
    mri, unrelated = 0.5 * volumes(2)
    brain, bone, _ = masks()
    inverted = (-mri).requires_grad_()
    terms = ClinicalRoiLoss()(inverted, mri, mri, brain, bone, SPACING_MM)
    other = ClinicalRoiLoss()(unrelated, mri, mri, brain, bone, SPACING_MM)
    assert (terms.brain > 1.8).all() and (terms.brain > other.brain + 0.5).all()
    terms.brain.sum().backward()
    assert inverted.grad.abs().sum() > 0


def test_similarity_is_local_and_not_one_statistic_of_the_region():
    """A slow ramp hides noise from global statistics, not from windows of 3 mm."""
    ramp = torch.linspace(-0.9, 0.9, 48).expand(1, 1, 8, 48, 48).contiguous()
    everywhere = torch.ones_like(ramp, dtype=torch.bool)
    noise = 0.1 * torch.randn(ramp.shape)
    terms = ClinicalRoiLoss()(ramp + noise, ramp, ramp, everywhere, everywhere, (2.0, 2.0, 2.0))
    x, y = ramp.numpy().ravel(), (ramp + noise).numpy().ravel()
    structure = (2 * np.cov(x, y)[0, 1] + 0.06**2) / (x.var() + y.var() + 0.06**2)
    assert 1 - structure < 0.05 < 0.3 < terms.brain.item()


def test_every_gradient_agrees_with_finite_differences():
    fused, mri, ct, probability = volumes(4, torch.float64)[:, :, :, :3, :6, :6]
    brain, bone, lesion = (m[:, :, 1:4, 2:8, 1:7].contiguous() for m in masks())
    inputs = lesion_inputs(probability.abs(), lesion)
    del inputs["lesion_probability"]
    loss = ClinicalRoiLoss(fidelity=(1.0, 2.0))

    def total(fused: Tensor, probability: Tensor) -> Tensor:
        return loss(
            fused, mri, ct, brain, bone, SPACING_MM, lesion_probability=probability, **inputs
        ).total

    arguments = (fused.contiguous().requires_grad_(), probability.abs().requires_grad_())
    assert brain.any() and bone.any() and lesion.any()
    assert torch.autograd.gradcheck(total, arguments)


def test_gamma_moves_the_fused_image_through_a_frozen_lesion_head():
    """A head called without gradients, or Dice on thresholded masks, would leave it where it is."""
    mri, ct = volumes(2)
    brain, bone, lesion = masks()
    head = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.Sigmoid()).requires_grad_(False)
    for lambdas in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        fused = volumes(3)[2].requires_grad_()
        loss = ClinicalRoiLoss(alpha=0.0, beta=0.0, gamma=1.0, lambdas=lambdas)
        inputs = lesion_inputs(head(fused), lesion)
        loss(fused, mri, ct, brain, bone, SPACING_MM, **inputs).total.sum().backward()
        assert fused.grad.isfinite().all() and (fused.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_case_without_a_region_gets_zero_and_is_left_out_of_the_logged_mean():
    fused, mri, ct = volumes(3)
    fused.requires_grad_()
    brain, bone, lesion = masks()
    for mask in (brain, bone, lesion):
        mask[1] = False
    inputs = lesion_inputs(volumes(1)[0].abs(), lesion)
    loss = ClinicalRoiLoss(fidelity=(1.0, 1.0))
    terms = loss(fused, mri, ct, brain, bone, SPACING_MM, **inputs)
    terms.total.sum().backward()
    assert terms.total[0] > 0 and terms.total[1] == 0
    assert fused.grad.isfinite().all() and fused.grad[0].any() and not fused.grad[1].any()
    assert terms.defined.tolist() == [[True] * 3, [False] * 3]
    means = terms.means()
    for name in ("brain", "bone", "dice", "nsd", "hd95", "fidelity_brain", "fidelity_bone"):
        torch.testing.assert_close(means[name], getattr(terms, name)[0])


def test_without_a_lesion_probability_the_lesion_says_nothing():
    fused, mri, ct = volumes(3)
    brain, bone, lesion = masks()
    strong, off = (
        ClinicalRoiLoss(gamma=g)(fused, mri, ct, brain, bone, SPACING_MM, lesion=lesion)
        for g in (50.0, 0.0)
    )
    assert strong.total.equal(off.total)
    assert not strong.defined[:, 2].any() and strong.means()["dice"].isnan()


@pytest.mark.parametrize("missing", ["lesion", "lesion_distance_mm"])
def test_a_lesion_probability_without_its_reference_is_refused(missing):
    fused, mri, ct = volumes(3)
    brain, bone, lesion = masks()
    inputs = lesion_inputs(volumes(1)[0].abs(), lesion)
    del inputs[missing]
    with pytest.raises(ValueError, match=f"reference's {missing}$"):
        ClinicalRoiLoss()(fused, mri, ct, brain, bone, SPACING_MM, **inputs)


@pytest.mark.parametrize("wrong", [{"lambdas": (1.0, 1.0)}, {"fidelity": (1.0,)}])
def test_a_wrong_number_of_weights_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        ClinicalRoiLoss(**wrong)


def test_autocast_does_not_touch_the_variances():
    """In half precision, the variance of a nearly flat region is rounding error."""
    fused, mri, ct = volumes(3) * 0.02 + 0.8
    brain, bone, _ = masks()
    loss = ClinicalRoiLoss()
    exact = loss(fused, mri, ct, brain, bone, SPACING_MM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(fused, mri, ct, brain, bone, SPACING_MM)
    torch.testing.assert_close(mixed.total, exact.total)


def test_spacing_may_be_the_batchs_tensor():
    fused, mri, ct = volumes(3)
    brain, bone, lesion = masks()
    inputs = lesion_inputs(volumes(1)[0].abs(), lesion)
    rows = torch.tensor([SPACING_MM, SPACING_MM])
    one, other = (
        ClinicalRoiLoss()(fused, mri, ct, brain, bone, spacing, **inputs).total
        for spacing in (SPACING_MM, rows)
    )
    torch.testing.assert_close(one, other)


def test_slices_are_scored_too():
    fused, mri, ct = volumes(3)[..., 3, :, :]
    brain, bone, lesion = (m[..., 3, :, :] for m in masks())
    distance_mm = signed_distance_mm(lesion, (2.0, 2.0))
    terms = ClinicalRoiLoss()(
        fused,
        mri,
        ct,
        brain,
        bone,
        (2.0, 2.0),
        volumes(1)[0][..., 3, :, :].abs(),
        lesion,
        distance_mm,
    )
    assert (terms.total > 0).all()
