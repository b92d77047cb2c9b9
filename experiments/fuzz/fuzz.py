"""What do our readers do with files that are broken, or made to do harm?

python experiments/fuzz/fuzz.py [INPUTS=100000] [SEED=0] [OUT=experiments/fuzz] [ONLY=reader,...]

Valid small files are changed in many ways (``mutations.py``) and given to every function that reads
one (``readers.py``), each in its own folder. What may come of it: it is read; or it is refused, by
an error that entry points say in one sentence, in one line that names the file. Anything else is a
find: an error of another kind, one that names no file, ten seconds without an end, a process that
dies, or more memory than ``ROOM_BYTES``. OUT/table.md counts them by reader; what was found lies in
OUT/finds, each input as it was given, with the error. The same seed gives the same inputs.
"""

import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from readers import READERS, Reader

from clinfuse.configuration import _EXPECTED, commit
from clinfuse.reporting.atomic import write_atomically

SECONDS, ROOM_BYTES, LONGEST = 10, 2 << 30, 1500
"""For one input; the memory it may take; characters of a sentence."""

OUTCOMES = ("read", "refused", "unclear", "crash", "hang", "died")
FINDS_KEPT = 3
"""Inputs that are kept of each kind of find."""


class Hang(BaseException):
    """An input took too long; not an Exception, which a reader might take for a damaged file."""


def main(
    inputs: int = 100_000, seed: int = 0, out: str = "experiments/fuzz", only: str = ""
) -> None:
    begun = time.monotonic()
    chosen = [reader for reader in READERS if not only or reader.name in only.split(",")]
    total = sum(reader.weight for reader in chosen)
    lines, found = [], 0
    for reader in chosen:
        count = round(inputs * reader.weight / total)
        counts, seconds = fuzzed(reader, count, seed, Path(out))
        found += sum(counts[outcome] for outcome in OUTCOMES[2:])
        each_ms = 1000 * seconds / max(count, 1)
        cells = [reader.name, reader.what, str(count), *(str(counts[o]) for o in OUTCOMES)]
        lines.append(f"| {' | '.join([*cells, f'{each_ms:.1f}'])} |")
        print(lines[-1], flush=True)
    minutes = (time.monotonic() - begun) / 60
    names = ["reader", "what is changed", "inputs", *OUTCOMES, "ms each"]
    head = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    command = f"python experiments/fuzz/fuzz.py {inputs} {seed}"
    made = (
        f"{inputs} inputs in {minutes:.0f} min on one core, {found} finds. `{command}`, {commit()}."
    )
    write_atomically(Path(out) / "table.md", "\n".join([made, "", *head, *lines]) + "\n")
    print(made)


def fuzzed(reader: Reader, count: int, seed: int, out: Path) -> tuple[dict[str, int], float]:
    """How often each outcome was; in a process of its own, another one after each that dies."""
    context = multiprocessing.get_context("fork")
    tallies = context.Array("q", len(OUTCOMES), lock=False)
    place = context.Array("d", [0, 0], lock=False)  # the input it is at, and since when
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="clinfuse_fuzz_") as scratch:
        while place[0] < count:
            place[1] = time.monotonic()
            job = (reader, count, seed, out, Path(scratch), tallies, place)
            process = context.Process(target=work, args=job)
            process.start()
            while process.is_alive():
                process.join(0.2)
                if time.monotonic() - place[1] > 3 * SECONDS:  # in code that no signal interrupts
                    process.kill()
                    process.join()
                    tallies[OUTCOMES.index("hang")] += 1
                    keep(reader, int(place[0]), Path(scratch), out, "hang", "killed")
                    place[0] += 1
                    break
            else:
                if process.exitcode and place[0] < count:
                    tallies[OUTCOMES.index("died")] += 1
                    said = f"exit status {process.exitcode}"
                    keep(reader, int(place[0]), Path(scratch), out, "died", said)
                    place[0] += 1
    return dict(zip(OUTCOMES, tallies, strict=True)), time.monotonic() - begun


def work(
    reader: Reader, count: int, seed: int, out: Path, scratch: Path, tallies: Any, place: Any
) -> None:
    """Inputs from ``place`` on, until they are done or one of them ends the process."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    if not os.environ.get("FUZZ_STDERR"):
        os.dup2(devnull, 2)
    faulthandler.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seeds = reader.seeds(scratch / "seeds")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    signal.signal(signal.SIGALRM, too_long)
    for index in range(int(place[0]), count):
        place[0], place[1] = index, time.monotonic()
        rng = np.random.default_rng([seed, index, *reader.name.encode()])
        folder = scratch / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        given = reader.write(seeds, rng, folder)
        outcome, said = outcome_of(partial(reader.read, folder, given), folder)
        tallies[OUTCOMES.index(outcome)] += 1
        if outcome not in ("read", "refused"):
            keep(reader, index, scratch, out, outcome, said)
    place[0] = count


def outcome_of(read: Callable[[], Any], folder: Path) -> tuple[str, str]:
    """What comes of reading, and what is said."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read()
        return "read", ""
    except Hang:
        return "hang", traceback.format_exc()
    except _EXPECTED as error:
        said = str(error)
        is_clear = str(folder) in said and "\n" not in said.strip() and len(said) < LONGEST
        return ("refused", "") if is_clear else ("unclear", traceback.format_exc())
    except BaseException:
        return "crash", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def too_long(*_: Any) -> None:
    raise Hang


def keep(reader: Reader, index: int, scratch: Path, out: Path, outcome: str, said: str) -> None:
    """An input that made a find, the first few of each kind."""
    last = (said.strip().splitlines() or [""])[-1]
    kind = "".join(c if c.isalnum() else "_" for c in f"{outcome}_{last.split(':')[0]}")[-60:]
    folder = out / "finds" / reader.name / kind
    if folder.is_dir() and len(list(folder.iterdir())) >= FINDS_KEPT:
        return
    shutil.copytree(scratch / "input", folder / str(index), dirs_exist_ok=True)
    (folder / str(index) / "error.txt").write_text(said)


def arguments(given: Sequence[str]) -> dict[str, Any]:
    """INPUTS SEED OUT ONLY, in this order."""
    kinds: dict[str, Callable[[str], Any]] = {"inputs": int, "seed": int, "out": str, "only": str}
    return {name: kind(text) for (name, kind), text in zip(kinds.items(), given, strict=False)}


if __name__ == "__main__":
    main(**arguments(sys.argv[1:]))
