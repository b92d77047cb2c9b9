import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from clinfuse.diffusion.samplers.ddpm import ddpm
from clinfuse.diffusion.schedule import cosine, levels_for


def monai_on(alpha_bars):
    """MONAI's scheduler on the given levels, each made a full timestep: its own betas between."""
    scheduler = DDPMScheduler(num_train_timesteps=len(alpha_bars), clip_sample=False)
    before = torch.cat([torch.ones(1), alpha_bars[:-1]])
    scheduler.alphas_cumprod, scheduler.alphas = alpha_bars, alpha_bars / before
    scheduler.betas, scheduler.prediction_type = 1 - scheduler.alphas, "sample"
    return scheduler


@pytest.mark.parametrize("steps", [50, 10, 3])
def test_ddpm_agrees_with_monai_respaced_to_the_same_levels(steps, gaussian, x_T):
    x_T, levels = x_T.float(), levels_for(cosine(50), steps)
    scheduler, generator = monai_on(levels.flip(0)), torch.Generator().manual_seed(1)
    theirs = x_T
    for t in range(steps - 1, -1, -1):
        x0_hat = gaussian.denoise(theirs, scheduler.alphas_cumprod[t].expand(len(x_T)))
        theirs, _ = scheduler.step(x0_hat, t, theirs, generator)
    ours = ddpm(gaussian.denoise, x_T, levels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ddpm_agrees_with_monais_own_full_chain(gaussian, x_T):
    x_T = x_T.float()
    scheduler = DDPMScheduler(
        num_train_timesteps=50, schedule="cosine", clip_sample=False, prediction_type="sample"
    )
    generator, theirs = torch.Generator().manual_seed(1), x_T
    for t in range(49, -1, -1):
        x0_hat = gaussian.denoise(theirs, scheduler.alphas_cumprod[t].expand(len(x_T)))
        theirs, _ = scheduler.step(x0_hat, t, theirs, generator)
    levels = levels_for(scheduler.alphas_cumprod, 50)
    ours = ddpm(gaussian.denoise, x_T, levels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ddpm_draws_from_the_data_distribution(gaussian):
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(1, 1, 300, 300, dtype=torch.float64, generator=generator)
    sample = ddpm(gaussian.denoise, x_T, levels_for(cosine(1000), 250), generator=generator)
    # 90 000 voxels: standard errors 0.0017 of the mean and 0.0012 of the deviation; on top, 250
    # steps of a posterior of x0_hat alone lack variance of the order of a step.
    assert sample.mean().item() == pytest.approx(gaussian.mean, abs=0.006)
    assert sample.std().item() == pytest.approx(gaussian.std, abs=0.015)


def test_samples_are_a_function_of_the_generator(gaussian, x_T):
    def sample(seed):
        levels = levels_for(cosine(50), 5)
        return ddpm(gaussian.denoise, x_T, levels, None, torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.allclose(sample(1), sample(2))


def test_the_last_step_adds_no_noise(gaussian, x_T):
    samples = [
        ddpm(gaussian.denoise, x_T, torch.tensor([0.5]), None, torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    ]
    torch.testing.assert_close(*samples)
    torch.testing.assert_close(samples[0], gaussian.denoise(x_T, torch.full((3,), 0.5).double()))
