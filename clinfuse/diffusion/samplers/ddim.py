"""Denoising diffusion implicit models, over any subset of levels."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.diffusion.guidance import Guide, guided_estimate
from clinfuse.diffusion.process import eps_from_x0, noise_like, q_sample
from clinfuse.diffusion.schedule import walk
from clinfuse.types import Denoiser


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x_T: Float[Tensor, "b c *dhw"],
    levels: Float[Tensor, " n"],
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "b c *dhw"]:
    """Walk from noise to a clean volume, one denoiser call a level.

    Song et al. (2021), Eq. 12 and 16: with eta = 0 the first-order solver of the probability-flow
    equation. Coefficients come from the two levels a step joins, so any subset will do. Carries no
    gradient.

    Args:
        denoise: maps (x_t, alpha_bar_t) to x0_hat.
        x_T: noise at the first level.
        levels: signal power kept, noisiest first, in [0, 1); the clean end is added.
        guide: its correction is subtracted after each step (Eq. 1).
        generator: source of the noise where eta > 0; None is torch's global state.
        eta: fraction of the posterior's standard deviation added afresh at each step: 0 is
            deterministic, 1 ancestral sampling. Not the guidance strength.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"expected eta between 0 and 1, got {eta}")
    x_t = x_T
    for noise_level, now, after in walk(levels, x_T):
        x0_hat, correction = guided_estimate(denoise, x_t, now, noise_level, guide)
        eps_hat = eps_from_x0(x_t, x0_hat, now)
        if eta > 0:
            renewed = eta**2 * (1 - now / after) / (1 - now)  # the noise's share drawn afresh
            eps_hat = q_sample(eps_hat, noise_like(x_t, generator), 1 - renewed)
        x_t = q_sample(x0_hat, eps_hat, after) - correction
    return x_t
