"""The denoising half of the training objective, Eq. 3, and how much its other half counts."""

from einops import reduce
from jaxtyping import Float
from torch import Tensor


def diffusion_loss(
    prediction: Float[Tensor, "b c *dhw"],
    target: Float[Tensor, "b c *dhw"],
    weight: Float[Tensor, "b 1 *dhw"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean squared error of each case's prediction: the first term of Eq. 3.

    Ho et al. (2020), Eq. 14. With v- or x_0-prediction, the target is v or x_0 instead of eps.

    Args:
        prediction: the network's output.
        target: what it should have been.
        weight: voxel weights of mean 1, so that weighting does not change the learning rate.
    """
    error = (prediction - target).square()
    return reduce(error if weight is None else weight * error, "b ... -> b", "mean")


def noise_level_weight(alpha_bar_t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """How much L_ROI on x0_hat counts at a noise level: alpha_bar_t, from 1 (clean) to 0 (noise).

    Where x_t is mostly noise, x0_hat is a blurred mean of all fused volumes, and its SSIM with one
    patient's MRI says nothing about the network. alpha_bar_t is the signal's share of power in x_t;
    of white data it is the share of the variance that x_t explains.
    """
    return alpha_bar_t
