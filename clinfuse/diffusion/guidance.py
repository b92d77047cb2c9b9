"""Guided sampling (Eq. 1): corrections to x_{t-1} from a loss on x0_hat and from the spread.

Pure functions of tensors: what the loss measures, and how x0_hat becomes a fused image, is the
caller's. The samplers call ``guided_estimate`` and subtract the correction it returns.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.diffusion.ensemble import (
    ensemble_mean,
    ensemble_uncertainty,
    ensemble_variance,
    eta_eff,
    normalised_uncertainty,
)
from clinfuse.types import Denoiser

Loss = Callable[[Tensor], Tensor | Sequence[Tensor]]
"""Maps x0_hat to one loss a sample, or one a group of members, or to the parts of such a loss."""


@dataclass(frozen=True)
class Guide:
    """A correction to subtract from x_{t-1}, and the noise levels at which it is wanted.

    Attributes:
        correction: maps (x_t, noise level, x0_hat) to a tensor in the shape of x_t.
        needs_graph: whether x0_hat must come with its graph back to x_t. That costs the memory of
            a training step.
        start: highest noise level 1 - alpha_bar_t that is guided; 1 guides from pure noise on.
        end: lowest noise level that is guided; 0 guides to the last step.
        refused: which samples had a gradient that is not finite in any step: one tensor, or none
            yet. Kept on the device, so that no step waits for the answer; ``warn_of_refused``
            reads it.
    """

    correction: Callable[[Tensor, float, Tensor], Tensor]
    needs_graph: bool = False
    start: float = 1.0
    end: float = 0.0
    refused: list[Tensor] = field(default_factory=list)

    def is_active(self, noise_level: float) -> bool:
        """Whether a level is guided, bounds included."""
        return self.end <= noise_level <= self.start

    def __call__(
        self,
        x_t: Float[Tensor, "b c *dhw"],
        noise_level: float,
        x0_hat: Float[Tensor, "b c *dhw"],
    ) -> Float[Tensor, "b c *dhw"]:
        """What to subtract from x_{t-1}, detached; 0 outside the guided levels."""
        if not self.is_active(noise_level):
            return torch.zeros_like(x_t)
        return self.correction(x_t, noise_level, x0_hat).detach()

    def warn_of_refused(self) -> None:
        """Say, after a walk, whether some samples went unguided in some steps."""
        if self.refused and torch.stack(self.refused).any():
            warnings.warn(
                "a guidance gradient was not finite: its case was not guided by it in that step",
                RuntimeWarning,
                stacklevel=2,
            )
        self.refused.clear()


def roi_guide(
    loss: Loss,
    eta: float,
    eta_u: float,
    kappa: float | None,
    members: int = 1,
    gradient: str = "full",
    start: float = 1.0,
    end: float = 0.0,
    reference_std: float = 0.1,
    early_loss: Loss | None = None,
    early_until: float = 1.0,
    of_mean: bool = False,
    weights: Sequence[float] | None = None,
    units: Sequence[Tensor | float] | None = None,
    centred: bool = False,
) -> Guide:
    """The guide of Alg. 1 line 10: eta_eff * grad L_ROI + eta_u * grad U.

    Both gradients have unit root mean square, so eta and eta_u are steps in units of x_t: L_ROI's
    in every sample, U's over all members of a case, whose relative sizes so survive (at x0_hat they
    sum to 0 and leave the ensemble mean alone). The paper does not say how they are scaled. No step
    is longer than to where the loss, if it went on falling in a straight line, would reach 0
    (Polyak 1987): of a squared error that is half of the way. So an eta too large is
    a waste and no danger, and what has arrived is not shaken by steps of a fixed length.

    A loss may come in parts, whose sum it is. At x0_hat each part then has its own unit gradient
    and its own bound, and the steps are added: bone that has arrived stays, however far the lesion
    has to go. Through the denoiser, where each part would cost a backward pass, their sum is
    followed.

    Args:
        loss: maps x0_hat to one loss a case, or the parts of one, 0 at best; a method that diffuses
            a residual turns x0_hat into F here. Must be differentiable, and treat cases apart.
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
        of_mean: whether the loss is that of the members' mean, the predictive mean on its way:
            ``loss`` then sees one x0_hat a case, and at x0 all members take the same step,
            so that they keep the spread between them. False guides each by itself.
        weights: w of each part at x0_hat, of which what is normalised sees nothing by itself: its
            step is eta w long and ends at w / (1 + w) of its reach. The more a part weighs, the
            further it goes; with others beside it and four steps in all, none goes so far that it
            overshoots where its loss is steep. None is for a loss in one part.
        units: of each part at x0_hat, how much of what its steps are measured in one of x_0 is
            worth, at every voxel; with 1, or None, they are measured in x_0. Where x_0 is a
            residual in error scales s, and F = mu + s x_0, steps of unit s are taken in F itself:
            they go as far where s is small as where it is large, and a squared error falls
            everywhere alike. Steps in x_0 move F by s^2 of its slope, so mostly where the model
            is in doubt.
        centred: whether the denoiser is a ``centred_estimate``, by which the members' mean is
            sqrt(alpha_bar_t) times that of their x_t. The gradient of that mean's loss is then
            known through the denoiser without walking back through it.
    """
    if gradient not in ("full", "x0"):
        raise ValueError(f"expected gradient 'full' or 'x0', got {gradient!r}")
    use_spread = eta_u != 0 and members > 1
    spread = partial(ensemble_uncertainty, members=members)
    group = members if of_mean else 1
    mean_is_known = centred and of_mean
    refused: list[Tensor] = []

    def loss_at(noise_level: float) -> Loss:
        chosen = loss if early_loss is None or noise_level <= early_until else early_loss
        return (lambda x0_hat: chosen(ensemble_mean(x0_hat, members))) if of_mean else chosen

    def correction(x_t: Tensor, noise_level: float, x0_hat: Tensor) -> Tensor:
        towards_x_t = x_t if gradient == "full" else None
        total = torch.zeros_like(x_t)
        if use_spread:
            walks_again = eta != 0 and not mean_is_known
            slope = loss_gradient(spread, x0_hat, towards_x_t, members, retain_graph=walks_again)
            total = total + slope.step(eta_u)
            _note(refused, ~slope.is_finite)
        if eta != 0:
            followed = loss_at(noise_level)
            strength = _voxelwise_eta(kappa, x0_hat, members, reference_std)
            if gradient == "full":
                if mean_is_known:
                    slope = of_centred(loss_gradient(followed, x0_hat, None, group), noise_level)
                else:
                    slope = loss_gradient(followed, x0_hat, x_t, group)
                slopes, lengths = [slope], [(eta, 1.0)]
            else:
                slopes = part_gradients(followed, x0_hat, group, units)
                lengths = [(eta, 1.0)]
                if weights is not None:
                    lengths = [(eta * weight, weight / (1 + weight)) for weight in weights]
            for slope, (length, relaxation) in zip(slopes, lengths, strict=True):
                total = total + strength * slope.step(length, relaxation)
                _note(refused, ~slope.is_finite)
        return total

    needs_graph = gradient == "full" and (use_spread or (eta != 0 and not mean_is_known))
    return Guide(correction, needs_graph, start, end, refused)


def walking_guide(
    walk: Callable[[Tensor], Tensor],
    members: int = 1,
    start: float = 1.0,
    end: float = 0.0,
) -> Guide:
    """A guide that takes the members' mean x0_hat to where a walk of many steps from it ends.

    Backward universal guidance (Bansal et al. 2023, Algorithm 1): a minimisation over the clean
    estimate by itself, none of whose steps asks the denoiser; for losses that one step of a
    gradient hardly lowers. The members of a case move alike and keep their spread.

    Args:
        walk: maps the mean of every case, in units of x_0, to where it should be.
        members: K, the ensemble members of a case side by side in the batch.
        start: highest noise level 1 - alpha_bar_t that is guided.
        end: lowest noise level that is guided.
    """

    def correction(x_t: Tensor, noise_level: float, x0_hat: Tensor) -> Tensor:
        mean = ensemble_mean(x0_hat.detach(), members)
        return (mean - walk(mean)).repeat_interleave(members, 0)

    return Guide(correction, start=start, end=end)


def together(guides: Sequence[Guide]) -> Guide:
    """One guide whose correction is the sum of those that each makes at its own levels."""
    refused: list[Tensor] = []

    def correction(x_t: Tensor, noise_level: float, x0_hat: Tensor) -> Tensor:
        total = torch.zeros_like(x_t)
        for guide in guides:
            total = total + guide(x_t, noise_level, x0_hat)
            for noted in guide.refused:
                _note(refused, noted)
            guide.refused.clear()
        return total

    return Guide(
        correction,
        any(guide.needs_graph for guide in guides),
        max(guide.start for guide in guides),
        min(guide.end for guide in guides),
        refused,
    )


def guided_estimate(
    denoise: Denoiser,
    x_t: Float[Tensor, "b c *dhw"],
    alpha_bar_t: Float[Tensor, " b"],
    noise_level: float,
    guide: Guide | None,
) -> tuple[Float[Tensor, "b c *dhw"], Float[Tensor, "b c *dhw"]]:
    """One call of the denoiser: x0_hat, and the correction for x_{t-1}; both detached.

    A graph is kept only if the guide is active at this level and asks for it.

    Args:
        denoise: maps (x_t, alpha_bar_t) to x0_hat.
        x_t: the samples.
        alpha_bar_t: signal power kept, as the denoiser wants it.
        noise_level: 1 - alpha_bar_t as a plain number, by which the guide decides what to do.
        guide: None guides nothing.

    Raises:
        RuntimeError: if a guide is active inside torch.inference_mode, which forbids gradients, or
            if it needs a graph and the denoiser has cut it.
    """
    if guide is None or not guide.is_active(noise_level):
        with torch.no_grad():
            return denoise(x_t, alpha_bar_t), torch.zeros_like(x_t)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("guidance needs gradients: use Trainer(inference_mode=False)")
    with torch.set_grad_enabled(guide.needs_graph):
        x_t = x_t.detach().requires_grad_(guide.needs_graph)
        x0_hat = denoise(x_t, alpha_bar_t)
    if guide.needs_graph and not x0_hat.requires_grad:
        raise RuntimeError("x0_hat has no graph back to x_t: does the denoiser run in no_grad?")
    return x0_hat.detach(), guide(x_t, noise_level, x0_hat)


@dataclass(frozen=True)
class Slope:
    """Where a loss rises, and how far it is worth walking down.

    Attributes:
        direction: the gradient with unit root mean square in each sample, or group of members; 0
            where it is 0 or not finite.
        reach: the Polyak step of each group, loss / |gradient|^2, in units of ``direction``.
        is_finite: whether the loss and the gradient of each sample are.
        unit: how much of what the gradient was taken by one of x_0 is worth.
    """

    direction: Float[Tensor, "b c *dhw"]
    reach: Float[Tensor, " g"]
    is_finite: Bool[Tensor, " b"]
    unit: Tensor | float = 1.0

    def step(self, length: float, relaxation: float = 1.0) -> Float[Tensor, "b c *dhw"]:
        """The direction times a length, which the reach bounds; in units of x_0.

        Args:
            length: what is asked for.
            relaxation: how much of the reach may be walked; below 2 the steps towards the least of
                a convex loss still converge.
        """
        bounded = (relaxation * self.reach).clamp(max=length)
        bounded = bounded.repeat_interleave(len(self.direction) // len(bounded))
        step = bounded.reshape(-1, *[1] * (self.direction.ndim - 1)) * self.direction
        return step / self.unit


@torch.enable_grad()
def loss_gradient(
    loss: Loss,
    x0_hat: Float[Tensor, "b c *dhw"],
    x_t: Float[Tensor, "b c *dhw"] | None = None,
    members: int = 1,
    retain_graph: bool = False,
) -> Slope:
    """The loss's gradient with unit root mean square: at x0_hat, or back through it at x_t.

    The chain rule in two parts. The loss's own graph is gone before the denoiser's is walked, and
    what walks it is of order 1, which half precision does not round to 0.

    Args:
        loss: each sample's, or group's, own. Parts are summed.
        x0_hat: the estimate; with its graph back to x_t, if x_t is given.
        x_t: what x0_hat was computed from; None stops at x0_hat.
        members: how many neighbours in the batch share one root mean square.
        retain_graph: keep the graph of x0_hat for another call.
    """
    leaf = x0_hat.detach().requires_grad_()
    value = torch.stack(_parts(loss(leaf))).sum(0)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    direction, rms = normalise_rms(gradient, members)
    if x_t is not None:
        (gradient,) = torch.autograd.grad(x0_hat, x_t, direction, retain_graph=retain_graph)
        direction, further = normalise_rms(gradient, members)
        rms = rms * further
    return _slope(value, direction, rms, members)


@torch.enable_grad()
def part_gradients(
    loss: Loss,
    x0_hat: Float[Tensor, "b c *dhw"],
    members: int = 1,
    units: Sequence[Tensor | float] | None = None,
) -> list[Slope]:
    """``loss_gradient`` at x0_hat for each part of the loss by itself.

    A part that does not depend on x0_hat, as the lesion's without a head, is flat.

    Args:
        loss: in as many parts as there are units.
        x0_hat: the estimate.
        members: how many neighbours in the batch share one root mean square.
        units: what each part's gradient is taken by is ``unit`` times x_0; None is x_0 itself.

    Raises:
        RuntimeError: if none does.
    """
    leaf = x0_hat.detach().requires_grad_()
    parts = _parts(loss(leaf))
    slopes = []
    for part, unit in zip(parts, units or [1.0] * len(parts), strict=True):
        gradient = torch.zeros_like(leaf)
        if part.requires_grad or not any(other.requires_grad for other in parts):
            (gradient,) = torch.autograd.grad(part.sum(), leaf, retain_graph=len(parts) > 1)
        slope = _slope(part, *normalise_rms(gradient / unit, members), members)
        slopes.append(replace(slope, unit=unit))
    return slopes


def of_centred(slope: Slope, noise_level: float) -> Slope:
    """The slope at x_t of a loss of the members' mean, from that at a centred x0_hat.

    Their mean is sqrt(alpha_bar_t) times that of x_t, so the direction stays and the gradient is
    so much the smaller; where nothing of x_0 is in x_t, it is flat.
    """
    signal = (1 - noise_level) ** 0.5
    if signal == 0:
        return replace(slope, direction=torch.zeros_like(slope.direction))
    return replace(slope, reach=slope.reach / signal)


def _note(refused: list[Tensor], also: Tensor) -> None:
    """Add to what was refused before; a tensor a step would break up the memory of a long walk."""
    refused[:] = [refused[0] | also if refused else also]


def _parts(loss: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (loss,) if isinstance(loss, Tensor) else tuple(loss)


def _slope(value: Tensor, direction: Tensor, rms: Tensor, members: int) -> Slope:
    size = direction[0].numel() * members
    value = value.detach().reshape(len(rms), -1).sum(1)
    reach = (value / (rms * size)).nan_to_num(nan=0, posinf=torch.inf, neginf=0).clamp(min=0)
    is_finite = (rms.isfinite() & value.isfinite()).repeat_interleave(members)
    return Slope(direction, reach, is_finite)


def normalise_rms(
    gradient: Float[Tensor, "b c *dhw"], members: int = 1
) -> tuple[Float[Tensor, "b c *dhw"], Float[Tensor, " g"]]:
    """The gradient scaled to unit root mean square in each sample, or group of members, and that.

    Zero stays zero. A group whose gradient is not finite gets zero, so is not guided in this step;
    its root mean square is infinite.
    """
    grouped = gradient.reshape(len(gradient) // members, -1)
    largest = grouped.abs().amax(1, keepdim=True)
    # Dividing by the largest value first keeps the squares of a tiny gradient from underflowing.
    usable = largest.isfinite() & (largest > 0)
    scaled = torch.where(usable, grouped / torch.where(usable, largest, 1.0), 0.0)
    rms = scaled.square().mean(1, keepdim=True).sqrt()
    direction = (scaled / torch.where(usable, rms, 1.0)).reshape_as(gradient)
    return direction, torch.where(largest.isfinite(), rms * largest, torch.inf)[:, 0]


def _voxelwise_eta(
    kappa: float | None, x0_hat: Tensor, members: int, reference_std: float
) -> Tensor | float:
    """Eq. 4's eta_eff in units of eta."""
    if kappa is None:
        return 1.0
    variance = ensemble_variance(x0_hat.detach(), members)
    uncertainty = normalised_uncertainty(variance, reference_std)
    return eta_eff(1.0, kappa, uncertainty).repeat_interleave(members, 0)
