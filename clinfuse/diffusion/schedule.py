"""Noise levels: how much signal power each step keeps, and which steps a sampler visits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cosine(n: int = 1000, offset: float = 0.008) -> Float[Tensor, " n"]:
    """Signal power kept at each of n steps, index 0 cleanest, following a squared cosine.

    Nichol and Dhariwal (2021), Eq. 17, with every step's beta held below 0.999 as in the paper, so
    the last level is small but positive. Computed in double precision, in the default dtype.
    """
    angle = (torch.linspace(0, 1, n + 1, dtype=torch.float64) + offset) / (1 + offset)
    alpha_bars = torch.cos(angle * math.pi / 2) ** 2
    return _from_betas(1 - alpha_bars[1:] / alpha_bars[:-1])


def linear(n: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> Float[Tensor, " n"]:
    """Signal power kept at each of n steps, index 0 cleanest, for betas on a straight line.

    Ho et al. (2020), section 4. Keeps about 4e-5 of the signal's power at step 1000.
    """
    return _from_betas(torch.linspace(beta_first, beta_last, n, dtype=torch.float64))


def zero_terminal_snr(alpha_bars: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The same schedule stretched so that its last level is exactly 0, pure noise.

    Lin et al. (2024), Alg. 1: sqrt(alpha_bar) is shifted and scaled; index 0 keeps its value. A
    noise prediction says nothing about x_0 at level 0: train v or x_0 on such a schedule.
    """
    root = alpha_bars.double().sqrt()
    stretched = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return (stretched**2).to(alpha_bars.dtype)


def levels_for(alpha_bars: Float[Tensor, " n"], steps: int) -> Float[Tensor, " steps"]:
    """The levels that a walk of so many steps visits, noisiest first.

    Evenly spaced from the end of the schedule ("trailing" in Lin et al. 2024, Table 2), so the
    noisiest level, which x_T is drawn at, is always the first.

    Raises:
        ValueError: if steps is not between 1 and n.
    """
    return alpha_bars[_timesteps(len(alpha_bars), steps)]


def walk(
    levels: Float[Tensor, " n"], x_T: Float[Tensor, "b c *dhw"]
) -> Iterator[tuple[float, Float[Tensor, " b"], Float[Tensor, " b"]]]:
    """(Noise level, alpha_bar now, alpha_bar after) of each step; the last ends at 1.

    The levels are read once, before the first step; so what depends on the noise level
    1 - alpha_bar now, a plain number, is decided without waiting for the device.

    Raises:
        ValueError: if levels do not rise strictly within [0, 1), from noisiest to cleanest.
    """
    path = [*levels.tolist(), 1.0]
    if not (path[0] >= 0 and all(now < after for now, after in pairwise(path))):
        raise ValueError(f"expected levels in [0, 1) that rise from noisiest, got {levels}")
    for now, after in pairwise(path):
        yield 1 - now, x_T.new_full(x_T.shape[:1], now), x_T.new_full(x_T.shape[:1], after)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The levels that a denoiser is trained on.

    Attributes:
        alpha_bars: signal power kept, falling, index 0 cleanest.
    """

    alpha_bars: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.alpha_bars)

    def timesteps(self, steps: int) -> Int[Tensor, " steps"]:
        """Indices of a walk of so many steps, noisiest first; the last index always included."""
        return _timesteps(len(self), steps)

    def alpha_bar(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Signal power kept at step t, on the device of t."""
        return self.alpha_bars.to(t.device)[t]

    def levels(self, steps: int) -> Float[Tensor, " steps"]:
        """Signal power kept along a walk of so many steps, noisiest first."""
        return levels_for(self.alpha_bars, steps)


def _timesteps(n: int, steps: int) -> Int[Tensor, " steps"]:
    if not 1 <= steps <= n:
        raise ValueError(f"expected between 1 and {n} steps, got {steps}")
    return torch.tensor([round(n - i * n / steps) - 1 for i in range(steps)])


def _from_betas(betas: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return (1 - betas.clamp(max=0.999)).cumprod(0).to(torch.get_default_dtype())
