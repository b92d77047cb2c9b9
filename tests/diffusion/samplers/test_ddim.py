import math

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler

from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.samplers.ddpm import ddpm
from clinfuse.diffusion.schedule import levels_for, zero_terminal_snr


def quarter_circle(steps):
    """Levels at even angles, sqrt(alpha_bar) = cos: the path from pure noise is smooth in it."""
    angle = torch.arange(steps, 0, -1, dtype=torch.float64) / steps * math.pi / 2
    return (angle.cos() ** 2).where(angle < math.pi / 2, 0.0)


def test_ddim_is_first_order(gaussian, x_T):
    def error(steps):
        return (ddim(gaussian.denoise, x_T, quarter_circle(steps)) - exact).abs().max()

    exact = gaussian.follow(x_T, 0.0, 1.0)
    assert error(200) / error(400) == pytest.approx(2, rel=0.05)
    assert error(400) < 0.01


def test_one_step_from_pure_noise_is_the_estimate_itself(gaussian, x_T):
    sample = ddim(gaussian.denoise, x_T, torch.tensor([0.0]))
    torch.testing.assert_close(sample, torch.full_like(x_T, gaussian.mean))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 20, 5])
def test_ddim_agrees_with_monai_on_any_subset_of_timesteps(eta, steps, gaussian, x_T):
    x_T = x_T.float()
    # MONAI is handed x0_hat: recovering it from eps_hat would divide by the noisiest cosine level's
    # sqrt(alpha_bar_t), and make float32 rounding 1e4 times larger.
    scheduler = DDIMScheduler(
        num_train_timesteps=100, schedule="cosine", clip_sample=False, prediction_type="sample"
    )
    scheduler.set_timesteps(steps)
    generator, theirs = torch.Generator().manual_seed(1), x_T
    for t in range(99, -1, -(100 // steps)):  # MONAI's step goes back by 100 // steps
        x0_hat = gaussian.denoise(theirs, scheduler.alphas_cumprod[t].expand(len(x_T)))
        theirs, _ = scheduler.step(x0_hat, t, theirs, eta, generator)
    levels = levels_for(scheduler.alphas_cumprod, steps)
    generator = torch.Generator().manual_seed(1)
    ours = ddim(gaussian.denoise, x_T, levels, generator=generator, eta=eta)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_one_is_ancestral_sampling(gaussian, x_T):
    levels = quarter_circle(7)
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    ancestral = ddpm(gaussian.denoise, x_T, levels, generator=first)
    torch.testing.assert_close(
        ddim(gaussian.denoise, x_T, levels, generator=second, eta=1.0), ancestral
    )


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_a_walk_from_zero_terminal_snr_stays_finite(steps, gaussian, x_T):
    alpha_bars = zero_terminal_snr(torch.linspace(0.99, 0.01, 30, dtype=torch.float64))
    for eta in (0.0, 1.0):
        sample = ddim(gaussian.denoise, x_T, levels_for(alpha_bars, steps), eta=eta)
        assert sample.isfinite().all()


def test_samples_are_a_function_of_the_generator(gaussian, x_T):
    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return ddim(gaussian.denoise, x_T, quarter_circle(4), generator=generator, eta=0.7)

    assert torch.equal(sample(1), sample(1))
    assert not torch.allclose(sample(1), sample(2))


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_come_from_the_noise(shape, dtype, gaussian):
    x_T = torch.randn(shape, dtype=dtype)
    sample = ddim(gaussian.denoise, x_T, quarter_circle(3))
    assert (sample.shape, sample.dtype) == (x_T.shape, dtype)


def test_sampling_without_a_guide_builds_no_graph(gaussian, x_T):
    weight = torch.ones((), dtype=x_T.dtype, requires_grad=True)

    def denoise(x_t, alpha_bar_t):
        assert not torch.is_grad_enabled()
        return weight * gaussian.denoise(x_t, alpha_bar_t)

    assert not ddim(denoise, x_T, quarter_circle(3)).requires_grad


def test_an_eta_outside_zero_to_one_is_refused(gaussian, x_T):
    with pytest.raises(ValueError, match="eta between 0 and 1"):
        ddim(gaussian.denoise, x_T, quarter_circle(3), eta=1.5)
