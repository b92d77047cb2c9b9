"""A fault campaign: command lines that are killed, starved, lied to and left alone.

python experiments/faults/campaign.py [--seed 0] [--kinds KIND ...] [--out experiments/faults]

One small training, one fusion and one evaluation are made first, undisturbed. Every fault then
starts from copies of them and is judged by the same rules:

- a run that was stopped goes on by the same command, from its last checkpoint and from nothing
  earlier, to the weights of the undisturbed one, bit for bit; a fusion or an evaluation leaves
  either nothing or the undisturbed one's files, and all of them when it is asked again;
- a file that was harmed is refused, or changes nothing: no output differs;
- what fails says so in one sentence, with no traceback, and ends with a status that is not 0;
- nothing half-written is left.

A fault that breaks a rule is reported with what it broke; the campaign then ends with status 1.
"""

import argparse
import csv
import gzip
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import harm
import torch
from commands import (
    SMALL,
    TRAINING_ONLY,
    Command,
    are_equal,
    imported,
    once,
    scratch,
    start,
    weights,
)

from clinfuse.configuration import commit

CHECKOUT = Path(__file__).resolve().parents[2]
TOTAL_STEPS = 12
COLUMNS = ("kind", "fault", "command", "what", "status", "outcome", "said", "broken", "commit")


@dataclass
class Fault:
    """One fault and what came of it."""

    fault: str
    command: str
    what: str
    status: str = ""
    said: str = ""
    outcome: str = ""
    kind: str = ""
    broken: list[str] = field(default_factory=list)

    def check(self, holds: bool, rule: str) -> None:
        if not holds:
            self.broken.append(rule)


class Campaign:
    """What all faults start from.

    Args:
        work: an empty folder.
        seed: of all that is drawn: moments, bytes, sizes.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed, self.faults = work, seed, list[Fault]()
        self.begin("")
        self.cache = work / "cache"
        self._folders = 0
        work.chmod(0o755)  # for the user that permissions count for

    # What is undisturbed.

    @cached_property
    def run(self) -> Path:
        """A run that was trained to its end."""
        folder, _ = self.work / "reference", self.half  # which draws the heads
        began = time.monotonic()
        done = once("train", self.training(folder), self.work / "reference.txt")
        assert done.status == 0, done.text
        self.train_seconds = time.monotonic() - began
        return folder

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return weights(self.run)

    @cached_property
    def half(self) -> Path:
        """A run that was asked to end after six of twelve steps: in the middle of an epoch."""
        folder, marks = self.work / "half", self.work / "half_sent"
        marks.mkdir()
        stop = [
            "+callbacks.signal._target_=signals.SignalAt", "+callbacks.signal.steps=[6]",
            "+callbacks.signal.signums=[15]", f"+callbacks.signal.folder={marks}",
        ]  # fmt: skip
        done = once("train", [*self.training(folder), *stop], self.work / "half.txt")
        assert done.status == 143, done.text
        return folder

    @cached_property
    def pair(self) -> Path:
        """A study folder with an MRI and a CT."""
        _ = self.run
        return next(p.parent for p in sorted(self.cache.glob("phantoms_*/case_*/mri.nii.gz")))

    @cached_property
    def fused(self) -> Path:
        folder, began = self.new("fused"), time.monotonic()
        done = once("fuse", self.fusion(self.run, folder), folder.with_suffix(".txt"))
        assert done.status == 0, done.text
        self.fuse_seconds = time.monotonic() - began
        return folder

    @cached_property
    def scored(self) -> Path:
        folder, began = self.new("scored"), time.monotonic()
        done = once("evaluate", self.evaluation(self.run, folder), folder.with_suffix(".txt"))
        assert done.status == 0, done.text
        self.evaluate_seconds = time.monotonic() - began
        return folder

    # Command lines.

    def training(self, folder: Path, *more: str) -> list[str]:
        places = [f"cache_dir={self.cache}", f"hydra.run.dir={folder}"]
        return [*SMALL, *TRAINING_ONLY, *places, *more]

    def fusion(self, run: Path, out: Path, pair: Path | None = None) -> list[str]:
        pair = self.pair if pair is None else pair
        mri, ct = (next(pair.glob(f"{name}.nii*")) for name in ("mri", "ct"))
        return [
            f"run={run}", f"mri={mri}", f"ct={ct}", f"out={out}", "trainer.accelerator=cpu",
            f"cache_dir={out.with_name(out.name + '_cache')}", f"hydra.run.dir={out}_hydra",
        ]  # fmt: skip

    def evaluation(self, run: Path, out: Path) -> list[str]:
        return [
            f"run={run}", f"out={out}", "misregistration_mm=[0]", "pictures=0",
            f"hydra.run.dir={out}_hydra",
        ]  # fmt: skip

    def new(self, name: str) -> Path:
        """A folder that is not there yet."""
        self._folders += 1
        return self.work / f"{name}_{self._folders}"

    # Rules.

    def same_fusion(self, out: Path) -> bool:
        """Whether all that was fused is what undisturbed fusing gives."""
        return all(
            (out / p.name).is_file() and content(out / p.name) == content(p)
            for p in self.fused.glob("*.nii.gz")
        )

    def same_scores(self, out: Path) -> bool:
        ours, theirs = out / "cases.csv", self.scored / "cases.csv"
        return ours.is_file() and rows_of(ours) == rows_of(theirs)

    def judge_refusal(self, fault: Fault, command: Command) -> None:
        """It failed: in one sentence, with a status."""
        fault.status, sentences = str(command.status), command.sentences
        fault.said = self.plain(sentences[0]) if sentences else last_line(command)
        fault.check(command.status not in (0, None), "ends with a status that is not 0")
        fault.check(len(sentences) == 1, f"says one sentence (said {len(sentences)})")
        fault.check("Traceback" not in command.text, "shows no traceback")
        fault.outcome = "refused"

    def judge_training(self, fault: Fault, folder: Path, again: Sequence[str] = ()) -> None:
        """It was stopped: the same command goes on from the last checkpoint, to the same end."""
        last = folder / "checkpoints" / "last.ckpt"
        begun = global_step(last) if last.is_file() else 0
        (folder / "metrics.csv").unlink(missing_ok=True)
        done = once("train", again or self.training(folder), folder.with_suffix(".again"))
        fault.check(done.status == 0, f"goes on by the same command ({last_line(done)})")
        if done.status:
            return
        steps = set(range(begun, TOTAL_STEPS))
        fault.check(logged_steps(folder) == steps, f"goes on from step {begun} and no earlier")
        fault.check(are_equal(weights(folder), self.weights), "ends with the same weights")
        fault.check(not (left := harm.half_written(folder)), f"leaves nothing half-written: {left}")
        fault.outcome = f"went on from step {begun} to the same weights"

    def plain(self, text: str) -> str:
        """Without this machine's folders."""
        return text.replace(f"{self.work}/", "").replace(f"{CHECKOUT}/", "")

    def begin(self, kind: str) -> None:
        """What is drawn for a kind of fault is the same, whichever come before it."""
        self.kind, self.draw = kind, random.Random(f"{self.seed} {kind}")

    def add(self, fault: Fault) -> None:
        fault.kind, fault.what = self.kind, self.plain(fault.what)
        self.faults.append(fault)
        verdict = "BROKEN: " + "; ".join(fault.broken) if fault.broken else fault.outcome
        print(f"{len(self.faults):4d} {fault.fault}, {fault.command}: {fault.what}: {verdict}")
        if fault.broken:
            print(f"     said: {fault.said}")
        sys.stdout.flush()


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a table of cases, without what was measured with a clock."""
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if "seconds" not in r.get("metric", "")]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def logged_steps(folder: Path) -> set[int]:
    path = folder / "metrics.csv"
    if not path.is_file():  # of a run that had no step left to do
        return set()
    with path.open(newline="") as file:
        return {int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")}


def global_step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def last_line(command: Command) -> str:
    return (command.text.strip().splitlines() or [""])[-1][:200]


# Kinds of faults.


def killed_trainings(c: Campaign, signum: int, times: int) -> None:
    """Signals at random moments between the start and the end."""
    name = signal.Signals(signum).name
    _ = c.run
    for workers in (number % 2 for number in range(times)):
        moment = c.draw.uniform(0.02, 0.95) * c.train_seconds
        folder = c.new("killed")
        fault = Fault(name, "train", f"after {moment:.2f} s, with {workers} loading processes")
        asked = c.training(folder, f"data.num_workers={workers}")
        command = start("train", asked, folder.with_suffix(".txt"))
        time.sleep(moment)
        command.kill(signum)
        fault.status = str(command.wait())
        allowed = (-signum, 128 + signum, 0)  # 0: it was over already
        fault.check(int(fault.status) in allowed, f"ends with a status of {allowed}")
        fault.check("Traceback" not in command.text, "shows no traceback")
        if fault.status == "0":
            fault.outcome = "was over before"
            fault.check(are_equal(weights(folder), c.weights), "ends with the same weights")
        else:
            c.judge_training(fault, folder, asked)
        c.add(fault)


def killed_outputs(c: Campaign, signum: int, times: int) -> None:
    """Signals at random moments of fusions and evaluations."""
    name = signal.Signals(signum).name
    _ = c.fused, c.scored
    for number in range(times):
        module = ("fuse", "evaluate")[number % 2]
        seconds = c.fuse_seconds if module == "fuse" else c.evaluate_seconds
        moment = c.draw.uniform(0.02, 0.98) * seconds
        out, fault = c.new("cut"), Fault(name, module, f"after {moment:.2f} s")
        asked = c.fusion(c.run, out) if module == "fuse" else c.evaluation(c.run, out)
        command = start(module, asked, out.with_suffix(".txt"))
        time.sleep(moment)
        command.kill(signum)
        fault.status = str(command.wait())
        fault.check(int(fault.status) in (-signum, 128 + signum, 0), "ends by the signal")
        if module == "fuse":
            whole = [
                content(p) == content(c.fused / p.name)
                for p in out.glob("*.nii.gz")
                if not p.name.startswith(".")
            ]
            fault.check(all(whole), "leaves whole files or none")
        elif (out / "cases.csv").is_file():
            fault.check(c.same_scores(out), "leaves a whole table or none")
        again = once(module, asked, out.with_suffix(".again"))
        same = c.same_fusion(out) if module == "fuse" else c.same_scores(out)
        fault.check(again.status == 0 and same, f"gives all when asked again ({last_line(again)})")
        fault.check(not (left := harm.half_written(out)), f"leaves nothing half-written: {left}")
        fault.outcome = "complete when asked again"
        c.add(fault)


def full_disks(c: Campaign, times: int) -> None:
    """A file system of its own that is too small; where none can be mounted, too small files."""
    mounts = harm.can_mount(c.work)
    _ = c.fused, c.scored
    for number in range(times):
        module = ("train", "train", "fuse", "evaluate")[number % 4]
        largest = 90_000 if module == "train" else 1500
        kilobytes = round(20 * (largest / 20) ** c.draw.random())
        name = "disk" if mounts else "file size limit"
        folder = c.new("full")
        fault = Fault("full disk", module, f"{name} of {kilobytes} kB")
        said = folder.with_suffix(".txt")
        asked = {
            "train": c.training(folder / "run"),
            "fuse": c.fusion(c.run, folder / "out"),
            "evaluate": c.evaluation(c.run, folder / "out"),
        }[module]
        if mounts:
            with harm.small_disk(folder, kilobytes):
                command = once(module, asked, said)
                left = harm.half_written(folder)
                shutil.copytree(folder, moved := c.new("saved"), dirs_exist_ok=True)
            shutil.rmtree(folder)
            moved.rename(folder)
        else:
            command = once(module, asked, said, before=harm.limited_files(kilobytes))
            left = harm.half_written(folder)
        if command.status == 0:
            fault.status, fault.outcome = "0", "was enough"
        else:
            c.judge_refusal(fault, command)
        fault.check(not left, f"leaves nothing half-written: {left}")
        if module == "train":
            c.judge_training(fault, folder / "run")
        else:
            again = once(module, asked, folder.with_suffix(".again"))
            same = (c.same_fusion if module == "fuse" else c.same_scores)(folder / "out")
            fault.check(again.status == 0 and same, f"gives all with room ({last_line(again)})")
        c.add(fault)


def harmed_checkpoints(c: Campaign, do: Callable[..., str], name: str, times: int) -> None:
    """The last checkpoint, the one before it as well, or a model draw, is not what was written."""
    _ = c.fused
    for number in range(times):
        kind = ("goes on", "fuses", "goes on", "fuses", "both")[number % 5]
        folder = harm.copied(c.run if kind == "fuses" else c.half, c.new("harmed"))
        checkpoints = folder / "checkpoints"
        if kind == "fuses":
            draws = sorted(checkpoints.glob("draw_*.pt"))
            fault = Fault(
                name, "fuse", do(c.draw.choice([checkpoints / "last.ckpt", *draws]), c.draw)
            )
            out = c.new("out")
            command = once("fuse", c.fusion(folder, out), out.with_suffix(".txt"))
            judge_harmed(c, fault, command, c.same_fusion(out) if out.is_dir() else False)
        else:
            what = do(checkpoints / "last.ckpt", c.draw)
            if kind == "both":
                what += " and " + do(checkpoints / "previous.ckpt", c.draw)
            fault = Fault(name, "train", what)
            asked = c.training(folder)
            command = once("train", asked, folder.with_suffix(".txt"))
            is_same = command.status == 0 and are_equal(weights(folder), c.weights)
            judge_harmed(c, fault, command, is_same)
            if kind == "goes on":
                fault.check(command.status == 0, "goes on from the one before it")
        c.add(fault)


def judge_harmed(c: Campaign, fault: Fault, command: Command, is_same: bool) -> None:
    """Refused in one sentence, or nothing has changed."""
    if command.status != 0:
        c.judge_refusal(fault, command)
        return
    fault.status = "0"
    warned = [line for line in command.text.splitlines() if "goes on from the one saved" in line]
    fault.said = c.plain(warned[0].split(" - ", 1)[-1]) if warned else ""
    fault.check(is_same, "refuses it, or gives what it gave before")
    fault.outcome = "went on from the checkpoint before it" if warned else "changes nothing"


def harmed_volumes(c: Campaign, do: Callable[..., str], name: str, times: int) -> None:
    """A source is not what was written: compressed, whose bytes have a checksum."""
    _ = c.fused
    for number in range(times):
        module = ("fuse", "fuse", "train")[number % 3]
        if module == "fuse":
            pair = harm.copied(c.pair, c.new("pair"))
            path = pair / c.draw.choice(["mri.nii.gz", "ct.nii.gz"])
            fault, out = Fault(name, "fuse", do(path, c.draw)), c.new("out")
            command = once("fuse", c.fusion(c.run, out, pair), out.with_suffix(".txt"))
            judge_harmed(c, fault, command, command.status == 0 and c.same_fusion(out))
        else:
            cohort = harm.copied(c.pair.parent, c.new("cohort"))
            path = c.draw.choice(sorted(cohort.glob("case_*/*.nii.gz")))
            fault, folder = Fault(name, "train", do(path, c.draw)), c.new("run")
            asked = c.training(folder, f"data.root={cohort}")
            command = once("train", asked, folder.with_suffix(".txt"))
            is_same = command.status == 0 and are_equal(weights(folder), c.weights)
            judge_harmed(c, fault, command, is_same)
        c.add(fault)


def cut_plain_volumes(c: Campaign, times: int) -> None:
    """A source without compression, cut. A turned bit in one is another image: nobody can know."""
    _ = c.fused
    for _ in range(times):
        pair = harm.copied(c.pair, c.new("pair"))
        for path in (pair / "mri.nii.gz", pair / "ct.nii.gz"):
            path.with_suffix("").write_bytes(content(path))
            path.unlink()
        path = pair / c.draw.choice(["mri.nii", "ct.nii"])
        fault, out = Fault("truncated NIfTI", "fuse", harm.cut(path, c.draw)), c.new("out")
        command = once("fuse", c.fusion(c.run, out, pair), out.with_suffix(".txt"))
        judge_harmed(c, fault, command, False)
        c.add(fault)


def harmed_configurations(c: Campaign, do: Callable[..., str], name: str, times: int) -> None:
    """A run's configuration is not what was written."""
    _ = c.fused
    for number in range(times):
        module = ("fuse", "fuse", "train")[number % 3]
        folder = harm.copied(c.half if module == "train" else c.run, c.new("configured"))
        fault = Fault(name, module, do(folder / ".hydra" / "config.yaml", c.draw))
        if module == "fuse":
            out = c.new("out")
            command = once("fuse", c.fusion(folder, out), out.with_suffix(".txt"))
            is_same = command.status == 0 and c.same_fusion(out)
        else:
            trusted = {"CLINFUSE_TRUSTED": "signals.SignalAt"}
            asked = [f"resume={folder}"]
            command = once("train", asked, folder.with_suffix(".txt"), environment=trusted)
            is_same = command.status == 0 and are_equal(weights(folder), c.weights)
        judge_harmed(c, fault, command, is_same)
        c.add(fault)


def unreadable(c: Campaign, times: int) -> None:
    """Folders and files that this user may not read or write, or that are none."""
    _ = c.fused
    for number in range(times):
        kind = ("source", "run", "place for output", "checkpoint", "folder is a file")[number % 5]
        fault, out = Fault("unreadable", "fuse", kind), c.new("out")
        run, pair = harm.copied(c.run, c.new("run")), harm.copied(c.pair, c.new("pair"))
        base = c.new("base")
        base.mkdir()
        base.chmod(0o777)
        asked = c.fusion(run, base / out.name, pair)
        closed = {
            "source": pair / "mri.nii.gz", "run": run / ".hydra",
            "place for output": base, "checkpoint": run / "checkpoints",
        }.get(kind)  # fmt: skip
        asked = [a for a in asked if not a.startswith(("hydra.run.dir", "cache_dir"))]
        free = c.new("free")
        free.mkdir()
        free.chmod(0o777)
        asked += [f"hydra.run.dir={free / 'hydra'}", f"cache_dir={free / 'cache'}"]
        if closed is None:
            shutil.rmtree(run / "checkpoints")
            (run / "checkpoints").write_text("no folder")
        else:
            closed.chmod(0o500 if kind == "place for output" else 0)
        said = out.with_suffix(".txt")
        command = once("fuse", asked, said, before=harm.as_nobody)
        c.judge_refusal(fault, command)
        fault.check(not list(base.rglob("*.nii.gz")), "writes nothing")
        c.add(fault)


def killed_workers(c: Campaign, times: int) -> None:
    """A process that draws for a training is killed."""
    _ = c.run
    for _ in range(times):
        folder = c.new("worker")
        asked = c.training(folder, "data.num_workers=2")
        command = start("train", asked, folder.with_suffix(".txt"))
        what = harm.kill_a_worker(command.pid, c.draw)
        command.wait()
        fault = Fault("killed worker", "train", what or "none was there")
        if command.status == 0:
            fault.status, fault.outcome = "0", "was not needed any more"
            fault.check(are_equal(weights(folder), c.weights), "ends with the same weights")
        else:
            c.judge_refusal(fault, command)
            c.judge_training(fault, folder, asked)
        c.add(fault)


def clock_jumps(c: Campaign, times: int) -> None:
    """The clock jumps within a training, and the files of a run are of other years."""
    _ = c.run
    for number in range(times):
        years = c.draw.choice([-30, -1, 1, 10])
        seconds = years * 365.25 * 86400
        folder = harm.copied(c.half, c.new("clock")) if number % 2 else c.new("clock")
        calls = c.draw.randrange(0, 200)
        fault = Fault("clock jump", "train", f"{years:+d} years after {calls} looks at the clock")
        if number % 2:
            fault.what += ", and as many in all its files"
            harm.redate(folder, seconds)
        jump = harm.jumping_clock(seconds, calls)
        command = once("train", c.training(folder), folder.with_suffix(".txt"), before=jump)
        fault.status, fault.outcome = str(command.status), "the same weights"
        fault.check(command.status == 0, f"goes on ({last_line(command)})")
        is_same = command.status == 0 and are_equal(weights(folder), c.weights)
        fault.check(is_same, "ends with the same weights")
        c.add(fault)


def unreachable_service(c: Campaign, times: int) -> None:
    """W&B is where nobody answers."""
    _ = c.run
    nobody = {
        "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "3", "WANDB_HTTP_TIMEOUT": "1",
    }  # fmt: skip
    for _ in range(times):
        folder = c.new("service")
        asked = c.training(folder, "logger=default")
        command = once("train", asked, folder.with_suffix(".txt"), environment=nobody)
        fault = Fault("W&B unreachable", "train", "nobody listens at its address")
        said = [line for line in command.text.splitlines() if "W&B did not start" in line]
        fault.status, fault.outcome = str(command.status), "logged offline, to the same weights"
        fault.said = said[0].split(" - ", 1)[-1].split("(")[0].strip() if said else ""
        fault.check(len(said) == 1, f"says one sentence (said {len(said)})")
        is_same = command.status == 0 and are_equal(weights(folder), c.weights)
        fault.check(is_same, f"ends with the same weights ({last_line(command)})")
        c.add(fault)


def killed_sweeps(c: Campaign, times: int) -> None:
    """A sweep of two trainings is asked to end, or killed, and started again."""
    _ = c.run
    for number in range(times):
        signum = (signal.SIGTERM, signal.SIGKILL)[number % 2]
        folder = c.new("sweep")
        training = [a for a in c.training(folder) if not a.startswith("hydra.run.dir")]
        asked = ["-m", *training, "seed=0,1", f"hydra.sweep.dir={folder}"]
        moment = c.draw.uniform(0.3, 1.5) * c.train_seconds
        fault = Fault(signal.Signals(signum).name, "train -m", f"after {moment:.2f} s")
        command = start("train", asked, folder.with_suffix(".txt"))
        time.sleep(moment)
        command.kill(signum)
        fault.status = str(command.wait())
        fault.check(int(fault.status) in (-signum, 128 + signum), "ends by the signal")
        again = once("train", asked, folder.with_suffix(".again"))
        fault.check(again.status == 0, f"goes on by the same command ({last_line(again)})")
        runs = [p.parents[1] for p in folder.rglob("last.ckpt")]
        same = [are_equal(weights(run), c.weights) for run in runs]
        fault.check(len(runs) == 2 and sum(same) == 1, "ends with the weights of both seeds")
        fault.check(not (left := harm.half_written(folder)), f"leaves nothing half-written: {left}")
        fault.outcome = "went on to the same weights"
        c.add(fault)


KINDS: dict[str, Callable[[Campaign], None]] = {
    "sigkill": lambda c: killed_trainings(c, signal.SIGKILL, 12),
    "sigterm": lambda c: killed_trainings(c, signal.SIGTERM, 10),
    "sigusr1": lambda c: killed_trainings(c, signal.SIGUSR1, 4),
    "killed outputs": lambda c: killed_outputs(c, signal.SIGKILL, 6),
    "ended outputs": lambda c: killed_outputs(c, signal.SIGTERM, 4),
    "sweeps": lambda c: killed_sweeps(c, 2),
    "disk": lambda c: full_disks(c, 12),
    "cut checkpoint": lambda c: harmed_checkpoints(c, harm.cut, "truncated checkpoint", 10),
    "flipped checkpoint": lambda c: harmed_checkpoints(c, harm.flip, "flipped checkpoint", 15),
    "cut volume": lambda c: harmed_volumes(c, harm.cut, "truncated NIfTI", 6),
    "cut plain volume": lambda c: cut_plain_volumes(c, 3),
    "flipped volume": lambda c: harmed_volumes(c, harm.flip, "flipped NIfTI", 9),
    "cut configuration": lambda c: harmed_configurations(c, harm.cut, "truncated config", 5),
    "flipped configuration": lambda c: harmed_configurations(c, harm.flip, "flipped config", 24),
    "unreadable": lambda c: unreadable(c, 5),
    "worker": lambda c: killed_workers(c, 5),
    "clock": lambda c: clock_jumps(c, 4),
    "service": lambda c: unreachable_service(c, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    began = time.monotonic()
    with (
        imported("clinfuse.train", "clinfuse.fuse", "clinfuse.evaluate"),
        scratch() as work,
    ):
        campaign = Campaign(work, asked.seed)
        for kind in asked.kinds:
            campaign.begin(kind)
            KINDS[kind](campaign)
        write(campaign, asked.kinds, time.monotonic() - began, asked.out)
    if any(fault.broken for fault in campaign.faults):
        sys.exit("expected every fault to be survived or refused, got those marked BROKEN")


def write(campaign: Campaign, kinds: Sequence[str], seconds: float, out: Path) -> None:
    """``cases.csv``, one line a fault; ``table.md``, the counts.

    Of kinds that were not asked for this time the lines are kept.
    """
    path, here = out / "cases.csv", commit()
    rows = [
        {name: str(getattr(f, name)) for name in COLUMNS[:-2]}
        | {"broken": "; ".join(f.broken), "commit": here}
        for f in campaign.faults
    ]
    if path.is_file():
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row["kind"] not in kinds]
    rows.sort(key=lambda row: list(KINDS).index(row["kind"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [
        f"`python experiments/faults/campaign.py`, commit {commits}.",
        "",
        "| fault | times | went on, or complete when asked again | refused in one sentence "
        "| changed nothing | rules broken |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for fault in [*dict.fromkeys(row["fault"] for row in rows), "all"]:
        counts = Counter(column_of(row) for row in rows if fault in (row["fault"], "all"))
        cells = [counts[column] for column in ("went on", "refused", "nothing", "broken")]
        lines.append(f"| {fault} | {counts.total()} | " + " | ".join(map(str, cells)) + " |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, "", f"{len(campaign.faults)} faults in {seconds / 60:.1f} minutes"]))


def column_of(row: Mapping[str, str]) -> str:
    if row["broken"]:
        return "broken"
    if row["outcome"] == "refused":
        return "refused"
    return "nothing" if row["outcome"] in ("changes nothing", "was enough") else "went on"


if __name__ == "__main__":
    main()
