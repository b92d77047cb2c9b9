"""Fusion on frozen ResNet features, the decoder learned: method.md section 7, resnet_fusion."""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.spacing import shared_spacing
from clinfuse.losses.perceptual import perceptual_distance
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.aims import aims_of
from clinfuse.methods.base import FusionMethod, Optim, Stage, staged_optimizer
from clinfuse.methods.initial_weights import StartsFromWeights, Weights, file_of
from clinfuse.networks.resnet_fusion import ResNetFusionNetwork
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


class ResNetFusion(StartsFromWeights, FusionMethod):
    """F = network(c), the network's encoder frozen; SSIM, gradient and perceptual loss.

    The perceptual loss is taken in the same frozen encoder's features. A layer's learning rate
    decays with its distance from F.

    Args:
        network: from both sources to F.
        loss: against the reference, taken for both sources, where a case has one; else against its
            clean registered pair.
        perceptual: weight of the perceptual loss.
        optimizer: built but for its parameters.
        weights: of the encoder, read when training starts: a file, or what brings one. Without them
            it is random, which the log says. A trained run has them in its checkpoint.
        layer_decay: of the learning rate, from one layer to the next away from F.
        perceptual_scales: how many of the encoder's, finest first.
        warmup_steps: of the learning rate.
    """

    steps = 1

    def __init__(
        self,
        network: ResNetFusionNetwork,
        loss: SourceLoss,
        perceptual: float,
        optimizer: Optim,
        weights: Weights = None,
        layer_decay: float = 0.9,
        perceptual_scales: int = 3,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        if not 0 < layer_decay <= 1:
            raise ValueError(f"expected layer_decay in (0, 1], got {layer_decay}")
        self.network, self.loss, self.perceptual = network, loss, perceptual
        self.optimizer, self.weights = optimizer, weights
        self.layer_decay, self.perceptual_scales = layer_decay, perceptual_scales
        self.warmup_steps = warmup_steps

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        fused: Tensor = self.network(batch.mri, batch.ct)
        return fused.clamp(-1, 1)

    def start_training(self) -> None:
        if self.weights is None:
            log.warning("no weights given for the ResNet: its frozen features are random ones")
        else:
            self.network.encoder.load(file_of(self.weights))

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        fused, aims = self.network(batch.mri, batch.ct), aims_of(batch)
        terms = self.loss(fused, *aims, shared_spacing(batch.spacing_mm))
        losses = {name: value for name, value in terms.means().items() if name != "total"}
        losses["perceptual"] = self.perceptual_distance(fused, *aims).mean()
        losses["loss"] = terms.total.mean() + self.perceptual * losses["perceptual"]
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    def perceptual_distance(self, fused: Tensor, mri: Tensor, ct: Tensor) -> Tensor:
        seen = [self.network.encoder(fused, self.perceptual_scales)]
        with torch.no_grad():
            seen += [self.network.encoder(aim, self.perceptual_scales) for aim in (mri, ct)]
        return perceptual_distance(*seen)

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        stages = [
            Stage(layer, 0, end, self.layer_decay**depth)
            for depth, layer in enumerate(self.network.layers())
        ]
        return staged_optimizer(self.optimizer, stages, self.warmup_steps)
