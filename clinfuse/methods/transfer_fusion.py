"""Transfer from visible-infrared to medical pairs: method.md section 7, transfer_fusion."""

import logging
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.spacing import shared_spacing
from clinfuse.losses.medical_fusion import MedicalFusionLoss
from clinfuse.methods.aims import aims_of
from clinfuse.methods.base import FusionMethod, Optim, Stage, staged_optimizer
from clinfuse.methods.initial_weights import StartsFromWeights, Weights, checkpoint_of_run, file_of
from clinfuse.networks.pretrained import load_weights, read_weights
from clinfuse.networks.transfer_fusion import TransferFusionNetwork
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


class TransferFusion(StartsFromWeights, FusionMethod):
    """F = network(c), trained on visible-infrared pairs first and then fine-tuned on medical ones.

    Each phase is a run of its own (``conf/experiment/transfer_*``): the second starts where the
    first has ended, and leaves the encoders as they are for its first epochs.

    Args:
        network: from both sources to F.
        loss: of both phases, against the reference, taken for both sources, where a case has one,
            else against its clean registered pair. Its medical term, always against the latter,
            needs masks.
        optimizer: built but for its parameters.
        weights: of the encoders, read when training starts: a file, or what brings one.
        start: folder of a run of this method to start from, in place of ``weights``. Without either
            the encoders are random, which the log says. A trained run has them in its checkpoint.
        freeze_epochs: for which the encoders are left as they are.
        warmup_steps: of the learning rate.
    """

    steps = 1

    def __init__(
        self,
        network: TransferFusionNetwork,
        loss: MedicalFusionLoss,
        optimizer: Optim,
        weights: Weights = None,
        start: str | Path | None = None,
        freeze_epochs: int = 0,
        warmup_steps: int = 50,
    ) -> None:
        super().__init__()
        if weights is not None and start is not None:
            raise ValueError(
                f"expected weights for the encoders or a run to start from, got both: {start}"
            )
        self.network, self.loss, self.optimizer = network, loss, optimizer
        self.weights, self.start = weights, start
        self.freeze_epochs, self.warmup_steps = freeze_epochs, warmup_steps

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return self._fused(batch).clamp(-1, 1)

    def _fused(self, batch: FusionBatch) -> Tensor:
        fused: Tensor = self.network(batch.mri, batch.ct, batch.ct_map)
        return fused

    def start_training(self) -> None:
        if self.start is not None:
            path = checkpoint_of_run(self.start)
            load_weights(self, read_weights(path), "a run of this method and this size", path)
        elif self.weights is not None:
            path = file_of(self.weights)
            for encoder in self.network.encoders:
                encoder.load(path)
        else:
            log.warning("no weights and no run to start from: both ResNets start at random")

    def on_train_epoch_start(self) -> None:
        for encoder in self.network.encoders:
            encoder.requires_grad_(self.current_epoch >= self.freeze_epochs)

    def training_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        spacing_mm = shared_spacing(batch.spacing_mm)
        terms = self.loss(self._fused(batch), aims_of(batch), batch.truth(), spacing_mm)
        losses = {"loss" if name == "total" else name: v for name, v in terms.means().items()}
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            batch_size=len(batch),
            sync_dist=True,
        )
        return losses["loss"]

    def configure_optimizers(self) -> Any:
        end = int(self.trainer.estimated_stepping_batches)
        epochs = max(self.trainer.max_epochs or 1, 1)
        thaw = min(round(end * self.freeze_epochs / epochs), end)
        encoders = [p for encoder in self.network.encoders for p in encoder.parameters()]
        known = {id(parameter) for parameter in encoders}
        rest = [p for p in self.network.parameters() if id(p) not in known]
        stages = [Stage(rest, 0, end), Stage(encoders, thaw, end)]
        return staged_optimizer(self.optimizer, stages, self.warmup_steps)
