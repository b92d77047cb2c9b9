"""How long calls take when they take turns, and how much memory one takes by itself.

Not run by hand: the benchmarks beside it import it, and start it for what needs a process of its
own (``in_child``).
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from clinfuse.configuration import fastest_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

MIB = 2**20


@dataclass(frozen=True)
class Pair:
    """One quantity of ours and of a reference, the less the better.

    Attributes:
        section: what is compared, ``training step``.
        case: on what, ``32 x 96 x 96``.
        unit: ``s`` or ``MiB``.
        ours: the median over turns.
        reference: likewise.
        least, most: the ratio in single turns; both the ratio itself where there was one turn.
        against: what the reference is.
    """

    section: str
    case: str
    unit: str
    ours: float
    reference: float
    least: float
    most: float
    against: str

    @property
    def ratio(self) -> float:
        """How many times as much the reference takes."""
        return self.reference / self.ours

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def pair(
    section: str,
    case: str,
    unit: str,
    ours: list[float] | float,
    reference: list[float] | float,
    against: str,
) -> Pair:
    """The pair of what was measured in turns, or once."""
    own, other = (m if isinstance(m, list) else [m] for m in (ours, reference))
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    middle = median(own), median(other)
    return Pair(section, case, unit, *middle, min(ratios), max(ratios), against)


def in_turns(
    calls: Mapping[str, Callable[[], object]], turns: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every turn of every call, after ``warmup`` turns that are not counted.

    The calls alternate, so that what else the machine does falls on all alike.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + turns):
        for name, call in calls.items():
            seconds = seconds_of(call)
            if turn >= warmup:
                spent[name].append(seconds)
    return spent


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Memory:
    """What a piece of work took.

    Attributes:
        mib: by how much it raised the most that was held, over what was held before it.
        process_mib: the most that the whole process held.
        private_mib: as ``mib``, of what is the process's own and no file's: what a volume in files
            (``mapped_memory``) does not take. Looked at every 10 ms; NaN on GPUs and off Linux.
    """

    mib: float = float("nan")
    process_mib: float = float("nan")
    private_mib: float = float("nan")


@contextmanager
def peak_memory() -> Iterator[Memory]:
    """The memory of what happens within: resident, or on a GPU allocated there.

    On Linux the mark of the most that was resident is set back first, so that imports and earlier
    work count for nothing. Elsewhere it cannot be: the first measurement of a process holds only
    where its imports took less than what it measures.
    """
    found = Memory()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        most = torch.cuda.max_memory_allocated()
    else:
        give_back_freed()
        is_set_back = set_back_mark()
        before = resident("VmRSS") if is_set_back else largest_resident()
        with most_private() as private:
            yield found
        most = resident("VmHWM") if is_set_back else largest_resident()
        if private:
            found.private_mib = (max(private) - private[0]) / MIB
    found.mib, found.process_mib = (most - before) / MIB, most / MIB


@contextmanager
def most_private() -> Iterator[list[int]]:
    """Bytes that are the process's own, every 10 ms; none where the system does not say."""
    held: list[int] = []
    if sys.platform != "linux":
        yield held
        return
    ended = threading.Event()

    def look() -> None:
        while True:
            held.append(resident("RssAnon"))
            if ended.wait(0.01):
                return

    watch = threading.Thread(target=look, daemon=True)
    held.append(resident("RssAnon"))
    watch.start()
    try:
        yield held
    finally:
        ended.set()
        watch.join()


def give_back_freed() -> None:
    """Have the allocator return what is free to the system, where it can."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def set_back_mark() -> bool:
    """Whether the kernel has forgotten how large this process was before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(mark: str) -> int:
    """Bytes resident now (VmRSS; RssAnon, of no file), or at most since set back (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{mark}:")))


def largest_resident() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


class DidNotFit(RuntimeError):
    """A child process ended without an answer."""


def in_child(where: str, **arguments: Any) -> Any:
    """What a function of a benchmark returns in a process of its own.

    Args:
        where: ``module:function``, of this folder.
        arguments: what JSON can carry; so must what it returns.

    Raises:
        DidNotFit: it ended by a signal, as it does when the system is out of memory.
        RuntimeError: it ended by an error.
    """
    command = [sys.executable, __file__, where, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        raise DidNotFit(f"{where} ended by signal {-done.returncode}: {arguments}")
    if done.returncode:
        raise RuntimeError(f"{where} failed with {arguments}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def autocast(precision: str) -> AbstractContextManager[Any]:
    """``bf16-mixed`` or ``16-mixed`` as autocast; ``32-true`` as nothing."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in dtypes:
        return nullcontext()
    return torch.autocast(DEVICE.type, dtype=dtypes[precision])


def precision_here() -> str:
    """What training takes on this machine: see ``conf/trainer``."""
    return fastest_precision()


def shape_of(text: str) -> tuple[int, ...]:
    """``32x96x96`` as voxels along (d, h, w)."""
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise SystemExit(f"expected a shape as 32x96x96 (d, h, w), got {text!r}")
    return tuple(int(size) for size in sizes)


def written(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape))


def show(pairs: list[Pair]) -> None:
    """Print a table of pairs."""
    print("\n| | | ours | reference | ratio | in single turns |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for p in pairs:
        digits = 0 if p.unit == "MiB" else 3
        values = f"{p.ours:.{digits}f} {p.unit} | {p.reference:.{digits}f} {p.unit}"
        print(
            f"| {p.section} | {p.case} | {values} | {p.ratio:.2f} | {p.least:.2f}–{p.most:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    os.environ.setdefault("MPLBACKEND", "Agg")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))
