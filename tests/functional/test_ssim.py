import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from clinfuse.functional import ssim_cpu
from clinfuse.functional.regional import regional_mean
from clinfuse.functional.ssim import sigma_voxels, ssim, ssim_map


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return a, (a + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)


def skimage_map(a, b, sigma):
    return structural_similarity(
        a.numpy(), b.numpy(), data_range=2.0, full=True,
        gaussian_weights=True, sigma=sigma, use_sample_covariance=False,
    )[1]  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 1, 24, 25), (2, 1, 16, 13, 14)])
def test_the_map_agrees_with_scikit_image(shape):
    a, b = pair(*shape)
    ours = ssim_map(a, b, [1.5] * (len(shape) - 2))
    for case in range(2):
        np.testing.assert_allclose(ours[case, 0], skimage_map(a[case, 0], b[case, 0], 1.5))


def test_a_window_of_no_depth_scores_each_slice_as_an_image():
    a, b = pair(1, 1, 4, 20, 20)
    ours = ssim_map(a, b, sigma_voxels((100.0, 2.0, 2.0), 3.0))
    for ours_slice, *slices in zip(ours[0, 0], a[0, 0], b[0, 0], strict=True):
        np.testing.assert_allclose(ours_slice, skimage_map(*slices, 1.5))


def test_the_mean_is_over_the_region_and_not_over_the_volume():
    a, b = pair(2, 1, 8, 20, 20)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[0, :, 2:4, 3:9, 5:12] = True
    mask[1, :, :, 9] = True
    similarity = ssim_map(a, b, (0.6, 1.5, 1.5), mask=mask)
    expected = [similarity[case][mask[case]].mean() for case in range(2)]
    torch.testing.assert_close(ssim(a, b, mask, (5.0, 2.0, 2.0)), torch.stack(expected))


def regions(shape):
    """A box off the border, one at a corner of the grid, a cloud of voxels, and all."""
    inner, corner, cloud = torch.zeros(3, *shape, dtype=torch.bool)
    inner[tuple(slice(n // 3, n // 3 + 5) for n in shape)] = True
    corner[tuple(slice(0, n // 2) for n in shape)] = True
    cloud[tuple(slice(1, n - 3) for n in shape)] = True
    cloud &= torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    return torch.stack([inner, corner, cloud, torch.ones_like(cloud)])[:, None]


@pytest.mark.parametrize("parts", [1, 32])
@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [((7, 16, 13), (5.0, 2.0, 1.0)), ((18, 11), (3.0, 1.4)), ((5, 150, 20), (3.0, 1.0, 1.0))],
)
def test_the_box_around_a_region_in_parts_scores_as_the_whole_grid_does(
    monkeypatch, shape, spacing_mm, parts
):
    monkeypatch.setattr(ssim_cpu, "PARTS", parts)
    mask = regions(shape)
    a, b = pair(*mask.shape)
    whole = regional_mean(ssim_map(a, b, sigma_voxels(spacing_mm, 3.0), mask=mask), mask)
    torch.testing.assert_close(ssim(a, b, mask, spacing_mm), whole, rtol=1e-10, atol=0)
    single = ssim(a.float(), b.float(), mask, spacing_mm)
    torch.testing.assert_close(single, whole.float(), rtol=1e-5, atol=0)


def test_what_has_a_gradient_scores_as_what_has_none():
    a, b = pair(2, 1, 6, 14, 9)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[0, :, 2:4, 3:9, 5:] = mask[1, :, :, 9] = True
    learned = ssim(a.clone().requires_grad_(), b, mask, (5.0, 2.0, 2.0))
    assert learned.requires_grad
    torch.testing.assert_close(learned.detach(), ssim(a, b, mask, (5.0, 2.0, 2.0)))


def test_luminance_counts_from_black_with_a_gradient_and_without():
    a, b = pair(1, 1, 6, 14, 9)
    mask = torch.ones(a.shape, dtype=torch.bool)
    expected = ssim(a + 1, b + 1, mask, (5.0, 2.0, 2.0))
    torch.testing.assert_close(ssim(a, b, mask, (5.0, 2.0, 2.0), black=-1.0), expected)
    learned = ssim(a.requires_grad_(), b, mask, (5.0, 2.0, 2.0), black=-1.0)
    torch.testing.assert_close(learned.detach(), expected)


def test_what_lies_outside_the_region_has_no_say():
    a, b = pair(1, 1, 8, 20, 20)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[:, :, 2:6, 3:12, 5:14] = True
    changed = torch.where(mask, a, 5 * torch.rand(a.shape, dtype=a.dtype))
    before, after = (ssim(image, b, mask, (5.0, 2.0, 2.0)) for image in (a, changed))
    torch.testing.assert_close(after, before)


def similarity(weights, x, y):
    """Wang et al. (2004), Eq. 13, of one window whose weights sum to 1."""
    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
    var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
    c_1, c_2 = 0.02**2, 0.06**2
    luminance = (2 * mean_x * mean_y + c_1) / (mean_x**2 + mean_y**2 + c_1)
    return luminance * (2 * covariance + c_2) / (var_x + var_y + c_2)


def test_a_window_cut_by_the_region_weighs_the_voxels_that_remain():
    a, b = pair(1, 1, 21, 21)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[:, :, 10:, 10:] = True  # the voxel at (10, 10) keeps a quarter of its window
    taps = np.exp(-0.5 * (np.arange(6) / 1.5) ** 2)  # 5 voxels to either side, 3.5 sigma
    weights = np.outer(taps, taps) / np.outer(taps, taps).sum()
    x, y = (image[0, 0, 10:16, 10:16].numpy() for image in (a, b))
    expected = similarity(weights, x, y)
    ours = ssim_map(a, b, (1.5, 1.5), mask=mask)[0, 0, 10, 10].item()
    assert ours == pytest.approx(expected, rel=1e-5)


def test_a_window_and_the_mean_weigh_each_voxel_by_its_share():
    a, b = pair(1, 1, 21, 21)
    generator = torch.Generator().manual_seed(2)
    shares = torch.rand(a.shape, generator=generator, dtype=a.dtype)
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)  # 5 voxels to either side, 3.5 sigma
    weights = np.outer(taps, taps) * shares[0, 0, 5:16, 5:16].numpy()
    weights /= weights.sum()
    x, y = (image[0, 0, 5:16, 5:16].numpy() for image in (a, b))
    expected = similarity(weights, x, y)
    ours = ssim_map(a, b, (1.5, 1.5), mask=shares)
    assert ours[0, 0, 10, 10].item() == pytest.approx(expected, rel=1e-6)
    mean = (ours * shares).sum() / shares.sum()
    assert ssim(a, b, shares, (2.0, 2.0)).item() == pytest.approx(mean.item(), rel=1e-10)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_shares_of_0_and_1_are_a_mask(with_gradient):
    mask = regions((7, 16, 13))
    a, b = pair(*mask.shape)
    scores = ssim(a.requires_grad_(with_gradient), b, mask.to(a), (5.0, 2.0, 1.0))
    torch.testing.assert_close(scores, ssim(a, b, mask, (5.0, 2.0, 1.0)))


def test_an_inverted_image_scores_below_zero():
    # Inverted about its mean of 0.5: luminance is 1 and structure -1, so a clamp would show.
    a = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(a, 1 - a, torch.ones_like(a, dtype=torch.bool), (2.0, 2.0)).item() < -0.8


def test_identical_images_score_one_and_an_empty_region_nan():
    a, _ = pair(2, 1, 8, 8, 8)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[0] = True
    spacing_mm = torch.full((2, 3), 2.0)
    scores = ssim(a, a, mask, spacing_mm)
    torch.testing.assert_close(scores[0].item(), 1.0)
    assert scores[1].isnan()


def test_an_empty_region_has_no_gradient_rather_than_nan():
    a, b = pair(2, 1, 6, 6)
    mask = torch.zeros(a.shape, dtype=torch.bool)
    mask[0, :, 2:] = True
    (gradient,) = torch.autograd.grad(ssim(a.requires_grad_(), b, mask, (1.0, 1.0)).nansum(), a)
    assert gradient[0].abs().sum() > 0
    assert (gradient[1] == 0).all()


def test_gradients_match_finite_differences():
    a, b = pair(1, 1, 4, 5, 4)
    sigma = (0.7, 1.5, 1.0)
    assert torch.autograd.gradcheck(lambda a, b: ssim_map(a, b, sigma), (
        a.requires_grad_(), b.requires_grad_(),
    ))  # fmt: skip


def test_flat_single_precision_background_scores_one():
    a = torch.full((1, 1, 16, 16, 16), -1.0)
    torch.testing.assert_close(ssim_map(a, a, (1.0, 1.0, 1.0)), torch.ones_like(a))


def test_windows_are_as_wide_in_mm_along_every_axis():
    assert sigma_voxels((5.0, 0.9, 1.5), 3.0) == pytest.approx((0.6, 10 / 3, 2.0))
    with pytest.raises(ValueError, match="one voxel spacing"):
        sigma_voxels(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), 3.0)
