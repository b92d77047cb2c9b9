import os
import signal
import stat

import lightning
import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from clinfuse.callbacks.interruption import SIGNALS, Interrupted, Interruptions, requeue


class Patient(lightning.LightningModule):
    """Is asked to end in its second batch."""

    def __init__(self, signum):
        super().__init__()
        self.signum, self.batches = signum, 0

    def test_step(self, batch, index):
        self.batches += 1
        if self.batches == 2:
            os.kill(os.getpid(), self.signum)


def ended_by(signum, *callbacks):
    method = Patient(signum)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=list(callbacks)
    )
    with pytest.raises(Interrupted) as ended:
        trainer.test(method, DataLoader(torch.zeros(5, 1)), verbose=False)
    assert method.batches == 2
    return ended.value


@pytest.fixture(autouse=True)
def _handlers():
    """What a test leaves would hear for the next one."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_run_ends_after_the_batch_it_is_in_with_a_shells_status(signum):
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    assert ended_by(signum, Interruptions()).code == 128 + signum
    assert {signum: signal.getsignal(signum) for signum in SIGNALS} == before


def test_a_handler_that_was_there_has_its_turn_before_the_end():
    heard = []
    signal.signal(signal.SIGUSR2, lambda signum, _frame: heard.append(signum))
    ended_by(signal.SIGUSR2, Interruptions())
    assert heard == [signal.SIGUSR2]


def test_a_signal_between_two_parts_of_a_run_is_not_lost():
    class Early(Callback):
        def setup(self, *_, **__):
            interruptions.received = signal.SIGTERM

    interruptions, method = Interruptions(), Patient(signal.SIGTERM)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False,
        callbacks=[Early(), interruptions],
    )  # fmt: skip
    with pytest.raises(Interrupted):
        trainer.test(method, DataLoader(torch.zeros(5, 1)), verbose=False)
    assert method.batches == 0


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A program by the name of Slurm's that writes what it was asked."""
    asked, program = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return asked


def test_a_job_of_slurm_is_put_back_by_sigusr1_alone(scontrol, monkeypatch):
    requeue()
    assert not scontrol.exists()  # no job
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    ended_by(signal.SIGTERM, Interruptions())
    assert not scontrol.exists()  # cancelled: it is not to come back
    ended_by(signal.SIGUSR1, Interruptions())
    assert scontrol.read_text() == "requeue 17\n"


def test_a_task_of_an_array_is_put_back_by_its_number(scontrol, monkeypatch):
    for name, value in (("JOB_ID", "20"), ("ARRAY_JOB_ID", "19"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    requeue()
    assert scontrol.read_text() == "requeue 19_3\n"
