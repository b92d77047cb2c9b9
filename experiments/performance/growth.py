"""How cost grows with the volume: time and memory at 1, 2, 4 and 8 times the voxels.

python experiments/performance/growth.py [--shapes 16x64x64 ...] [--turns 2] [--out FOLDER]
    [--windows MODEL [--window-shapes 64x128x128 ...]]

Training step and sampling step of our denoiser, and the fusion of a whole volume by the method as
``conf`` has it (untrained; registration, anchor, and two guided steps of five members). Sizes take
turns in time; memory is that of a process of its own. The exponent is the slope of a straight line
through logarithms: 1 is in proportion to the voxels.

``--windows`` fuses by a MODEL of ``fusion.py`` instead (``NAME=RUN,memory_gb=0.5,mapped=true``), as
a rule in windows and with volumes in files: memory is then what is the process's own, beside them.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from cases import noise, phantom_with_lesion, resized
from fusion import fused, fusing, parsed
from machine import machine
from measure import (
    DEVICE,
    MIB,
    in_child,
    in_turns,
    peak_memory,
    precision_here,
    shape_of,
    written,
)
from ours import WaveletDenoiser, untrained_method
from steps import training_step, walk

from clinfuse.networks.fusion_unet import BYTES_PER_FEATURE, FusionUNet

SHAPES = [(16, 64, 64), (32, 64, 64), (32, 64, 128), (32, 128, 128)]
WINDOW_SHAPES = [(64, 128, 128), (64, 128, 256), (64, 256, 256), (128, 256, 256)]
FUSION = ["method.steps=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--windows")
    parser.add_argument("--window-shapes", nargs="+", type=shape_of, default=WINDOW_SHAPES)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.windows:
        rows = [in_windows(asked.windows, asked.window_shapes)]
    else:
        rows = measured(asked.shapes, asked.turns)
    show_growth(rows)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "growth": rows}
        name = "growth_in_windows.json" if asked.windows else "growth.json"
        (asked.out / name).write_text(json.dumps(record, indent=1) + "\n")


def measured(shapes: list[tuple[int, ...]] = SHAPES, turns: int = 2) -> list[dict[str, Any]]:
    """Seconds, MiB and both exponents of each piece of work."""
    precision, of = precision_here(), WaveletDenoiser()
    rows = []
    for work in ("training", "sampling"):
        calls = {}
        for shape in shapes:
            batch = noise(shape).to(DEVICE)
            one = training_step(of, batch, precision)
            calls[written(shape)] = (
                one if work == "training" else partial(walk, of, batch, precision, 1)
            )
        seconds = in_turns(calls, turns)
        mib = in_child("steps:peak", name="ours", work=work, shapes=shapes, precision=precision)
        rows.append(row(f"{work} step", shapes, seconds, mib))
    rows[-1]["bytes_per_feature"] = bytes_per_feature(of.network, shapes, mib)
    seconds = fusion_seconds(shapes, turns)
    rows.append(row("whole fusion", shapes, seconds, in_child("growth:peaks", shapes=shapes)))
    return rows


def bytes_per_feature(
    network: FusionUNet, shapes: list[tuple[int, ...]], mib: list[float]
) -> float:
    """What an evaluation takes for each feature of the finest level and voxel of its own grid.

    The slope of a straight line through the measurements; ``fusion_unet.BYTES_PER_FEATURE`` says
    what windows are chosen by.
    """
    features = network.bytes_per_voxel / BYTES_PER_FEATURE
    voxels = [math.prod(shape) / (8 if network.haar else 1) for shape in shapes]
    return linear_regression(voxels, [m * MIB for m in mib]).slope / features


def fusion_seconds(shapes: list[tuple[int, ...]], turns: int) -> dict[str, list[float]]:
    method, drawn = untrained_method(FUSION), phantom_with_lesion((32, 96, 96))
    batches = {written(shape): resized(drawn, shape).to(DEVICE) for shape in shapes}
    return in_turns({n: partial(fused, method, batch) for n, batch in batches.items()}, turns)


def peaks(shapes: list[list[int]]) -> list[float]:
    """MiB of fusing each shape, in this process: for ``in_child``."""
    method, drawn = untrained_method(FUSION), phantom_with_lesion((32, 96, 96))
    fused(method, resized(drawn, (8, 32, 32)).to(DEVICE))
    found = []
    for shape in shapes:
        batch = resized(drawn, shape).to(DEVICE)
        with peak_memory() as taken:
            fused(method, batch)
        found.append(taken.mib)
    return found


def in_windows(model: str, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    """The growth of whole fusions, each in a process of its own."""
    found = [fusing(model, shape) for shape in shapes]
    seconds = {written(shape): [each["seconds"]] for shape, each in zip(shapes, found, strict=True)}
    name, run, settings = parsed(model)
    work = f"fusion, {name}={','.join([Path(run).name, *settings])}"
    grown = row(work, shapes, seconds, [each["private_mib"] for each in found])
    return grown | {"windows": [each["windows"] for each in found]}


def row(
    work: str, shapes: list[tuple[int, ...]], seconds: dict[str, list[float]], mib: list[float]
) -> dict[str, Any]:
    """One piece of work: what was measured, and the exponents fitted to it."""
    middle = [median(seconds[written(shape)]) for shape in shapes]
    voxels = [math.prod(shape) for shape in shapes]
    return {
        "work": work,
        "shapes": [list(shape) for shape in shapes],
        "voxels": voxels,
        "seconds": middle,
        "mib": mib,
        "exponent_of_time": exponent(voxels, middle),
        "exponent_of_memory": exponent(voxels, mib),
    }


def exponent(voxels: list[int], cost: list[float]) -> float:
    """Least-squares slope of log cost over log voxels."""
    return linear_regression([math.log(v) for v in voxels], [math.log(c) for c in cost]).slope


def show_growth(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    sizes = " | ".join(written(shape) for shape in rows[0]["shapes"])
    for r in rows:
        if "bytes_per_feature" in r:
            print(
                f"{r['work']}: {r['bytes_per_feature']:.0f} bytes a feature and voxel of its grid"
            )
    print(f"\n| | {sizes} | exponent |")
    print("| --- |" + " ---: |" * (len(rows[0]["shapes"]) + 1))
    for r in rows:
        seconds = " | ".join(f"{s:.2f} s" for s in r["seconds"])
        mib = " | ".join(f"{m:.0f} MiB" for m in r["mib"])
        print(f"| {r['work']}, time | {seconds} | {r['exponent_of_time']:.2f} |")
        print(f"| {r['work']}, memory | {mib} | {r['exponent_of_memory']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
