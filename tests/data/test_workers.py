import multiprocessing
import os
import signal
import subprocess
import threading

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker as worker_loop

from clinfuse.data import workers
from clinfuse.data.workers import FOR_THE_TRAINING, begin_worker


def beside_a_thread(worker):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    begin_worker(worker)


@pytest.fixture(params=[begin_worker, beside_a_thread])
def worker(request, monkeypatch):
    """A process of a loader that waits for more work, and the rest of the work."""
    # W&B, once used, begins threads in every fork: after its tests each process is beside one.
    monkeypatch.setattr(workers, "GRACE_S", 1.0)
    monkeypatch.setattr(worker_loop, "MP_STATUS_CHECK_INTERVAL", 0.5)  # how long it may be deaf
    loader = DataLoader(range(8), num_workers=1, prefetch_factor=1, worker_init_fn=request.param)
    others = multiprocessing.active_children()
    items = iter(loader)
    next(items)
    (process,) = set(multiprocessing.active_children()) - set(others)
    yield process, items
    process.kill()
    process.join()


@pytest.mark.parametrize("signum", FOR_THE_TRAINING)
def test_what_a_scheduler_sends_to_everybody_leaves_the_loader_at_work(signum, worker):
    process, items = worker
    subprocess.run(["kill", f"-{signum.name}", str(process.pid)], check=True)
    assert [int(item) for item in items] == list(range(1, 8))


def test_the_loader_still_ends_its_own_processes(worker):
    process, _items = worker
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0
