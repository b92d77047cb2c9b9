import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from clinfuse.functional.eight_bit import eight_bit
from clinfuse.functional.source_ssim import ssim_published, ssim_sources


def sources(*shape):
    mri = torch.rand(shape) * 2 - 1
    ct = (mri + 0.5 * torch.randn(shape)).clamp(-1, 1)
    mri[..., :6], ct[..., :6] = -1, -1
    return (mri + ct) / 2, mri, ct


def over_slices(fused, mri, ct, **options):
    """scikit-image's mean of every slice, summed over both sources."""
    f, m, c = (eight_bit(image).double().numpy() for image in (fused, mri, ct))
    return [
        np.mean(
            [
                structural_similarity(x, y, **options) + structural_similarity(x, z, **options)
                for x, y, z in zip(
                    *(i[case].reshape(-1, *i.shape[-2:]) for i in (f, m, c)), strict=True
                )
            ]
        )
        for case in range(len(f))
    ]


@pytest.mark.parametrize("shape", [(2, 1, 20, 21), (2, 1, 3, 16, 17)])
def test_the_published_value_is_scikit_images_default_for_a_range_of_two(shape):
    images = sources(*shape)
    expected = over_slices(*images, data_range=2)
    np.testing.assert_allclose(ssim_published(*images), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1, 20, 21), (2, 1, 3, 16, 17)])
def test_the_right_value_is_scikit_images_with_wangs_window_and_the_range_of_the_levels(shape):
    f, m, c = sources(*shape)
    options = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    maps = [
        structural_similarity(x, y, full=True, **options)[1].mean()
        for case in range(2)
        for y_of in (m, c)
        for x, y in zip(
            *(eight_bit(i)[case].double().reshape(-1, *shape[-2:]).numpy() for i in (f, y_of)),
            strict=True,
        )
    ]
    expected = np.reshape(maps, (2, 2, -1)).mean(2).sum(1)
    np.testing.assert_allclose(ssim_sources(f, m, c), expected, rtol=1e-4)  # single precision


def test_both_are_two_for_identical_images():
    image, *_ = sources(1, 1, 16, 16)
    assert ssim_sources(image, image, image).item() == pytest.approx(2)
    assert ssim_published(image, image, image).item() == pytest.approx(2)


def test_noise_of_one_level_in_the_dark_costs_the_published_value_alone():
    dark = torch.full((1, 1, 32, 32), -1.0)
    noisy = dark + torch.randint(0, 2, dark.shape) / 127.5
    assert ssim_sources(noisy, dark, dark).item() > 1.9
    assert ssim_published(noisy, dark, dark).item() < 0.1


def test_a_slice_smaller_than_a_window_has_no_published_value():
    image = torch.rand(2, 1, 6, 30)
    assert ssim_published(image, image, image).isnan().all()
