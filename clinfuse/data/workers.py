"""Processes that draw for a training: one thread each, and deaf to what the training must hear."""

import os
import signal
import threading

import SimpleITK as sitk

FOR_THE_TRAINING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends to every process of a job."""


def begin_worker(_worker: int) -> None:
    """The ``worker_init_fn`` of our loaders.

    A scheduler that wants its machine back asks all processes to end. If these did, the training
    would fail for want of data in the step that it is to finish and save. They end with it, and
    when their loader itself ends them.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINING)
    threading.Thread(target=_obey_the_loader, daemon=True).start()


def _obey_the_loader() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            os._exit(0)
