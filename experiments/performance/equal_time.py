"""Which learns more in the same time: our denoiser, or a pixel-space one of as many weights?

OMP_NUM_THREADS=1 python experiments/performance/equal_time.py [--seconds 150] [--shape 16x64x64]
    [--rates 5e-4 5e-4] [--out FOLDER]

Both learn the velocity of F itself (no anchor) from the same stream of phantoms, noise levels and
noise: draw i is the i-th step of either. They train in slices of two seconds in one process, by
turns, so that what else the machine does falls on both; each has ``--seconds`` of the processor (on
a GPU, of the clock) in all, loading and validation not counted. The optimiser is the same (AdamW,
gradients clipped at 1, a warm-up over the first twentieth and a cosine down to 0, by the share of
its time that a contestant has used), its rate may be given for each (``--rates OURS REFERENCE``),
and so is the machine's training precision. The validation loss is the mean squared error of v over
the voxels of held-out phantoms, at fixed noise levels and noise, in single precision: in voxels for
both.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import phantoms
from machine import machine
from measure import DEVICE, autocast, precision_here, shape_of, synchronise, written
from reference import weights_of
from steps import CONTESTANTS, Contestant
from torch import Tensor, nn

from clinfuse.types import FusionBatch

SLICE_SECONDS = 2.0
VALIDATION_STEPS = (99, 249, 399, 549, 699, 849, 949)
"""Of 1000, at which the held-out phantoms are noised."""


@dataclass
class Learner:
    """One contestant on its way.

    Attributes:
        of: the denoiser.
        rate: its highest learning rate.
        seconds: training time used.
        steps: done in that time.
        curve: (seconds, validation loss) so far.
    """

    of: Contestant
    rate: float
    seconds: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.of.network.parameters(), self.rate, weight_decay=0.01
        )

    def learn(self, until: float, budget: float, cases: list[FusionBatch], precision: str) -> None:
        """Train until so many seconds are used in all."""
        self.of.network.train()
        while self.seconds < until:
            batch, t, eps = draw(cases, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * rate_factor(self.seconds / budget)
            start = used()
            self.step(batch, t, eps, precision)
            self.seconds += used() - start
            self.steps += 1

    def step(self, batch: FusionBatch, t: Tensor, eps: Tensor, precision: str) -> None:
        self.optimizer.zero_grad()
        with autocast(precision):
            loss = self.of.loss(batch, t, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.of.network.parameters(), 1.0)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--shape", type=shape_of, default=(16, 64, 64))
    parser.add_argument("--rates", type=float, nargs=2, default=(5e-4, 5e-4))
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = trained(asked.seconds, asked.shape, asked.rates, asked.cases, asked.held_out)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "equal_time": found}
        (asked.out / "equal_time.json").write_text(json.dumps(record, indent=1) + "\n")


def trained(
    budget: float, shape: tuple[int, ...], rates: Sequence[float], cases: int, held_out: int
) -> dict[str, Any]:
    """Train both; returns their curves, steps and losses at each noise level."""
    precision = precision_here()
    learning = [batch.to(DEVICE) for batch in phantoms(cases, 0, shape)]
    unseen = [batch.to(DEVICE) for batch in phantoms(held_out, 1, shape)]
    learners = {
        name: Learner(contestant(), rate)
        for (name, contestant), rate in zip(CONTESTANTS.items(), rates, strict=True)
    }
    print(
        f"{cases} phantoms of {written(shape)}, {held_out} held out, {budget:g} s each", flush=True
    )
    until, looks = 0.0, [budget * share for share in (0.25, 0.5, 0.75)]
    while until < budget:
        until = min(until + SLICE_SECONDS, budget)
        for learner in learners.values():
            learner.learn(until, budget, learning, precision)
        if looks and until >= looks[0]:
            looks.pop(0)
            report(learners, unseen)
    per_level = report(learners, unseen)
    print("\n| | weights | steps | validation loss of v |\n| --- | ---: | ---: | ---: |")
    rows = {}
    for name, learner in learners.items():
        loss, weights = learner.curve[-1][1], weights_of(learner.of.network)
        print(f"| {name} | {weights} | {learner.steps} | {loss:.4f} |")
        rows[name] = {
            "weights": weights,
            "rate": learner.rate,
            "steps": learner.steps,
            "seconds": learner.seconds,
            "loss": loss,
            "loss_by_step_of_1000": per_level[name],
            "curve": learner.curve,
        }
    return {"shape": list(shape), "seconds": budget, "precision": precision, **rows}


def report(learners: dict[str, Learner], unseen: list[FusionBatch]) -> dict[str, dict[int, float]]:
    """Validate both, and say so; the losses by noise level."""
    by_level = {}
    for name, learner in learners.items():
        by_level[name] = validation(learner.of, unseen)
        loss = sum(by_level[name].values()) / len(by_level[name])
        learner.curve.append((learner.seconds, loss))
        print(f"{learner.seconds:6.1f} s, {learner.steps:5d} steps, {name}: {loss:.4f}", flush=True)
    return by_level


@torch.no_grad()
def validation(of: Contestant, unseen: list[FusionBatch]) -> dict[int, float]:
    """Mean squared error of v at each noise level, the same noise for whoever is asked."""
    of.network.eval()
    losses = {}
    for t in VALIDATION_STEPS:
        found = []
        for case, batch in enumerate(unseen):
            generator = torch.Generator().manual_seed(1000 * case + t)
            eps = torch.randn(batch.mri.shape, generator=generator).to(DEVICE)
            found.append(float(of.loss(batch, torch.tensor([t], device=DEVICE), eps)))
        losses[t] = sum(found) / len(found)
    return losses


def draw(cases: list[FusionBatch], index: int) -> tuple[FusionBatch, Tensor, Tensor]:
    """Case, noise level and noise of the index-th step, whoever takes it."""
    generator = torch.Generator().manual_seed(index)
    batch = cases[int(torch.randint(len(cases), (), generator=generator))]
    t = torch.randint(1000, (1,), generator=generator)
    eps = torch.randn(batch.mri.shape, generator=generator)
    return batch, t.to(DEVICE), eps.to(DEVICE)


def used() -> float:
    """Seconds of the processor, of all its threads; on a GPU those that go by."""
    synchronise()
    return time.perf_counter() if DEVICE.type == "cuda" else time.process_time()


def rate_factor(done: float) -> float:
    """Of the learning rate, when so much of the time is used."""
    return min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


if __name__ == "__main__":
    main()
