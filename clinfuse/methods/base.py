"""What every fusion method is: something that fuses a batch, trained or not."""

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clinfuse.types import FusionBatch, SliceBatch


class FusionMethod(LightningModule):
    """Anything that fuses: a voxel rule, a regression, a diffusion model.

    ``fuse`` is the whole contract. A method whose answer is a distribution also overrides
    ``ensemble``; a method with weights also has a ``training_step``.
    """

    steps: int = 0
    """Network evaluations per sample; 0 for a rule."""

    sampling_version: int = 1
    """Raise when the same weights and settings give other samples: what was calibrated on those of
    before then no longer holds."""

    sampling_only: tuple[str, ...] = ()
    """Constructor arguments that no weight depends on: runs that differ in them alone are trained
    alike."""

    adaptation_seconds: Mapping[str, float] = MappingProxyType({})
    """By case, what adapting to it cost when it was fused last; empty where nothing adapts."""

    needs_reference: bool = False
    """Whether ``training_step`` compares with ``batch.reference``."""

    @abstractmethod
    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        """The fused volumes, in model space [-1, 1], on the MRI's grid."""

    def ensemble(self, batch: FusionBatch) -> Float[Tensor, "k b 1 *dhw"]:
        """Draws from the method's predictive distribution; their mean is what ``fuse`` returns.

        A deterministic method has one draw.
        """
        return self.fuse(batch)[None]

    def fused_chroma(self, batch: SliceBatch) -> Float[Tensor, "b 2 *dhw"] | None:
        """Cb and Cr that go with ``fuse``: the second source's, unless a method makes its own."""
        return batch.chroma

    def model_draws(self, batch: FusionBatch) -> Float[Tensor, "m k b 1 *dhw"]:
        """``ensemble`` by each of M models that the training could as well have ended with.

        What ``functional.calibration.total_variance`` splits into epistemic and aleatoric. A
        method of one model has one.
        """
        return self.ensemble(batch)[None]

    def registered_roi(self, batch: FusionBatch) -> Bool[Tensor, "b r *dhw"]:
        """The masks where the method believes they belong: as given, unless it registers."""
        return batch.roi

    def test_step(self, batch: FusionBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """All model draws; callbacks score them."""
        return self.model_draws(batch)

    def validation_step(self, batch: FusionBatch, batch_idx: int) -> Tensor:
        """All model draws; callbacks score them."""
        return self.model_draws(batch)

    @property
    def is_trainable(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())


Optim = Callable[[Iterable[Any]], Optimizer]
"""An optimiser but for its parameters: ``functools.partial(torch.optim.AdamW, lr=1e-4)``."""


def warmup_cosine(step: int, start: int, end: int, warmup: int) -> float:
    """Learning-rate factor: 0 before ``start``, linear to 1 over ``warmup`` steps, cosine to 0."""
    if step < start or step >= end:
        return 0.0
    done = step - start
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(end - start - warmup, 1)))


@dataclass(frozen=True)
class Stage:
    """Weights trained together, and when.

    Attributes:
        parameters: the weights.
        start: first training step.
        end: the step after the last.
        learning_rate: relative to the optimizer's.
    """

    parameters: Sequence[Parameter]
    start: int
    end: int
    learning_rate: float = 1.0

    def factor(self, warmup_steps: int) -> Callable[[int], float]:
        """Learning-rate factor of a step; the warm-up takes at most a quarter of the stage."""
        warmup = min(warmup_steps, max((self.end - self.start) // 4, 1))
        return lambda step: self.learning_rate * warmup_cosine(step, self.start, self.end, warmup)


def staged_optimizer(
    optimizer: Optim, stages: Sequence[Stage], warmup_steps: int
) -> dict[str, Any]:
    """One optimiser over the stages' weights, each trained in its own steps.

    Returns:
        What ``LightningModule.configure_optimizers`` may return.
    """
    built = optimizer([{"params": list(stage.parameters)} for stage in stages])
    scheduler = LambdaLR(built, [stage.factor(warmup_steps) for stage in stages])
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def case_generator(case_id: str, seed: int) -> torch.Generator:
    """Randomness that belongs to a case: the same whatever is fused beside it, before or after."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{case_id}".encode()))


def step_generator(step: int, seed: int, place: int = 0) -> torch.Generator:
    """Randomness that belongs to a training step, so that a resumed run repeats its losses.

    Args:
        step: the training step.
        seed: of the run.
        place: of a case among all that the step sees.
    """
    of_place = f"/{place}" if place else ""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/step {step}{of_place}".encode()))


def case_places(method: LightningModule, cases: int, batch_idx: int) -> range:
    """Where a batch's cases come among all that a training step sees.

    Of all ranks, and of all batches whose gradients are accumulated: what draws by place draws the
    same for 2 ranks with a case each, for 2 batches of one case, and for one batch of 2.
    """
    trainer = method._trainer
    rank, ranks, within = 0, 1, 0
    if trainer is not None:
        rank, ranks = trainer.global_rank, trainer.world_size
        within = batch_idx % trainer.accumulate_grad_batches
    first = (within * ranks + rank) * cases
    return range(first, first + cases)
