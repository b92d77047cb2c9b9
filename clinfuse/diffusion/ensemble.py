"""K members of one case, sampled together: their noise, their spread, and Eq. 4 on it.

Members lie side by side in the first axis, case by case (a a a b b b), as in FusionBatch.repeat.
"""

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from clinfuse.diffusion.process import noise_like

VARIANCE_MATCHED = 4
"""Members from which on their noise has its second moment matched too."""


def ensemble_noise(
    like: Float[Tensor, "bk c *dhw"], members: int, generator: torch.Generator | None = None
) -> Float[Tensor, "bk c *dhw"]:
    """Unit Gaussian noise whose mean over the members of a case is exactly 0, its variance 1.

    Moment matching (antithetic draws, for two members): with K members, draws less their mean,
    times sqrt(K / (K - 1)), so that they waste nothing on a common offset and the ensemble mean is
    less noisy. From ``VARIANCE_MATCHED`` members on, their variance at every voxel is made exactly
    1 as well (quadratic resampling, Barraquand 1995): the standard deviation of five free draws is
    off by a third at each voxel, and the ensemble's spread with it. A member alone then is one
    coordinate of a point on a sphere, for five members nearly bell-shaped; with fewer than
    ``VARIANCE_MATCHED`` it is exactly N(0, I). One member is plain.

    Args:
        like: a tensor whose shape, dtype and device the noise takes.
        members: K, a divisor of the first axis.
        generator: source of randomness; None is torch's global state.
    """
    eps = _by_case(noise_like(like, generator), members)
    if members > 1:
        eps = eps - eps.mean(1, keepdim=True)
        if members < VARIANCE_MATCHED:
            eps = eps * (members / (members - 1)) ** 0.5
        else:
            eps = eps / eps.square().mean(1, keepdim=True).sqrt()
    return rearrange(eps, "b k ... -> (b k) ...")


def centred_estimate(
    x0_hat: Float[Tensor, "bk c *dhw"],
    x_t: Float[Tensor, "bk c *dhw"],
    alpha_bar_t: Float[Tensor, " bk"],
    members: int,
) -> Float[Tensor, "bk c *dhw"]:
    """x0_hat with its mean over the members replaced by what a mean-free x_0 would have.

    The residual of a regressed mean has mean zero given the condition, so where the members' x_t
    share an offset its estimate is sqrt(alpha_bar_t) times their mean, as for x_0 ~ N(0, I); only
    guidance puts one there. A denoiser's own error in that mean is the same for all members,
    and would be added to the regression's; about the mean, x0_hat stays the denoiser's.

    Args:
        x0_hat: the denoiser's estimates.
        x_t: what they were made from.
        alpha_bar_t: signal power kept.
        members: K, at least 2.
    """
    of_noise = _by_case(x_t, members).mean(1, keepdim=True)
    level = _by_case(alpha_bar_t, members)[:, :1].sqrt()
    by_case = _by_case(x0_hat, members)
    mean = level.reshape(-1, *[1] * (by_case.ndim - 1)) * of_noise
    centred = by_case - by_case.mean(1, keepdim=True) + mean
    return rearrange(centred, "b k ... -> (b k) ...")


def ensemble_mean(x0_hat: Float[Tensor, "bk c *dhw"], members: int) -> Float[Tensor, "b c *dhw"]:
    """Mean over the members of each case; differentiable."""
    return _by_case(x0_hat, members).mean(1)


def ensemble_variance(
    x0_hat: Float[Tensor, "bk c *dhw"], members: int
) -> Float[Tensor, "b c *dhw"]:
    """Unbiased variance over the members of each case; differentiable; 0 for a single member."""
    by_case = _by_case(x0_hat, members)
    return by_case.var(1, correction=1) if members > 1 else torch.zeros_like(by_case[:, 0])


def ensemble_uncertainty(x0_hat: Float[Tensor, "bk c *dhw"], members: int) -> Float[Tensor, " b"]:
    """U(x_t) of Eq. 1: each case's variance over members, averaged over voxels; differentiable.

    The members are estimates that the sampler has already made, so U costs no forward pass.
    """
    return reduce(ensemble_variance(x0_hat, members), "b ... -> b", "mean")


def normalised_uncertainty(
    variance: Float[Tensor, "b c *dhw"], reference_std: float
) -> Float[Tensor, "b c *dhw"]:
    """uncert(p) of Eq. 4: variance / (variance + reference_std^2), in [0, 1).

    The scale is fixed, neither the case's own maximum nor its range: a case on which all members
    agree is certain everywhere, and one value means the same in every case and at every step.

    Args:
        variance: over the members, in squared units of x_0.
        reference_std: the spread at which uncert is 1/2, in units of x_0; above 0.
    """
    return variance / (variance + reference_std**2)


def eta_eff(
    eta: float, kappa: float, uncertainty: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Guidance strength per voxel, eta * sigmoid(kappa (1 - conf)) with conf = 1 - uncert (Eq. 4).

    As the equation is written, it runs from eta / 2 where the members agree to eta * sigmoid(kappa)
    where they do not; kappa = 0 halves eta everywhere.
    """
    confidence = 1 - uncertainty
    return eta * torch.sigmoid(kappa * (1 - confidence))


def _by_case(x: Tensor, members: int) -> Tensor:
    if members < 1 or len(x) % members:
        raise ValueError(f"expected a multiple of {members} members in the batch, got {len(x)}")
    return rearrange(x, "(b k) ... -> b k ...", k=members)
