"""Runs that were interrupted at random steps, against one that was not.

python experiments/faults/resume.py [--interruptions 10] [--seed 0] [--out experiments/faults]

Ten trainings are interrupted once each, after a random step, by SIGTERM, SIGUSR1 or SIGKILL, and
go on by the same command or by ``resume=``; an eleventh is interrupted at all of these steps. Each
is compared with the training that ran through: averaged weights, weights, and what the optimiser
remembers, bit for bit.
"""

import argparse
import csv
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import SMALL, TRAINING_ONLY, are_equal, imported, once, scratch, weights

from clinfuse.configuration import commit

EPOCHS, STEPS_PER_EPOCH = 5, 8
TRAINING = (
    *SMALL, *TRAINING_ONLY,
    f"trainer.max_epochs={EPOCHS}", f"data.draws_per_epoch={STEPS_PER_EPOCH}",
)  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    draw = random.Random(asked.seed)
    steps = sorted(draw.sample(range(1, EPOCHS * STEPS_PER_EPOCH), asked.interruptions))
    signums = [SIGNALS[number % len(SIGNALS)] for number in range(len(steps))]
    draw.shuffle(signums)
    with imported("clinfuse.train"), scratch() as work:
        reference = work / "whole"
        whole = once("train", command_of(reference, work), work / "whole.txt")
        assert whole.status == 0, whole.text
        rows = []
        for number, (step, signum) in enumerate(zip(steps, signums, strict=True)):
            workers, by = number % 2, ("same command", "resume=")[number // 2 % 2]
            folder = work / f"run_{number}"
            rows.append(interrupted(folder, work, [step], [signum], workers, by, reference))
        folder = work / "at_all"
        rows.append(interrupted(folder, work, steps, signums, 0, "same command", reference))
    write(rows, asked.out)
    if not all(row["equal"] == "yes" for row in rows):
        sys.exit("expected runs that end with the weights of the one that ran through")


def command_of(folder: Path, work: Path, *more: str) -> list[str]:
    return [*TRAINING, f"cache_dir={work / 'cache'}", f"hydra.run.dir={folder}", *more]


def interrupted(
    folder: Path,
    work: Path,
    steps: Sequence[int],
    signums: Sequence[int],
    workers: int,
    by: str,
    reference: Path,
) -> dict[str, str]:
    """One line of the table: a training that was interrupted and went on until its end."""
    marks = folder.with_name(f"{folder.name}_sent")
    marks.mkdir()
    command = command_of(
        folder, work, f"data.num_workers={workers}", "+callbacks.signal._target_=signals.SignalAt",
        f"+callbacks.signal.steps={list(steps)}", f"+callbacks.signal.folder={marks}",
        f"+callbacks.signal.signums={[int(signum) for signum in signums]}",
    )  # fmt: skip
    trusted = {"CLINFUSE_TRUSTED": "signals.SignalAt"}
    statuses: list[int] = []
    while len(statuses) <= len(steps):
        again = [f"resume={folder}"] if statuses and by == "resume=" else command
        done = once("train", again, work / f"{folder.name}.txt", environment=trusted)
        assert done.status is not None
        statuses.append(done.status)
        if done.status == 0:
            break
    expected = [-s if s == signal.SIGKILL else 128 + s for s in signums] + [0]
    assert statuses == expected, (statuses, expected, done.text)
    row = {
        "after_step": " ".join(map(str, steps)),
        "signal": " ".join(signal.Signals(s).name for s in signums),
        "workers": str(workers),
        "went_on_by": by,
        "statuses": " ".join(map(str, statuses)),
        "equal": "yes" if are_equal(weights(reference), weights(folder)) else "no",
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


def write(rows: Sequence[dict[str, str]], out: Path) -> None:
    with (out / "resume.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    equal = sum(row["equal"] == "yes" for row in rows)
    lines = [
        f"`python experiments/faults/resume.py`, commit {commit()}. "
        f"{EPOCHS * STEPS_PER_EPOCH} steps in {EPOCHS} epochs; "
        f"{equal} of {len(rows)} runs that were interrupted end with the weights, averages and "
        "optimiser states of the one that was not, bit for bit.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |",
        "| " + " | ".join("---" for _ in rows[0]) + " |",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    (out / "resume.md").write_text("\n".join(lines) + "\n")
    print(f"{equal} of {len(rows)} equal", flush=True)


if __name__ == "__main__":
    main()
