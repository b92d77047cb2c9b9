"""Training steps whose loss or gradient is not finite: skipped, counted, and kept to be repeated.

What stopped a run is repeated by two lines, wherever its folder is::

    method = build_method(run_config(folder))
    losses, gradient_norm = repeated(folder / "nonfinite_step_120.pt", method)
"""

import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from clinfuse.networks.pretrained import read_whole
from clinfuse.reporting.atomic import write_atomically
from clinfuse.types import FusionBatch, SliceBatch

log = logging.getLogger(__name__)

_BATCHES = {kind.__name__: kind for kind in (FusionBatch, SliceBatch)}


class NonFiniteGuard(Callback):
    """Skips training steps whose loss or gradient is NaN or inf, and stops where they go on.

    In a skipped step nothing learns: gradients are dropped before the optimizer sees them, so that
    weights, momenta and decay stay, buffers are put back, and the average isn't updated. It still
    is a step of the schedule. All ranks skip together. ``train/skipped_steps`` counts them.

    A step costs one number read back from the device, which says whether loss and gradient are
    finite, and a copy of those buffers that a step changes, as statistics of batches: which these
    are is seen in the first step of each epoch, before which all are copied.

    A gradient that overflows in float16 while the loss is finite is the gradient scaler's business
    (it skips the step itself and lowers its scale) and isn't counted, until the scale is down to 1.

    Args:
        folder: for ``nonfinite_step_STEP.pt``, what the last step was made of, when it stops: the
            batches, the random state, the weights; tensors and plain data, for ``repeated``.
        in_a_row: skipped steps after which it stops. As skipped steps change nothing, ten different
            batches in a row blame the weights or the data as a whole, not a batch.
        in_all: the same of a run. A hundred are half a percent of the default 20 000 steps.
    """

    def __init__(self, folder: str | Path, in_a_row: int = 10, in_all: int = 100) -> None:
        if in_a_row < 1 or in_all < 1:
            raise ValueError(f"expected limits of at least 1 step, got {in_a_row} and {in_all}")
        self.folder, self.in_a_row, self.in_all = Path(folder), in_a_row, in_all
        self.skipped, self.row = 0, 0
        self.cases: Counter[str] = Counter()
        self._changing: set[str] = set()
        self._knows_changing = False
        self._forget()

    def _forget(self) -> None:
        self._batches: list[Any] = []
        self._random: list[dict[str, Tensor]] = []
        self._losses: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "row": self.row, "cases": dict(self.cases)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.row = state_dict["skipped"], state_dict["row"]
        self.cases = Counter(state_dict["cases"])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._knows_changing = False  # what was frozen may learn from here on
        self._forget()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._batches:
            self._buffers = {
                name: buffer.clone()
                for name, buffer in pl_module.named_buffers()
                if name in self._changing or not self._knows_changing
            }
        self._batches.append(batch)
        self._random.append(random_state(pl_module.device))

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._losses.append(loss.detach().float())  # as scaled, which makes none finite or not

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._knows_changing:
            self._changing |= changed(pl_module, self._buffers)
            self._knows_changing = True
        norm = gradient_norm(optimizer)
        losses = torch.stack(self._losses or [torch.zeros_like(norm)])
        is_bad_loss, is_bad_gradient = are_bad(trainer, losses, norm)
        if (is_bad_loss or is_bad_gradient) and (is_bad_loss or _scale(trainer) <= 1):
            self._losses = [loss / _scale(trainer) for loss in self._losses]
            what = _fault(pl_module, losses.sum())
            self._skip(trainer, pl_module, optimizer)
            log.warning("step %d skipped: %s in %s", trainer.global_step, what, self._named())
            if self.row >= self.in_a_row or self.skipped >= self.in_all:
                self._stop(trainer, pl_module, what, float(norm))
        else:
            self.row = 0
        self._forget()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)

    def _skip(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # without one an optimizer leaves weight and state alone
        with torch.no_grad():
            for name, buffer in pl_module.named_buffers():
                if name in self._buffers:
                    buffer.copy_(self._buffers[name])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                seen = {"latest_update_step": trainer.global_step + 1}  # what this step will be
                callback.load_state_dict({**callback.state_dict(), **seen})
        self.skipped, self.row = self.skipped + 1, self.row + 1
        self.cases.update(case for batch in self._batches for case in _case_ids(batch))

    def _named(self) -> str:
        cases = [case for batch in self._batches for case in _case_ids(batch)]
        return ", ".join(cases) or "a batch without case ids"

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str, norm: float) -> None:
        step = trainer.global_step
        rank = f"_rank_{trainer.global_rank}" if trainer.world_size > 1 else ""
        weights, content = trainer.strategy.lightning_module_state_dict(), io.BytesIO()
        torch.save(
            {
                "step": step,
                "steps": int(min(trainer.estimated_stepping_batches, 2**31)),
                "epoch": trainer.current_epoch,
                "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
                "precision": str(trainer.precision),
                "losses": [float(loss) for loss in self._losses],
                "gradient_norm": norm,
                "batches": [_plain(batch) for batch in self._batches],
                "random": self._random,
                "weights": {n: w.cpu() for n, w in weights.items()},
            },
            content,
        )
        path = self.folder / f"nonfinite_step_{step}{rank}.pt"
        write_atomically(path, content.getvalue())
        often = ", ".join(f"{case} {times}x" for case, times in self.cases.most_common(3))
        faults = "; ".join(_faults_of(self._batches)) or "its volumes are finite"
        raise ValueError(
            f"expected finite losses and gradients, got {what} at step {step} in {self._named()} "
            f"({faults}), after {self.row} skipped steps in a row and {self.skipped} in all "
            f"(most often {often or 'unnamed batches'}): what repeats it is in {path}"
        )


class Repetition(NamedTuple):
    """What a step gave when it was repeated: the loss of each batch, and the gradient's norm."""

    losses: list[float]
    gradient_norm: float


def repeated(path: str | Path, method: LightningModule) -> Repetition:
    """The step that a ``NonFiniteGuard`` kept, once more; the method is left with its weights.

    In the precision that it had, but for float16, which needs a GPU.

    Args:
        path: of the file.
        method: built as it was in that run, by ``build_method(run_config(folder))``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a step that was kept, found none: {path}")
    try:
        kept = read_whole(Path(path))
        batches = [_batch(plain) for plain in kept["batches"]]
    except Exception as error:
        raise ValueError(
            f"expected a step that was kept, got {type(error).__name__}: {path}"
        ) from error
    again, precision = _Again(kept), kept["precision"]
    if precision.startswith("16") and not torch.cuda.is_available():
        precision = "32-true"
    trainer = Trainer(
        max_epochs=-1,
        max_steps=kept["steps"],
        accumulate_grad_batches=len(batches),
        limit_val_batches=0,
        precision=precision,
        devices=1,
        callbacks=[again],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, train_dataloaders=DataLoader(_Stream(batches), batch_size=None))
    return Repetition(again.losses, again.gradient_norm)


class _Again(Callback):
    """Puts a training where a kept step was, and reads what the step gives."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept, self.random = kept, iter(kept["random"])
        self.losses: list[float] = []
        self.gradient_norm = float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.load_state_dict(self.kept["weights"])
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
        progress.optimizer.step.total.completed = self.kept["step"]
        trainer.fit_loop.epoch_progress.current.completed = self.kept["epoch"]

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        state = next(self.random)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self.losses.append(float(loss.detach()) / _scale(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.gradient_norm = float(gradient_norm(optimizer))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        trainer.should_stop = True


class _Stream(IterableDataset[Any]):
    """Batches without a number of them, so that the training is as long as it is told."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def are_bad(
    trainer: Trainer, losses: Float[Tensor, " b"], norm: Float[Tensor, ""]
) -> tuple[bool, bool]:
    """Whether a loss or the norm is NaN or inf, here or on another rank: one number read back."""
    device = trainer.strategy.root_device
    finite = torch.stack([value.isfinite().all().to(device) for value in (losses, norm)])
    bad: Any = trainer.strategy.reduce((~finite).int(), reduce_op="max")
    kinds = int(bad[0] + 2 * bad[1])
    return bool(kinds & 1), bool(kinds & 2)


def changed(module: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """The names of buffers that are not what they were."""
    now = {name: buffer for name, buffer in module.named_buffers() if name in before}
    return {name for name, buffer in now.items() if not torch.equal(buffer, before[name])}


def gradient_norm(optimizer: Optimizer) -> Float[Tensor, ""]:
    """The norm of all gradients that an optimizer would step by; 0 where there are none."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """What torch's own generators would draw next: the CPU's and, on one, the GPU's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _scale(trainer: Trainer) -> float:
    """What a float16 training's losses are multiplied by; 1 where nothing scales them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def _fault(pl_module: LightningModule, loss: Tensor) -> str:
    if not loss.isfinite():
        return f"a loss of {float(loss)}"
    named = ((n, p.grad) for n, p in pl_module.named_parameters() if p.grad is not None)
    names = [name for name, gradient in named if not gradient.isfinite().all()]
    others = f" and {len(names) - 1} others" if len(names) > 1 else ""
    return f"a gradient of NaN or inf ({names[0] if names else 'on another rank'}{others})"


def _faults_of(batches: Sequence[Any]) -> list[str]:
    """What in the batches is not finite by itself."""
    faults = []
    for batch in batches:
        for name, value in (vars(batch) if is_dataclass(batch) else {}).items():
            if isinstance(value, Tensor) and not value.isfinite().all():
                faults.append(f"{name} of {', '.join(_case_ids(batch))} is not finite")
    return faults


def _case_ids(batch: Any) -> Sequence[str]:
    return getattr(batch, "case_id", ())


def _plain(batch: Any) -> Any:
    """A batch as tensors and plain data."""
    if not is_dataclass(batch):
        return batch
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    plain = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in values.items()}
    lists = {n: list(v) for n, v in plain.items() if isinstance(v, tuple)}
    return {"type": type(batch).__name__, **plain, **lists}


def _batch(plain: Any) -> Any:
    if not isinstance(plain, dict) or plain.get("type") not in _BATCHES:
        return plain
    kind = _BATCHES[plain["type"]]
    return kind(**{name: value for name, value in plain.items() if name != "type"})
