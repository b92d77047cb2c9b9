import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.diffusion.ensemble import (
    centred_estimate,
    ensemble_mean,
    ensemble_uncertainty,
    ensemble_variance,
)
from clinfuse.diffusion.guidance import (
    Guide,
    guided_estimate,
    loss_gradient,
    normalise_rms,
    roi_guide,
    together,
    walking_guide,
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


def mean_above(x0_hat):
    """A loss that rises by the same slope everywhere, and is far from 0."""
    return (x0_hat + 10).flatten(1).sum(1)


def rms(x):
    return x.flatten(1).square().mean(1).sqrt()


def unit(gradient):
    return gradient / rms(gradient).reshape(-1, 1, 1, 1)


def levels_like(x_t, level=0.5):
    return x_t.new_full(x_t.shape[:1], level)


def estimate(denoise, x_t, guide, level=0.5):
    """``guided_estimate`` at one signal power."""
    return guided_estimate(denoise, x_t, levels_like(x_t, level), 1 - level, guide)


def test_full_gradient_of_a_linear_denoiser_is_its_transpose(x_t, matrix, linear_denoiser):
    guide = roi_guide(squared_error, eta=0.3, eta_u=0.0, kappa=None, gradient="full")
    x0_hat, correction = estimate(linear_denoiser, x_t, guide)
    expected = ((x0_hat - 0.7).flatten(1) @ matrix).reshape_as(x_t)  # A^T (A x - 0.7)
    torch.testing.assert_close(correction, 0.3 * unit(expected))


def test_x0_gradient_stops_at_the_estimate(x_t, linear_denoiser):
    guide = roi_guide(squared_error, eta=0.3, eta_u=0.0, kappa=None, gradient="x0")
    x0_hat, correction = estimate(linear_denoiser, x_t, guide)
    torch.testing.assert_close(correction, 0.3 * unit(x0_hat - 0.7))


def test_both_gradients_agree_where_the_denoiser_only_scales(gaussian, x_t):
    full, x0 = (
        estimate(
            gaussian.denoise,
            x_t,
            roi_guide(squared_error, eta=0.1, eta_u=0.1, kappa=2.0, members=3, gradient=gradient),
        )[1]
        for gradient in ("full", "x0")
    )
    torch.testing.assert_close(full, x0)


@pytest.mark.parametrize("gradient", ["full", "x0"])
def test_uncertainty_gradient_is_that_of_the_variance(gradient, x_t, matrix, linear_denoiser):
    guide = roi_guide(squared_error, 0.0, eta_u=0.2, kappa=None, members=3, gradient=gradient)
    x0_hat, correction = estimate(linear_denoiser, x_t, guide)
    cases = x0_hat.reshape(2, 3, VOXELS)
    slope = cases - cases.mean(1, keepdim=True)  # dU/dx0 up to a factor, which unit length takes
    slope = slope @ matrix if gradient == "full" else slope
    slope = slope / slope.square().mean((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(correction, 0.2 * slope.reshape_as(x_t))


def test_uncertainty_guidance_at_x0_leaves_the_ensemble_mean_alone(x_t):
    guide = roi_guide(squared_error, 0.0, eta_u=0.2, kappa=None, members=3, gradient="x0")
    correction = guide(x_t, 0.5, x_t)
    sums = correction.reshape(2, 3, -1).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
    assert correction.abs().max() > 0.1


@pytest.mark.parametrize("kappa", [0.5, 4.0])
def test_guidance_strength_is_equation_4_at_every_voxel(kappa, x_t):
    guide = roi_guide(squared_error, 0.2, 0.0, kappa, members=3, gradient="x0", reference_std=0.5)
    plain = roi_guide(squared_error, 0.2, 0.0, None, members=3, gradient="x0")
    strength = guide(x_t, 0.5, x_t) / plain(x_t, 0.5, x_t)
    variance = ensemble_variance(x_t, 3)
    for case in range(2):
        for member in range(3):
            for p in range(VOXELS):
                spread = variance[case].flatten()[p].item()
                conf = 1 - spread / (spread + 0.5**2)
                expected = 1 / (1 + math.exp(-kappa * (1 - conf)))
                ours = strength[3 * case + member].flatten()[p].item()
                assert ours == pytest.approx(expected, rel=1e-9)


def test_kappa_none_leaves_equation_4_out_and_zero_halves_eta(x_t):
    full, half = (
        roi_guide(squared_error, 0.2, 0.0, kappa, members=3, gradient="x0")(x_t, 0.5, x_t)
        for kappa in (None, 0.0)
    )
    torch.testing.assert_close(rms(full), levels_like(x_t, 0.2))
    torch.testing.assert_close(half, full / 2)


def test_a_step_is_the_unguided_step_minus_the_correction(gaussian, x_t):
    guide = Guide(lambda x_t, noise_level, x0_hat: 0.1 * x_t + 0.2 * x0_hat)
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


@pytest.mark.parametrize(
    "noise_level, is_guided",
    [(1.0, False), (0.91, False), (0.9, True), (0.5, True), (0.2, True), (0.19, False)],
)
def test_levels_outside_the_range_are_not_guided(noise_level, is_guided, x_t):
    guide = Guide(lambda x_t, noise_level, x0_hat: torch.ones_like(x_t), start=0.9, end=0.2)
    assert guide.is_active(noise_level) is is_guided
    correction = guide(x_t, noise_level, x_t)
    torch.testing.assert_close(correction, torch.full_like(x_t, float(is_guided)))


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


# How far a step goes.


def test_the_reach_is_the_loss_over_the_squared_slope(x_t):
    """Of 1/2 |x - 0.7|^2 the slope is x - 0.7 and the Polyak step half of it."""
    slope = loss_gradient(squared_error, x_t)
    torch.testing.assert_close(slope.direction, unit(x_t - 0.7))
    torch.testing.assert_close(slope.reach, rms(x_t - 0.7) / 2)
    assert slope.is_finite.all()
    torch.testing.assert_close(slope.step(math.inf), (x_t - 0.7) / 2)


def test_the_reach_through_a_denoiser_is_in_units_of_x_t(x_t, matrix, linear_denoiser):
    x_t.requires_grad_()
    x0_hat = linear_denoiser(x_t, levels_like(x_t))
    slope = loss_gradient(squared_error, x0_hat, x_t)
    error = (x0_hat.detach() - 0.7).flatten(1)
    gradient = error @ matrix  # A^T (A x - 0.7)
    polyak = 0.5 * error.square().sum(1) / gradient.square().sum(1)
    torch.testing.assert_close(slope.reach, polyak * gradient.square().mean(1).sqrt())
    expected = (polyak[:, None] * gradient).reshape_as(x_t)
    torch.testing.assert_close(slope.step(math.inf), expected)


def test_the_reach_of_a_group_is_that_of_its_whole_loss(x_t):
    slope = loss_gradient(squared_error, x_t, members=3)
    of_case = (x_t - 0.7).reshape(2, -1).square().mean(1).sqrt()
    torch.testing.assert_close(slope.reach, of_case / 2)
    torch.testing.assert_close(slope.step(math.inf), (x_t - 0.7) / 2)


@pytest.mark.parametrize("distance", [1e-6, 1e-3, 0.19, 0.21, 5.0])
def test_a_step_is_as_long_as_asked_but_never_beyond_half_the_way(distance, x_t):
    near = 0.7 + distance * unit(x_t)
    correction = roi_guide(squared_error, 0.1, 0.0, None, gradient="x0")(x_t, 0.5, near)
    torch.testing.assert_close(correction, min(0.1, distance / 2) * unit(x_t))


def test_the_pull_towards_low_spread_stops_half_way_too(x_t):
    correction = roi_guide(squared_error, 0.0, 1e6, None, members=3, gradient="x0")(x_t, 0.5, x_t)
    of_case = x_t.reshape(2, 3, 1, 3, 4)
    torch.testing.assert_close(
        correction, ((of_case - of_case.mean(1, keepdim=True)) / 2).reshape_as(x_t)
    )


def test_what_has_arrived_stays(x_t):
    guide = roi_guide(squared_error, 0.1, 0.1, 0.5, members=3, gradient="x0")
    assert (guide(x_t, 0.5, torch.full_like(x_t, 0.7)) == 0).all()


@given(exponent=st.floats(-3, 3))
def test_the_scale_of_a_loss_neither_lengthens_nor_shortens_its_steps(exponent):
    x_t = torch.randn(6, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = loss_gradient(lambda x: 10**exponent * squared_error(x), x_t)
    torch.testing.assert_close(slope.reach, rms(x_t - 0.7) / 2)


def test_a_loss_below_zero_or_that_is_no_number_gives_no_step(x_t):
    below, unknown = (
        loss_gradient(lambda x, by=by: squared_error(x) + by, x_t) for by in (-1e6, math.nan)
    )
    assert (below.step(0.1) == 0).all() and (unknown.step(0.1) == 0).all()


@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("gradient", ["full", "x0"])
@pytest.mark.parametrize("sampler", [ddim, ddpm, dpm_solver])
def test_an_eta_a_million_times_too_large_ends_finite_and_no_further_off(
    sampler, gradient, of_mean, gaussian, x_t
):
    def error(eta, eta_u):
        guide = roi_guide(
            squared_error, eta, eta_u, None, members=3, gradient=gradient, of_mean=of_mean
        )
        generator = torch.Generator().manual_seed(0)
        sample = sampler(gaussian.denoise, x_t, LEVELS, guide, generator)
        assert sample.isfinite().all()
        return squared_error(ensemble_mean(sample, 3) if of_mean else sample)

    without = error(0.0, 0.0)
    assert (error(1e6, 0.0) < without).all()
    assert (error(1e6, 1e6) < without).all()


# The loss of the members' mean.


def test_the_loss_of_the_mean_sees_one_mean_a_case(x_t):
    seen = []

    def loss(x0_hat):
        seen.append(x0_hat.detach())
        return squared_error(x0_hat)

    roi_guide(loss, 0.1, 0.0, None, members=3, gradient="x0", of_mean=True)(x_t, 0.5, x_t)
    (mean,) = seen
    torch.testing.assert_close(mean, x_t.reshape(2, 3, 1, 3, 4).mean(1))


@pytest.mark.parametrize("eta", [0.1, 1e6])
def test_all_members_take_the_step_that_their_mean_would(eta, x_t):
    guide = roi_guide(squared_error, eta, 0.0, None, members=3, gradient="x0", of_mean=True)
    away = x_t.reshape(2, 3, 1, 3, 4).mean(1) - 0.7
    length = torch.minimum(torch.tensor(eta), rms(away) / 2)  # half the way of the mean
    step = length.reshape(2, 1, 1, 1) * unit(away)
    torch.testing.assert_close(guide(x_t, 0.5, x_t), step.repeat_interleave(3, 0))


@pytest.mark.parametrize("eta", [0.1, 1e6])
@pytest.mark.parametrize("sampler", [ddim, dpm_solver])
def test_guiding_the_mean_moves_it_as_if_it_were_alone_and_leaves_the_spread(
    sampler, eta, gaussian, x_t
):
    """Of a denoiser that is affine, and so maps means to means."""

    def guided(start, eta, members):
        guide = roi_guide(
            squared_error, eta, 0.0, None, members=members, gradient="x0", of_mean=True
        )
        return sampler(gaussian.denoise, start, LEVELS, guide)

    members, alone = guided(x_t, eta, 3), guided(ensemble_mean(x_t, 3), eta, 1)
    torch.testing.assert_close(ensemble_mean(members, 3), alone)
    apart = ensemble_variance(guided(x_t, 0.0, 3), 3)
    torch.testing.assert_close(ensemble_variance(members, 3), apart)
    each = sampler(
        gaussian.denoise, x_t, LEVELS,
        roi_guide(squared_error, eta, 0.0, None, members=3, gradient="x0"),
    )  # fmt: skip
    assert not torch.allclose(ensemble_variance(each, 3), apart, rtol=0.05)


@pytest.mark.parametrize("eta", [0.05, 1e6])
def test_full_gradient_of_the_mean_is_that_of_its_loss_in_each_members_x_t(eta, x_t, matrix):
    def denoise(x_t, alpha_bar_t):
        return torch.tanh(x_t.flatten(1) @ matrix.T).reshape_as(x_t)

    guide = roi_guide(squared_error, eta, 0.0, None, members=3, gradient="full", of_mean=True)
    _, correction = estimate(denoise, x_t, guide)
    by_hand = x_t.clone().requires_grad_()
    losses = squared_error(denoise(by_hand, None).reshape(2, 3, 1, 3, 4).mean(1))
    (gradient,) = torch.autograd.grad(losses.sum(), by_hand)
    square = gradient.reshape(2, -1).square().sum(1)
    factor = torch.minimum(eta / (square / (3 * VOXELS)).sqrt(), losses.detach() / square)
    expected = factor.repeat_interleave(3).reshape(6, 1, 1, 1) * gradient
    torch.testing.assert_close(correction, expected)


@pytest.fixture
def walked(matrix):
    """A centred denoiser that is not linear, and how often its network was walked back through."""
    walks = []

    def network(x_t):
        x0_hat = torch.tanh(x_t.flatten(1) @ matrix.T).reshape_as(x_t)
        if x0_hat.requires_grad:
            x0_hat.register_hook(walks.append)
        return x0_hat

    return walks, lambda x_t, level: centred_estimate(network(x_t), x_t, level, 3)


@pytest.mark.parametrize("eta", [0.05, 1e6])
@pytest.mark.parametrize("eta_u", [0.0, 0.02])
@pytest.mark.parametrize("kappa", [None, 3.0])
def test_the_mean_of_centred_members_is_guided_in_full_without_a_walk(
    eta, eta_u, kappa, x_t, walked
):
    walks, denoise = walked

    def corrected(centred):
        guide = roi_guide(
            squared_error, eta, eta_u, kappa, 3, "full", of_mean=True, centred=centred
        )
        walks.clear()
        return estimate(denoise, x_t, guide, level=0.3)[1], len(walks)

    known, walks_when_known = corrected(centred=True)
    expected, walks_when_not = corrected(centred=False)
    torch.testing.assert_close(known, expected)
    assert walks_when_known == (eta_u != 0)  # U's own
    assert walks_when_not == 1 + (eta_u != 0)


def test_the_mean_of_centred_members_goes_unguided_in_full_where_x_t_is_all_noise(x_t, walked):
    _, denoise = walked
    for centred in (True, False):
        guide = roi_guide(squared_error, 0.1, 0.0, None, 3, "full", of_mean=True, centred=centred)
        _, correction = estimate(denoise, x_t, guide, level=0.0)
        assert not correction.any()


# The normalised gradient.


def test_normalised_gradients_have_unit_rms_and_their_direction(x_t):
    gradient = x_t * torch.logspace(-30, 30, 6, dtype=x_t.dtype).reshape(6, 1, 1, 1)
    for dtype in (torch.float32, torch.float64):  # squares of 1e-30 and 1e30 leave float32
        direction, size = normalise_rms(gradient.to(dtype))
        torch.testing.assert_close(direction, unit(x_t).to(dtype))
        expected = rms(x_t) * torch.logspace(-30, 30, 6, dtype=x_t.dtype)
        torch.testing.assert_close(size, expected.to(dtype))


def test_members_share_one_scale(x_t):
    x_t[0] *= 100
    normalised, size = normalise_rms(x_t, members=3)
    normalised = normalised.reshape(2, -1)
    torch.testing.assert_close(size, x_t.reshape(2, -1).square().mean(1).sqrt())
    torch.testing.assert_close(normalised.square().mean(1), torch.ones(2, dtype=x_t.dtype))
    torch.testing.assert_close(
        normalised[0] / x_t[:3].flatten(), (1 / x_t[:3].square().mean().sqrt()).expand(3 * VOXELS)
    )


def test_a_zero_gradient_stays_zero(x_t):
    x_t[1] = 0
    normalised, size = normalise_rms(x_t)
    assert (normalised[1] == 0).all() and size[1] == 0
    assert normalised.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_none_in_its_own_sample(value, x_t):
    expected, _ = normalise_rms(x_t)
    x_t[1, 0, 0, 0] = value
    normalised, size = normalise_rms(x_t)
    assert (normalised[1] == 0).all() and size[1] == math.inf
    torch.testing.assert_close(normalised[[0, 2, 3, 4, 5]], expected[[0, 2, 3, 4, 5]])


def steep_at_zero(x0_hat):
    """A loss whose slope at 0 is infinite."""
    return x0_hat.abs().sqrt().flatten(1).sum(1)


@pytest.mark.parametrize("of_mean, unguided", [(False, [1]), (True, [0, 1, 2])])
def test_what_has_no_finite_slope_goes_unguided_alone_and_is_told_after_the_walk(
    of_mean, unguided, x_t
):
    guide = roi_guide(
        steep_at_zero, 0.1, 0.0, None, members=3, gradient="x0", of_mean=of_mean
    )  # fmt: skip
    x_t[1] = 0
    if of_mean:
        x_t[2] = -x_t[0]  # so the mean of the first case is 0
    correction = guide(x_t, 0.5, x_t)
    guided = [i for i in range(6) if i not in unguided]
    assert (correction[unguided] == 0).all() and (correction[guided] != 0).any((1, 2, 3)).all()
    with pytest.warns(
        RuntimeWarning, match="not finite: its case was not guided by it in that step"
    ):
        guide.warn_of_refused()


def test_a_walk_with_finite_slopes_warns_of_nothing_and_one_warning_is_not_repeated(x_t, recwarn):
    guide = roi_guide(steep_at_zero, 0.1, 0.05, None, members=3, gradient="x0")
    guide(x_t, 0.5, x_t)
    guide.warn_of_refused()
    assert not recwarn
    guide(x_t, 0.5, torch.zeros_like(x_t))
    guide.warn_of_refused()
    guide(x_t, 0.5, x_t)
    guide.warn_of_refused()
    assert len(recwarn) == 1


def test_a_long_walk_holds_no_more_than_a_short_one_and_still_warns_of_its_first_step(x_t):
    guide = together([roi_guide(steep_at_zero, 0.1, 0.05, None, members=3, gradient="x0")])
    guide(x_t, 0.5, torch.zeros_like(x_t))
    for _ in range(20):
        guide(x_t, 0.5, x_t)
    assert len(guide.refused) == 1
    with pytest.warns(RuntimeWarning, match="not finite"):
        guide.warn_of_refused()


def test_a_loss_gradient_far_below_half_precision_survives_a_half_precision_denoiser(x_t):
    # Its slope, about 1e-12, rounds to 0 in float16, whose least positive number is 6e-8.
    x_t = x_t.float().requires_grad_()
    x0_hat = (x_t.half() * 0.5).float()
    slope = loss_gradient(lambda x: 1e-12 * squared_error(x), x0_hat, x_t)
    torch.testing.assert_close(slope.direction, unit(x0_hat - 0.7).detach(), rtol=2e-3, atol=2e-3)
    expected = rms(x0_hat.detach() - 0.7)  # half the way of x0_hat, which is half of x_t's
    torch.testing.assert_close(slope.reach, expected, rtol=2e-3, atol=0)


# A loss in parts.


def in_two_parts(x0_hat):
    """Two columns of the volume: one that has nearly arrived, and one that weighs much more."""
    near, far = x0_hat[..., :2] - x0_hat[..., :2].detach() + 0.01, x0_hat[..., 2:] - 0.7
    return tuple(
        weight * 0.5 * part.square().flatten(1).sum(1) for weight, part in ((1, near), (100, far))
    )


def test_each_part_of_a_loss_steps_by_itself_and_only_as_far_as_it_has_to_go(x_t):
    guide = roi_guide(in_two_parts, 0.1, 0.0, None, gradient="x0", weights=(1.0, 0.25))
    correction = guide(x_t, 0.5, x_t)
    torch.testing.assert_close(correction[..., :2], torch.full_like(x_t[..., :2], 0.01 / 4))
    away = torch.zeros_like(x_t)
    away[..., 2:] = x_t[..., 2:] - 0.7
    torch.testing.assert_close(correction[..., 2:], 0.025 * unit(away)[..., 2:])


@pytest.mark.parametrize("weight, of_the_way", [(0.0, 0.0), (0.25, 0.1), (1.0, 0.25), (4.0, 0.4)])
def test_the_more_a_part_weighs_the_further_it_goes_where_eta_does_not_bound_it(
    x_t, weight, of_the_way
):
    guide = roi_guide(
        lambda x: (squared_error(x),), 1e6, 0.0, None, gradient="x0", weights=(weight,)
    )
    torch.testing.assert_close(guide(x_t, 0.5, x_t), of_the_way * (x_t - 0.7))


def test_through_the_denoiser_the_parts_are_followed_as_their_sum(x_t, linear_denoiser):
    def whole(x0_hat):
        return sum(in_two_parts(x0_hat))

    (_, in_parts), (_, summed) = (
        estimate(linear_denoiser, x_t, roi_guide(loss, 0.4, 0.0, None, weights=weights))
        for loss, weights in ((in_two_parts, (1.0, 0.25)), (whole, None))
    )
    torch.testing.assert_close(in_parts, summed)
    assert in_parts.abs().max() > 0.1


def test_steps_in_the_image_go_half_the_way_however_small_the_error_scale_is(x_t):
    """F = s x_0 with s from 0.01 to 1, and a squared error in F that is to be halved."""
    scale = torch.logspace(-2, 0, x_t.shape[-1], dtype=x_t.dtype).expand_as(x_t)

    def moved(units):
        guide = roi_guide(
            lambda x: (squared_error(scale * x),), 1e6, 0.0, None, gradient="x0", units=units
        )
        return scale * guide(x_t, 0.5, x_t)

    to_go = scale * x_t - 0.7
    torch.testing.assert_close(moved([scale]), 0.5 * to_go)
    in_x_0 = (moved(None) / to_go)[..., 0].abs()
    assert in_x_0.max() < 1e-3  # where s is 0.01, F hardly moves


def test_a_step_in_the_image_is_as_long_there_as_asked(x_t):
    scale = torch.logspace(-2, 0, x_t.shape[-1], dtype=x_t.dtype).expand_as(x_t)
    guide = roi_guide(
        lambda x: (squared_error(scale * x),), 0.01, 0.0, None, gradient="x0", units=[scale]
    )
    moved = scale * guide(x_t, 0.5, x_t)
    torch.testing.assert_close(moved, 0.01 * unit(scale * x_t - 0.7))


def test_a_part_that_does_not_read_the_estimate_is_flat_and_the_others_are_not(x_t):
    def with_a_constant(x0_hat):
        return squared_error(x0_hat), x0_hat.new_ones(len(x0_hat))

    guide = roi_guide(with_a_constant, 0.1, 0.0, None, gradient="x0", weights=(1.0, 1.0))
    torch.testing.assert_close(guide(x_t, 0.5, x_t), 0.1 * unit(x_t - 0.7))
    nothing = roi_guide(
        lambda x: (x.new_ones(6), x.new_ones(6)), 0.1, 0.0, None, gradient="x0", weights=(1.0, 1.0)
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        nothing(x_t, 0.5, x_t)


@pytest.mark.parametrize("noise, expected", [(0.8, "early"), (0.5, "whole"), (0.2, "whole")])
def test_the_early_loss_guides_above_its_level_and_the_whole_one_from_there_on(
    noise, expected, x_t
):
    losses = {"whole": squared_error, "early": mean_above}
    guide = roi_guide(
        losses["whole"], 0.1, 0.0, None, gradient="x0",
        early_loss=losses["early"], early_until=0.5,
    )  # fmt: skip
    alone = {
        name: roi_guide(loss, 0.1, 0.0, None, gradient="x0")(x_t, noise, x_t)
        for name, loss in losses.items()
    }
    torch.testing.assert_close(guide(x_t, noise, x_t), alone[expected])
    torch.testing.assert_close(alone["early"], torch.full_like(x_t, 0.1))
    torch.testing.assert_close(alone["whole"], 0.1 * unit(x_t - 0.7))


def test_a_walk_of_a_guide_moves_the_mean_there_and_every_member_as_far():
    x_t, x0_hat = torch.randn(2, 6, 1, 4, 5)
    goal = torch.randn(2, 1, 4, 5)
    guide = walking_guide(lambda mean: goal, members=3)
    moved = x0_hat - guide(x_t, 0.5, x0_hat)
    torch.testing.assert_close(ensemble_mean(moved, 3), goal)
    torch.testing.assert_close(ensemble_variance(moved, 3), ensemble_variance(x0_hat, 3))


def test_guides_together_add_up_each_at_its_own_levels():
    x_t, x0_hat = torch.randn(2, 2, 1, 4, 4)
    early = walking_guide(lambda mean: mean - 1, start=1.0, end=0.6)
    late = walking_guide(lambda mean: mean - 2, start=0.7, end=0.0)
    both = together([early, late])
    for level, expected in ((0.9, 1.0), (0.65, 3.0), (0.1, 2.0)):
        torch.testing.assert_close(both(x_t, level, x0_hat), torch.full_like(x_t, expected))


def test_guides_together_still_say_what_they_refused():
    refusing = roi_guide(lambda x0_hat: (x0_hat / 0).sum((1, 2, 3)), 0.1, 0.0, None, gradient="x0")
    both = together([refusing, walking_guide(lambda mean: mean)])
    both(torch.zeros(1, 1, 4, 4), 0.5, torch.ones(1, 1, 4, 4))
    with pytest.warns(RuntimeWarning, match="not finite"):
        both.warn_of_refused()
