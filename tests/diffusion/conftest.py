"""Data on which the whole diffusion is known in closed form: independent Gaussian voxels."""

from dataclasses import dataclass

import pytest
import torch


@dataclass
class GaussianData:
    """Voxels N(mean, std^2): x_t is N(sqrt(a) mean, a std^2 + 1 - a) at signal power a."""

    mean: float = 0.3
    std: float = 0.5

    def denoise(self, x_t, alpha_bar_t):
        """The posterior mean E[x_0 | x_t], by the rule for two Gaussians."""
        a = alpha_bar_t.reshape(-1, *[1] * (x_t.ndim - 1))
        gain = a.sqrt() * self.std**2 / (a * self.std**2 + 1 - a)
        return self.mean + gain * (x_t - a.sqrt() * self.mean)

    def follow(self, x_t, now, after):
        """The probability flow's exact path: the standard score of every voxel stays what it is."""
        score = (x_t - now**0.5 * self.mean) / (now * self.std**2 + 1 - now) ** 0.5
        return after**0.5 * self.mean + (after * self.std**2 + 1 - after) ** 0.5 * score


@pytest.fixture
def gaussian():
    return GaussianData()


@pytest.fixture
def x_T():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, 4, 5, dtype=torch.float64, generator=generator)
