import numpy as np
import pytest
import torch
from scipy.stats import kstest

from clinfuse.data.augmentation import Augmentation, mirrored, with_gamma, with_noise


def draws(augmentation, n=2000):
    generator = torch.Generator().manual_seed(0)
    return [augmentation.draw(generator) for _ in range(n)]


def test_every_number_varies_as_far_as_was_asked_and_no_further():
    drawn = draws(Augmentation(0.3, 0.6, 5, 4, 0.05, 0.2, 0.03))
    turned = [d for d in drawn if not torch.equal(d.matrix, torch.eye(4, dtype=torch.float64))]
    # 2000 coins: four standard errors are 0.041 and 0.044
    assert np.mean([d.flips for d in drawn]) == pytest.approx(0.3, abs=0.041)
    assert len(turned) / len(drawn) == pytest.approx(0.6, abs=0.044)
    for axis in range(3):
        shifts = [float(d.matrix[axis, 3]) for d in turned]
        assert kstest(shifts, "uniform", (-4, 8)).pvalue > 1e-3
    scales = np.log([d.scale for d in turned]) / np.log(1.05)
    assert kstest(scales, "uniform", (-1, 2)).pvalue > 1e-3
    assert kstest(np.log([d.gamma for d in drawn]), "uniform", (-0.2, 0.4)).pvalue > 1e-3
    assert kstest([d.mri_noise for d in drawn], "uniform", (0, 0.03)).pvalue > 1e-3
    assert kstest([d.ct_noise for d in drawn], "uniform", (0, 0.03)).pvalue > 1e-3


def test_the_matrix_is_a_similarity():
    for draw in draws(Augmentation(affine=1), 20):
        linear = draw.matrix[:3, :3]
        identity = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(linear @ linear.T, draw.scale**2 * identity)


def test_zeros_are_no_augmentation():
    for draw in draws(Augmentation(0, 0, 0, 0, 0, 0, 0), 20):
        assert not draw.flips and draw.gamma == 1 and draw.mri_noise == draw.ct_noise == 0
        assert torch.equal(draw.matrix, torch.eye(4, dtype=torch.float64))


def test_what_is_off_does_not_shift_what_is_on():
    little, much = draws(Augmentation(flip=0, affine=0), 5), draws(Augmentation(1, 1), 5)
    assert [d.gamma for d in little] == [d.gamma for d in much]


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"max_mm": -1.0}, {"max_scale": 1.0}])
def test_impossible_augmentation_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Augmentation(**wrong)


def test_mirroring_exchanges_left_and_right_only():
    volume = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert torch.equal(mirrored(volume)[..., 0], volume[..., 3])
    assert torch.equal(mirrored(mirrored(volume)), volume)


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.3])
def test_gamma_keeps_the_ends_and_the_order(gamma):
    mri = torch.linspace(-1, 1, 101).reshape(1, 1, 1, -1)
    changed = with_gamma(mri, gamma)
    assert changed[0, 0, 0, 0] == -1 and changed[0, 0, 0, -1] == 1
    assert (changed.diff() > 0).all()
    assert (changed[..., 50] + 1) / 2 == pytest.approx(0.5**gamma)


def test_noise_has_the_deviation_that_was_asked_for_and_stays_in_model_space():
    zero = torch.zeros(1, 30, 30, 30)
    noise = with_noise(zero, 0.05, torch.Generator().manual_seed(0))
    assert noise.std() == pytest.approx(0.05, rel=0.02)  # 27000 voxels: standard error 0.4 %
    assert with_noise(zero + 1, 0.5, torch.Generator()).max() <= 1
