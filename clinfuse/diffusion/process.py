"""The forward process, and the one place that converts between x_0, noise and velocity."""

import torch
from jaxtyping import Float
from torch import Tensor

PARAMETERISATIONS = ("v", "eps", "x_0")
"""What a network may predict: velocity (Salimans and Ho 2022), the noise, the clean volume."""


def q_sample(
    x_0: Float[Tensor, "b c *dhw"],
    eps: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """Noise a clean volume: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.

    Ho et al. (2020), Eq. 4.

    Args:
        x_0: clean volume, or whatever quantity is diffused.
        eps: unit Gaussian noise.
        alpha_bar_t: signal power kept, in [0, 1], one per case.
    """
    signal, noise = _roots(alpha_bar_t, x_0)
    return signal * x_0 + noise * eps


def eps_from_x0(
    x_t: Float[Tensor, "b c *dhw"],
    x_0: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """The noise that took x_0 to x_t: all of x_t at level 0, and 0 at level 1, where none is."""
    signal, noise = _roots(alpha_bar_t, x_t)
    return (x_t - signal * x_0) * _inverse(noise)


def x0_from_eps(
    x_t: Float[Tensor, "b c *dhw"],
    eps: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """The clean volume under x_t if its noise is eps; 0 at level 0, where x_t holds no signal."""
    signal, noise = _roots(alpha_bar_t, x_t)
    return (x_t - noise * eps) * _inverse(signal)


def v_from(
    x_0: Float[Tensor, "b c *dhw"],
    eps: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """The velocity sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0: finite at every level.

    Salimans and Ho (2022), section 4: -x_0 at level 0, and eps at level 1.
    """
    signal, noise = _roots(alpha_bar_t, x_0)
    return signal * eps - noise * x_0


def x0_from_v(
    x_t: Float[Tensor, "b c *dhw"],
    v: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """The clean volume under x_t if its velocity is v: defined at every level."""
    signal, noise = _roots(alpha_bar_t, x_t)
    return signal * x_t - noise * v


def x0_from_prediction(
    prediction: Float[Tensor, "b c *dhw"],
    x_t: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
    parameterisation: str,
) -> Float[Tensor, "b c *dhw"]:
    """The clean estimate x0_hat that a network's output stands for.

    Raises:
        ValueError: if parameterisation is not one of PARAMETERISATIONS.
    """
    convert = {"v": x0_from_v, "eps": x0_from_eps, "x_0": lambda x_t, x_0, alpha_bar_t: x_0}
    return convert[_known(parameterisation)](x_t, prediction, alpha_bar_t)


def target_for(
    parameterisation: str,
    x_0: Float[Tensor, "b c *dhw"],
    eps: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """What the network should output for x_t = q_sample(x_0, eps, alpha_bar_t) (Eq. 3)."""
    return {"v": v_from(x_0, eps, alpha_bar_t), "eps": eps, "x_0": x_0}[_known(parameterisation)]


def posterior(
    x_0: Float[Tensor, "b c *dhw"],
    x_t: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
    alpha_bar_after: Float[Tensor, " b"],
) -> tuple[Float[Tensor, "b c *dhw"], Float[Tensor, "b *ones"]]:
    """Mean and variance of the less noisy volume, given x_0 and x_t.

    Ho et al. (2020), Eq. 7, where alpha_t is the ratio of the two levels. So the step may skip any
    number of timesteps, and the betas of consecutive ones never enter.

    Args:
        x_0: clean volume.
        x_t: the noisy volume.
        alpha_bar_t: signal power kept in x_t, in [0, 1).
        alpha_bar_after: signal power kept in the less noisy volume, in (alpha_bar_t, 1]; the
            variance is 0 and the mean x_0 where it is 1.
    """
    now, after = _per_case(alpha_bar_t, x_t), _per_case(alpha_bar_after, x_t)
    variance = (1 - after) / (1 - now) * (1 - now / after)
    toward_x_0 = after.sqrt() * (1 - now / after) / (1 - now)
    toward_x_t = (now / after).sqrt() * (1 - after) / (1 - now)
    return toward_x_0 * x_0 + toward_x_t * x_t, variance


def x0_between(
    x_t: Float[Tensor, "b c *dhw"],
    x_after: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
    alpha_bar_after: Float[Tensor, " b"],
) -> Float[Tensor, "b c *dhw"]:
    """The x_0 by which one DDIM step from x_t arrives at x_after.

    What a student of fewer steps is to predict (Salimans and Ho 2022, appendix G).

    Args:
        x_t: where the step begins.
        x_after: where it ends, less noisy.
        alpha_bar_t: signal power kept in x_t, in [0, 1).
        alpha_bar_after: in x_after, in (alpha_bar_t, 1].
    """
    signal, noise = _roots(alpha_bar_t, x_t)
    signal_after, noise_after = _roots(alpha_bar_after, x_t)
    ratio = noise_after / noise
    return (x_after - ratio * x_t) / (signal_after - ratio * signal)


def noise_like(
    x: Float[Tensor, "b c *dhw"], generator: torch.Generator | None = None
) -> Float[Tensor, "b c *dhw"]:
    """Unit Gaussian noise in the shape of x, drawn on the generator's device and moved to x's.

    A CPU generator so gives the same noise whatever device samples. None: torch's global state.
    """
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _known(parameterisation: str) -> str:
    if parameterisation not in PARAMETERISATIONS:
        raise ValueError(f"expected one of {PARAMETERISATIONS}, got {parameterisation!r}")
    return parameterisation


def _per_case(alpha_bar_t: Tensor, x: Tensor) -> Tensor:
    return alpha_bar_t.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _roots(alpha_bar_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar_t = _per_case(alpha_bar_t, x)
    return alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()


def _inverse(root: Tensor) -> Tensor:
    return torch.where(root > 0, root.reciprocal(), 0.0)
