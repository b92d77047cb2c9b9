"""Diff-FCCF: one diffusion U-Net fuses, registers and denoises a pair in full colour."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.diffusion.process import noise_like, q_sample, x0_from_eps
from clinfuse.functional.warp import rigid_displacement, warp
from clinfuse.losses.deformation import folding, roughness
from clinfuse.losses.sources import SourceLoss
from clinfuse.losses.weight_policy import WeightPolicy
from clinfuse.methods.base import (
    FusionMethod,
    Optim,
    Stage,
    case_generator,
    case_places,
    staged_optimizer,
    step_generator,
)
from clinfuse.networks.diff_fccf import (
    ANATOMY,
    BOTH,
    FUNCTION,
    SOURCE_NOISE,
    DiffFccfNetwork,
    Heads,
    Sight,
)
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.types import FusionBatch, SliceBatch

AIR = -0.9
"""Brighter than this in either source is something to register."""

MISPLACED_MM = 1.0
"""An error of the deformation that costs as much as a picture that is wrong by 1 everywhere."""

TERMS = ("noise", "folding", "smoothness", "fusion", "quality")
"""Terms of the loss."""


@dataclass(frozen=True)
class Step:
    """What the network makes of a noisy picture.

    Attributes:
        fused: the blend, which is the estimate x0_hat.
        registered: the functional source without its noise, moved by u.
        heads: what it is made with.
    """

    fused: Float[Tensor, "b 3 *dhw"]
    registered: Float[Tensor, "b 3 *dhw"]
    heads: Heads


@dataclass
class StageResult:
    """What a stage of the inference hands on.

    Attributes:
        sight: what it was conditioned on.
        start: the noisy picture that it began with.
        picture: Y, Cb and Cr in [-1, 1] at its end.
        displacement_mm: u of all its steps.
    """

    sight: Sight
    start: Float[Tensor, "b 3 *dhw"]
    picture: Float[Tensor, "b 3 *dhw"]
    displacement_mm: Float[Tensor, "b n *dhw"]


class DiffFccf(FusionMethod):
    """Diffusion of the fused picture in Y, Cb and Cr, by blends of the sources with its estimate.

    x_0 is the fused picture. The network's three heads say what the noise is, of the diffusion and
    of the two sources; where the functional source belongs on the anatomical one; and how much of
    each voxel comes from which of them, its noise subtracted, or from the diffusion's own estimate.
    The blend of the three is x0_hat (method.md section 7). A blend of noisy sources could not be
    without noise whatever its shares, and the last stage, which mixes the anatomical source with a
    picture that holds it already, would have more of it than their average.

    Inference is hierarchical. In the noisiest third of the schedule the condition is the functional
    source alone, in the middle third both, in the last the anatomical one. Each stage is a walk by
    the sampler to a whole picture, and the next begins at this picture with its own first level's
    noise. Where the functional source is seen no more, the picture so far stands in its place.

    What the public description leaves open: where a study has no reference, x_0 is the clean pair
    blended by the network's own masks; and the quality term holds u against the jitter that moved
    the functional source, known in training, besides holding pictures against pictures.

    A grey study is one whose chroma is 0.

    Args:
        network: builds ``FusionUNet`` but for its channels.
        spatial_dims: 2 or 3.
        alpha_bars: the schedule, index 0 cleanest; at least three levels.
        levels: maps (levels, steps) to those that a walk visits.
        sampler: maps (denoise, x_T, levels) to x_0.
        steps_per_stage: levels visited in each of the three.
        fusion: what the fused luma keeps of its two sources.
        policy: weights of the five terms.
        optimizer: built but for its parameters.
        warmup_steps: of the learning rate.
        graph_order: terms of the Chebyshev polynomials.
        max_mm: the farthest that one step moves the functional source along an axis.
        noise_std: of the noise that a training draw adds to the sources, at most; in model space.
        members: samples whose mean is the fused picture.
        seed: of the noise, in training and in sampling.

    Raises:
        ValueError: fewer than three levels, fewer than one step or member, or other terms to weigh
            than ``TERMS``.
    """

    def __init__(
        self,
        network: Callable[..., FusionUNet],
        spatial_dims: int,
        alpha_bars: Float[Tensor, " n"],
        levels: Callable[[Tensor, int], Tensor],
        sampler: Callable[..., Tensor],
        steps_per_stage: int,
        fusion: SourceLoss,
        policy: WeightPolicy,
        optimizer: Optim,
        warmup_steps: int = 50,
        graph_order: int = 3,
        max_mm: float = 8.0,
        noise_std: float = 0.0,
        members: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(alpha_bars) < 3 or steps_per_stage < 1 or members < 1:
            raise ValueError(
                "expected a schedule of at least 3 levels, and steps and members of at least 1, "
                f"got {len(alpha_bars)}, {steps_per_stage} and {members}"
            )
        if set(policy.base) != set(TERMS):
            raise ValueError(f"expected a weight for each of {TERMS}, got {sorted(policy.base)}")
        self.network = DiffFccfNetwork(network, spatial_dims, graph_order, max_mm)
        self.register_buffer("alpha_bars", alpha_bars, persistent=False)
        self.levels, self.sampler, self.steps_per_stage = levels, sampler, steps_per_stage
        self.fusion, self.policy = fusion, policy
        self.optimizer, self.warmup_steps = optimizer, warmup_steps
        self.noise_std, self.members, self.seed = noise_std, members, seed
        self.steps = 3 * steps_per_stage

    alpha_bars: Tensor

    # Sampling: three stages.

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """The luma of ``fuse_colour``."""
        return self.ensemble(batch).mean(0).clamp(-1, 1)

    def fuse_colour(self, batch: FusionBatch) -> Float[Tensor, "b 3 *dhw"]:
        """Y in [-1, 1], and Cb and Cr in [-0.5, 0.5] as ``SliceBatch.chroma`` has them.

        Colours that RGB does not have are possible, as after any change of luma
        (``functional.colour.into_gamut``).
        """
        luma, chroma = self._pictures(batch).mean(0).clamp(-1, 1).tensor_split([1], 1)
        return torch.cat([luma, chroma / 2], 1)

    def fused_chroma(self, batch: SliceBatch) -> Float[Tensor, "b 2 *dhw"] | None:
        """The chroma of ``fuse_colour``; None for a pair that is grey by its kind."""
        return None if batch.chroma is None else self.fuse_colour(batch)[:, 1:]

    def ensemble(self, batch: FusionBatch) -> Float[Tensor, "k b 1 *dhw"]:
        """Lumas of ``members`` samples, their noise drawn per case."""
        return self._pictures(batch)[:, :, :1]

    def displacement_mm(self, batch: FusionBatch) -> Float[Tensor, "b n *dhw"]:
        """u of the stage that sees both sources, the members' mean."""
        u = self.stages(batch)[1].displacement_mm
        return rearrange(u, "(b k) ... -> k b ...", k=self.members).mean(0)

    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks, the functional source's own moved with it by u."""
        brain, bone, lesion = batch.roi.split(1, 1)
        moved = warp(bone.to(batch.ct.dtype), self.displacement_mm(batch), batch.spacing_mm)
        return torch.cat([brain, moved > 0.5, lesion], 1)

    @torch.no_grad()
    def stages(self, batch: FusionBatch) -> list[StageResult]:
        """The three stages of the inference, every case ``members`` times in place."""
        k = self.members
        generators = [case_generator(case, self.seed) for case in batch.case_id]
        batch = batch.repeat(k)
        functional = functional_of(batch)
        picture, results = torch.zeros_like(functional), []
        for sight, (first, end) in self._thirds():
            shown = functional if sight.function else picture
            walk = Walk(self, sight, shown, batch)
            levels = self.levels(self.alpha_bars[first:end], self.steps_per_stage)
            noise = torch.cat([noise_like(functional[:k], generator) for generator in generators])
            start = q_sample(picture, noise, levels[0].expand(len(noise)))
            picture = self.sampler(walk.denoise, start, levels)
            results.append(StageResult(sight, start, picture, walk.displacement_mm))
        return results

    def _pictures(self, batch: FusionBatch) -> Tensor:
        return rearrange(self.stages(batch)[-1].picture, "(b k) ... -> k b ...", k=self.members)

    def _thirds(self) -> list[tuple[Sight, tuple[int, int]]]:
        """The stages in the order of the inference, and first level and end of each."""
        n = len(self.alpha_bars)
        third, two_thirds = n // 3, 2 * n // 3
        return [(FUNCTION, (two_thirds, n)), (BOTH, (third, two_thirds)), (ANATOMY, (0, third))]

    def look(
        self,
        x_t: Float[Tensor, "b 3 *dhw"],
        alpha_bar_t: Float[Tensor, " b"],
        anatomical: Float[Tensor, "b 1 *dhw"],
        functional: Float[Tensor, "b 3 *dhw"],
        batch: FusionBatch,
        sight: Sight,
    ) -> Step:
        """One evaluation of the network.

        Args:
            x_t: the noisy picture.
            alpha_bar_t: signal power kept in it.
            anatomical: luma of the anatomical source.
            functional: the functional source; the picture so far where it is not seen.
            batch: for its masks and voxel size.
            sight: what of them is seen.
        """
        seen = self.network.encode(anatomical, functional, batch.roi, sight)
        heads = self.network(x_t, seen, alpha_bar_t, batch.spacing_mm, sight)
        with torch.autocast(x_t.device.type, enabled=False):
            noise = heads.source_noise
            anatomical = (anatomical - noise[:, :1]).clamp(-1, 1)
            luma, chroma = functional[:, :1] - noise[:, 1:], functional[:, 1:]
            registered = torch.cat([luma.clamp(-1, 1), chroma], 1)
            if sight.registers:
                registered = warp(registered, heads.displacement_mm, batch.spacing_mm)
            denoised = x0_from_eps(x_t, heads.eps_hat, alpha_bar_t).clamp(-1, 1)
            return Step(heads.blend(anatomical, registered, denoised), registered, heads)

    # Training: five terms.

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        place = case_places(self, len(batch), batch_idx)[0]  # each rank draws for its own cases
        terms = self.terms(batch, step_generator(self.global_step, self.seed, place))
        weights = self.policy.weights()
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        self.log_dict(
            {"train/loss": total.detach()}
            | {f"train/{name}": term.detach() for name, term in terms.items()}
            | {f"weight/{name}": weight for name, weight in weights.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        if self._trainer is not None:  # all ranks steer by what all have seen
            terms = {n: self.trainer.strategy.reduce(t.detach().clone()) for n, t in terms.items()}
        self.policy.observe(terms, self._progress())
        return total

    def terms(self, batch: FusionBatch, generator: torch.Generator) -> dict[str, Float[Tensor, ""]]:
        """The loss's five terms on a batch, unweighted.

        The network looks twice, each time at sources with noise. First at both, and at a mixture of
        them as they lie, noised to a level of the middle third, as it does in that stage; from
        there come the deformation and the masks. Then with a random stage's condition at the fused
        picture, noised to one of the stage's levels; where that is the stage of both sources, the
        functional one is moved by the deformation, as in a walk's second step.

        Fused and registered pictures are compared with clean ones. The first term is the error in
        the noise of the diffusion and in that of the sources.
        """
        clean_anatomical, clean_functional = clean_pair(batch)
        anatomical, functional, noise = self._noisy(batch, clean_anatomical, generator)

        stages = self._thirds()
        alpha_bar_t = self._level(len(batch), *stages[1][1], generator)
        share = per_case(torch.rand(len(batch), generator=generator), batch.mri)
        so_far = functional_of(batch)
        so_far = torch.cat([torch.lerp(batch.mri, so_far[:, :1], share), so_far[:, 1:]], 1)
        x_t = q_sample(so_far, noise_like(so_far, generator), alpha_bar_t)
        seen = self.look(x_t, alpha_bar_t, anatomical, functional, batch, BOTH)
        u = seen.heads.displacement_mm
        x_0 = fused_target(seen.heads, clean_anatomical, clean_functional, batch.reference)
        mistaken = mistaken_noise(seen.heads, noise, BOTH)

        sight, third = stages[int(torch.randint(len(stages), (), generator=generator))]
        shown = functional if sight.function else seen.fused.detach()
        if sight.registers:
            moved = warp(torch.cat([functional, noise[:, 1:]], 1), u.detach(), batch.spacing_mm)
            shown, noise = moved[:, :-1], torch.cat([noise[:, :1], moved[:, -1:]], 1)
        alpha_bar_t = self._level(len(batch), *third, generator)
        eps = noise_like(x_0, generator)
        x_t = q_sample(x_0, eps, alpha_bar_t)
        step = self.look(x_t, alpha_bar_t, anatomical, shown, batch, sight)
        mistaken = (mistaken + mistaken_noise(step.heads, noise, sight)) / 2

        clean_luma = clean_functional[:, :1]
        with torch.autocast(u.device.type, enabled=False):
            fusion = self.fusion(seen.fused[:, :1], clean_anatomical, clean_luma, batch.spacing_mm)
            quality = (
                (seen.registered - clean_functional).square().mean()
                + (seen.fused - x_0).square().mean()
                + (step.fused - x_0).square().mean()
            )
            if batch.misregistration is not None:
                shown_at = torch.maximum(clean_anatomical, clean_luma) > AIR
                quality = quality + misplaced(u, batch, shown_at) / MISPLACED_MM**2
            return {
                "noise": (step.heads.eps_hat - eps).square().mean() + mistaken,
                "folding": folding(u, batch.spacing_mm).mean(),
                "smoothness": roughness(u, batch.spacing_mm).mean(),
                "fusion": fusion.total.mean(),
                "quality": quality,
            }

    def _noisy(
        self, batch: FusionBatch, clean_anatomical: Tensor, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 3 *dhw"], Float[Tensor, "b 2 *dhw"]]:
        """The sources with noise of a random size in each case's lumas, and what it is.

        The noise of an anatomical source that came noisy is all of it; the clean functional one
        lies elsewhere, and only what is added here is known of its noise.
        """
        lumas = torch.cat([batch.mri, batch.ct], 1)
        std = per_case(self.noise_std * torch.rand(len(batch), generator=generator), lumas)
        noisy = (lumas + std * noise_like(lumas, generator)).clamp(-1, 1)
        functional = torch.cat([noisy[:, 1:], functional_of(batch)[:, 1:]], 1)
        return noisy[:, :1], functional, noisy - torch.cat([clean_anatomical, batch.ct], 1)

    def _level(self, cases: int, first: int, end: int, generator: torch.Generator) -> Tensor:
        t = torch.randint(first, end, (cases,), generator=generator)
        return self.alpha_bars[t.to(self.alpha_bars.device)]

    def _progress(self) -> float:
        return self.global_step / max(int(self.trainer.estimated_stepping_batches), 1)

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        stage = Stage(list(self.network.parameters()), 0, end)
        return staged_optimizer(self.optimizer, [stage], self.warmup_steps)


class Walk:
    """The denoiser of a stage, which brings the functional source nearer with every step.

    Each step's u starts from where the steps before it have put the source, and the source is
    interpolated only once, along all of them.

    Attributes:
        displacement_mm: u of the steps so far.
    """

    displacement_mm: Float[Tensor, "b n *dhw"]

    def __init__(
        self, method: DiffFccf, sight: Sight, functional: Tensor, batch: FusionBatch
    ) -> None:
        self.method, self.sight, self.functional, self.batch = method, sight, functional, batch
        self.displacement_mm = functional.new_zeros(
            len(functional), functional.ndim - 2, *functional.shape[2:]
        )

    def denoise(
        self, x_t: Float[Tensor, "b 3 *dhw"], alpha_bar_t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b 3 *dhw"]:
        """x0_hat of a sampler's step."""
        batch, functional = self.batch, self.functional
        if self.sight.registers:
            functional = warp(functional, self.displacement_mm, batch.spacing_mm)
        step = self.method.look(x_t, alpha_bar_t, batch.mri, functional, batch, self.sight)
        if self.sight.registers:
            self.displacement_mm = composed(
                self.displacement_mm, step.heads.displacement_mm, batch.spacing_mm
            )
        return step.fused


def composed(
    first_mm: Float[Tensor, "b n *dhw"],
    second_mm: Float[Tensor, "b n *dhw"],
    spacing_mm: Float[Tensor, "b n"],
) -> Float[Tensor, "b n *dhw"]:
    """The displacement by which one warp does what warping by ``first`` and then ``second`` does.

    u(p) = u_2(p) + u_1(p + u_2(p)).
    """
    return second_mm + warp(first_mm, second_mm, spacing_mm)


def functional_of(batch: FusionBatch) -> Float[Tensor, "b 3 *dhw"]:
    """The functional source as it came: Y, and Cb and Cr scaled to [-1, 1]; those of grey are 0."""
    chroma = batch.chroma if isinstance(batch, SliceBatch) else None
    if chroma is None:
        return torch.cat([batch.ct, torch.zeros_like(batch.ct), torch.zeros_like(batch.ct)], 1)
    return torch.cat([batch.ct, 2 * chroma], 1)


def clean_pair(
    batch: FusionBatch,
) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 3 *dhw"]]:
    """The registered noise-free sources, as in ``FusionBatch.truth``, the functional one in colour.

    The chroma comes moved with its source and is moved back.
    """
    anatomical, luma, _ = batch.truth()
    chroma = functional_of(batch)[:, 1:]
    if batch.misregistration is not None:
        with torch.autocast(luma.device.type, enabled=False):
            shape = tuple(luma.shape[2:])
            back = rigid_displacement(batch.misregistration, shape, batch.spacing_mm)
            chroma = warp(chroma, back, batch.spacing_mm)
    return anatomical, torch.cat([luma, chroma], 1)


@torch.no_grad()
def fused_target(
    heads: Heads,
    clean_anatomical: Float[Tensor, "b 1 *dhw"],
    clean_functional: Float[Tensor, "b 3 *dhw"],
    reference: Float[Tensor, "b 1 *dhw"] | None,
) -> Float[Tensor, "b 3 *dhw"]:
    """x_0: the clean functional source's colour; as luma the reference, else a clean blend.

    The blend has the shares that the masks give the two sources, the denoised picture left out.
    """
    luma = reference
    if luma is None:
        share = heads.luma_logits[:, :2].softmax(1)[:, 1:]
        luma = torch.lerp(clean_anatomical, clean_functional[:, :1], share)
    return torch.cat([luma, clean_functional[:, 1:]], 1)


def mistaken_noise(
    heads: Heads, noise: Float[Tensor, "b 2 *dhw"], sight: Sight
) -> Float[Tensor, ""]:
    """Mean squared error of the noise found in the sources that are seen, in its own unit."""
    seen = noise.new_tensor([sight.anatomy, sight.function])
    square = ((heads.source_noise - noise) / SOURCE_NOISE).square()
    return (square.transpose(0, 1).flatten(1).mean(1) * seen).sum() / seen.sum()


def per_case(values: Float[Tensor, " b"], like: Float[Tensor, "b c *dhw"]) -> Tensor:
    """A number a case, to multiply pictures with."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def misplaced(
    displacement_mm: Float[Tensor, "b n *dhw"],
    batch: FusionBatch,
    where: Bool[Tensor, "b 1 *dhw"],
) -> Float[Tensor, ""]:
    """Mean squared distance in mm^2 between u and the one that undoes the known motion."""
    assert batch.misregistration is not None
    shape = tuple(displacement_mm.shape[2:])
    true = rigid_displacement(batch.misregistration, shape, batch.spacing_mm)
    square = (displacement_mm - true).square().sum(1, keepdim=True) * where
    return square.sum() / where.sum().clamp(min=1)
