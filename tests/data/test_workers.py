import multiprocessing
import os
import signal
import subprocess
import threading
import time

import pytest
from torch.utils.data import DataLoader

from clinfuse.data import workers
from clinfuse.data.workers import FOR_THE_TRAINING, begin_worker


def beside_a_thread(worker):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    workers.GRACE_S = 1.0  # in the process of its own that this is
    begin_worker(worker)


@pytest.fixture(params=[begin_worker, beside_a_thread])
def worker(request):
    """A process of a loader that waits for more work, and the rest of the work."""
    loader = DataLoader(range(8), num_workers=1, prefetch_factor=1, worker_init_fn=request.param)
    items = iter(loader)
    next(items)
    (process,) = multiprocessing.active_children()
    return process, items


@pytest.mark.parametrize("signum", FOR_THE_TRAINING)
def test_what_a_scheduler_sends_to_everybody_leaves_the_loader_at_work(signum, worker):
    process, items = worker
    subprocess.run(["kill", f"-{signum.name}", str(process.pid)], check=True)
    assert [int(item) for item in items] == list(range(1, 8))


def test_the_loader_still_ends_its_own_processes(worker):
    process, items = worker
    os.kill(process.pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert process.exitcode == 0
    del items
