"""What fusing a whole volume costs, and how much less than a walk of 1000 steps.

python experiments/performance/fusion.py [NAME=RUN[,SETTING=VALUE ...] ...] [--shapes 32x64x64 ...]
    [--reference NAME=RUN,steps=1000,...] [--reference-shapes 32x64x64] [--per-step] [--out FOLDER]

RUN is a run folder, or ``untrained``: the method as ``conf`` has it with random weights, which
costs as much. SETTING is ``steps`` or ``members`` of the method, ``memory_gb`` for windows (none
without it), ``mapped=true`` for volumes in files (without it, where memory would not hold them), or
any key of the run's configuration (``guidance.eta=0``). Every model fuses a phantom brought to each
shape (d x h x w) in a process of its own, after a small one to warm up: registration, guidance and
all members, whose mean is the fused volume and whose spread its uncertainty, in the machine's
precision. ``call=fuse`` asks for the fused volume alone, which a student gives without its members;
``call=model_draws`` for the members of every model draw of the run. Memory is the most that fusing
added to what was resident with the model and the study loaded, what of that lay in no file, and the
most that the process held in all.

The reference is run in full, at its own steps, where ``--reference-shapes`` says; there the models
run once before it and once after, and are compared with it. ``--per-step`` adds what one more step
costs: the time at the model's steps less that at one, over the steps between (of a reference at
other shapes, at five steps). Only what was run in full is called a ratio.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cases import phantom_with_lesion, resized
from machine import machine
from measure import (
    DEVICE,
    DidNotFit,
    autocast,
    in_child,
    peak_memory,
    precision_here,
    seconds_of,
    shape_of,
    written,
)
from omegaconf import DictConfig, OmegaConf
from ours import configuration, waken
from torch import Tensor

from clinfuse.configuration import (
    build_method,
    quiet_libraries,
    register_resolvers,
    run_config,
    trained_method,
)
from clinfuse.networks.mapped_memory import volumes_mapped
from clinfuse.networks.windows import limit_memory, windows_used
from clinfuse.types import FusionBatch

UNTRAINED = "untrained"
SHAPES = [(32, 64, 64), (26, 256, 256), (160, 224, 224)]
SHORT = {"steps": "method.steps", "members": "method.members"}
CALLS = ("ensemble", "fuse", "model_draws")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[f"method={UNTRAINED}"])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES)
    parser.add_argument("--reference")
    parser.add_argument("--reference-shapes", nargs="*", type=shape_of, default=[(32, 64, 64)])
    parser.add_argument("--per-step", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = measured(
        asked.models, asked.shapes, asked.reference, asked.reference_shapes, asked.per_step
    )
    show_fusion(rows)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "fusion": rows}
        (asked.out / "fusion.json").write_text(json.dumps(record, indent=1) + "\n")


def measured(
    models: list[str],
    shapes: list[tuple[int, ...]],
    reference: str | None = None,
    reference_shapes: list[tuple[int, ...]] | None = None,
    per_step: bool = False,
) -> list[dict[str, Any]]:
    """A row for every model and shape, with the ratio to the reference where that was run."""
    rows = []
    for shape in shapes:
        is_compared = reference is not None and shape in (reference_shapes or [])
        before = [fusing(model, shape, per_step) for model in models]
        if is_compared:
            assert reference is not None
            slow = fusing(reference, shape)
            after = [fusing(model, shape) for model in models]
            for row, again in zip(before, after, strict=True):
                row["seconds"] = mean([row["seconds"], again["seconds"]])
                row["ratio"] = slow["seconds"] / row["seconds"]
                row["ratio_to"] = slow["name"]
            before.append(slow)
        elif reference is not None and per_step:
            cost = fusing(f"{reference},steps=5", shape, per_step)
            before.append(cost | {"name": f"{cost['name']}, at 5 steps"})
        rows += before
    return rows


def fusing(model: str, shape: tuple[int, ...], per_step: bool = False) -> dict[str, Any]:
    """What one model costs at one shape; where memory did not do, a row that says so."""
    name, run, settings = parsed(model)
    try:
        row = in_child("fusion:one", run=run, settings=settings, shape=shape, per_step=per_step)
    except DidNotFit:
        row = {"seconds": float("nan"), "mib": float("nan"), "process_mib": float("nan")}
    row = {"name": name, "run": Path(run).name, "settings": settings, "shape": list(shape), **row}
    print(f"{name}, {written(shape)}: {row['seconds']:.2f} s, {row['mib']:.0f} MiB", flush=True)
    return row


def parsed(model: str) -> tuple[str, str, list[str]]:
    """Name, run folder and settings of ``NAME=RUN,SETTING=VALUE``; a later setting wins."""
    named, *settings = model.split(",")
    name, _, run = named.rpartition("=")
    if not run or not all("=" in setting for setting in settings):
        raise SystemExit(f"expected NAME=RUN[,SETTING=VALUE ...], got {model!r}")
    full = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        full[SHORT.get(key, key)] = value
    return name or Path(run).name, run, [f"{key}={value}" for key, value in full.items()]


def one(run: str, settings: list[str], shape: list[int], per_step: bool) -> dict[str, Any]:
    """Seconds and MiB in this process: for ``in_child``."""
    register_resolvers()
    quiet_libraries()
    own = dict(setting.split("=", 1) for setting in settings)
    call, memory_gb = own.pop("call", "ensemble"), own.pop("memory_gb", None)
    is_mapped = own.pop("mapped", "false") == "true"
    if call not in CALLS:
        raise ValueError(f"expected call= one of {CALLS}, got {call!r}")
    method = method_of(run, [f"{key}={value}" for key, value in own.items()]).to(DEVICE).eval()
    limit_memory(method, None if memory_gb is None else float(memory_gb))
    drawn = phantom_with_lesion((32, 96, 96))
    fused(method, resized(drawn, (8, 32, 32)), call)
    batch = resized(drawn, shape).to(DEVICE)
    with peak_memory() as taken, volumes_mapped() if is_mapped else nullcontext():
        seconds = seconds_of(lambda: fused(method, batch, call))
    found = {
        "steps": method.steps,
        "members": getattr(method, "members", 1),
        "seconds": seconds,
        "mib": taken.mib,
        "process_mib": taken.process_mib,
        "private_mib": taken.private_mib,
        "windows": windows_used(method),
    }
    if per_step and method.steps > 1:
        steps, method.steps = method.steps, 1
        rest = seconds - seconds_of(lambda: fused(method, batch, call))
        found["seconds_per_step"] = rest / (steps - 1)
    return found


def method_of(run: str, settings: list[str]) -> Any:
    """The method of a run with settings changed, or an untrained one."""
    if run == UNTRAINED:
        cfg = with_settings(configuration(), settings)
        torch.manual_seed(0)
        method = build_method(cfg)
        waken(method)
        return method
    return trained_method(run, with_settings(run_config(run), settings))


def with_settings(cfg: DictConfig, settings: list[str]) -> DictConfig:
    for setting in settings:
        key, _, value = setting.partition("=")
        OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"value={value}"]).value)
    return cfg


def fused(method: Any, batch: FusionBatch, call: str = "ensemble") -> Tensor:
    """The volume as ``clinfuse.fuse`` makes it, from what was asked of the method."""
    with torch.no_grad(), autocast(precision_here()):
        drawn = getattr(method, call)(batch)
        return drawn if call == "fuse" else drawn.flatten(0, -6).mean(0).clamp(-1, 1)


def show_fusion(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        "\n| | shape | steps | s | MiB added | in no file | in all | s a step | of the reference |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in rows:
        private = r.get("private_mib", float("nan"))
        step = f"{r['seconds_per_step']:.3f}" if "seconds_per_step" in r else ""
        ratio = f"1 / {r['ratio']:.0f}" if "ratio" in r else ""
        print(
            f"| {r['name']} | {written(r['shape'])} | {r.get('steps', '')} | {r['seconds']:.2f} "
            f"| {r['mib']:.0f} | {private:.0f} | {r['process_mib']:.0f} | {step} | {ratio} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
