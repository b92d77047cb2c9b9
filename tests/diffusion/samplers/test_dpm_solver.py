import pytest
import torch

from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.samplers.dpm_solver import dpm_solver
from clinfuse.diffusion.schedule import cosine, levels_for, zero_terminal_snr

NOISIEST, CLEANEST = 0.002, 0.98


def even_log_snr(steps):
    """Levels at even steps of log signal-to-noise, the variable of Lu et al.'s error bounds."""
    ends = torch.logit(torch.tensor([NOISIEST, CLEANEST], dtype=torch.float64))
    return torch.sigmoid(torch.linspace(*ends.tolist(), steps + 1, dtype=torch.float64))


@pytest.fixture
def error(gaussian, x_T):
    """Largest error of a sampler against the exact path to the cleanest level.

    The step from there to zero noise is the denoiser itself, exact or not, so it is shared.
    """

    def of(sampler, steps):
        exact = gaussian.follow(x_T, NOISIEST, CLEANEST)
        exact = gaussian.denoise(exact, torch.full((3,), CLEANEST, dtype=torch.float64))
        return (sampler(gaussian.denoise, x_T, even_log_snr(steps)) - exact).abs().max().item()

    return of


def test_dpm_solver_is_second_order(error):
    assert error(dpm_solver, 100) / error(dpm_solver, 200) == pytest.approx(4, rel=0.1)


def test_ddim_on_the_same_levels_is_first_order(error):
    assert error(ddim, 100) / error(ddim, 200) == pytest.approx(2, rel=0.1)


def test_dpm_solver_is_closer_than_ddim_in_few_steps(error):
    assert error(dpm_solver, 12) < 0.3 * error(ddim, 12)


def test_steps_agree_with_the_papers_update_written_out(gaussian, x_T):
    levels = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    alpha, sigma = levels.sqrt(), (1 - levels).sqrt()
    log_snr = torch.log(alpha / sigma)
    h = log_snr.diff()
    x, estimates = x_T, []
    for i in range(3):  # Lu et al. (2022), Alg. 2, lines 4 to 9
        estimates.append(gaussian.denoise(x, levels[i].expand(3)))
        d = estimates[-1]
        if i > 0:
            r = h[i - 1] / h[i]
            d = (1 + 1 / (2 * r)) * estimates[i] - 1 / (2 * r) * estimates[i - 1]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (torch.exp(-h[i]) - 1) * d
    expected = gaussian.denoise(x, levels[3].expand(3))
    torch.testing.assert_close(dpm_solver(gaussian.denoise, x_T, levels), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_walk_from_zero_terminal_snr_stays_finite(steps, gaussian, x_T):
    levels = levels_for(zero_terminal_snr(cosine(100).double()), steps)
    sample = dpm_solver(gaussian.denoise, x_T, levels)
    assert sample.isfinite().all()
    assert steps < 20 or (sample - gaussian.follow(x_T, 0.0, 1.0)).abs().max() < 0.1


def test_short_walks_are_those_of_ddim(gaussian, x_T):
    for levels in (torch.tensor([0.0]), torch.tensor([0.1, 0.6])):
        expected = ddim(gaussian.denoise, x_T, levels)
        torch.testing.assert_close(dpm_solver(gaussian.denoise, x_T, levels), expected)
