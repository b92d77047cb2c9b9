"""Ancestral sampling, over any subset of levels."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.diffusion.guidance import Guide, guided_estimate
from clinfuse.diffusion.process import noise_like, posterior
from clinfuse.diffusion.schedule import walk
from clinfuse.types import Denoiser


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    x_T: Float[Tensor, "b c *dhw"],
    levels: Float[Tensor, " n"],
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c *dhw"]:
    """Walk from noise to a clean volume, drawing every x_{t-1} from its posterior given x0_hat.

    Ho et al. (2020), Alg. 2, with the posterior's variance (their beta-tilde) and the posterior
    between the two levels a step joins, so that steps may be skipped. Carries no gradient.

    Args:
        denoise: maps (x_t, alpha_bar_t) to x0_hat.
        x_T: noise at the first level.
        levels: signal power kept, noisiest first, in [0, 1); the clean end is added.
        guide: its correction is subtracted after each step (Eq. 1).
        generator: source of the noise; None is torch's global state.
    """
    x_t = x_T
    for noise_level, now, after in walk(levels, x_T):
        x0_hat, correction = guided_estimate(denoise, x_t, now, noise_level, guide)
        mean, variance = posterior(x0_hat, x_t, now, after)
        x_t = mean + variance.sqrt() * noise_like(x_t, generator) - correction
    return x_t
