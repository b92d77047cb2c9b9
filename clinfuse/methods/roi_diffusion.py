"""CLIN-FuseDiff++: sample what a registration-aware blend leaves open, guided by L_ROI (Alg. 1)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.diffusion.ensemble import centred_estimate, ensemble_noise
from clinfuse.diffusion.guidance import Guide, roi_guide, together, walking_guide
from clinfuse.diffusion.process import (
    q_sample,
    target_for,
    x0_from_prediction,
)
from clinfuse.functional.regional import regional_mean, shares_of_moved
from clinfuse.functional.spacing import shared_spacing
from clinfuse.losses.denoising import denoising_loss
from clinfuse.losses.diffusion import diffusion_loss, noise_level_weight
from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.losses.most_kept import MostKept
from clinfuse.losses.reference import ReferenceLoss
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.losses.uncertainty import gaussian_nll, laplace_nll
from clinfuse.methods.base import (
    FusionMethod,
    Optim,
    Stage,
    case_generator,
    case_places,
    staged_optimizer,
    step_generator,
)
from clinfuse.methods.objective import (
    asked_of,
    clean_pair_of,
    clean_roi_loss,
    reference_of,
    roi_loss,
    within,
)
from clinfuse.networks.fusion_unet import Condition, FusionUNet
from clinfuse.networks.kept_memory import memory_by_size
from clinfuse.networks.registered_blend import Anchor, NoAnchor, RegisteredBlend
from clinfuse.networks.rigid_registration import (
    SynthesisRegistration,
    move,
    registration_error_mm,
)
from clinfuse.networks.source_denoiser import SourceDenoisers
from clinfuse.types import ROI_NAMES, Denoiser, FusionBatch

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
        lesion_start: highest noise level at which the lesion head reads F (Alg. 1 line 7): 1 is
            every step, 0.6 the last two of four with the cosine schedule.
        of_mean: whether L_ROI is that of the ensemble's mean, which is what is handed out: all
            members then move alike and keep their spread, at the price of one loss. False
            guides each member by itself.
        tolerance_mm: how far the anchor's registration may want to move the CT (root mean square
            over the brain) for bone to be guided to the CT as it was given all the same. A motion
            below the registration's own error says nothing, and moving the CT costs detail.
            A CT that the anchor's mean looks more like than like the registered one is taken as
            given too. 0 always guides to the registered CT, infinity to the CT as given, as the
            paper does.
        by_region: whether brain, bone and lesion each take a step of their own, as long as eta
            times their weight, and each only as far as it has to go; false follows the sum of the
            three, as Eq. 1 does. Through the denoiser it is always the sum.
        image_steps: whether the steps of brain, bone and lesion, each by itself, are measured in F.
            The paper's are, for it diffuses F; the residual's own leave F where the model is sure
            of it (s is small). What a source shows is to be had everywhere; what a lesion head
            would like to see, only where the model leaves it open.
        kept: beside Eq. 2, the climb that takes the ensemble's mean F at every level to where it
            keeps more of both sources as they were given, over the whole image. For pairs without
            regions; None, or one of 0 steps, leaves it out.
        kept_start: highest noise level at which it climbs.
    """

    eta: float
    eta_u: float
    kappa: float | None
    gradient: str = "x0"
    start: float = 1.0
    end: float = 0.0
    reference_std: float = 1.0
    lesion_start: float = 1.0
    of_mean: bool = True
    tolerance_mm: float = 0.0
    by_region: bool = True
    image_steps: Sequence[bool] = (True, True, False)
    kept: MostKept | None = None
    kept_start: float = 1.0

    def __post_init__(self) -> None:
        if len(self.image_steps) != len(ROI_NAMES):
            raise ValueError(
                f"expected one of image_steps for each of {ROI_NAMES}, got {list(self.image_steps)}"
            )


@dataclass(frozen=True)
class LossWeights:
    """Weights of the training objective's terms.

    Attributes:
        roi: lambda_roi of Eq. 3.
        scale: the anchor's Laplace likelihood, which trains s(c) alone.
        kept: what the anchor's mean loses of the clean sources (``SourceFidelity``).
        information: weight of VIF beside Qabf in that.
    """

    roi: float
    scale: float
    kept: float = 0.0
    information: float = 0.3


class RoiDiffusion(FusionMethod):
    """Denoise a volume conditioned on MRI, CT and the ROI masks: CLIN-FuseDiff++ (Alg. 1).

    What is diffused is the residual r = (F - mu(c)) / s(c) of an anchor (method.md section 3,
    "Diffusion must earn its place"). Training has three stages: what prepares the anchor's sources
    (their denoisers, the CT's registration), the anchor on sources so prepared, the denoiser on
    what the anchor leaves.
    The denoiser sees the sources as the anchor prepares them, and guidance pulls towards those, so
    that L_ROI undoes neither the registration nor the denoising. With ``NoAnchor`` it is plain
    conditional diffusion.

    Args:
        anchor: maps a batch to an ``Anchor``.
        network: builds the U-Net that predicts one volume from r_t, knowing mu and log s, given
            its channels of state, knowledge and output.
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
        shares: of the training steps: for the anchor's sources, the anchor and the denoiser.
        learning_rates: of the three stages, relative to the optimizer's.
        warmup_steps: of the learning rate, in each of the three stages.
        parameterisation: what the network predicts: v, eps or x_0.
        centred: whether the ensemble's mean follows the anchor and the guidance alone
            (``centred_estimate``); false lets the denoiser move it.
        lesion_head: frozen network from F to lesion probability; None turns gamma off.
        seed: of the noise, in training and in sampling.
    """

    needs_reference = True
    sampling_version = 3
    sampling_only = ("guidance_loss", "sampler", "steps", "members", "guidance", "centred")

    def __init__(
        self,
        anchor: RegisteredBlend | NoAnchor,
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
        learning_rates: Sequence[float] = (1.0, 1.0, 1.0),
        warmup_steps: int = 50,
        parameterisation: str = "v",
        centred: bool = True,
        lesion_head: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"expected three shares of training that sum to 1, got {list(shares)}")
        if shares[0] > 0 and anchor.registration is None and anchor.denoisers is None:
            raise ValueError(
                f"expected no share of training for the sources of an anchor that prepares none, "
                f"got {shares[0]}"
            )
        self.anchor, self.loss, self.guidance_loss = anchor, loss, guidance_loss
        self.reference_loss = reference_loss
        self.network_like = network
        self.network = network(state_channels=1, known_channels=2, out_channels=1)
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)
        self.levels, self.sampler, self.steps, self.members = levels, sampler, steps, members
        self.guidance, self.weights, self.optimizer = guidance, weights, optimizer
        self.shares, self.learning_rates = tuple(shares), tuple(learning_rates)
        self.warmup_steps = warmup_steps
        self.parameterisation, self.centred = parameterisation, centred
        self.lesion_head, self.seed = lesion_head, seed
        self.other_anchors = nn.ModuleList()

    alpha_bars: Tensor

    # Sampling: Algorithm 1.

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """The predictive mean over the ensemble."""
        return self.ensemble(batch).mean(0).clamp(-1, 1)

    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks, the CT's own moved with it by the anchor."""
        return self.anchor.registered_roi(batch)

    @memory_by_size
    def ensemble(self, batch: FusionBatch) -> Float[Tensor, "k b 1 *dhw"]:
        """``members`` samples of F, their noise drawn per case and moment-matched.

        They may leave model space by their noise; their mean is clamped. Clamping each would move
        the mean away from -1 in all the air, which whole-image SSIM sees.
        """
        with torch.no_grad():
            anchor = self.anchor(batch)
        return self.sample(batch, anchor)

    @memory_by_size
    def model_draws(self, batch: FusionBatch) -> Float[Tensor, "m k b 1 *dhw"]:
        """``ensemble``, then the same from each anchor of ``add_draw``.

        The noise is the same for all, so that what differs is the model. It is the anchor that
        makes the mean (``centred``), so it is the anchor whose doubt is epistemic.
        """
        with torch.no_grad():
            anchors = [anchor(batch) for anchor in (self.anchor, *self.other_anchors)]
        return torch.stack([self.sample(batch, anchor) for anchor in anchors])

    def add_draw(self, weights: Mapping[str, Tensor]) -> None:
        """Take the anchor of another point of the training as a model draw.

        Args:
            weights: names and values as in ``state_dict``; what is missing is as it is here.
        """
        anchor, prefix = copy.deepcopy(self.anchor), "anchor."
        named = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        anchor.load_state_dict(anchor.state_dict() | named)
        self.other_anchors.append(anchor.to(self.device).eval())

    def sample(self, batch: FusionBatch, anchor: Anchor) -> Float[Tensor, "k b 1 *dhw"]:
        """``ensemble`` from an anchor that is there already."""
        noise = member_noise(batch, anchor, self.members, self.seed)
        r_0 = self.walk(batch, anchor, noise, self.steps)
        return members_of(anchor, r_0, self.members)

    def walk(
        self,
        batch: FusionBatch,
        anchor: Anchor,
        x_T: Float[Tensor, "bk 1 *dhw"],
        steps: int,
        visit: Callable[[Tensor], None] | None = None,
    ) -> Float[Tensor, "bk 1 *dhw"]:
        """r_0 of every member at the end of a guided walk from its noise.

        Args:
            batch: for the guidance.
            anchor: of the batch.
            x_T: noise, the members of a case side by side.
            steps: levels visited.
            visit: called with x_t at each of them.
        """
        with torch.no_grad():
            denoise = self._denoiser(self._encode(anchor))
        guide = self._guide(batch, anchor)

        def visited(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
            if visit is not None:
                visit(x_t.detach())
            return denoise(x_t, alpha_bar_t)

        r_0: Tensor = self.sampler(visited, x_T, self.levels(self.alpha_bars, steps), guide=guide)
        if guide is not None:
            guide.warn_of_refused()
        return r_0

    def _encode(self, anchor: Anchor) -> Condition:
        known = torch.cat([anchor.mean, anchor.scale.log()], 1)
        return self.network.encode(anchor.mri, anchor.ct, anchor.roi, known)

    def _denoiser(self, condition: Condition) -> Denoiser:
        def denoise(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
            prediction = self.network(x_t, condition, alpha_bar_t).float()
            x0_hat = x0_from_prediction(prediction, x_t, alpha_bar_t, self.parameterisation)
            if self.centred and self.members > 1:
                return centred_estimate(x0_hat, x_t, alpha_bar_t, self.members)
            return x0_hat

        return denoise

    def _guide(self, batch: FusionBatch, anchor: Anchor) -> Guide | None:
        settings = self.guidance
        guides = []
        if settings.eta != 0 or settings.eta_u != 0:
            guides.append(self._roi_guide(batch, anchor))
        if settings.kept is not None and settings.kept.steps > 0:
            guides.append(self._kept_guide(batch, anchor, settings.kept))
        return together(guides) if guides else None

    def _kept_guide(self, batch: FusionBatch, anchor: Anchor, kept: MostKept) -> Guide:
        def walk(mean: Tensor) -> Tensor:
            fused = (anchor.mean + anchor.scale * mean).clamp(-1, 1)
            return mean + (kept.climbed(fused, batch.mri, batch.ct) - fused) / anchor.scale

        settings = self.guidance
        return walking_guide(walk, self.members, settings.kept_start, settings.end)

    def _roi_guide(self, batch: FusionBatch, anchor: Anchor) -> Guide:
        settings = self.guidance
        mri, ct, roi = guiding_sources(batch, anchor, settings.tolerance_mm)
        seen = 1 if settings.of_mean else self.members
        spacing_mm = shared_spacing(batch.spacing_mm)  # here: a loss that read it would wait
        distance_mm = batch.lesion_distance_mm
        if distance_mm is not None:
            distance_mm = repeated(distance_mm, seen)
        mean, scale, mri, ct, roi = (
            repeated(volume, seen) for volume in (anchor.mean, anchor.scale, mri, ct, roi)
        )

        image_scale = repeated(anchor.scale, self.members)
        weights: list[float] = [1.0]
        units: list[Tensor | float] = [1.0]
        if settings.by_region:
            weights = list(self.guidance_loss.weights)
            units = [image_scale if in_image else 1.0 for in_image in settings.image_steps]

        head: Callable[[Tensor], Tensor] | None = None
        if self.lesion_head is not None:
            head = within(self.lesion_head, asked_of(roi))

        def loss(
            x0_hat: Tensor, lesion_head: Callable[[Tensor], Tensor] | None
        ) -> tuple[Tensor, ...]:
            fused = mean + scale * x0_hat
            terms = roi_loss(
                self.guidance_loss, fused, mri, ct, roi, spacing_mm, distance_mm, lesion_head
            )
            return terms.by_region if settings.by_region else (terms.total,)

        return roi_guide(
            partial(loss, lesion_head=head),
            eta=settings.eta,
            eta_u=settings.eta_u,
            kappa=settings.kappa,
            members=self.members,
            gradient=settings.gradient,
            start=settings.start,
            end=settings.end,
            reference_std=settings.reference_std,
            early_loss=partial(loss, lesion_head=None),
            early_until=settings.lesion_start,
            of_mean=settings.of_mean,
            weights=weights if len(weights) > 1 else None,
            units=units,
            centred=self.centred and self.members > 1,
        )

    # Training: Eq. 3 in three stages.

    @property
    def stage_ends(self) -> tuple[int, int, int]:
        """The training steps at which sources, anchor and denoiser are done."""
        steps = int(self.trainer.estimated_stepping_batches)
        sources = round(self.shares[0] * steps)
        return sources, sources + round(self.shares[1] * steps), steps

    @property
    def draw_stages(self) -> list[tuple[int, int, tuple[str, ...]]]:
        """First step, end and names of the weights of each stage that model draws differ in."""
        sources_end, anchor_end, _ = self.stage_ends
        prepared = ("anchor.registration.", "anchor.denoisers.")
        return [(0, sources_end, prepared), (sources_end, anchor_end, ("anchor.network.",))]

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        sources_end, anchor_end, _ = self.stage_ends
        if self.global_step < sources_end:
            losses = self._sources_step(batch)
        elif self.global_step < anchor_end:
            losses = self._anchor_step(batch)
        else:
            losses = self._denoiser_step(batch, case_places(self, len(batch), batch_idx))
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    def _sources_step(self, batch: FusionBatch) -> dict[str, Tensor]:
        losses = source_losses(self.anchor.registration, self.anchor.denoisers, batch)
        return {**losses, "loss": torch.stack(list(losses.values())).sum()}

    def _anchor_step(self, batch: FusionBatch) -> dict[str, Tensor]:
        anchor, truth = self.anchor(batch), reference_of(batch)
        error = anchor.mean - truth
        losses = {
            "reference": self.reference_loss(anchor.mean, truth, batch.spacing_mm).mean(),
            "roi": clean_roi_loss(self.loss, anchor.mean, batch, self.lesion_head).mean(),
            "scale": scale_loss(error.detach(), anchor.scale),
        }
        if self.weights.kept:
            lost = SourceFidelity(1.0, self.weights.information)
            losses["kept"] = lost(anchor.mean, *clean_pair_of(batch)[:2]).mean()
        weights = {"reference": 1.0, **vars(self.weights)}
        losses["loss"] = sum(
            (weights[name] * value for name, value in losses.items()), 0 * error.sum()
        )
        return losses

    def _denoiser_step(self, batch: FusionBatch, places: Sequence[int]) -> dict[str, Tensor]:
        with torch.no_grad():
            anchor = self.anchor(batch)
        r_0 = ((reference_of(batch) - anchor.mean) / anchor.scale).clamp(
            -MAX_RESIDUAL, MAX_RESIDUAL
        )
        generators = [step_generator(self.global_step, self.seed, place) for place in places]
        levels, one = len(self.alpha_bars), (1, *r_0.shape[1:])
        t = torch.cat([torch.randint(levels, (1,), generator=each) for each in generators])
        alpha_bar_t = self.alpha_bars[t.to(r_0.device)]
        eps = torch.cat([torch.randn(one, generator=each) for each in generators]).to(r_0.device)
        x_t = q_sample(r_0, eps, alpha_bar_t)
        prediction = self.network(x_t, self._encode(anchor), alpha_bar_t).float()
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
        sources_end, anchor_end, end = self.stage_ends
        prepared = (self.anchor.registration, self.anchor.denoisers)
        first = [p for part in prepared if part is not None for p in part.parameters()]
        of_first = {id(parameter) for parameter in first}
        rest = [p for p in self.anchor.parameters() if id(p) not in of_first]
        rates = self.learning_rates
        stages = [
            Stage(first, 0, sources_end, rates[0]),
            Stage(rest, sources_end, anchor_end, rates[1]),
            Stage(list(self.network.parameters()), anchor_end, end, rates[2]),
        ]
        trained = [stage for stage in stages if stage.parameters]
        return staged_optimizer(self.optimizer, trained, self.warmup_steps)


def guiding_sources(
    batch: FusionBatch, anchor: Anchor, tolerance_mm: float
) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Float[Tensor, "b r *dhw"]]:
    """The MRI and CT that F is guided to, and the share of each voxel in each region.

    They are as the anchor prepares them, but for three things. A CT that the registration would
    move by less than ``tolerance_mm`` is taken as it was given, with its bone mask. So is one that
    the anchor's mean looks more like, in its bone, than like the registered one in that one's: the
    anchor has not believed its own registration (0 mm of tolerance believes it all the same). And
    bone ends where the brain begins: the brain mask is the MRI's own, and where a bone mask that
    was moved reaches into it, it is wrong.
    """
    mri, ct = anchor.mri, anchor.ct
    brain, bone, lesion = anchor.roi.split(1, 1)
    bone = shares_of_moved(bone)
    if anchor.registration is not None and tolerance_mm > 0:
        motion = anchor.registration.motion
        still = torch.eye(motion.shape[-1]).to(motion).expand_as(motion)
        wanted_mm = registration_error_mm(motion, still, brain, batch.spacing_mm)
        is_still = (wanted_mm < tolerance_mm) & (brain > 0).flatten(1).any(1)
        given, moved = (
            regional_mean((anchor.mean - source).square(), region)
            for source, region in ((batch.ct, batch.bone), (ct, bone))
        )
        is_given = is_still | (given < moved)
        is_given = is_given.reshape(-1, *[1] * (ct.ndim - 1))
        ct = torch.where(is_given, batch.ct, ct)
        bone = torch.where(is_given, batch.bone.to(bone.dtype), bone)
    return mri, ct, torch.cat([brain, bone * (1 - brain), lesion], 1)


def member_noise(
    batch: FusionBatch, anchor: Anchor, members: int, seed: int
) -> Float[Tensor, "bk 1 *dhw"]:
    """x_T of every member, moment-matched: what a case draws depends on it and the seed alone."""
    noise = [
        ensemble_noise(mean.expand(members, *mean.shape[1:]), members, case_generator(case, seed))
        for mean, case in zip(anchor.mean.split(1), batch.case_id, strict=True)
    ]
    return torch.cat(noise)


def members_of(
    anchor: Anchor, r_0: Float[Tensor, "bk 1 *dhw"], members: int
) -> Float[Tensor, "k b 1 *dhw"]:
    """F = mu + s r_0 of every member."""
    by_member = rearrange(r_0, "(b k) ... -> k b ...", k=members)
    return anchor.mean + anchor.scale * by_member


def repeated(volume: Tensor, times: int) -> Tensor:
    """Every case ``times`` times in place (a a b b)."""
    return volume if times == 1 else volume.repeat_interleave(times, 0)


def scale_loss(
    error: Float[Tensor, "b 1 *dhw"], scale: Float[Tensor, "b 1 *dhw"]
) -> Float[Tensor, ""]:
    """What trains s(c): the Laplace likelihood of the error, each voxel weighted by s itself.

    s is a standard deviation, learned from absolute errors. Squared ones are ruled by the few
    voxels where an edge went astray, which in a short training hold s too large everywhere else.
    Without the weight (Seitzer et al. 2022, beta = 1) the many voxels that are
    nearly right would rule instead, and those where the error is large count for little. Every case
    counts alike.
    """
    mean_absolute = (2 / math.pi) ** 0.5 * scale  # of a normal variable
    weight = scale.detach()
    weighted = weight * laplace_nll(error, mean_absolute.log())
    return (weighted.flatten(1).mean(1) / weight.flatten(1).mean(1)).mean()


def source_losses(
    registration: SynthesisRegistration | None,
    denoisers: SourceDenoisers | None,
    batch: FusionBatch,
) -> dict[str, Float[Tensor, ""]]:
    """What trains the networks that prepare the anchor's sources, each against a clean twin.

    The registration's guess of the CT has a squared error and the likelihood of its error scale;
    a denoised source a squared error, in its own region also by itself and as SSIM. The CT is
    denoised once moved, here by the true motion.
    """
    losses = {}
    clean_mri, clean_ct, roi = clean_pair_of(batch)
    if registration is not None:
        guess, log_scale = registration.synthesise(batch.mri, batch.brain.to(batch.mri.dtype))
        error = guess - clean_ct
        likelihood = gaussian_nll(error.detach(), log_scale)
        losses["guess"] = (10 * error.square() + 0.1 * likelihood).mean()
    if denoisers is not None:
        assert batch.misregistration is not None
        ct = move(batch.ct, batch.misregistration, batch.spacing_mm, refine=3).clamp(-1, 1)
        brain, bone, _ = roi.split(1, 1)
        for name, denoised, clean, region in (
            ("denoised_mri", denoisers.mri(batch.mri), clean_mri, brain),
            ("denoised_ct", denoisers.ct(ct), clean_ct, bone),
        ):
            losses[name] = denoising_loss(denoised, clean, region, batch.spacing_mm).mean()
    return losses
