"""A student of CLIN-FuseDiff++: what its teacher samples in many guided steps, in 1, 2 or 4."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.diffusion.ensemble import centred_estimate, ensemble_mean, ensemble_noise
from clinfuse.diffusion.process import x0_between, x0_from_prediction
from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.functional.regional import regional_mean
from clinfuse.methods.base import (
    FusionMethod,
    Optim,
    Stage,
    case_places,
    staged_optimizer,
    step_generator,
)
from clinfuse.methods.roi_diffusion import (
    RoiDiffusion,
    guiding_sources,
    member_noise,
    members_of,
)
from clinfuse.networks.kept_memory import memory_by_size
from clinfuse.networks.registered_blend import Anchor
from clinfuse.types import Denoiser, FusionBatch


class DistilledFusion(FusionMethod):
    """Few steps and no gradient: the guided walk of a teacher, learned.

    The members of a centred teacher are its anchor's mean, moved by the guidance, and a spread
    about that whose mean is 0. Two networks learn the two. ``mean_network`` says in one evaluation
    where the guidance takes the mean: so far towards the MRI in the brain, so far towards the CT
    in bone, and what else there is in units of s(c). ``network`` starts as the teacher's denoiser
    and learns to cross in one step what took the teacher several: its target is the x_0 by which
    a single DDIM step from the teacher's x_t arrives at the teacher's x_t', k levels on (Salimans
    & Ho 2022, appendix G, whose halvings are here taken at once). Neither asks for a gradient when
    it samples, so a study costs steps + 1 evaluations, and its memory is that of a forward pass.

    What the guidance was is learned: another eta, alpha or beta needs another student.

    Args:
        teacher: a trained ``RoiDiffusion``, whose ensemble is centred and guided by its mean; its
            weights come by ``learn_from``, or with the student's own.
        steps: of the student.
        members: K, ensemble members sampled together.
        teacher_steps: of the walk that is learned, a multiple of ``steps``.
        teacher_members: of the walk that is learned.
        spread_weight: of the spread's loss beside the mean's.
        optimizer: built but for its parameters.
        warmup_steps: of the learning rate.
        lesion_head: frozen network from F to lesion probability, of the teacher's guidance.
        seed: of the noise, in training and in sampling.

    Raises:
        ValueError: for a teacher of another kind, or steps that do not divide its own.
    """

    def __init__(
        self,
        teacher: RoiDiffusion,
        steps: int,
        members: int,
        teacher_steps: int,
        teacher_members: int,
        optimizer: Optim,
        spread_weight: float = 0.1,
        warmup_steps: int = 20,
        lesion_head: torch.nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not (teacher.centred and teacher.guidance.of_mean and teacher.guidance.gradient == "x0"):
            raise ValueError(
                "expected a teacher whose ensemble is centred and guided by its mean at x_0 "
                "(centred=true, of_mean=true, gradient=x0), got one that is not"
            )
        if steps < 1 or teacher_steps % steps:
            raise ValueError(
                f"expected teacher_steps as a multiple of steps, got {teacher_steps} and {steps}"
            )
        if min(members, teacher_members) < 2:
            raise ValueError(
                f"expected at least 2 members, got {members}, of the teacher {teacher_members}"
            )
        teacher.members, teacher.steps = teacher_members, teacher_steps
        teacher.lesion_head = lesion_head
        self.teacher = teacher.requires_grad_(False)
        self.network = teacher.network_like(state_channels=1, known_channels=2, out_channels=1)
        self.mean_network = teacher.network_like(state_channels=0, known_channels=2, out_channels=3)
        self.steps, self.members = steps, members
        self.optimizer, self.warmup_steps = optimizer, warmup_steps
        self.spread_weight, self.seed = spread_weight, seed

    sampling_version = 2
    sampling_only = ("members",)

    @property
    def lesion_head(self) -> torch.nn.Module | None:
        return self.teacher.lesion_head

    @property
    def guidance(self) -> Any:
        return self.teacher.guidance

    def learn_from(self, teacher: RoiDiffusion) -> None:
        """Take a trained teacher's weights, and begin where its denoiser is."""
        own = self.teacher.state_dict()
        self.teacher.load_state_dict({n: w for n, w in teacher.state_dict().items() if n in own})
        self.network.load_state_dict(teacher.network.state_dict())

    @memory_by_size
    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """The predictive mean: the anchor's, moved as the guidance would."""
        with torch.no_grad():
            anchor = self.teacher.anchor(batch)
            return (anchor.mean + self.shift(batch, anchor)).clamp(-1, 1)

    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks, the CT's own moved with it by the anchor."""
        return self.teacher.registered_roi(batch)

    @memory_by_size
    def ensemble(self, batch: FusionBatch) -> Float[Tensor, "k b 1 *dhw"]:
        """``members`` samples of F; their mean is what ``fuse`` returns."""
        with torch.no_grad():
            return self._sample(batch, self.teacher.anchor(batch))

    @memory_by_size
    def model_draws(self, batch: FusionBatch) -> Float[Tensor, "m k b 1 *dhw"]:
        """``ensemble``, then the same from each further anchor of the teacher's."""
        anchors = (self.teacher.anchor, *self.teacher.other_anchors)
        with torch.no_grad():
            return torch.stack([self._sample(batch, anchor(batch)) for anchor in anchors])

    def add_draw(self, weights: Mapping[str, Tensor]) -> None:
        """Take the anchor of another point of the teacher's training as a model draw."""
        self.teacher.add_draw(weights)

    def shift(self, batch: FusionBatch, anchor: Anchor) -> Float[Tensor, "b 1 *dhw"]:
        """How far the guidance takes the mean of F, voxel by voxel."""
        sources = guiding_sources(batch, anchor, self.guidance.tolerance_mm)
        return self._shift_towards(anchor, *sources)

    def _shift_towards(self, anchor: Anchor, mri: Tensor, ct: Tensor, roi: Tensor) -> Tensor:
        condition = self.mean_network.encode(mri, ct, roi, _known(anchor))
        to_mri, to_ct, rest = self.mean_network(None, condition).float().split(1, 1)
        del condition
        brain, bone, _ = roi.split(1, 1)
        pulled = brain * to_mri * (mri - anchor.mean) + bone * to_ct * (ct - anchor.mean)
        return pulled + anchor.scale * rest

    def _sample(self, batch: FusionBatch, anchor: Anchor) -> Tensor:
        shift = self.shift(batch, anchor)  # before there are members, whose memory it would add to
        x_T = member_noise(batch, anchor, self.members, self.seed)
        spread = ddim(self._denoiser(anchor, self.members), x_T, self._levels(self.steps))
        del x_T
        return members_of(anchor, spread, self.members).add_(shift)

    def _levels(self, steps: int) -> Tensor:
        return self.teacher.levels(self.teacher.alpha_bars, steps)

    def _denoiser(self, anchor: Anchor, members: int) -> Denoiser:
        condition = self.network.encode(anchor.mri, anchor.ct, anchor.roi, _known(anchor))

        def denoise(x_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
            prediction = self.network(x_t, condition, alpha_bar_t).float()
            x0_hat = x0_from_prediction(prediction, x_t, alpha_bar_t, self.teacher.parameterisation)
            return centred_estimate(x0_hat, x_t, alpha_bar_t, members)

        return denoise

    # Training: the teacher walks, the student learns every stretch of its way.

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        with torch.no_grad():
            anchor = self.teacher.anchor(batch)
        states, r_0 = self._taught(batch, anchor, case_places(self, len(batch), batch_idx))
        losses = {
            "mean": self._mean_loss(batch, anchor, ensemble_mean(r_0, self.teacher.members)),
            "spread": self._spread_loss(anchor, states),
        }
        losses["loss"] = losses["mean"] + self.spread_weight * losses["spread"]
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    @torch.no_grad()
    def _taught(
        self, batch: FusionBatch, anchor: Anchor, places: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """The teacher's x_t at the student's levels and its r_0, then r_0 as it is."""
        k, step = self.teacher.members, self.global_step
        noise = [
            ensemble_noise(
                mean.expand(k, *mean.shape[1:]), k, step_generator(step, self.seed, place)
            )
            for mean, place in zip(anchor.mean.split(1), places, strict=True)
        ]
        visited: list[Tensor] = []
        r_0 = self.teacher.walk(batch, anchor, torch.cat(noise), self.teacher.steps, visited.append)
        return [*visited[:: self.teacher.steps // self.steps], r_0], r_0

    def _mean_loss(self, batch: FusionBatch, anchor: Anchor, taught: Tensor) -> Tensor:
        """Squared error of F's mean over the whole, and again in each region by itself."""
        sources = guiding_sources(batch, anchor, self.guidance.tolerance_mm)
        error = (self._shift_towards(anchor, *sources) - anchor.scale * taught).square()
        roi = sources[2]
        regions = [torch.ones_like(roi[:, :1]), *roi.split(1, 1)]
        means = [regional_mean(error, region).nan_to_num(0) for region in regions]
        return 100 * torch.stack(means).sum(0).mean()

    def _spread_loss(self, anchor: Anchor, states: list[Tensor]) -> Tensor:
        """Mean over the steps of the squared error of x_0, weighed by max(SNR, 1).

        The truncated weight of Salimans & Ho (2022), section 4, held below 100.
        """
        k, levels = self.teacher.members, [*self._levels(self.steps).tolist(), 1.0]
        centre = partial(_centred, members=k)
        spreads = [centre(x_t) for x_t in states]
        denoise = self._denoiser(anchor, k)
        losses = []
        for i, (x_t, after) in enumerate(pairwise(spreads)):
            now = x_t.new_full((len(x_t),), levels[i])
            target = x0_between(x_t, after, now, x_t.new_full((len(x_t),), levels[i + 1]))
            weight = min(max(levels[i] / (1 - levels[i]), 1.0), 100.0)
            losses.append(weight * (denoise(x_t, now) - target).square().mean())
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        trained = [*self.network.parameters(), *self.mean_network.parameters()]
        return staged_optimizer(self.optimizer, [Stage(trained, 0, end)], self.warmup_steps)


def _known(anchor: Anchor) -> Tensor:
    """What both networks know of the anchor itself."""
    return torch.cat([anchor.mean, anchor.scale.log()], 1)


def _centred(x: Float[Tensor, "bk 1 *dhw"], members: int) -> Float[Tensor, "bk 1 *dhw"]:
    by_case = rearrange(x, "(b k) ... -> b k ...", k=members)
    return rearrange(by_case - by_case.mean(1, keepdim=True), "b k ... -> (b k) ...")
