"""End a run that is asked to end: after the step it is in, with a shell's status for the signal."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers warn with: SIGTERM before they kill, SIGUSR1 to be put back into the queue, and
SIGUSR2 where submitit has started the job and puts it back itself."""


class Interrupted(SystemExit):
    """A run has ended because it was asked to; its status is 128 and the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Interruptions(Callback):
    """Raises ``Interrupted`` after the batch in which the process got one of ``SIGNALS``.

    Lightning would hear SIGTERM in training alone, and save in the middle of a step. Handlers that
    were there when this was built are called before the end, as submitit's. A job of Slurm that
    got SIGUSR1 is put back into the queue.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {s: signal.getsignal(s) for s in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        self.end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.end_if_asked(trainer)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.end_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum in SIGNALS:
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, self._before[signum])

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "")

    def end_if_asked(self, trainer: Trainer) -> None:
        """Raise, where a signal came; a job of Slurm or submitit is put back first."""
        if self.received is None:
            return
        handler: Callable[..., Any] | Any = self._before[self.received]
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.received, None)
        elif self.received == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        log.info("%s: this run ends here", signal.Signals(self.received).name)
        raise Interrupted(self.received)

    def _listen(self, trainer: Trainer) -> None:
        if trainer.received_sigterm and self.received is None:  # between Lightning's ear and ours
            self.received = int(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: Any) -> None:
        self.received = signum


def requeue() -> None:
    """Put this job of Slurm back into the queue; nothing, where it is none."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None or shutil.which("scontrol") is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        log.warning("Slurm did not take job %s back: %s", job, done.stderr.strip())
