"""Test-time training: a small fusion network adapted to each pair before it fuses it."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from clinfuse.functional.intensity import leaky_clamp
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.base import FusionMethod, Optim, Stage, case_generator, staged_optimizer
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


class PairFusion(nn.Module):
    """F = w I_C + (1 - w) I_M + d, with w and d from a ``FusionUNet``: untrained, the average.

    Args:
        network: builds the U-Net, given its channels of state and output.
    """

    def __init__(self, network: Callable[..., FusionUNet]) -> None:
        super().__init__()
        self.unet = network(state_channels=0, out_channels=2)

    def forward(
        self,
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        roi: Float[Tensor, "b r *dhw"],
    ) -> Float[Tensor, "b 1 *dhw"]:
        """F, next to model space where the correction leaves it."""
        logit, correction = self.unet(None, self.unet.encode(mri, ct, roi)).float().split(1, 1)
        return leaky_clamp(torch.lerp(mri, ct, logit.sigmoid()) + correction)


class TttFusion(FusionMethod):
    """Test-time training (Sun et al. 2020) of a fusion network, whose loss needs no truth anyway.

    The loss says how much of its two sources a fused image keeps, so it is there at inference too.
    ``fuse`` takes each case's own copy of the weights down it for some steps, on the pair mirrored
    at random, and fuses with the copy; the method's weights are never touched. They are what
    training left, by the same loss on many pairs, or the initial ones.

    Args:
        network: builds ``FusionUNet`` but for its channels.
        loss: of a fused image and its two sources.
        optimizer: of the training, built but for its parameters.
        adaptation: optimizer at inference, built but for its parameters; it brings the learning
            rate.
        adaptation_steps: of each case; 0 fuses with the weights as they are.
        max_gradient: norm that gradients are cut to while adapting.
        warmup_steps: of the learning rate in training.
        seed: of the mirroring.

    Raises:
        ValueError: a negative number of steps.
    """

    def __init__(
        self,
        network: Callable[..., FusionUNet],
        loss: SourceLoss,
        optimizer: Optim,
        adaptation: Optim,
        adaptation_steps: int = 20,
        max_gradient: float = 1.0,
        warmup_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if adaptation_steps < 0:
            raise ValueError(f"expected at least 0 adaptation steps, got {adaptation_steps}")
        self.network = PairFusion(network)
        self.loss, self.optimizer, self.adaptation = loss, optimizer, adaptation
        self.adaptation_steps, self.max_gradient = adaptation_steps, max_gradient
        self.warmup_steps, self.seed = warmup_steps, seed
        self.steps = 1 + adaptation_steps
        self.adaptation_seconds = {}

    adaptation_seconds: dict[str, float]

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """Each case fused by the weights adapted to it, whatever is fused beside it or before."""
        cases = [self._fuse_case(batch, index) for index in range(len(batch))]
        return torch.cat(cases).clamp(-1, 1)

    def _fuse_case(self, batch: FusionBatch, index: int) -> Tensor:
        case_id, only = batch.case_id[index], slice(index, index + 1)
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
            pair = [batch.mri[only], batch.ct[only], batch.roi[only].to(batch.ct.dtype)]
            pair = [volume.detach().clone() for volume in pair]  # inference tensors have no grad
            start = time.perf_counter()
            weights = self._adapted(pair, batch.spacing_mm[only].clone(), case_id)
            seconds = time.perf_counter() - start
        self.adaptation_seconds[case_id] = seconds
        log.info("%s: %d adaptation steps in %.2f s", case_id, self.adaptation_steps, seconds)
        with torch.no_grad():
            fused: Tensor = functional_call(self.network, weights, tuple(pair))
        return fused

    def _adapted(self, pair: list[Tensor], spacing_mm: Tensor, case_id: str) -> dict[str, Tensor]:
        """A copy of the weights after its descent."""
        weights = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self.network.named_parameters()
        }
        optimizer = self.adaptation(list(weights.values()))
        generator = case_generator(case_id, self.seed)
        axes = range(2, pair[0].ndim)
        for _ in range(self.adaptation_steps):
            mirrored = [axis for axis in axes if torch.rand((), generator=generator) < 0.5]
            mri, ct, roi = (volume.flip(mirrored) for volume in pair)
            fused = functional_call(self.network, weights, (mri, ct, roi))
            optimizer.zero_grad()
            self.loss(fused, mri, ct, spacing_mm).total.sum().backward()
            nn.utils.clip_grad_norm_(weights.values(), self.max_gradient)
            optimizer.step()
        return {name: weight.detach() for name, weight in weights.items()}

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        """The same loss on the weights themselves."""
        fused = self.network(batch.mri, batch.ct, batch.roi.to(batch.ct.dtype))
        terms = self.loss(fused, batch.mri, batch.ct, batch.spacing_mm).means()
        losses = {"loss" if name == "total" else name: value for name, value in terms.items()}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        stage = Stage(list(self.network.parameters()), 0, end)
        return staged_optimizer(self.optimizer, [stage], self.warmup_steps)
