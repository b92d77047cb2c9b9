import pytest
import torch

from clinfuse.functional.sobel import gradient_magnitude
from clinfuse.functional.ssim import ssim
from clinfuse.losses.sources import SourceLoss


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.rand((2, 2, 1, *shape), generator=generator) - 1).unbind(0)


@pytest.mark.parametrize("shape", [(17, 21), (9, 12, 11)])
def test_each_term_is_its_formula_and_the_total_their_weighted_sum(shape):
    mri, ct = pair(*shape)
    spacing_mm = torch.tensor([[1.2, 0.9, 0.9][-len(shape) :]] * 2)
    fused = 0.7 * mri + 0.3 * ct
    terms = SourceLoss(2.0, 3.0, 5.0, 7.0)(fused, mri, ct, spacing_mm)
    whole = torch.ones_like(mri, dtype=torch.bool)
    likeness = [ssim(fused + 1, source + 1, whole, spacing_mm, 1.5) for source in (mri, ct)]
    torch.testing.assert_close(terms.ssim, 1 - (likeness[0] + likeness[1]) / 2)
    squares = ((fused - mri) ** 2 + (fused - ct) ** 2) / 2
    torch.testing.assert_close(terms.squared_error, squares.flatten(1).mean(1))
    steeper = gradient_magnitude(mri).maximum(gradient_magnitude(ct))
    slope = (gradient_magnitude(fused) - steeper).abs().flatten(1).mean(1)
    torch.testing.assert_close(terms.gradient, slope)
    brightest = (fused - mri.maximum(ct)).abs().flatten(1).mean(1)
    torch.testing.assert_close(terms.intensity, brightest)
    total = 2 * terms.squared_error + 3 * terms.ssim + 5 * terms.gradient + 7 * terms.intensity
    torch.testing.assert_close(terms.total, total)


def test_equal_sources_that_are_the_fused_image_cost_nothing():
    mri, _ = pair(16, 16)
    terms = SourceLoss(1.0, 1.0, 1.0, 1.0)(mri, mri, mri, torch.ones(2, 2))
    torch.testing.assert_close(terms.total, torch.zeros(2), atol=1e-5, rtol=0)


def test_a_step_down_its_gradient_lowers_it():
    mri, ct = pair(24, 24)
    fused = ((mri + ct) / 2).requires_grad_()
    loss = SourceLoss(1.0, 1.0, 1.0, 1.0)
    before = loss(fused, mri, ct, torch.ones(2, 2)).total.sum()
    (slope,) = torch.autograd.grad(before, fused)
    after = loss(fused - 0.5 * slope, mri, ct, torch.ones(2, 2)).total.sum()
    assert after < before
