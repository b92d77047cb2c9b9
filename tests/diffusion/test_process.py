import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.schedulers import DDIMScheduler

from clinfuse.diffusion.process import (
    eps_from_x0,
    noise_like,
    posterior,
    q_sample,
    target_for,
    v_from,
    x0_from_eps,
    x0_from_prediction,
    x0_from_v,
)

LEVELS = st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3)
SHAPES = st.sampled_from([(3, 1, 4, 5), (3, 2, 2, 3, 4)])


def draw(shape, level):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return x_0, eps, torch.tensor(level, dtype=torch.float64)


@given(level=LEVELS, shape=SHAPES)
def test_noise_is_recovered_from_the_volume_it_was_added_to(level, shape):
    x_0, eps, alpha_bar_t = draw(shape, level)
    torch.testing.assert_close(eps_from_x0(q_sample(x_0, eps, alpha_bar_t), x_0, alpha_bar_t), eps)


@given(level=LEVELS, shape=SHAPES)
def test_the_clean_volume_is_recovered_from_its_noise(level, shape):
    x_0, eps, alpha_bar_t = draw(shape, level)
    torch.testing.assert_close(x0_from_eps(q_sample(x_0, eps, alpha_bar_t), eps, alpha_bar_t), x_0)


@given(level=LEVELS, shape=SHAPES)
@pytest.mark.parametrize("parameterisation", ["v", "eps", "x_0"])
def test_a_perfect_prediction_gives_back_the_clean_volume(parameterisation, level, shape):
    x_0, eps, alpha_bar_t = draw(shape, level)
    prediction = target_for(parameterisation, x_0, eps, alpha_bar_t)
    x_t = q_sample(x_0, eps, alpha_bar_t)
    x0_hat = x0_from_prediction(prediction, x_t, alpha_bar_t, parameterisation)
    torch.testing.assert_close(x0_hat, x_0)


@given(level=LEVELS, shape=SHAPES)
def test_velocity_is_the_noised_volume_turned_by_a_right_angle(level, shape):
    x_0, eps, alpha_bar_t = draw(shape, level)
    x_t, v = q_sample(x_0, eps, alpha_bar_t), v_from(x_0, eps, alpha_bar_t)
    # (x_t, v) is (x_0, eps) rotated: no length is lost.
    torch.testing.assert_close(x_t**2 + v**2, x_0**2 + eps**2)


def test_noising_keeps_unit_variance_unit():
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 1, 100, 100, generator=generator)
    x_t = q_sample(x_0, eps, torch.tensor([0.0, 0.3, 1.0]))
    # The standard error of a variance from 10 000 voxels is 0.014.
    torch.testing.assert_close(x_t.var((1, 2, 3)), torch.ones(3), atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noising_and_velocity_agree_with_monai(dtype):
    scheduler = DDIMScheduler(num_train_timesteps=50, schedule="cosine")
    x_0, eps = torch.randn(2, 3, 1, 4, 4, 4, dtype=dtype)
    t = torch.tensor([0, 20, 49])
    alpha_bar_t = scheduler.alphas_cumprod[t]
    expected = scheduler.add_noise(x_0, eps, t)
    torch.testing.assert_close(q_sample(x_0, eps, alpha_bar_t), expected)
    expected = scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(v_from(x_0, eps, alpha_bar_t), expected)


def test_level_zero_is_pure_noise_and_every_conversion_is_finite():
    x_0, eps, alpha_bar_t = draw((3, 1, 4, 4), [0.0, 0.0, 0.0])
    x_t = q_sample(x_0, eps, alpha_bar_t)
    torch.testing.assert_close(x_t, eps)
    torch.testing.assert_close(eps_from_x0(x_t, x_0, alpha_bar_t), x_t)
    torch.testing.assert_close(v_from(x_0, eps, alpha_bar_t), -x_0)
    torch.testing.assert_close(x0_from_v(x_t, -x_0, alpha_bar_t), x_0)
    assert (x0_from_eps(x_t, eps, alpha_bar_t) == 0).all()


def test_level_one_is_clean_and_every_conversion_is_finite():
    x_0, eps, alpha_bar_t = draw((3, 1, 4, 4), [1.0, 1.0, 1.0])
    x_t = q_sample(x_0, eps, alpha_bar_t)
    torch.testing.assert_close(x_t, x_0)
    torch.testing.assert_close(x0_from_eps(x_t, eps, alpha_bar_t), x_0)
    torch.testing.assert_close(v_from(x_0, eps, alpha_bar_t), eps)
    assert (eps_from_x0(x_t, x_0 + 1, alpha_bar_t) == 0).all()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_gradients_are_finite_at_both_ends(level):
    x_t, x_0 = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64, requires_grad=True).unbind()
    alpha_bar_t = torch.full((3,), level, dtype=torch.float64)
    total = sum(f(x_t, x_0, alpha_bar_t).sum() for f in (eps_from_x0, x0_from_eps, x0_from_v))
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(total, (x_t, x_0)))


@given(levels=st.tuples(st.floats(0.0, 0.9), st.floats(0.01, 0.99)), data=st.data())
def test_the_posterior_leads_to_the_marginal_of_the_less_noisy_level(levels, data):
    now, fraction = levels
    after = now + fraction * (1 - now)
    x_0, eps, alpha_bar_t = draw((3, 1, 4, 5), [now] * 3)
    alpha_bar_after = torch.full_like(alpha_bar_t, after)
    mean, variance = posterior(x_0, q_sample(x_0, eps, alpha_bar_t), alpha_bar_t, alpha_bar_after)
    # Given x_0, the mean carries some eps; its share and the variance make up 1 - alpha_bar_after.
    share = (mean - after**0.5 * x_0) / eps
    total = share**2 + variance
    torch.testing.assert_close(total, torch.full_like(total, 1 - after), rtol=1e-6, atol=1e-9)


def test_the_posterior_at_the_clean_end_is_the_clean_volume():
    x_0, eps, alpha_bar_t = draw((3, 1, 4, 5), [0.0, 0.4, 0.8])
    mean, variance = posterior(x_0, eps, alpha_bar_t, torch.ones_like(alpha_bar_t))
    torch.testing.assert_close(mean, x_0)
    assert (variance == 0).all()


def test_an_unknown_parameterisation_is_refused():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="got 'x0'"):
        x0_from_prediction(x, x, torch.ones(1), "x0")
    with pytest.raises(ValueError, match="got 'noise'"):
        target_for("noise", x, x, torch.ones(1))


def test_noise_depends_on_the_generator_alone():
    x = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    first, second, other = (noise_like(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first.dtype == x.dtype
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
