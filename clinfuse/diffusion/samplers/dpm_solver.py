"""DPM-Solver++(2M): a second-order deterministic walk at one denoiser call a level."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.diffusion.guidance import Guide, guided_estimate
from clinfuse.diffusion.process import eps_from_x0, q_sample
from clinfuse.diffusion.schedule import walk
from clinfuse.types import Denoiser


@torch.no_grad()
def dpm_solver(
    denoise: Denoiser,
    x_T: Float[Tensor, "b c *dhw"],
    levels: Float[Tensor, " n"],
    guide: Guide | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c *dhw"]:
    """Walk from noise to a clean volume by a two-step method in log signal-to-noise.

    Lu et al. (2022), "DPM-Solver++", Alg. 2. Their update is a DDIM step whose x0_hat is
    extrapolated from the last two. The first and the last step, to zero noise, are of first order,
    and so is the one after a level of 0, where the log signal-to-noise is infinite. Carries no
    gradient.

    Args:
        denoise: maps (x_t, alpha_bar_t) to x0_hat.
        x_T: noise at the first level.
        levels: signal power kept, noisiest first, in [0, 1); the clean end is added.
        guide: its correction is subtracted after each step (Eq. 1).
        generator: unused: the walk is deterministic. Here so that all samplers are called alike.
    """
    x_t, x0_before = x_T, x_T
    steps = zip(walk(levels, x_T), _extrapolations(levels), strict=True)
    for (noise_level, now, after), weight in steps:
        x0_hat, correction = guided_estimate(denoise, x_t, now, noise_level, guide)
        ahead = x0_hat + weight * (x0_hat - x0_before)
        x_t = q_sample(ahead, eps_from_x0(x_t, ahead, now), after) - correction
        x0_before = x0_hat
    return x_t


def _extrapolations(levels: Float[Tensor, " n"]) -> list[float]:
    """Lu et al.'s 1 / (2 r) of each step: half of its length over the last one's, else 0."""
    log_snr = [0.5 * math.log(a / (1 - a)) if a > 0 else -math.inf for a in levels.tolist()]
    lengths = [after - now for now, after in pairwise(log_snr)]
    middle = [0.5 * step / last for last, step in pairwise(lengths)]
    return [0.0, *middle, 0.0][: len(log_snr)]
