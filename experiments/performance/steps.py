"""A training step, a sampling step and a guided step: ours beside the pixel-space reference.

python experiments/performance/steps.py [--shapes 32x96x96 26x256x256] [--turns 3] [--out FOLDER]

Time: both take turns in this process, and medians are compared. A training step is forward,
backward and the optimiser; a sampling step half of a DDIM walk of two; a guided step one of a walk
of the whole method (five members), beside the reference's five members each guided through the
denoiser by the same L_ROI. Memory: every contestant in a process of its own, by how much the work
raises what is resident over what was after imports and construction. Throughput is in voxels a
second, and in floating-point operations, as a share of what a product of two large matrices
reaches. Volumes of a million voxels and more take a single turn, after one to warm up.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import noise, phantom_with_lesion
from machine import machine
from measure import (
    DEVICE,
    DidNotFit,
    Pair,
    autocast,
    in_child,
    in_turns,
    pair,
    peak_memory,
    precision_here,
    seconds_of,
    shape_of,
    show,
    written,
)
from ours import WaveletDenoiser, untrained_method
from reference import PixelReference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clinfuse.methods.objective import roi_loss
from clinfuse.types import FusionBatch

AGAINST = "MONAI DiffusionModelUNet in pixel space, equal weights"
WALK = 2
"""Steps of the walk that a sampling step is a part of."""

CONTESTANTS = {"ours": WaveletDenoiser, "reference": PixelReference}
Contestant = WaveletDenoiser | PixelReference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(32, 96, 96)])
    parser.add_argument("--guided", type=shape_of, default=(16, 64, 64))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    pairs, throughput = measured(asked.shapes, asked.turns)
    pairs += guided(asked.guided, asked.turns)
    show(pairs)
    record = {
        "machine": machine(),
        "pairs": [p.as_json() for p in pairs],
        "throughput": throughput,
    }
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "steps.json").write_text(json.dumps(record, indent=1) + "\n")


def measured(
    shapes: list[tuple[int, ...]], turns: int, precision: str | None = None
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Pairs of seconds and MiB of training and sampling steps, and the throughput of training."""
    precision = precision or precision_here()
    pairs: list[Pair] = []
    throughput = []
    for shape in shapes:
        try:
            pairs += memory(shape, precision)
        except DidNotFit as error:
            print(f"left out: {written(shape)} did not fit in memory ({error})", flush=True)
            continue
        is_large = math.prod(shape) > 1e6
        found, seconds = times(shape, 1 if is_large else turns, precision)
        pairs += found
        if not is_large:
            throughput.append(speed(shape, seconds, precision))
        print(f"done: {written(shape)}", flush=True)
    return pairs, throughput


def times(
    shape: tuple[int, ...], turns: int, precision: str
) -> tuple[list[Pair], dict[str, float]]:
    """Pairs of seconds at one shape, and the medians of training."""
    batch, case = noise(shape).to(DEVICE), f"{written(shape)}, {precision}"
    both = {name: contestant() for name, contestant in CONTESTANTS.items()}
    training = in_turns(
        {name: training_step(of, batch, precision) for name, of in both.items()}, turns
    )
    walks = {name: partial(walk, of, batch, precision) for name, of in both.items()}
    sampling = {
        name: [s / WALK for s in seconds] for name, seconds in in_turns(walks, turns).items()
    }
    return [
        pair("training step", case, "s", training["ours"], training["reference"], AGAINST),
        pair("sampling step", case, "s", sampling["ours"], sampling["reference"], AGAINST),
    ], {name: median(seconds) for name, seconds in training.items()}


def memory(shape: tuple[int, ...], precision: str) -> list[Pair]:
    """Pairs of MiB at one shape."""
    case = f"{written(shape)}, {precision}"
    pairs = []
    for section, work in (("training step", "training"), ("sampling step", "sampling")):
        ours, theirs = (
            in_child("steps:peak", name=name, work=work, shapes=[shape], precision=precision)[0]
            for name in CONTESTANTS
        )
        pairs.append(pair(section, case, "MiB", ours, theirs, AGAINST))
    return pairs


def peak(name: str, work: str, shapes: list[list[int]], precision: str) -> list[float]:
    """MiB of training or of sampling steps at each shape, in this process: for ``in_child``."""
    found = []
    for shape in shapes:
        of, batch = CONTESTANTS[name](), noise(shape).to(DEVICE)
        call = training_step(of, batch, precision)
        if work == "sampling":
            call = partial(walk, of, batch, precision, 1)
        with peak_memory() as taken:
            call()
            call()
        found.append(taken.mib)
        del of, batch, call
    return found


def training_step(
    of: Contestant, batch: FusionBatch, precision: str, learning_rate: float = 1e-4
) -> Callable[[], Tensor]:
    """One step of training, to be called again and again."""
    optimizer = torch.optim.AdamW(of.network.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    assert batch.reference is not None
    eps = torch.randn(batch.reference.shape, generator=generator).to(DEVICE)
    t = torch.tensor([500], device=DEVICE)

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(precision):
            loss = of.loss(batch, t, eps)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def walk(of: Contestant, batch: FusionBatch, precision: str, steps: int = WALK) -> Tensor:
    x_T = torch.randn(batch.mri.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with autocast(precision):
        return of.sample(batch, x_T, steps)


def speed(shape: tuple[int, ...], seconds: dict[str, float], precision: str) -> dict[str, Any]:
    """Training's voxels a second, and its share of the speed of a product of large matrices."""
    batch = noise(shape).to(DEVICE)
    voxels = batch.mri.numel()
    fastest = matmul_speed(precision)
    row: dict[str, Any] = {"shape": list(shape), "precision": precision, "matmul_flops": fastest}
    for name, contestant in CONTESTANTS.items():
        step = training_step(contestant(), batch, precision)
        with FlopCounterMode(display=False) as counter:
            step()
        operations = counter.get_total_flops()
        row[name] = {
            "voxels_per_second": voxels / seconds[name],
            "flop": operations,
            "share_of_matmul": operations / seconds[name] / fastest,
        }
        share = row[name]["share_of_matmul"]
        print(
            f"{name}, {written(shape)}: {voxels / seconds[name]:.3g} voxels/s in training, "
            f"{operations / 1e9:.0f} GFLOP a step, {share:.0%} of a matrix product's speed",
            flush=True,
        )
    return row


def matmul_speed(precision: str, turns: int = 5) -> float:
    """Operations a second of a large product in the same precision: what is to be had here."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    size = 8192 if DEVICE.type == "cuda" else 2048
    left = torch.randn(size, size, device=DEVICE).to(dtype)
    left @ left
    return 2 * size**3 / min(seconds_of(lambda: left @ left) for _ in range(turns))


def guided(shape: tuple[int, ...], turns: int) -> list[Pair]:
    """A guided step of the whole method, beside guidance through a pixel-space denoiser."""
    precision, batch = precision_here(), phantom_with_lesion(shape).to(DEVICE)
    method, other = untrained_method(), PixelReference()
    case = f"{written(shape)}, {method.members} members"
    with torch.no_grad(), autocast(precision):
        anchor = method.anchor(batch)

    def ours() -> None:
        with torch.no_grad(), autocast(precision):
            method.sample(batch, anchor)

    def theirs() -> None:
        guided_walk(other, method, batch, precision, method.steps)

    spent = in_turns({"ours": ours, "reference": theirs}, turns)
    steps = {name: [s / method.steps for s in seconds] for name, seconds in spent.items()}
    against = "MONAI DiffusionModelUNet in pixel space, guided through it by L_ROI, in a batch"
    return [pair("guided step", case, "s", steps["ours"], steps["reference"], against)]


def guided_walk(
    of: PixelReference, method: Any, batch: FusionBatch, precision: str, steps: int
) -> Tensor:
    """DDIM by MONAI's scheduler, each step moved down the gradient of L_ROI through the network.

    The plain form of Eq. 1: the gradient with respect to x_t, scaled to unit root mean square.
    """
    members = batch.repeat(method.members)
    known = of.condition(members)
    x_t = torch.randn(members.mri.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    of.walk.set_timesteps(steps, device=DEVICE)
    for t in of.walk.timesteps:
        x_t = x_t.detach().requires_grad_()
        with autocast(precision):
            v = of.network(torch.cat([x_t, known], 1), timesteps=t[None].float()).float()
        after, x0_hat = of.walk.step(v, t, x_t)
        loss = roi_loss(
            method.guidance_loss, x0_hat, members.mri, members.ct, members.roi, members.spacing_mm
        )
        (gradient,) = torch.autograd.grad(loss.total.sum(), x_t)
        x_t = (after - method.guidance.eta * gradient / gradient.square().mean().sqrt()).detach()
    return x_t


if __name__ == "__main__":
    main()
