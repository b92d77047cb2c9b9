import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.diffusion.ensemble import (
    centred_estimate,
    ensemble_noise,
    ensemble_uncertainty,
    ensemble_variance,
    eta_eff,
    normalised_uncertainty,
)


def members_of(cases=2, k=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(cases * k, 1, 2, 3, 4, dtype=dtype, generator=generator)


def test_variance_is_over_the_members_of_one_case():
    x0_hat = members_of(cases=2, k=3)
    expected = [np.var(x0_hat[i : i + 3].numpy(), axis=0, ddof=1) for i in (0, 3)]
    torch.testing.assert_close(ensemble_variance(x0_hat, 3), torch.tensor(np.stack(expected)))


def test_uncertainty_is_the_mean_variance_over_voxels():
    x0_hat = members_of(cases=2, k=3)
    expected = [np.var(x0_hat[i : i + 3].numpy(), axis=0, ddof=1).mean() for i in (0, 3)]
    torch.testing.assert_close(ensemble_uncertainty(x0_hat, 3), torch.tensor(expected))


def test_uncertainty_reaches_every_member_with_the_gradient_of_a_variance():
    x0_hat = members_of(cases=2, k=3).requires_grad_()
    ensemble_uncertainty(x0_hat, 3).sum().backward()
    cases = x0_hat.detach().reshape(2, 3, -1)
    expected = 2 * (cases - cases.mean(1, keepdim=True)) / (3 - 1) / cases.shape[-1]
    torch.testing.assert_close(x0_hat.grad, expected.reshape_as(x0_hat))
    assert torch.autograd.gradcheck(lambda x: ensemble_uncertainty(x, 3), x0_hat)


def test_a_single_member_has_no_spread():
    assert (ensemble_variance(members_of(k=1), 1) == 0).all()
    assert (ensemble_uncertainty(members_of(k=1), 1) == 0).all()


def test_members_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 members"):
        ensemble_variance(members_of(cases=2, k=3), 4)


@given(std=st.floats(0.001, 100), reference_std=st.floats(0.01, 10))
def test_uncert_is_a_half_at_the_reference_spread_and_stays_below_one(std, reference_std):
    spread = torch.tensor([0.0, reference_std, std], dtype=torch.float64) ** 2
    uncert = normalised_uncertainty(spread.reshape(3, 1, 1), reference_std).flatten()
    assert uncert[0] == 0
    assert uncert[1] == pytest.approx(0.5)
    assert 0 <= uncert[2] < 1
    assert (uncert[2] > 0.5) == (std > reference_std) or std == pytest.approx(reference_std)


def test_uncert_does_not_depend_on_the_rest_of_the_case():
    quiet, loud = torch.full((1, 1, 2, 2), 0.01), torch.full((1, 1, 2, 2), 0.01)
    loud[..., 0, 0] = 100.0
    alone, beside = normalised_uncertainty(quiet, 0.1), normalised_uncertainty(loud, 0.1)
    torch.testing.assert_close(alone[..., 1, 1], beside[..., 1, 1])


@given(eta=st.floats(0, 1), kappa=st.floats(-5, 5))
def test_eta_eff_is_equation_4_voxel_by_voxel(eta, kappa):
    uncert = torch.rand(1, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    strength = eta_eff(eta, kappa, uncert).flatten().tolist()
    for ours, u in zip(strength, uncert.flatten().tolist(), strict=True):
        conf = 1 - u
        assert ours == pytest.approx(eta / (1 + math.exp(-kappa * (1 - conf))), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("members", [2, 5])
def test_noise_of_an_ensemble_cancels_in_the_mean_of_each_case(members):
    like = torch.empty(2 * members, 1, 8, 8, 8)
    eps = ensemble_noise(like, members, torch.Generator().manual_seed(0))
    mean = eps.reshape(2, members, *like.shape[1:]).mean(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)


@pytest.mark.parametrize("members", [1, 2, 5])
def test_each_member_of_an_ensemble_starts_from_unit_noise(members):
    like = torch.empty(members, 1, 200, 200, dtype=torch.float64)
    eps = ensemble_noise(like, members, torch.Generator().manual_seed(0))
    # 40 000 voxels: standard errors 0.005 of the mean, 0.007 of the variance.
    torch.testing.assert_close(
        eps.mean((1, 2, 3)), torch.zeros_like(eps[:, 0, 0, 0]), atol=0.02, rtol=0
    )
    torch.testing.assert_close(
        eps.var((1, 2, 3)), torch.ones_like(eps[:, 0, 0, 0]), atol=0.03, rtol=0
    )


def test_noise_of_an_ensemble_is_a_function_of_its_generator():
    like = torch.empty(4, 1, 3, 3)
    first, second = (ensemble_noise(like, 2, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    plain = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(ensemble_noise(like, 1, torch.Generator().manual_seed(7)), plain)


@pytest.mark.parametrize("k", [4, 5, 8])
def test_from_four_members_on_their_noise_has_mean_zero_and_variance_one_at_every_voxel(k):
    like = torch.zeros(2 * k, 1, 8, 16, 16)
    noise = ensemble_noise(like, k, torch.Generator().manual_seed(0)).reshape(2, k, -1)
    torch.testing.assert_close(noise.mean(1), torch.zeros(2, 2048), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.square().mean(1), torch.ones(2, 2048), atol=1e-5, rtol=0)
    each = noise.flatten(0, 1)
    assert ((each.std(1) - 1).abs() < 0.06).all()
    assert each.abs().max() <= (k - 1) ** 0.5 + 1e-4  # a point on a sphere
    apart = torch.corrcoef(each[:k])
    expected = torch.eye(k) * (1 + 1 / (k - 1)) - 1 / (k - 1)
    assert (apart - expected).abs().max() < 0.1


def test_a_centred_estimate_keeps_the_spread_and_takes_its_mean_from_the_noise():
    x0_hat, x_t = members_of(cases=2, k=3), members_of(cases=2, k=3).flip(0)
    alpha_bar_t = torch.tensor([0.25] * 3 + [0.81] * 3, dtype=torch.float64)
    centred = centred_estimate(x0_hat, x_t, alpha_bar_t, 3)
    for case, level in ((slice(0, 3), 0.5), (slice(3, 6), 0.9)):
        torch.testing.assert_close(centred[case].mean(0), level * x_t[case].mean(0))
        apart = x0_hat[case] - x0_hat[case].mean(0)
        torch.testing.assert_close(centred[case] - centred[case].mean(0), apart)
