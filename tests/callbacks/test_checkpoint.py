import multiprocessing
import os
import random
import resource
import signal
import subprocess

import lightning
import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from clinfuse.callbacks.checkpoint import (
    LAST,
    PREVIOUS,
    RunCheckpoint,
    linked,
    random_states,
    set_random_states,
)
from clinfuse.callbacks.interruption import Interrupted
from clinfuse.data.paired_volumes import DrawSampler
from clinfuse.data.workers import begin_worker
from clinfuse.networks.pretrained import read_whole

STEPS_PER_EPOCH, EPOCHS = 5, 3


class Numbers(Dataset):
    """Three numbers of a draw."""

    def __getitem__(self, draw):
        return torch.randn(3, generator=torch.Generator().manual_seed(draw.seed))


class Shaken(lightning.LightningModule):
    """Learns with every global generator there is, and draws from one in validation too."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.seen, self.epochs_begun = [], 0

    def on_train_epoch_start(self):
        self.epochs_begun += 1

    def training_step(self, batch, _index):
        self.seen.append(float(batch[0, 0]))
        shake = torch.rand(()) + np.random.rand() + random.random()
        return self.network(batch).square().mean() * shake

    def validation_step(self, batch, _index):
        self.log("score", self.network(batch).mean() + torch.rand(()), batch_size=1)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class At(Callback):
    """Does something once: at the end of this process's n-th training batch, or in a validation."""

    def __init__(self, do, batch=None, in_validation=False):
        self.do, self.batches_left, self.in_validation = do, batch, in_validation

    def on_train_batch_end(self, *_):
        if self.batches_left is not None:
            self.batches_left -= 1
            if self.batches_left == 0:
                self.do()

    def on_validation_batch_end(self, *_):
        if self.in_validation:
            self.do()


def ask(signum=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), signum)


def ask_all():
    """As a scheduler does: the loader's processes too, and not by the training itself."""
    pids = [child.pid for child in multiprocessing.active_children()] + [os.getpid()]
    assert len(pids) == 2
    subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)


def crash():
    raise KeyError("as if killed")


def trained(folder, *callbacks, workers=0, goes_on=False, accumulate=1, **saving):
    """The method and the last checkpoint of a training of three epochs with a validation in two."""
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(
        Numbers(),
        batch_size=2,
        sampler=DrawSampler(7, 2 * STEPS_PER_EPOCH, seed=3, batch_size=2),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
    )
    trainer = Trainer(
        max_epochs=EPOCHS,
        check_val_every_n_epoch=2,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            EMAWeightAveraging(decay=0.9), Timer(), *callbacks, RunCheckpoint(folder, **saving)
        ],
    )  # fmt: skip
    method = Shaken()
    validation = DataLoader(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    path = folder / LAST if goes_on else None
    trainer.fit(method, loader, validation, ckpt_path=path, weights_only=True)
    return method, read_whole(folder / LAST)


def assert_same_end(one, other):
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert one[part].keys() == other[part].keys()
        for name, weight in one[part].items():
            assert torch.equal(weight, other[part][name]), (part, name)
    for number, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer_states"][0]["state"][number][name])
    for part in ("lr_schedulers", "global_step", "epoch", "loops"):
        assert one[part] == other[part], part
    ours, theirs = one["clinfuse"], other["clinfuse"]
    assert ours["metrics"] == theirs["metrics"] and ours["batches"] == theirs["batches"] == 0
    assert ours["random"]["python"] == theirs["random"]["python"]
    assert torch.equal(ours["random"]["numpy"][0], theirs["random"]["numpy"][0])
    assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 4, 5, 8, 10, 14])
def test_a_run_that_was_asked_to_end_goes_on_with_the_next_step(step, whole, tmp_path):
    with pytest.raises(Interrupted) as ended:
        trained(tmp_path, At(ask(), step))
    assert ended.value.code == 128 + signal.SIGTERM
    assert read_whole(tmp_path / LAST)["global_step"] == step
    method, end = trained(tmp_path, goes_on=True)
    assert method.seen == whole[0].seen[step:]
    assert_same_end(whole[1], end)


def test_a_loader_with_a_process_of_its_own_goes_on_at_its_place(tmp_path):
    whole = trained(tmp_path / "whole", workers=1)
    for step in (3, 5):  # within an epoch, and at an epoch's end
        with pytest.raises(Interrupted):
            trained(tmp_path / str(step), At(ask_all, step), workers=1)
        method, end = trained(tmp_path / str(step), goes_on=True, workers=1)
        assert method.seen == whole[0].seen[step:]
        assert_same_end(whole[1], end)


def test_a_validation_that_was_interrupted_is_made_anew(whole, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, At(ask(signal.SIGUSR1), in_validation=True))
    interrupted = read_whole(tmp_path / LAST)
    assert interrupted["global_step"] == 10 and "score" not in interrupted["clinfuse"]["metrics"]
    method, end = trained(tmp_path, goes_on=True)
    assert method.seen == whole[0].seen[10:]
    assert_same_end(whole[1], end)


def test_a_run_that_was_killed_repeats_what_came_after_the_checkpoint(whole, tmp_path):
    with pytest.raises(KeyError):
        trained(tmp_path, At(crash, 9), every_n_steps=3)
    assert read_whole(tmp_path / LAST)["global_step"] == 6
    assert read_whole(tmp_path / PREVIOUS)["global_step"] == 5
    method, end = trained(tmp_path, goes_on=True, every_n_steps=3)
    assert method.seen == whole[0].seen[6:] and method.epochs_begun == 2
    assert_same_end(whole[1], end)


def test_nothing_is_saved_while_gradients_add_up(tmp_path):
    whole = trained(tmp_path / "whole", accumulate=2)  # steps after batches 2, 4, 5; 7, 9, 10
    with pytest.raises(Interrupted):
        trained(tmp_path, At(ask(), 8), accumulate=2)
    assert read_whole(tmp_path / LAST)["global_step"] == 5
    method, end = trained(tmp_path, goes_on=True, accumulate=2)
    assert method.seen == whole[0].seen[9:]
    assert_same_end(whole[1], end)


def test_a_long_epoch_is_saved_on_the_way(tmp_path):
    with pytest.raises(KeyError):
        trained(tmp_path, At(crash, 4), minutes=0)
    assert read_whole(tmp_path / LAST)["global_step"] == 3


def test_the_metrics_measured_before_an_interruption_are_known_after_it(whole, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path, At(ask(), 12))
    trained(tmp_path, goes_on=True)
    assert read_whole(tmp_path / LAST)["clinfuse"]["metrics"]["score"] == pytest.approx(
        whole[1]["clinfuse"]["metrics"]["score"], abs=0
    )


def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_no_half_of_another(tmp_path):
    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large"):
            trained(tmp_path, At(fill, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert read_whole(tmp_path / LAST)["global_step"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_what_a_killed_run_had_half_written_is_cleared_away(tmp_path):
    half = tmp_path / f".{LAST}.123.tmp"
    half.write_bytes(b"half")
    trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}


def test_a_file_takes_another_name_where_one_was_and_where_it_has_it_already(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("one")
    other.write_text("other")
    for _ in range(2):
        linked(one, other)
        assert other.read_text() == "one" and os.path.samefile(one, other)
        assert len(list(tmp_path.iterdir())) == 2


def test_every_generator_draws_again_what_it_drew():
    def draws():
        return random.random(), random.gauss(0, 1), np.random.randn(), float(torch.rand(()))

    np.random.randn()  # numpy keeps every second number of a normal distribution
    states = random_states()
    first = draws()
    assert draws() != first
    set_random_states(states)
    assert draws() == first


@pytest.mark.parametrize("wrong", [{"minutes": -1}, {"every_n_steps": 0}])
def test_times_that_cannot_be_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))}"):
        RunCheckpoint(tmp_path, **wrong)
