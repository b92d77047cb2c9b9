"""What becomes of two sources' coefficients at one place: the rules of multi-scale fusion."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.gaussian import gaussian_smooth

Selection = Callable[[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]], Tensor]
"""Coefficients of the fused image from those of MRI and CT, in their shape."""

ENERGY_SIGMA = 1.0
"""Width of the window of ``larger_energy``, in coefficients of the level."""


def mean(a: Float[Tensor, "b 1 *dhw"], b: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
    """Half of both."""
    return (a + b) / 2


def larger(a: Float[Tensor, "b 1 *dhw"], b: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
    """The greater value: the brighter source, of an approximation."""
    return torch.maximum(a, b)


def larger_magnitude(
    a: Float[Tensor, "b 1 *dhw"], b: Float[Tensor, "b 1 *dhw"]
) -> Float[Tensor, "b 1 *dhw"]:
    """The coefficient farther from zero, ``a`` among equals: the steeper edge."""
    return torch.where(a.abs() >= b.abs(), a, b)


def larger_energy(
    a: Float[Tensor, "b 1 *dhw"], b: Float[Tensor, "b 1 *dhw"]
) -> Float[Tensor, "b 1 *dhw"]:
    """The coefficient of the source with more energy around it, ``a`` among equals.

    Burt & Kolczynski (1993), salience, without averaging where both match: a coefficient is taken
    with its neighbours, so that one noisy voxel does not decide.
    """
    energy = gaussian_smooth(torch.cat((a, b), 1).square(), [ENERGY_SIGMA] * (a.ndim - 2))
    return torch.where(energy[:, :1] >= energy[:, 1:], a, b)
