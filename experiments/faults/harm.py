"""What can go wrong, done to files, processes and machines on purpose."""

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

NOBODY = 65534


def cut(path: Path, draw: random.Random) -> str:
    """Leave the first part of a file."""
    size = path.stat().st_size
    kept = draw.randrange(1, size)
    rewrite(path, path.read_bytes()[:kept])
    return f"{path.name} cut to {kept} of {size} bytes"


def flip(path: Path, draw: random.Random) -> str:
    """Turn one bit of a file over."""
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    rewrite(path, bytes(content))
    return f"bit {bit} of byte {place} of {len(content)} in {path.name}"


def rewrite(path: Path, content: bytes) -> None:
    """Another file of that name: the old one may have more names."""
    path.unlink()
    path.write_bytes(content)


def limited_files(kilobytes: int) -> Callable[[], None]:
    """No file may grow beyond that: what a full disk or a quota says to one that writes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    return limit


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own with so much space.

    Raises:
        OSError: this user cannot mount one.
    """
    folder.mkdir(parents=True)
    options = f"size={kilobytes}k,mode=0777"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        raise OSError("expected to be allowed to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(scratch: Path) -> bool:
    try:
        with small_disk(scratch / "mounted", 64):
            return True
    except OSError:
        return False


def as_nobody() -> None:
    """Go on as a user for whom permissions count."""
    os.environ["HOME"] = "/tmp"
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def jumping_clock(seconds: float, after_calls: int) -> Callable[[], None]:
    """``time.time`` jumps; what measures durations (``time.monotonic``) does not, as in Linux."""

    def jump() -> None:
        real, calls = time.time, itertools.count()
        time.time = lambda: real() + (seconds if next(calls) >= after_calls else 0)  # type: ignore[assignment]

    return jump


def redate(folder: Path, seconds: float) -> None:
    """Every file was changed so much later, or before."""
    now = time.time()
    for path in folder.rglob("*"):
        os.utime(path, (now + seconds, now + seconds), follow_symlinks=False)


def kill_a_worker(pid: int, draw: random.Random, seconds: float = 60) -> str | None:
    """Kill a process that a training has started, a while after it was; None where none was."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            children = psutil.Process(pid).children(recursive=True)
            if workers := [c for c in children if c.status() != psutil.STATUS_ZOMBIE]:
                time.sleep(draw.uniform(0, 0.6))
                worker = draw.choice(workers)
                worker.kill()
                return f"its process {workers.index(worker) + 1} of {len(workers)}"
        except psutil.NoSuchProcess:
            pass
        if psutil.pid_exists(pid) and psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        time.sleep(0.002)
    return None


def copied(run: Path, folder: Path) -> Path:
    """A run to be harmed."""
    shutil.copytree(run, folder)
    return folder


def half_written(folder: Path) -> list[str]:
    """Temporary files, and outputs with nothing in them."""
    ours = {".nii", ".gz", ".csv", ".json", ".html", ".ckpt", ".pt", ".png", ".md", ".yaml"}
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return sorted(
        str(p.relative_to(folder))
        for p in files
        if p.suffix == ".tmp" or (p.suffix in ours and p.stat().st_size == 0)
    )
