import math

import pytest
import torch

from clinfuse.diffusion.ensemble import ensemble_uncertainty, ensemble_variance
from clinfuse.diffusion.guidance import (
    Guide,
    guided_estimate,
    loss_gradient,
    normalise_rms,
    roi_guide,
)
from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.samplers.ddpm import ddpm
from clinfuse.diffusion.samplers.dpm_solver import dpm_solver

LEVELS = torch.tensor([0.0, 0.2, 0.5, 0.8], dtype=torch.float64)
VOXELS = 12


@pytest.fixture
def x_t():
    """Two cases of three members each, case by case."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 3, 4, dtype=torch.float64, generator=generator)


@pytest.fixture
def matrix():
    """What a linear denoiser multiplies the voxels by: neither symmetric nor diagonal."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(VOXELS, VOXELS, dtype=torch.float64, generator=generator) / 4


@pytest.fixture
def linear_denoiser(matrix):
    return lambda x_t, alpha_bar_t: (x_t.flatten(1) @ matrix.T).reshape_as(x_t)


def squared_error(x0_hat):
    return 0.5 * (x0_hat - 0.7).square().flatten(1).sum(1)


def unit(gradient):
    return gradient / gradient.flatten(1).square().mean(1).sqrt().reshape(-1, 1, 1, 1)


def levels_like(x_t, level=0.5):
    return x_t.new_full(x_t.shape[:1], level)


def test_full_gradient_of_a_linear_denoiser_is_its_transpose(x_t, matrix, linear_denoiser):
    guide = roi_guide(squared_error, eta=0.3, eta_u=0.0, kappa=None, gradient="full")
    x0_hat, correction = guided_estimate(linear_denoiser, x_t, levels_like(x_t), guide)
    expected = ((x0_hat - 0.7).flatten(1) @ matrix).reshape_as(x_t)  # A^T (A x - 0.7)
    torch.testing.assert_close(correction, 0.3 * unit(expected))


def test_x0_gradient_stops_at_the_estimate(x_t, linear_denoiser):
    guide = roi_guide(squared_error, eta=0.3, eta_u=0.0, kappa=None, gradient="x0")
    x0_hat, correction = guided_estimate(linear_denoiser, x_t, levels_like(x_t), guide)
    torch.testing.assert_close(correction, 0.3 * unit(x0_hat - 0.7))


def test_both_gradients_agree_where_the_denoiser_only_scales(gaussian, x_t):
    full, x0 = (
        guided_estimate(
            gaussian.denoise,
            x_t,
            levels_like(x_t),
            roi_guide(squared_error, eta=0.3, eta_u=0.1, kappa=2.0, members=3, gradient=gradient),
        )[1]
        for gradient in ("full", "x0")
    )
    torch.testing.assert_close(full, x0)


@pytest.mark.parametrize("gradient", ["full", "x0"])
def test_uncertainty_gradient_is_that_of_the_variance(gradient, x_t, matrix, linear_denoiser):
    guide = roi_guide(squared_error, 0.0, eta_u=0.2, kappa=None, members=3, gradient=gradient)
    x0_hat, correction = guided_estimate(linear_denoiser, x_t, levels_like(x_t), guide)
    cases = x0_hat.reshape(2, 3, VOXELS)
    slope = cases - cases.mean(1, keepdim=True)  # dU/dx0 up to a factor, which unit length takes
    slope = slope @ matrix if gradient == "full" else slope
    slope = slope / slope.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(correction, 0.2 * slope.reshape_as(x_t))


def test_uncertainty_guidance_at_x0_leaves_the_ensemble_mean_alone(x_t):
    guide = roi_guide(squared_error, 0.0, eta_u=0.2, kappa=None, members=3, gradient="x0")
    correction = guide(x_t, levels_like(x_t), x_t)
    sums = correction.reshape(2, 3, -1).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    assert correction.abs().max() > 0.1


@pytest.mark.parametrize("kappa", [0.5, 4.0])
def test_guidance_strength_is_equation_4_at_every_voxel(kappa, x_t):
    guide = roi_guide(squared_error, 0.2, 0.0, kappa, members=3, gradient="x0", reference_std=0.5)
    plain = roi_guide(squared_error, 1.0, 0.0, None, members=3, gradient="x0")
    alpha_bar_t = levels_like(x_t)
    strength = guide(x_t, alpha_bar_t, x_t) / plain(x_t, alpha_bar_t, x_t)
    variance = ensemble_variance(x_t, 3)
    for case in range(2):
        for member in range(3):
            for p in range(VOXELS):
                spread = variance[case].flatten()[p].item()
                conf = 1 - spread / (spread + 0.5**2)
                expected = 0.2 / (1 + math.exp(-kappa * (1 - conf)))
                ours = strength[3 * case + member].flatten()[p].item()
                assert ours == pytest.approx(expected, rel=1e-9)


def test_kappa_none_leaves_equation_4_out_and_zero_halves_eta(x_t):
    full, half = (
        roi_guide(squared_error, 0.2, 0.0, kappa, members=3, gradient="x0")(
            x_t, levels_like(x_t), x_t
        )
        for kappa in (None, 0.0)
    )
    torch.testing.assert_close(full.flatten(1).square().mean(1).sqrt(), levels_like(x_t, 0.2))
    torch.testing.assert_close(half, full / 2)


def test_a_step_is_the_unguided_step_minus_the_correction(gaussian, x_t):
    guide = Guide(lambda x_t, alpha_bar_t, x0_hat: 0.1 * x_t + 0.2 * x0_hat)
    level = levels_like(x_t, 0.4)
    for sampler in (ddim, ddpm, dpm_solver):
        guided = sampler(gaussian.denoise, x_t, level[:1], guide)
        expected = sampler(gaussian.denoise, x_t, level[:1])
        expected = expected - 0.1 * x_t - 0.2 * gaussian.denoise(x_t, level)
        torch.testing.assert_close(guided, expected)


@pytest.mark.parametrize("gradient", ["full", "x0"])
@pytest.mark.parametrize("sampler", [ddim, ddpm, dpm_solver])
def test_each_of_eta_eta_u_and_kappa_changes_the_sample(sampler, gradient, linear_denoiser, x_t):
    def sample(**changes):
        weights = {"eta": 0.1, "eta_u": 0.05, "kappa": 0.5} | changes
        guide = roi_guide(squared_error, members=3, gradient=gradient, **weights)
        return sampler(linear_denoiser, x_t, LEVELS, guide, torch.Generator().manual_seed(0))

    default = sample()
    torch.testing.assert_close(sample(), default)
    for changes in ({"eta": 0.2}, {"eta": 0.0}, {"eta_u": 0.1}, {"eta_u": 0.0}, {"kappa": 2.0}):
        assert not torch.allclose(sample(**changes), default, atol=1e-3)
    assert not torch.allclose(sample(kappa=None), default, atol=1e-3)


@pytest.mark.parametrize("gradient", ["full", "x0"])
def test_guidance_lowers_what_it_descends(gradient, gaussian, x_t):
    def sample(eta, eta_u):
        guide = roi_guide(squared_error, eta, eta_u, None, members=3, gradient=gradient)
        return ddim(gaussian.denoise, x_t, LEVELS, guide)

    assert (squared_error(sample(0.1, 0.0)) < squared_error(sample(0.0, 0.0))).all()
    spread, before = (ensemble_uncertainty(sample(0.0, eta_u), 3) for eta_u in (0.05, 0.0))
    assert (spread < before).all()


def test_spread_costs_no_forward_pass(gaussian, x_t):
    calls = []

    def denoise(x_t, alpha_bar_t):
        calls.append(alpha_bar_t)
        return gaussian.denoise(x_t, alpha_bar_t)

    ddim(denoise, x_t, LEVELS, roi_guide(squared_error, 0.1, 0.05, 0.5, members=3))
    assert len(calls) == len(LEVELS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [True, True, True, True]),
        ({"gradient": "x0"}, [False, False, False, False]),
        ({"start": 0.8, "end": 0.5}, [False, True, True, False]),
        ({"eta": 0.0, "members": 1}, [False, False, False, False]),
    ],
)
def test_the_denoiser_runs_with_a_graph_only_where_it_is_needed(settings, expected, gaussian, x_t):
    seen = []

    def denoise(x_t, alpha_bar_t):
        seen.append(torch.is_grad_enabled())
        return gaussian.denoise(x_t, alpha_bar_t)

    settings = {"eta": 0.1, "eta_u": 0.05, "kappa": 0.5, "members": 3} | settings
    sample = ddim(denoise, x_t, LEVELS, roi_guide(squared_error, **settings))
    assert seen == expected
    assert not sample.requires_grad


def test_levels_outside_the_range_are_not_guided(x_t):
    guide = Guide(lambda x_t, alpha_bar_t, x0_hat: torch.ones_like(x_t), start=0.9, end=0.2)
    # Noise levels 1 - alpha_bar: above the range, at both of its ends nearly, inside, and below.
    alpha_bar_t = torch.tensor([0.0, 0.11, 0.5, 0.79, 0.81, 1.0], dtype=torch.float64)
    assert guide(x_t, alpha_bar_t, x_t)[:, 0, 0, 0].tolist() == [0, 1, 1, 1, 0, 0]


def test_parameters_of_the_denoiser_collect_no_gradient(x_t):
    network = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    guide = roi_guide(squared_error, 0.1, 0.05, 0.5, members=3)
    ddim(lambda x_t, alpha_bar_t: network(x_t), x_t, LEVELS, guide)
    assert all(weight.grad is None for weight in network.parameters())


def test_guidance_is_refused_in_inference_mode(gaussian, x_t):
    guide = roi_guide(squared_error, 0.1, 0.05, 0.5, members=3)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        ddim(gaussian.denoise, x_t, LEVELS, guide)
    with torch.inference_mode():
        assert ddim(gaussian.denoise, x_t, LEVELS).isfinite().all()


def test_a_denoiser_that_cuts_the_graph_is_refused(gaussian, x_t):
    guide = roi_guide(squared_error, 0.1, 0.05, 0.5, members=3)
    with pytest.raises(RuntimeError, match="no graph back to x_t"):
        ddim(torch.no_grad()(gaussian.denoise), x_t, LEVELS, guide)


def test_a_loss_that_cuts_the_graph_is_refused(gaussian, x_t):
    thresholded = roi_guide(lambda x0_hat: (x0_hat > 0).double().mean((1, 2, 3)), 0.1, 0.0, None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        ddim(gaussian.denoise, x_t, LEVELS, thresholded)


def test_an_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="'full' or 'x0'"):
        roi_guide(squared_error, 0.1, 0.05, 0.5, gradient="half")


def test_normalised_gradients_have_unit_rms_and_their_direction(x_t):
    gradient = x_t * torch.logspace(-30, 30, 6, dtype=x_t.dtype).reshape(6, 1, 1, 1)
    for dtype in (torch.float32, torch.float64):  # squares of 1e-30 and 1e30 leave float32
        torch.testing.assert_close(normalise_rms(gradient.to(dtype)), unit(x_t).to(dtype))


def test_members_share_one_scale(x_t):
    x_t[0] *= 100
    normalised = normalise_rms(x_t, members=3).reshape(2, -1)
    torch.testing.assert_close(normalised.square().mean(1), torch.ones(2, dtype=x_t.dtype))
    torch.testing.assert_close(
        normalised[0] / x_t[:3].flatten(), (1 / x_t[:3].square().mean().sqrt()).expand(3 * VOXELS)
    )


def test_a_zero_gradient_stays_zero(x_t):
    x_t[1] = 0
    normalised = normalise_rms(x_t)
    assert (normalised[1] == 0).all()
    assert normalised.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_leaves_its_own_sample_unguided_and_says_so(value, x_t):
    expected = normalise_rms(x_t)
    x_t[1, 0, 0, 0] = value
    with pytest.warns(RuntimeWarning, match="not finite"):
        normalised = normalise_rms(x_t)
    assert (normalised[1] == 0).all()
    torch.testing.assert_close(normalised[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]])


def test_a_loss_gradient_far_below_half_precision_survives_a_half_precision_denoiser(x_t):
    # Its slope, about 1e-12, rounds to 0 in float16, whose least positive number is 6e-8.
    x_t = x_t.float().requires_grad_()
    x0_hat = (x_t.half() * 0.5).float()
    slope = loss_gradient(lambda x: 1e-12 * squared_error(x), x0_hat, x_t)
    torch.testing.assert_close(slope, unit(x0_hat - 0.7).detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("noise, expected", [(0.8, "early"), (0.5, "whole"), (0.2, "whole")])
def test_the_early_loss_guides_above_its_level_and_the_whole_one_from_there_on(
    noise, expected, x_t
):
    losses = {"whole": squared_error, "early": lambda x: x.flatten(1).sum(1)}
    guide = roi_guide(
        losses["whole"], 1.0, 0.0, None, gradient="x0",
        early_loss=losses["early"], early_until=0.5,
    )  # fmt: skip
    got = guide(x_t, levels_like(x_t, 1 - noise), x_t)
    alone = roi_guide(losses[expected], 1.0, 0.0, None, gradient="x0")
    torch.testing.assert_close(got, alone(x_t, levels_like(x_t, 1 - noise), x_t))


def test_each_case_has_the_loss_of_its_own_level(x_t):
    guide = roi_guide(
        squared_error, 1.0, 0.0, None, gradient="x0",
        early_loss=lambda x: x.flatten(1).sum(1), early_until=0.5,
    )  # fmt: skip
    levels = torch.tensor([0.1, 0.9] * 3, dtype=torch.float64)
    got = guide(x_t, levels, x_t)
    torch.testing.assert_close(got[::2], torch.ones_like(got[::2]))
    torch.testing.assert_close(got[1::2], unit(x_t - 0.7)[1::2])
