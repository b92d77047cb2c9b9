"""Guided sampling (Eq. 1): corrections to x_{t-1} from a loss on x0_hat and from the spread.

Pure functions of tensors: what the loss measures, and how x0_hat becomes a fused image, is the
caller's. The samplers call ``guided_estimate`` and subtract the correction it returns.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.diffusion.ensemble import (
    ensemble_uncertainty,
    ensemble_variance,
    eta_eff,
    normalised_uncertainty,
)
from clinfuse.types import Denoiser


@dataclass(frozen=True)
class Guide:
    """A correction to subtract from x_{t-1}, and the noise levels at which it is wanted.

    Attributes:
        correction: maps (x_t, alpha_bar_t, x0_hat) to a tensor in the shape of x_t.
        needs_graph: whether x0_hat must come with its graph back to x_t. That costs the memory of
            a training step.
        start: highest noise level 1 - alpha_bar_t that is guided; 1 guides from pure noise on.
        end: lowest noise level that is guided; 0 guides to the last step.
    """

    correction: Callable[[Tensor, Tensor, Tensor], Tensor]
    needs_graph: bool = False
    start: float = 1.0
    end: float = 0.0

    def is_active(self, alpha_bar_t: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Which cases lie at a level that is guided, bounds included."""
        return (self.end <= 1 - alpha_bar_t) & (1 - alpha_bar_t <= self.start)

    def __call__(
        self,
        x_t: Float[Tensor, "b c *dhw"],
        alpha_bar_t: Float[Tensor, " b"],
        x0_hat: Float[Tensor, "b c *dhw"],
    ) -> Float[Tensor, "b c *dhw"]:
        """What to subtract from x_{t-1}, detached; 0 for a case outside the guided levels."""
        active = self.is_active(alpha_bar_t).reshape(-1, *[1] * (x_t.ndim - 1))
        return torch.where(active, self.correction(x_t, alpha_bar_t, x0_hat).detach(), 0.0)


def roi_guide(
    loss: Callable[[Tensor], Tensor],
    eta: float,
    eta_u: float,
    kappa: float | None,
    members: int = 1,
    gradient: str = "full",
    start: float = 1.0,
    end: float = 0.0,
    reference_std: float = 0.1,
    early_loss: Callable[[Tensor], Tensor] | None = None,
    early_until: float = 1.0,
) -> Guide:
    """The guide of Alg. 1 line 10: eta_eff * grad L_ROI + eta_u * grad U.

    Both gradients have unit root mean square, so eta and eta_u are steps in units of x_t: L_ROI's
    in every sample, U's over all members of a case, whose relative sizes so survive (at x0_hat they
    sum to 0 and leave the ensemble mean alone). The paper does not say how they are scaled.

    Args:
        loss: maps x0_hat to one loss a case; a method that diffuses a residual turns x0_hat into
            F here. Must be differentiable, and treat cases apart.
        eta: strength of the loss; 0 leaves it out.
        eta_u: strength of the pull towards low spread; without effect on a single member.
        kappa: how strongly spread raises eta (Eq. 4, which halves eta where there is no spread);
            None uses eta itself everywhere.
        members: K, the ensemble members of a case side by side in the batch.
        gradient: "full" is the gradient with respect to x_t through the denoiser; "x0" stops at
            x0_hat, as though the denoiser's Jacobian were a multiple of the identity: no backward
            pass through the network, and its memory.
        start: highest noise level 1 - alpha_bar_t that is guided.
        end: lowest noise level that is guided.
        reference_std: spread at which Eq. 4's uncert is 1/2, in units of x_0.
        early_loss: what stands for the loss at noise levels above ``early_until``: the loss without
            the parts that cannot read an estimate so rough (Alg. 1 line 7). None is the loss
            itself.
        early_until: highest noise level at which the loss itself is taken.
    """
    if gradient not in ("full", "x0"):
        raise ValueError(f"expected gradient 'full' or 'x0', got {gradient!r}")
    use_spread = eta_u != 0 and members > 1

    def loss_at(alpha_bar_t: Tensor) -> Callable[[Tensor], Tensor]:
        is_early = 1 - alpha_bar_t > early_until
        if early_loss is None or not is_early.any():
            return loss
        if is_early.all():
            return early_loss
        return lambda x0_hat: torch.where(is_early, early_loss(x0_hat), loss(x0_hat))

    def correction(x_t: Tensor, alpha_bar_t: Tensor, x0_hat: Tensor) -> Tensor:
        towards_x_t = x_t if gradient == "full" else None
        total = torch.zeros_like(x_t)
        if use_spread:
            spread = partial(ensemble_uncertainty, members=members)
            slope = loss_gradient(spread, x0_hat, towards_x_t, members, retain_graph=eta != 0)
            total = total + eta_u * slope
        if eta != 0:
            slope = loss_gradient(loss_at(alpha_bar_t), x0_hat, towards_x_t)
            total = total + _voxelwise_eta(eta, kappa, x0_hat, members, reference_std) * slope
        return total

    return Guide(correction, gradient == "full" and (eta != 0 or use_spread), start, end)


def guided_estimate(
    denoise: Denoiser,
    x_t: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
    guide: Guide | None,
) -> tuple[Float[Tensor, "b c *dhw"], Float[Tensor, "b c *dhw"]]:
    """One call of the denoiser: x0_hat, and the correction for x_{t-1}; both detached.

    A graph is kept only if the guide is active at this level and asks for it.

    Raises:
        RuntimeError: if a guide is active inside torch.inference_mode, which forbids gradients, or
            if it needs a graph and the denoiser has cut it.
    """
    if guide is None or not guide.is_active(alpha_bar_t).any():
        with torch.no_grad():
            return denoise(x_t, alpha_bar_t), torch.zeros_like(x_t)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("guidance needs gradients: use Trainer(inference_mode=False)")
    with torch.set_grad_enabled(guide.needs_graph):
        x_t = x_t.detach().requires_grad_(guide.needs_graph)
        x0_hat = denoise(x_t, alpha_bar_t)
    if guide.needs_graph and not x0_hat.requires_grad:
        raise RuntimeError("x0_hat has no graph back to x_t: does the denoiser run in no_grad?")
    return x0_hat.detach(), guide(x_t, alpha_bar_t, x0_hat)


@torch.enable_grad()
def loss_gradient(
    loss: Callable[[Tensor], Tensor],
    x0_hat: Float[Tensor, "b c *dhw"],
    x_t: Float[Tensor, "b c *dhw"] | None = None,
    members: int = 1,
    retain_graph: bool = False,
) -> Float[Tensor, "b c *dhw"]:
    """The loss's gradient with unit root mean square: at x0_hat, or back through it at x_t.

    The chain rule in two parts. The loss's own graph is gone before the denoiser's is walked, and
    what walks it is of order 1, which half precision does not round to 0.

    Args:
        loss: maps x0_hat to one loss a case, each case's own.
        x0_hat: the estimate; with its graph back to x_t, if x_t is given.
        x_t: what x0_hat was computed from; None stops at x0_hat.
        members: how many neighbours in the batch share one root mean square.
        retain_graph: keep the graph of x0_hat for another call.
    """
    leaf = x0_hat.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    slope = normalise_rms(slope, members)
    if x_t is None:
        return slope
    (slope,) = torch.autograd.grad(x0_hat, x_t, slope, retain_graph=retain_graph)
    return normalise_rms(slope, members)


def normalise_rms(
    gradient: Float[Tensor, "b c *dhw"], members: int = 1
) -> Float[Tensor, "b c *dhw"]:
    """The gradient scaled to unit root mean square in each sample, or group of members.

    Zero stays zero. A sample whose gradient is not finite gets zero, so is not guided in this step,
    and a RuntimeWarning says so.
    """
    grouped = gradient.reshape(len(gradient) // members, -1)
    largest = grouped.abs().amax(1, keepdim=True)
    if not largest.isfinite().all():
        warnings.warn("a guidance gradient is not finite: case left unguided", RuntimeWarning, 2)
    # Dividing by the largest value first keeps the squares of a tiny gradient from underflowing.
    usable = largest.isfinite() & (largest > 0)
    scaled = torch.where(usable, grouped / torch.where(usable, largest, 1.0), 0.0)
    rms = scaled.square().mean(1, keepdim=True).sqrt()
    return (scaled / torch.where(usable, rms, 1.0)).reshape_as(gradient)


def _voxelwise_eta(
    eta: float, kappa: float | None, x0_hat: Tensor, members: int, reference_std: float
) -> Tensor | float:
    if kappa is None:
        return eta
    variance = ensemble_variance(x0_hat.detach(), members)
    uncertainty = normalised_uncertainty(variance, reference_std)
    return eta_eff(eta, kappa, uncertainty).repeat_interleave(members, 0)
