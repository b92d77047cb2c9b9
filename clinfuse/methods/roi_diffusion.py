"""CLIN-FuseDiff++: sample what a registration-aware blend leaves open, guided by L_ROI (Alg. 1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.diffusion.ensemble import ensemble_noise
from clinfuse.diffusion.guidance import Guide, roi_guide
from clinfuse.diffusion.process import (
    q_sample,
    target_for,
    x0_from_prediction,
)
from clinfuse.losses.diffusion import diffusion_loss, noise_level_weight
from clinfuse.losses.reference import ReferenceLoss
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.losses.uncertainty import gaussian_nll
from clinfuse.methods.base import (
    FusionMethod,
    Optim,
    case_generator,
    staged_optimizer,
    step_generator,
)
from clinfuse.methods.objective import clean_ct_of, clean_roi_loss, reference_of, roi_loss
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.networks.registered_blend import Anchor
from clinfuse.types import Denoiser, FusionBatch

MAX_RESIDUAL = 8.0
"""Residuals beyond so many error scales are cut before the denoiser learns from them."""


@dataclass(frozen=True)
class Guidance:
    """The knobs of Eq. 1 and Eq. 4 at sampling; alpha, beta, gamma, lambda and tau are the loss's.

    Attributes:
        eta: strength of grad L_ROI, in units of x_t; 0 samples without guidance.
        eta_u: strength of grad U.
        kappa: how strongly the members' spread raises eta (Eq. 4); None uses eta everywhere.
        gradient: ``full`` goes through the denoiser, ``x0`` stops at x0_hat.
        start: highest noise level 1 - alpha_bar_t that is guided.
        end: lowest noise level that is guided.
        reference_std: spread of r_0 at which Eq. 4's uncert is one half.
    """

    eta: float
    eta_u: float
    kappa: float | None
    gradient: str = "x0"
    start: float = 1.0
    end: float = 0.0
    reference_std: float = 1.0


@dataclass(frozen=True)
class LossWeights:
    """Weights of the training objective's terms.

    Attributes:
        roi: lambda_roi of Eq. 3.
        scale: the anchor's Gaussian likelihood, which trains s(c) alone.
    """

    roi: float
    scale: float


class RoiDiffusion(FusionMethod):
    """Denoise a volume conditioned on MRI, CT and the ROI masks: CLIN-FuseDiff++ (Alg. 1).

    What is diffused is the residual r = (F - mu(c)) / s(c) of an anchor (method.md section 3,
    "Diffusion must earn its place"). Training has three stages: the anchor's registration, the
    anchor on CTs so registered, the denoiser on what the anchor leaves.
    The denoiser sees the CT where the anchor puts it, and guidance pulls towards that CT, so that
    L_ROI does not undo the registration. With ``NoAnchor`` it is plain conditional diffusion.

    Args:
        anchor: maps a batch to an ``Anchor``.
        network: builds the U-Net that predicts one volume from three (r_t, mu, log s), given its
            channels of state and output.
        loss: L_ROI of Eq. 2 in the training objective.
        reference_loss: what the anchor's mean minimises against the reference, beside L_ROI.
        guidance_loss: L_ROI of Eq. 2 in guidance, with its own fidelity weights.
        alpha_bars: the schedule, index 0 cleanest.
        sampler: maps (denoise, x_T, levels, guide) to x_0.
        steps: levels visited when sampling.
        members: K, ensemble members sampled together.
        guidance: strengths at sampling.
        weights: of the training objective.
        optimizer: built but for its parameters.
        shares: of the training steps: for the registration, the anchor and the denoiser.
        warmup_steps: of the learning rate, in each of the three stages.
        parameterisation: what the network predicts: v, eps or x_0.
        lesion_head: frozen network from F to lesion probability; None turns gamma off.
        seed: of the noise, in training and in sampling.
    """

    def __init__(
        self,
        anchor: nn.Module,
        network: Callable[..., FusionUNet],
        loss: ClinicalRoiLoss,
        reference_loss: ReferenceLoss,
        guidance_loss: ClinicalRoiLoss,
        alpha_bars: Float[Tensor, " n"],
        levels: Callable[[Tensor, int], Tensor],
        sampler: Callable[..., Tensor],
        steps: int,
        members: int,
        guidance: Guidance,
        weights: LossWeights,
        optimizer: Optim,
        shares: Sequence[float],
        warmup_steps: int = 50,
        parameterisation: str = "v",
        lesion_head: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"expected three shares of training that sum to 1, got {list(shares)}")
        self.anchor, self.loss, self.guidance_loss = anchor, loss, guidance_loss
        self.reference_loss = reference_loss
        self.network = network(state_channels=3, out_channels=1)
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)
        self.levels, self.sampler, self.steps, self.members = levels, sampler, steps, members
        self.guidance, self.weights, self.optimizer = guidance, weights, optimizer
        self.shares, self.warmup_steps = tuple(shares), warmup_steps
        self.parameterisation, self.lesion_head, self.seed = parameterisation, lesion_head, seed

    alpha_bars: Tensor

    # Sampling: Algorithm 1.

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """The predictive mean over the ensemble."""
        return self.ensemble(batch).mean(0)

    def ensemble(self, batch: FusionBatch) -> Float[Tensor, "k b 1 *dhw"]:
        """``members`` samples of F, their noise drawn per case and moment-matched."""
        k = self.members
        with torch.no_grad():
            anchor = self.anchor(batch)
            condition = self.network.encode(batch.mri, anchor.ct, anchor.roi).repeat(k)
        anchors = anchor.repeat(k)
        noise = [
            ensemble_noise(mean.expand(k, *mean.shape[1:]), k, case_generator(case, self.seed))
            for mean, case in zip(anchor.mean.split(1), batch.case_id, strict=True)
        ]
        r_0 = self.sampler(
            self._denoiser(anchors, condition),
            torch.cat(noise),
            self.levels(self.alpha_bars, self.steps),
            guide=self._guide(batch.repeat(k), anchors),
        )
        fused = (anchors.mean + anchors.scale * r_0).clamp(-1, 1)
        return rearrange(fused, "(b k) ... -> k b ...", k=k)

    def _denoiser(self, anchor: Anchor, condition: Any) -> Denoiser:
        fixed = torch.cat([anchor.mean, anchor.scale.log()], 1)

        def denoise(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
            prediction = self.network(torch.cat([x_t, fixed], 1), condition, alpha_bar_t).float()
            return x0_from_prediction(prediction, x_t, alpha_bar_t, self.parameterisation)

        return denoise

    def _guide(self, batch: FusionBatch, anchor: Anchor) -> Guide | None:
        settings = self.guidance
        if settings.eta == 0 and settings.eta_u == 0:
            return None

        def loss(x0_hat: Tensor) -> Tensor:
            fused = anchor.mean + anchor.scale * x0_hat
            sources = (batch.mri, anchor.ct, anchor.roi > 0.5)
            return roi_loss(self.guidance_loss, fused, batch, *sources, self.lesion_head)

        return roi_guide(
            loss,
            eta=settings.eta,
            eta_u=settings.eta_u,
            kappa=settings.kappa,
            members=self.members,
            gradient=settings.gradient,
            start=settings.start,
            end=settings.end,
            reference_std=settings.reference_std,
        )

    # Training: Eq. 3 in three stages.

    @property
    def stage_ends(self) -> tuple[int, int, int]:
        """The training steps at which registration, anchor and denoiser are done."""
        steps = int(self.trainer.estimated_stepping_batches)
        registration = round(self.shares[0] * steps)
        return registration, registration + round(self.shares[1] * steps), steps

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        registration_end, anchor_end, _ = self.stage_ends
        if self.global_step < registration_end:
            losses = self._registration_step(batch)
        elif self.global_step < anchor_end:
            losses = self._anchor_step(batch)
        else:
            losses = self._denoiser_step(batch)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
        )
        return losses["loss"]

    def _registration_step(self, batch: FusionBatch) -> dict[str, Tensor]:
        brain = batch.brain.to(batch.mri.dtype)
        registration = getattr(self.anchor, "registration")  # noqa: B009
        guess, log_scale = registration.synthesise(batch.mri, brain)
        return {"loss": synthesis_loss(guess, log_scale, clean_ct_of(batch)).mean()}

    def _anchor_step(self, batch: FusionBatch) -> dict[str, Tensor]:
        anchor, truth = self.anchor(batch), reference_of(batch)
        error = anchor.mean - truth
        losses = {
            "reference": self.reference_loss(anchor.mean, truth, batch.spacing_mm).mean(),
            "roi": clean_roi_loss(self.loss, anchor.mean, batch, self.lesion_head).mean(),
            "scale": gaussian_nll(error.detach(), anchor.scale.log()).mean(),
        }
        weights = {"reference": 1.0, **vars(self.weights)}
        losses["loss"] = sum(
            (weights[name] * value for name, value in losses.items()), 0 * error.sum()
        )
        return losses

    def _denoiser_step(self, batch: FusionBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            anchor = self.anchor(batch)
        r_0 = ((reference_of(batch) - anchor.mean) / anchor.scale).clamp(
            -MAX_RESIDUAL, MAX_RESIDUAL
        )
        generator = step_generator(self.global_step, self.seed)
        t = torch.randint(len(self.alpha_bars), (len(batch),), generator=generator)
        alpha_bar_t = self.alpha_bars[t.to(r_0.device)]
        eps = torch.randn(r_0.shape, generator=generator).to(r_0.device)
        x_t = q_sample(r_0, eps, alpha_bar_t)
        condition = self.network.encode(batch.mri, anchor.ct, anchor.roi)
        fixed = torch.cat([anchor.mean, anchor.scale.log()], 1)
        prediction = self.network(torch.cat([x_t, fixed], 1), condition, alpha_bar_t).float()
        target = target_for(self.parameterisation, r_0, eps, alpha_bar_t)
        losses = {"diffusion": diffusion_loss(prediction, target).mean()}
        losses["loss"] = losses["diffusion"]
        if self.weights.roi:
            x0_hat = x0_from_prediction(prediction, x_t, alpha_bar_t, self.parameterisation)
            fused = anchor.mean + anchor.scale * x0_hat
            roi = clean_roi_loss(self.loss, fused, batch, self.lesion_head)
            losses["roi"] = (noise_level_weight(alpha_bar_t) * roi).mean()
            losses["loss"] = losses["loss"] + self.weights.roi * losses["roi"]
        return losses

    def configure_optimizers(self) -> Any:
        registration_end, anchor_end, end = self.stage_ends
        registration = getattr(self.anchor, "registration", None)
        first = [] if registration is None else list(registration.parameters())
        of_first = {id(parameter) for parameter in first}
        rest = [p for p in self.anchor.parameters() if id(p) not in of_first]
        stages = [
            (first, 0, registration_end),
            (rest, registration_end, anchor_end),
            (list(self.network.parameters()), anchor_end, end),
        ]
        trained = [stage for stage in stages if stage[0]]
        return staged_optimizer(self.optimizer, trained, self.warmup_steps)


def synthesis_loss(
    guess: Float[Tensor, "b 1 *dhw"],
    log_scale: Float[Tensor, "b 1 *dhw"],
    clean_ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """What trains the guess of the CT: squared error, and the likelihood of its error scale."""
    error = guess - clean_ct
    likelihood = gaussian_nll(error.detach(), log_scale)
    return (10 * error.square() + 0.1 * likelihood).flatten(1).mean(1)
