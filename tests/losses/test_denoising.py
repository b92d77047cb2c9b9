import torch

from clinfuse.functional.regional import regional_mean
from clinfuse.functional.ssim import ssim
from clinfuse.losses.denoising import denoising_loss

SPACING_MM = (4.0, 2.0, 2.0)


def pair(cases=2):
    clean = torch.rand(cases, 1, 6, 10, 12) * 2 - 1
    region = torch.rand(cases, 1, 6, 10, 12) > 0.6
    return clean + 0.1 * torch.randn_like(clean), clean, region


def test_it_is_the_squared_error_twice_and_one_minus_ssim_in_the_region():
    noisy, clean, region = pair()
    error = (noisy - clean).square()
    expected = (
        3 * error.mean((1, 2, 3, 4))
        + 3 * regional_mean(error, region)
        + 1
        - ssim(noisy + 1, clean + 1, region, SPACING_MM)
    )
    got = denoising_loss(noisy, clean, region, SPACING_MM, squared_error=3.0)
    torch.testing.assert_close(got, expected)
    nothing_left = denoising_loss(clean, clean, region, SPACING_MM)
    torch.testing.assert_close(nothing_left, torch.zeros(2), atol=1e-4, rtol=0)


def test_an_empty_region_leaves_the_error_of_the_whole_and_a_finite_gradient():
    noisy, clean, region = pair()
    region[0] = False
    noisy.requires_grad_()
    got = denoising_loss(noisy, clean, region, SPACING_MM)
    torch.testing.assert_close(got[0], 10 * (noisy - clean)[0].square().mean())
    got.sum().backward()
    assert noisy.grad.isfinite().all() and noisy.grad[0].abs().sum() > 0
