import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from clinfuse.losses.medical_fusion import MedicalFusionLoss, correlation
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.losses.sources import SourceLoss

WEIGHTS = {
    "content": 15, "structure": 8, "detail": 5, "consistency": 3, "gradient": 2, "medical": 10,
}  # fmt: skip
"""As method.md states them."""


def pair(*shape):
    return (2 * torch.rand(2, 2, 1, *shape) - 1).unbind(0)


def regions(*shape):
    """Brain in the middle, bone around it, no lesion."""
    roi = torch.zeros(2, 3, *shape, dtype=torch.bool)
    roi[:, 0, ..., 4:-4] = roi[:, 1, ..., :3] = True
    return roi


@pytest.mark.parametrize("shape", [(17, 21), (9, 12, 11)], ids=str)
def test_each_term_is_what_it_says_and_the_total_their_sum_in_the_method_s_weights(shape):
    (mri, ct), roi, spacing = pair(*shape), regions(*shape), (2.0, 1.0, 1.0)[-len(shape) :]
    fused = 0.6 * mri + 0.4 * ct + 0.05
    terms = MedicalFusionLoss()(fused, (mri, ct), (mri, ct, roi), spacing)
    sources = SourceLoss()(fused, mri, ct, spacing)
    torch.testing.assert_close(terms.content, sources.intensity)
    torch.testing.assert_close(terms.structure, sources.ssim)
    torch.testing.assert_close(terms.gradient, sources.gradient)
    eq_2 = ClinicalRoiLoss(1.0, 1.0, 0.0)(fused, mri, ct, roi[:, :1], roi[:, 1:2], spacing)
    torch.testing.assert_close(terms.medical, eq_2.brain + eq_2.bone)
    alike = [
        [np.corrcoef(f.ravel(), s.ravel())[0, 1] for f, s in zip(fused, source, strict=True)]
        for source in (mri, ct)
    ]
    np.testing.assert_allclose(terms.consistency, 1 - np.mean(alike, 0), rtol=1e-4)
    fine = []
    for image in (fused, mri, ct):
        smooth = [
            gaussian_filter(case[0].numpy(), [1.5 / mm for mm in spacing], truncate=3.5)
            for case in image
        ]
        fine.append(image[:, 0].numpy() - np.stack(smooth))
    finest = np.where(np.abs(fine[1]) >= np.abs(fine[2]), fine[1], fine[2])
    expected = np.abs(fine[0] - finest).reshape(2, -1).mean(1)
    np.testing.assert_allclose(terms.detail, expected, rtol=1e-4)
    total = sum(weight * getattr(terms, name) for name, weight in WEIGHTS.items())
    torch.testing.assert_close(terms.total, total)


def test_the_reference_is_aimed_at_while_the_medical_term_sees_the_pair():
    (mri, ct), roi = pair(20, 20), regions(20, 20)
    reference = torch.where(roi[:, 1:2], ct, mri)
    terms = MedicalFusionLoss()(reference, (reference, reference), (mri, ct, roi), (1.0, 1.0))
    for name in ("content", "structure", "detail", "consistency", "gradient"):
        torch.testing.assert_close(getattr(terms, name), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.medical, torch.zeros(2), atol=1e-4, rtol=0)
    swapped = MedicalFusionLoss()(reference, (reference, reference), (ct, mri, roi), (1.0, 1.0))
    assert (swapped.medical > 0.5).all()


def test_a_pair_without_masks_has_no_medical_loss_and_finite_slopes_for_the_rest():
    mri, ct = pair(16, 16)
    fused = ((mri + ct) / 2).requires_grad_()
    none = torch.zeros(2, 3, 16, 16, dtype=torch.bool)
    loss = MedicalFusionLoss()
    terms = loss(fused, (mri, ct), (mri, ct, none), (1.0, 1.0))
    assert (terms.medical == 0).all()
    (slope,) = torch.autograd.grad(terms.total.sum(), fused)
    assert slope.isfinite().all()
    after = loss(fused - 1e-2 * slope, (mri, ct), (mri, ct, none), (1.0, 1.0))
    assert after.total.sum() < terms.total.sum()


def test_correlation_is_numpy_s_and_that_of_a_flat_image_is_zero_with_a_slope():
    a, b = pair(9, 11)
    expected = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(correlation(a, b), expected, rtol=1e-4)
    flat = torch.zeros_like(a).requires_grad_()
    found = correlation(flat, b)
    assert (found == 0).all()
    (slope,) = torch.autograd.grad(found.sum(), flat)
    assert slope.isfinite().all() and slope.abs().max() > 0
