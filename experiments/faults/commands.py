"""Command lines as processes of their own, without what each would take to import torch.

This process has imported everything once; a command is a fork of it that calls the entry point
with its arguments, and ends with a status as any process does.
"""

import atexit
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

SMALL = (
    "experiment=smoke",
    "data.prepare.workers=1",
    "data.draws_per_epoch=4",
    "trainer.max_epochs=3",
    "trainer.check_val_every_n_epoch=2",
    "trainer.log_every_n_steps=1",
    "method.steps=2",
    "method.members=2",
    "callbacks.progress=null",
)
"""A training of twelve steps, with a validation in it."""

TRAINING_ONLY = ("test=false", "interval_level=null", "callbacks.report=null")


@dataclass
class Command:
    """A command line that runs.

    Attributes:
        pid: of the process, which leads a group of its own.
        said: the file that its two streams go to.
        status: its exit status, negative for a signal, as ``subprocess`` has it; None while it
            runs.
    """

    pid: int
    said: Path
    status: int | None = None
    started: float = field(default_factory=time.monotonic)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = 240) -> int:
        """Its status; one that hangs is killed, which is an answer too."""
        while self.poll() is None:
            if time.monotonic() - self.started > seconds:
                self.kill()
                raise TimeoutError(f"still running after {seconds:g} s: {self.said}")
            time.sleep(0.01)
        self.kill()  # what it may have left of its group
        assert self.status is not None
        return self.status

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    @property
    def sentences(self) -> list[str]:
        """What it said in one line each, as an entry point says what is wrong."""
        return [line for line in self.text.splitlines() if line.startswith("clinfuse: ")]


def start(
    module: str,
    arguments: Sequence[str],
    said: Path,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Command:
    """Begin ``python -m clinfuse.MODULE ARGUMENTS``.

    Args:
        module: of the entry point.
        arguments: of the command line.
        said: file for what it prints.
        before: called in the new process first: a limit, another user.
        environment: variables to set.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        return Command(pid, said)
    status = 1
    try:
        os.setsid()
        with said.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment or {})
        sys.argv = [f"clinfuse/{module}.py", *arguments]
        if before is not None:
            before()
        importlib.import_module(f"clinfuse.{module}").main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        atexit._run_exitfuncs()
        os._exit(status)


def once(module: str, arguments: Sequence[str], said: Path, **more: object) -> Command:
    """A command line from its beginning to its end."""
    command = start(module, arguments, said, **more)  # type: ignore[arg-type]
    command.wait()
    return command


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors that decide how a run goes on, by name: averages, weights, momenta."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    parts = {name: content[name] for name in ("state_dict", "current_model_state")}
    found = {f"{part}/{name}": w for part, state in parts.items() for name, w in state.items()}
    for number, state in content["optimizer_states"][0]["state"].items():
        found |= {f"optimizer/{number}/{name}": torch.as_tensor(v) for name, v in state.items()}
    return found


def are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(w, other[n]) for n, w in one.items())


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards; a fork that ends leaves it alone, unlike tempfile's own."""
    folder = Path(tempfile.mkdtemp(prefix="faults."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def imported(*modules: str) -> Iterator[None]:
    """Everything that those entry points import, before the first fork; the folder of this file
    too, so that a configuration can name the callbacks in it."""
    here = str(Path(__file__).resolve().parent)
    os.environ |= {"WANDB_MODE": "disabled", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    if here not in sys.path:
        sys.path.insert(0, here)
    for module in (*modules, "wandb", "monai", "lightning"):
        importlib.import_module(module)
    yield
