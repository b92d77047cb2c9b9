"""Likelihoods for a network that predicts its own error's scale, voxel by voxel."""

import math

from jaxtyping import Float
from torch import Tensor


def laplace_nll(
    error: Float[Tensor, "*shape"], log_scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """-log of the Laplace density of the error, |e| / b + log(2 b), with b = exp(log_scale).

    Kendall & Gal (2017), Sec. 2.2, in its L1 form. Least, over b, at b = |e|. Unbounded below: an
    exact prediction earns ever more by shrinking b, so keep ``log_scale`` bounded in the network.

    Args:
        error: prediction minus target.
        log_scale: log of the scale b, in the error's unit.
    """
    return error.abs() * (-log_scale).exp() + log_scale + math.log(2)


def gaussian_nll(
    error: Float[Tensor, "*shape"], log_scale: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """-log of the normal density of the error, with standard deviation exp(log_scale).

    Kendall & Gal (2017), Eq. 5 with its constant. Least, over the scale, at the error's size.

    Args:
        error: prediction minus target.
        log_scale: log of the standard deviation, in the error's unit.
    """
    return 0.5 * (error * (-log_scale).exp()).square() + log_scale + 0.5 * math.log(2 * math.pi)
