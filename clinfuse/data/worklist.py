"""Cases that any number of workers share, each done by one of them, whoever stops and starts.

What is done of a case is a folder of its name, there whole or not at all: it is made under another
name and then renamed. Who works on a case holds a lock, which a killed process lets go.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

WORK = ".work"
"""Beside the cases' folders: locks, what is being made, and why cases failed."""

EXPECTED = (ValueError, OSError, ConnectionError)
"""Errors that say enough by themselves; of others the traceback is printed as well."""


class Share(NamedTuple):
    """Every ``parts``-th case from ``part``, the first being 0."""

    part: int
    parts: int

    def of(self, cases: Sequence[str]) -> list[str]:
        return list(cases[self.part :: self.parts])


def share_of(asked: str | None, environment: Mapping[str, str]) -> Share | None:
    """The share that ``I/N`` names, or with ``rank`` the environment; None where none is asked.

    Slurm tells tasks of an array and tasks that ``srun`` started their rank, torchrun its own.

    Raises:
        ValueError: neither, or ``rank`` where nothing tells one.
    """
    if asked is None:
        return None
    if asked == "rank":
        return _rank(environment)
    part, slash, parts = asked.partition("/")
    if slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return Share(int(part), int(parts))
    raise ValueError(f"expected shard=I/N with I from 0 to N - 1, or shard=rank, got {asked}")


def _rank(environment: Mapping[str, str]) -> Share:
    def number(name: str, otherwise: int) -> int:
        return int(environment.get(name, otherwise))

    is_array, is_slurm = "SLURM_ARRAY_TASK_ID" in environment, "SLURM_STEP_ID" in environment
    if not (is_array or is_slurm or "WORLD_SIZE" in environment):
        raise ValueError(
            "expected Slurm (a task of an array, or of srun) or torchrun for shard=rank, "
            "got neither: name the share, shard=I/N"
        )
    share = Share(0, 1)
    if is_array:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID", 0) - first) // step
        share = Share(task, number("SLURM_ARRAY_TASK_COUNT", 1))
    if "WORLD_SIZE" in environment:
        within = Share(number("RANK", 0), number("WORLD_SIZE", 1))
    elif is_slurm:  # a batch script by itself has SLURM_NTASKS as well, and is one process
        within = Share(number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1))
    else:
        return share
    return Share(share.part * within.parts + within.part, share.parts * within.parts)


def begun_alike(record: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """What the first worker put into ``record``: ``own``, if that is this one.

    Raises:
        ValueError: the first worker had another ``key``, or the record cannot be read.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    if not record.is_file():
        written = record.with_name(f".{record.name}.{socket.gethostname()}.{os.getpid()}")
        written.write_text(json.dumps(own, indent=1) + "\n")
        try:
            with suppress(FileExistsError):  # of who was faster
                os.link(written, record)
        finally:
            written.unlink()
    try:
        begun = json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"expected a record in JSON, got {error}: {record}") from error
    if begun.get("key") != own["key"]:
        raise ValueError(
            f"expected a folder that is new, or of the same settings and weights, got one of "
            f"others (remove it, or choose another folder): {record.parent}"
        )
    return dict(begun)


def digest_of(files: Iterable[Path]) -> str:
    """Sixteen characters that differ when the content of a file does."""
    seen = hashlib.sha256()
    for file in files:
        seen.update(hashlib.sha256(file.read_bytes()).digest())
    return seen.hexdigest()[:16]


class Worklist:
    """Cases to be done, and what has become of each: a folder in ``folder``, or a reason.

    Args:
        folder: of the cases' folders.
        cases: all of them, in order.
        share: of them that this worker takes, whatever others do, without locks; with None it takes
            the next that is not done and that nobody holds.
    """

    def __init__(
        self, folder: Path | str, cases: Sequence[str], share: Share | None = None
    ) -> None:
        self.folder, self.cases, self.share = Path(folder), list(cases), share
        self.work = self.folder / WORK
        self._failed_before = {case: self._when_failed(case) for case in self.cases}

    @property
    def done(self) -> list[str]:
        """Cases whose folder is there."""
        return [case for case in self.cases if self._is_done(case)]

    @property
    def failed(self) -> dict[str, str]:
        """Why those failed that are not done, by case; whoever tried last."""
        reasons = {case: self._reason(case) for case in self.cases if not self._is_done(case)}
        return {case: reason.read_text() for case, reason in reasons.items() if reason.is_file()}

    def go(self, make: Callable[[str, Path], None]) -> None:
        """Do what there is to do, until all is done, has failed, or is held by others.

        A case that fails keeps no other from being done. What failed before this worker began is
        tried once more.

        Args:
            make: of a case's name, writes its files into an empty folder.
        """
        mine = self.cases if self.share is None else self.share.of(self.cases)
        while any([self._take(case, make) for case in mine]):
            pass  # what others let go meanwhile

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other worker is in such a block, where there are locks."""
        lock: AbstractContextManager[bool] = nullcontext(True)
        if self.share is None:
            lock = _locked(self.work / ".all.lock", wait=True)
        with lock:
            yield

    def _take(self, case: str, make: Callable[[str, Path], None]) -> bool:
        """Whether there was something to do about a case, and it was done or tried."""
        if self._is_settled(case):
            return False
        with self._claimed(case) as is_mine:
            if not is_mine or self._is_settled(case):
                return False
            scratch = self.work / case
            shutil.rmtree(scratch, ignore_errors=True)  # of a worker that was killed
            scratch.mkdir(parents=True)
            try:
                make(case, scratch)
                _settle(scratch)
                scratch.replace(self.folder / case)
                self._reason(case).unlink(missing_ok=True)
            except Exception as error:
                if not self._is_done(case):  # by another one with the same share
                    self._keep_reason(case, error)
                shutil.rmtree(scratch, ignore_errors=True)
        return True

    def _claimed(self, case: str) -> AbstractContextManager[bool]:
        if self.share is not None:
            return nullcontext(True)
        return _locked(self.work / f"{case}.lock", wait=False)

    def _is_done(self, case: str) -> bool:
        return (self.folder / case).is_dir()

    def _is_settled(self, case: str) -> bool:
        """Done, or failed since this worker began."""
        failed = self._when_failed(case)
        return self._is_done(case) or (failed is not None and failed != self._failed_before[case])

    def _reason(self, case: str) -> Path:
        return self.work / f"{case}.failed"

    def _when_failed(self, case: str) -> tuple[int, int] | None:
        try:
            found = self._reason(case).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _keep_reason(self, case: str, error: Exception) -> None:
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
        name = "" if isinstance(error, EXPECTED) else f"{type(error).__name__}: "
        written = self.work / f".{case}.{os.getpid()}.failed"
        written.write_text(" ".join(f"{name}{error}".split()))
        written.replace(self._reason(case))


@contextmanager
def _locked(lock: Path, wait: bool) -> Iterator[bool]:
    """Whether no other process is in a block with this lock, now or after waiting.

    Raises:
        ValueError: the file system has no locks.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        is_mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_mine = False
        except OSError as error:
            raise ValueError(
                f"expected a file system with locks, got {error.strerror}: {lock} "
                "(shard=I/N gives each worker a fixed share without any)"
            ) from error
        yield is_mine


def _settle(folder: Path) -> None:
    """Have the disk keep a folder's files before it is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
