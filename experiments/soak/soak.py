"""Does a long session leak? Training, guided sampling, evaluation and fusion, again and again.

python experiments/soak/soak.py --out FOLDER [--minutes 120] [--keep FOLDER] [--again]

One process, and in every cycle what users run, by the entry points themselves: ``clinfuse.train``
(a dataloader with a worker, three stages, weight averages, checkpoints, a guided validation,
calibration, a test with its report), ``clinfuse.evaluate`` of that run beside a rule, and
``clinfuse.fuse`` of one study, on heads of 16 x 32 x 32 voxels that are read from disk. The cycle's
folder is then removed, and what the process holds is measured. Memory is counted as it is and, in
every fourth cycle, again after what the allocator keeps was given back, so that fragmentation is
told from a leak.

Time in which the process was stopped for more than half a minute doesn't count. Writes
``soak.csv``, ``soak.png`` and ``table.md`` into ``--keep`` (else ``--out``); ends with status 1
where the last tenth of the cycles holds more than the first tenth after a tenth of warm-up: 2 % of
memory (the medians), one process, one file (the least of each tenth, for what Python has yet to
collect comes and goes). ``--again`` runs nothing and reads what the last one recorded in ``--out``.
"""

import argparse
import csv
import ctypes
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import psutil
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from matplotlib import pyplot as plt
from omegaconf import DictConfig, open_dict

from clinfuse import evaluate, fuse, train
from clinfuse.configuration import CONFIG_PATH, register_resolvers, run_facts

SMALL = (
    *("experiment=smoke", "data.prepare.workers=1", "data.num_workers=1"),
    *("trainer.max_epochs=3", "trainer.check_val_every_n_epoch=3", "trainer.log_every_n_steps=1"),
    *("method.steps=2", "method.members=2"),
)
"""A training of seconds that visits everything: three stages, a validation, a test."""

MIB = 2**20
TOLERANCE = 0.02
MEMORY = {
    "rss_mib": "resident memory as it is, MiB",
    "uss_mib": "of that its own, MiB",
    "trimmed_rss_mib": "resident after collection and trim, MiB",
    "trimmed_uss_mib": "of that its own, MiB",
    "peak_mib": "most within a cycle, with its processes, MiB",
    "cuda_mib": "CUDA memory, MiB",
}
SHOWN_ONLY = {"uss_mib", "trimmed_uss_mib", "peak_mib"}
"""What says as much of the rest of the machine: libraries are a process's own while no other maps
them, and a peak is seen or missed, every other second."""

COUNTS = {
    "processes": "processes it started",
    "file_descriptors": "open file descriptors",
    "threads": "threads",
    "temporary_files": "files in the temporary folder",
    "output_files": "files in the output folder",
    "cycle_files": "files that a cycle writes",
    "figures": "open figures",
}
SHOWN_ROWS = 1500


class Watch(threading.Thread):
    """Counts the seconds in which the process ran, and the most memory that it and its own held."""

    def __init__(self, every: float = 2.0, pause: float = 30.0) -> None:
        super().__init__(daemon=True)
        self.every, self.pause = every, pause
        self.seconds, self.peak_bytes = 0.0, 0

    def run(self) -> None:
        process, last = psutil.Process(), time.monotonic()
        while True:
            time.sleep(self.every)
            now = time.monotonic()
            if now - last < self.pause:
                self.seconds += now - last
            last = now
            self.peak_bytes = max(self.peak_bytes, held_bytes(process))


def held_bytes(process: psutil.Process) -> int:
    """Resident memory of a process, and what the ones it started have of their own."""
    held = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            held += child.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # has just ended
            continue
    return int(held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    out = asked.out.resolve()
    keep = (asked.keep or out).resolve()
    if not asked.again:
        soak(out, 60 * asked.minutes)
    with (out / "rows.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    keep.mkdir(parents=True, exist_ok=True)
    write_csv(keep / "soak.csv", rows[:: -(-len(rows) // SHOWN_ROWS)])
    compared, faults = comparison(rows)
    last = rows[-1]
    head = (
        f"`python experiments/soak/soak.py --minutes {asked.minutes:g}`, commit "
        f"{(out / 'commit.txt').read_text()}, torch {torch.__version__}: {len(rows)} cycles in "
        f"{last['minutes']:.0f} minutes ({last['processor_minutes']:.0f} of the processor), times "
        f"in which it was stopped not counted."
    )
    verdict = "; ".join(faults) or (
        f"memory flat within {TOLERANCE:.0%}, no process and no file left behind"
    )
    text = f"{head}\n\n{compared}\n\nVerdict: {verdict}.\n"
    (keep / "table.md").write_text(text)
    draw(rows, keep / "soak.png")
    print(text)
    return 1 if faults else 0


def soak(out: Path, seconds: float) -> None:
    """Cycles for so long; ``rows.csv`` has what each left behind."""
    shutil.rmtree(out / "cycle", ignore_errors=True)
    (out / "temporary").mkdir(parents=True, exist_ok=True)
    (out / "commit.txt").write_text(run_facts()["commit"])
    os.environ["TMPDIR"] = tempfile.tempdir = str(out / "temporary")
    register_resolvers()
    watch = Watch()
    watch.start()
    rows: list[dict[str, float]] = []
    while watch.seconds < seconds:
        cycle(len(rows), out)
        rows.append(measured(len(rows), out, watch))
        write_csv(out / "rows.csv", rows)
        last = rows[-1]
        print(
            f"soak: cycle {len(rows)}, {watch.seconds / 60:.1f} min, "
            f"{last['rss_mib']:.1f} MiB, {last['file_descriptors']} open files",
            flush=True,
        )


def cycle(number: int, out: Path) -> None:
    """Train, evaluate and fuse by the entry points, in a folder of its own."""
    folder = out / "cycle"
    cache = f"cache_dir={out / 'cache'}"
    training = configured("train", folder / "run", *SMALL, cache, f"seed={number}")
    train.main(training)
    evaluated = folder / "evaluation"
    asked = (f"run={folder / 'run'}", "baselines=[average]", "misregistration_mm=[0,2]")
    asked = (*asked, f"out={evaluated}", "+trainer.limit_test_batches=1", "pictures=1", cache)
    evaluate.main(configured("evaluate", evaluated, *asked))
    study = next(Path(training.data.root).glob("case_*"))
    scans = (f"mri={study / 'mri.nii.gz'}", f"ct={study / 'ct.nii.gz'}")
    asked = (f"run={folder / 'run'}", *scans, f"out={folder / 'fused'}", cache)
    fuse.main(configured("fuse", folder / "fuse", *asked))


def configured(name: str, folder: Path, *overrides: str) -> DictConfig:
    """What the entry point ``name`` gets for a command line, Hydra's own part set as it does it."""
    (folder / ".hydra").mkdir(parents=True)
    with initialize_config_dir(config_dir=CONFIG_PATH, version_base="1.3"):
        place = f"hydra.runtime.output_dir={folder}"
        cfg = compose(name, [*overrides, place], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def measured(number: int, out: Path, watch: Watch) -> dict[str, float]:
    """What the process holds after a cycle, whose folder is removed."""
    cycle_files = files_in(out / "cycle")
    shutil.rmtree(out / "cycle")
    process = psutil.Process()
    held = process.memory_full_info()
    row: dict[str, float] = {
        "cycle": number,
        "minutes": round(watch.seconds / 60, 2),
        "processor_minutes": round(time.process_time() / 60, 2),
        "rss_mib": round(held.rss / MIB, 2),
        "uss_mib": round(held.uss / MIB, 2),
        "trimmed_rss_mib": float("nan"),
        "trimmed_uss_mib": float("nan"),
        "peak_mib": round(watch.peak_bytes / MIB, 2),
        "cuda_mib": round(torch.cuda.memory_allocated() / MIB, 2),
        "processes": len(process.children(recursive=True)),
        "file_descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "temporary_files": files_in(out / "temporary"),
        "output_files": files_in(out) - files_in(out / "temporary"),
        "cycle_files": cycle_files,
        "figures": len(plt.get_fignums()),
        "objects": len(gc.get_objects()),
    }
    if number % 4 == 3:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        held = process.memory_full_info()
        row["trimmed_rss_mib"] = round(held.rss / MIB, 2)
        row["trimmed_uss_mib"] = round(held.uss / MIB, 2)
    watch.peak_bytes = 0
    return row


def files_in(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def comparison(rows: Sequence[Mapping[str, float]]) -> tuple[str, list[str]]:
    """A table of the first tenth after the warm-up beside the last one, and what has grown."""
    tenth = max(len(rows) // 10, 1)
    first, last = rows[tenth : 2 * tenth], rows[-tenth:]
    lines = [
        f"| | cycles {tenth + 1} to {2 * tenth} | the last {tenth} | change |",
        "| --- | ---: | ---: | ---: |",
    ]
    faults = []
    for names, digits in ((MEMORY, 1), (COUNTS, 0)):
        for name, text in names.items():
            of_tenth = middle if names is MEMORY else least
            before, after = of_tenth(first, name), of_tenth(last, name)
            if before != before or after != after or (name == "cuda_mib" and not before + after):
                continue  # not measured in so few cycles; no CUDA
            change = after - before
            shown = f"{change / before:+.2%}" if names is MEMORY else f"{change:+g}"
            lines.append(f"| {text} | {before:.{digits}f} | {after:.{digits}f} | {shown} |")
            if name not in SHOWN_ONLY and change > (TOLERANCE * before if names is MEMORY else 0):
                faults.append(f"{text}: {before:.{digits}f} became {after:.{digits}f}")
    return "\n".join(lines), faults


def middle(rows: Sequence[Mapping[str, float]], name: str) -> float:
    values = [row[name] for row in rows if row[name] == row[name]]
    return float(median(values)) if values else float("nan")


def least(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return min(row[name] for row in rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Memory over time, and below it what is counted."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    minutes = [row["minutes"] for row in rows]
    for name in ("rss_mib", "uss_mib", "trimmed_uss_mib"):
        known = [(m, row[name]) for m, row in zip(minutes, rows, strict=True) if row[name] > 0]
        label = MEMORY[name] if name == "rss_mib" else name.replace("_mib", "").replace("_", " ")
        above.plot(*zip(*known, strict=True), ".-" if "trimmed" in name else "-", label=label)
    for name in ("file_descriptors", "threads", "processes", "temporary_files"):
        below.plot(minutes, [row[name] for row in rows], label=COUNTS[name])
    above.set(ylabel="MiB", ylim=(0, None))
    below.set(ylabel="count", xlabel="minutes", ylim=(-1, None))
    for axes in (above, below):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
