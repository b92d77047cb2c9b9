"""Processes that draw for a training: one thread each, and deaf to what the training must hear."""

import os
import signal
import threading

import SimpleITK as sitk

FOR_THE_TRAINING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends to every process of a job."""

GRACE_S = 30.0


def begin_worker(_worker: int) -> None:
    """The ``worker_init_fn`` of our loaders.

    A scheduler that wants its machine back asks all processes to end. If these did, the training
    would fail for want of data in the step that it is to finish and save. They end with it, and
    when their loader itself ends them. Where a library has begun a thread before, the system may
    give it what this one has blocked, and who sent it is not known: SIGTERM then ends the process
    ``GRACE_S`` later, when a training will have saved.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    for signum in FOR_THE_TRAINING:
        signal.signal(signum, _later)
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINING)
    threading.Thread(target=_obey_the_loader, daemon=True).start()


def _obey_the_loader() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            os._exit(0)


def _later(signum: int, _frame: object) -> None:
    if signum == signal.SIGTERM:
        timer = threading.Timer(GRACE_S, os._exit, (0,))
        timer.daemon = True
        timer.start()
