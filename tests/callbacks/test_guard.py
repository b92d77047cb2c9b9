"""Steps that are not finite: nothing learns from them, they are counted, and the last is kept."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clinfuse.callbacks.guard import NonFiniteGuard, repeated
from clinfuse.configuration import build_method
from clinfuse.train import main
from clinfuse.types import FusionBatch


def batch(case, fault=""):
    """A study of 2 x 4 x 4 voxels; a fault is what its MRI or its lesion mask brings about."""
    generator = torch.Generator().manual_seed(case)
    mri, ct = torch.rand(2, 1, 1, 2, 4, 4, generator=generator) * 2 - 1
    if fault == "volume":
        mri[0, 0, 0, 0, 0] = float("nan")
    roi = torch.zeros(1, 3, 2, 4, 4, dtype=torch.bool)
    roi[:, 2] = fault == "gradient"
    roi[:, 1] = fault == "loss"
    return FusionBatch(mri, ct, roi, torch.ones(1, 3), [f"case_{case:03d}"])


class Learner(lightning.LightningModule):
    """Weights, statistics, momenta, decay and a schedule: all that a step moves."""

    def __init__(self, learning_rate=0.01, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)
        self.learning_rate, self.dropout = learning_rate, nn.Dropout(dropout)

    def training_step(self, batch, _index):
        loss = (self.norm(self.conv(self.dropout(batch.mri))).mean(1) - batch.ct[:, 0]).abs().mean()
        if batch.lesion.any():  # the slope of a root at 0: a finite loss without a gradient
            loss = loss + (self.conv.weight * 0).abs().sqrt().sum()
        if batch.bone.any():  # infinite, but a constant: its gradient is finite
            loss = loss + float("inf")
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Watch(Callback):
    """What there is to learn, after every step."""

    def __init__(self):
        self.learned, self.rates, self.counted = [], [], []

    def on_train_batch_end(self, trainer, method, *_):
        (average,) = (c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging))
        state = {
            **method.state_dict(),
            **{f"average.{n}": w for n, w in average._average_model.state_dict().items()},
            **{
                f"optimizer.{i}.{n}": value
                for i, own in trainer.optimizers[0].state_dict()["state"].items()
                for n, value in own.items()
            },
        }
        self.learned.append({name: value.clone() for name, value in state.items()})
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.counted.append(trainer.callback_metrics.get("train/skipped_steps"))


def train(batches, *callbacks, learner=None, **settings):
    """Trains on batches in order; returns the watch and the trainer."""
    watch = Watch()
    trainer = lightning.Trainer(
        logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[*callbacks, EMAWeightAveraging(decay=0.5), watch],
        **{"max_epochs": 1, **settings},
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(Learner() if learner is None else learner, loader)
    return watch, trainer


def changed(before, after):
    return {name for name in after if name not in before or not before[name].equal(after[name])}


@pytest.mark.parametrize("fault", ["volume", "gradient", "loss"])
def test_nothing_learns_from_a_step_that_is_not_finite(fault, tmp_path):
    guard = NonFiniteGuard(tmp_path)
    watch, _ = train([batch(0), batch(1, fault), batch(2)], guard)
    first, skipped, last = watch.learned
    assert changed(first, skipped) == set()
    assert changed(skipped, last) == set(first) - {"average.module.norm.num_batches_tracked"}
    assert watch.rates == pytest.approx([0.01 / 2, 0.01 / 3, 0.01 / 4])  # a step of the schedule
    assert (guard.skipped, guard.row, dict(guard.cases)) == (1, 0, {"case_001": 1})
    assert not list(tmp_path.iterdir())

    unguarded, _ = train([batch(0), batch(1, fault), batch(2)])  # what it is for
    assert all(changed(before, after) for before, after in pairwise(unguarded.learned))
    is_ruined = not unguarded.learned[-1]["conv.weight"].isfinite().all()
    assert is_ruined == (fault != "loss")


class Readbacks(TorchDispatchMode):
    """Counts how often a number is brought from where it was computed: ``item``, ``equal``."""

    of = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.of
        return function(*args, **(kwargs or {}))


class Counted(NonFiniteGuard):
    """What the guard itself reads back in each step, and what it keeps a copy of."""

    def __init__(self, folder):
        super().__init__(folder)
        self.readbacks, self.copied, self._here = [], [], 0

    def on_train_batch_start(self, *given):
        with Readbacks() as seen:
            super().on_train_batch_start(*given)
        self._here = seen.count
        self.copied.append(set(self._buffers))

    def on_before_backward(self, *given):
        with Readbacks() as seen:
            super().on_before_backward(*given)
        self._here += seen.count

    def on_before_optimizer_step(self, *given):
        with Readbacks() as seen:
            super().on_before_optimizer_step(*given)
        self.readbacks.append(self._here + seen.count)


STATISTICS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class Thawing(Learner):
    """With a constant buffer, and batch statistics that stand still for an epoch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(5.0))

    def on_train_epoch_start(self):
        self.norm.train(self.current_epoch > 0)


def test_a_step_costs_one_number_and_copies_of_those_buffers_that_steps_change(tmp_path):
    guard = Counted(tmp_path)
    train([batch(case) for case in range(3)], guard, learner=Thawing(), max_epochs=2)
    all_of_them = STATISTICS | {"table"}
    assert guard.copied == [all_of_them, set(), set(), all_of_them, STATISTICS, STATISTICS]
    assert guard.readbacks == [1 + 4, 1, 1, 1 + 4, 1, 1]


@pytest.mark.parametrize("step", range(6))
def test_whichever_step_is_skipped_leaves_all_buffers_as_they_were(step, tmp_path):
    class Faulty(Thawing):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * float("nan") if 3 * self.current_epoch + index == step else loss

    class Before(Callback):
        def on_train_batch_start(self, _trainer, method, _batch, index):
            if 3 * method.current_epoch + index == step:
                self.buffers = {name: b.clone() for name, b in method.named_buffers()}

        def on_train_batch_end(self, _trainer, method, _outputs, _batch, index):
            if 3 * method.current_epoch + index == step:
                assert changed(self.buffers, dict(method.named_buffers())) == set()
                self.was_asked = True

    before, guard = Before(), NonFiniteGuard(tmp_path)
    batches = [batch(case) for case in range(3)]
    train(batches, guard, before, learner=Faulty(), max_epochs=2)
    assert guard.skipped == 1 and before.was_asked


def test_skipped_steps_are_logged_and_outlive_an_interruption(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    watch, _ = train([batch(0, "loss"), batch(1), batch(2, "loss"), batch(3)], guard)
    assert [float(count) for count in watch.counted[1:]] == [1, 2, 2]
    again = NonFiniteGuard(tmp_path)
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.cases) == (2, guard.cases)


def test_it_stops_after_so_many_in_a_row_and_a_good_step_begins_anew(tmp_path):
    faults = ["loss", "loss", "", "loss", "volume", "gradient", ""]
    batches = [batch(case, fault) for case, fault in enumerate(faults)]
    train(batches, NonFiniteGuard(tmp_path, in_a_row=4))
    with pytest.raises(ValueError) as stopped:
        train(batches, NonFiniteGuard(tmp_path, in_a_row=3))
    said = str(stopped.value)
    assert said.startswith("expected finite losses and gradients, got a gradient of NaN or inf (")
    assert "conv.weight" in said and "at step 5 in case_005 (its volumes are finite)" in said
    assert "after 3 skipped steps in a row and 5 in all" in said
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_step_5.pt"]
    assert str(tmp_path / "nonfinite_step_5.pt") in said


def test_it_stops_after_so_many_in_all_and_names_who_was_in_them(tmp_path):
    cases = [(7, "volume"), (1, ""), (7, "volume"), (2, ""), (3, "loss"), (4, "")]
    with pytest.raises(ValueError, match="3 in all") as stopped:
        train([batch(*case) for case in cases], NonFiniteGuard(tmp_path, in_all=3))
    assert "got a loss of inf at step 4 in case_003" in str(stopped.value)
    assert "most often case_007 2x, case_003 1x" in str(stopped.value)
    with pytest.raises(ValueError, match="mri of case_007 is not finite"):
        train([batch(7, "volume")], NonFiniteGuard(tmp_path, in_a_row=1))


def test_limits_that_would_never_let_it_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1 step, got 0 and 100"):
        NonFiniteGuard(tmp_path, in_a_row=0)


def test_a_kept_step_is_repeated_from_its_file_alone(tmp_path):
    """Two batches a step, dropout, three steps on: losses come out as they were, bit for bit."""

    class Losses(Callback):
        def __init__(self):
            self.of = []

        def on_before_backward(self, _trainer, _method, loss):
            self.of.append(float(loss.detach()))

    batches = [batch(case) for case in range(6)] + [batch(6), batch(7, "gradient")]
    losses = Losses()
    with pytest.raises(ValueError, match="got a gradient of NaN or inf"):
        train(
            batches, losses, NonFiniteGuard(tmp_path, in_a_row=1), learner=Learner(dropout=0.5),
            accumulate_grad_batches=2,
        )  # fmt: skip
    path = tmp_path / "nonfinite_step_3.pt"
    kept = torch.load(path, weights_only=True)  # tensors and plain data
    assert [plain["case_id"] for plain in kept["batches"]] == [["case_006"], ["case_007"]]
    assert kept["losses"] == losses.of[-2:] and kept["step"] == 3
    torch.manual_seed(123)
    again = repeated(path, Learner(learning_rate=1.0, dropout=0.5))
    assert again.losses == losses.of[-2:]
    assert again.gradient_norm != again.gradient_norm  # NaN


def test_a_kept_step_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a step that was kept, found none: "):
        repeated(tmp_path / "nonfinite_step_1.pt", Learner())
    (tmp_path / "nonfinite_step_1.pt").write_bytes(b"no file of torch's")
    with pytest.raises(ValueError, match=r"expected a step that was kept, got .*step_1\.pt"):
        repeated(tmp_path / "nonfinite_step_1.pt", Learner())


class Steep(Learner):
    """A loss of 1 whose gradient is a million everywhere."""

    def training_step(self, batch, _index):
        steep = sum(1e6 * parameter.sum() for parameter in self.parameters())
        loss = 1 + steep - steep.detach()
        return loss * float("nan") if batch.bone.any() else loss


def scaled_by(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def test_an_overflow_by_the_scale_of_float16_is_no_fault(tmp_path):
    guard, batches = NonFiniteGuard(tmp_path), [batch(case) for case in range(20)]
    watch, trainer = train(batches, guard, learner=Steep(), plugins=[scaled_by(2.0**120)])
    # 1e6 x 2^120 is inf in float32, 1e6 x 2^108 is not: twelve steps to find that out
    moved = ["conv.weight" in changed(before, after) for before, after in pairwise(watch.learned)]
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**108
    assert moved == [False] * 11 + [True] * 8
    assert guard.skipped == 0


@pytest.mark.parametrize(("scale", "fault"), [(2.0**16, "loss"), (1.0, "volume")])
def test_under_a_scaler_a_bad_loss_is_a_fault_and_so_is_a_gradient_nothing_scales(
    scale, fault, tmp_path
):
    class Broken(Steep):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            is_bad = not batch.mri.isfinite().all()
            return loss + (self.conv.weight * 0).abs().sqrt().sum() if is_bad else loss

    guard = NonFiniteGuard(tmp_path)
    watch, _ = train(
        [batch(0), batch(1, fault), batch(2)], guard, learner=Broken(), plugins=[scaled_by(scale)]
    )
    assert guard.skipped == 1 and dict(guard.cases) == {"case_001": 1}
    assert changed(watch.learned[0], watch.learned[1]) == set()
    assert "conv.weight" in changed(watch.learned[1], watch.learned[2])


class Poison(Callback):
    """Lets one voxel of every MRI be NaN from a step on."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        if trainer.global_step >= self.step:
            batch.mri[..., 0] = float("nan")


def test_a_run_of_bad_batches_stops_with_one_sentence_and_what_repeats_it(
    phantoms, tmp_path, capsys
):
    cfg = phantoms.config(
        *phantoms.smoke, "method=deterministic_unet", "callbacks.report=null", "test=false",
        "callbacks.progress=null", "callbacks.guard.in_a_row=2", "trainer.max_epochs=1",
        "+callbacks.poison._target_=tests.callbacks.test_guard.Poison", "+callbacks.poison.step=1",
        folder=tmp_path,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(cfg)
    assert ended.value.code == 1
    said, *_ = capsys.readouterr().err.splitlines()
    assert said.startswith("clinfuse: expected finite losses and gradients, got a loss of nan at ")
    assert "mri of case_" in said and "after 2 skipped steps in a row and 2 in all" in said
    assert not (tmp_path / "checkpoints").exists() and not list(tmp_path.rglob("*.tmp"))
    path = tmp_path / "nonfinite_step_2.pt"
    again = repeated(path, build_method(cfg))
    assert all(loss != loss for loss in again.losses) and len(again.losses) == 1  # NaN


RANKS = """
import sys
import torch
from torch import distributed
from tests.callbacks.test_guard import NonFiniteGuard, Learner, batch
import lightning


class Data(torch.utils.data.IterableDataset):
    def __iter__(self):
        rank = distributed.get_rank()
        for step in range(3):
            yield batch(10 * rank + step, "loss" if (rank, step) == (1, 1) else "")


class Print(lightning.Callback):
    def on_train_batch_end(self, trainer, method, outputs, batch, index):
        weight = float(method.conv.weight.double().sum())
        print(f"step {index} rank {trainer.global_rank}: {weight!r}", flush=True)


if __name__ == "__main__":
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=3, logger=False, accelerator="cpu", devices=2,
        strategy="ddp", enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[NonFiniteGuard(sys.argv[1]), Print()],
    )
    trainer.fit(Learner(), torch.utils.data.DataLoader(Data(), batch_size=None))
    assert trainer.callback_metrics["train/skipped_steps"] == 1
"""


@pytest.mark.slow
def test_what_one_rank_cannot_use_all_ranks_skip(tmp_path):
    """The faulty loss is a constant: its gradient, and so that of all ranks, is finite."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = re.findall(r"step (\d) rank (\d): (-?[\d.]+)", done.stdout)  # lines may run together
    assert {(step, rank) for step, rank, _ in said} == {(s, r) for s in "012" for r in "01"}
    weights = [{weight for step, _, weight in said if int(step) == of} for of in range(3)]
    assert all(len(both) == 1 for both in weights)
    assert weights[0] == weights[1] != weights[2]
