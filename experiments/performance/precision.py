"""What makes a step cheaper, and what it changes: each with its measured ratio.

python experiments/performance/precision.py [--shape 32x96x96] [--turns 3] [--run RUN]
    [--no-compile] [--parts PART ...] [--out FOLDER]

Every variant takes turns with the plain form beside it: eager, single precision for those of
arithmetic, the machine's training precision (see ``conf/trainer``) for the others; evaluated by the
U-Net's own forward, but for ``lean_unet`` and what is kept of freed memory. ``differs`` is the
largest difference of the predicted velocity, as a share of its range. The network has had
twenty steps of training on a phantom; with a run, its own denoiser is taken, and its whole fusion
of six phantoms is compared as well, as a share of model space's range of 2. Memory is that of
training steps in a process of its own. PART is one of what it says that it has measured,
``compiler`` for one.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import noise, phantom, phantom_with_lesion
from machine import machine
from measure import (
    DEVICE,
    autocast,
    in_child,
    in_turns,
    peak_memory,
    precision_here,
    seconds_of,
    shape_of,
)
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets.diffusion_model_unet import DiffusionUNetResnetBlock
from ours import WaveletDenoiser
from steps import training_step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from clinfuse.networks.kept_memory import freed_memory_kept
from clinfuse.types import DATA_RANGE, FusionBatch


@dataclass
class Variant:
    """What one change does, beside the plain form.

    Attributes:
        name: the change.
        of: the work.
        plain: seconds, or MiB.
        changed: likewise.
        unit: ``s`` or ``MiB``.
        differs: largest difference of the output as a share of its range; None where not compared.
        note: what else is to be said.
    """

    name: str
    of: str
    plain: float
    changed: float
    unit: str = "s"
    differs: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as much the plain form takes."""
        return self.plain / self.changed

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=shape_of, default=(32, 96, 96))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--run")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--parts", nargs="+")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found = measured(asked.shape, asked.turns, asked.run, not asked.no_compile, asked.parts)
    show_variants(found)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "variants": [v.as_json() for v in found]}
        (asked.out / "precision.json").write_text(json.dumps(record, indent=1) + "\n")


def measured(
    shape: tuple[int, ...],
    turns: int,
    run: str | None = None,
    with_compiler: bool = True,
    only: list[str] | None = None,
) -> list[Variant]:
    """Every variant, in the order of the table; of ``only`` some parts, where they are named."""
    state = run_weights(run) if run else trained_a_little()
    batch = phantom_with_lesion(shape).to(DEVICE)
    parts: dict[str, Callable[[], list[Variant]]] = {
        "arithmetic": lambda: arithmetic(state, batch, turns),
        "layouts and norms": lambda: layouts(state, batch, turns),
        "checkpointing": lambda: checkpointed(shape, turns),
        "sampling": lambda: sampling(state, batch, turns),
        "memory": lambda: [kept_memory(state, batch, turns)],
        "averaging": lambda: [averaging(turns)],
    }
    if with_compiler:
        parts["compiler"] = lambda: compiled(state, batch, turns)
    if run:
        parts["whole fusion"] = lambda: whole_fusion(run)
    if unknown := set(only or ()) - set(parts):
        raise SystemExit(f"expected --parts among {', '.join(parts)}, got {', '.join(unknown)}")
    parts = {name: part for name, part in parts.items() if not only or name in only}
    found = []
    for name, part in parts.items():
        seconds = seconds_of(lambda part=part: found.extend(part()))
        print(f"{name}: measured in {seconds:.0f} s", flush=True)
    return found


def trained_a_little(steps: int = 20) -> dict[str, Tensor]:
    """Weights of a network that predicts something, so that differences mean something."""
    denoiser, batch = WaveletDenoiser(), phantom(0, 0, (16, 64, 64)).to(DEVICE)
    step = training_step(denoiser, batch, "32-true", learning_rate=2e-3)
    for _ in range(steps):
        step()
    return {name: value.clone() for name, value in denoiser.network.state_dict().items()}


def run_weights(run: str) -> dict[str, Tensor]:
    from clinfuse.configuration import register_resolvers, trained_method

    register_resolvers()
    return dict(trained_method(run).network.state_dict())


def denoiser_of(state: dict[str, Tensor]) -> WaveletDenoiser:
    denoiser = WaveletDenoiser()
    denoiser.network.load_state_dict(state)
    return by_monai(denoiser)


def by_monai(denoiser: WaveletDenoiser) -> WaveletDenoiser:
    """Evaluated by the U-Net's own forward, as in training, and not by ``lean_unet``."""
    denoiser.network.train()
    return denoiser


def prediction(denoiser: WaveletDenoiser, batch: FusionBatch, precision: str) -> Tensor:
    """v at a middling noise level, what is known encoded anew."""
    x_t = torch.randn(batch.mri.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    level = torch.full((len(x_t),), 0.3, device=DEVICE)
    with torch.no_grad(), autocast(precision):
        return denoiser.network(x_t, denoiser.encoded(batch), level).float()


def share_of_range(changed: Tensor, plain: Tensor) -> float:
    return float((changed - plain).abs().max() / (plain.max() - plain.min()))


def both(
    name: str,
    plain: tuple[WaveletDenoiser, str],
    changed: tuple[WaveletDenoiser, str],
    batch: FusionBatch,
    turns: int,
    note: str = "",
    warmup: int = 1,
) -> list[Variant]:
    """A denoiser and precision beside another: a prediction and a training step."""
    of = {"plain": plain, "changed": changed}
    seen = {key: prediction(d, batch, p) for key, (d, p) in of.items()}
    differs = share_of_range(seen["changed"], seen["plain"])
    evaluating = in_turns(
        {key: partial(prediction, d, batch, p) for key, (d, p) in of.items()}, turns, warmup
    )
    seen.clear()
    learning = noise(batch.mri.shape[2:]).to(DEVICE)
    training = in_turns(
        {key: training_step(d, learning, p) for key, (d, p) in of.items()}, turns, warmup
    )
    return [
        Variant(name, work, median(s["plain"]), median(s["changed"]), "s", off, note)
        for work, s, off in (("evaluation", evaluating, differs), ("training", training, None))
    ]


def arithmetic(state: dict[str, Tensor], batch: FusionBatch, turns: int) -> list[Variant]:
    """Half precisions by autocast, beside single precision."""
    found = []
    for name in ("bf16-mixed", *(("16-mixed",) if DEVICE.type == "cuda" else ())):
        plain, changed = denoiser_of(state), denoiser_of(state)
        found += both(f"{name} autocast", (plain, "32-true"), (changed, name), batch, turns)
    return found


def layouts(state: dict[str, Tensor], batch: FusionBatch, turns: int) -> list[Variant]:
    """Channels last, beside channels first; fused attention; and norms of single voxels."""
    precision, found = precision_here(), []
    first, last = torch.contiguous_format, torch.channels_last_3d
    for name, change in (
        ("channels_last_3d", partial(laid_out, layout=last)),
        ("channels_last_3d, weights too", partial(laid_out, layout=last, weights=True)),
        ("fused attention", fuse_attention),
    ):
        plain, changed = denoiser_of(state), denoiser_of(state)
        if name.startswith("channels"):
            laid_out(plain.network, first)
        change(changed.network)
        found += both(name, (plain, precision), (changed, precision), batch, turns)
    plain, changed = map(by_monai, (WaveletDenoiser(), WaveletDenoiser(["network=local"])))
    found += both("network=local", (plain, precision), (changed, precision), batch, turns)
    for variant in found[-2:]:
        variant.differs = None  # they are other networks
    plain, changed = denoiser_of(state), denoiser_of(state)
    changed.network.eval()
    found += both("lean_unet", (plain, precision), (changed, precision), batch, turns)[:1]
    return found


def laid_out(network: Any, layout: torch.memory_format, weights: bool = False) -> None:
    """The U-Net's input in a layout of our choice, in training too; its weights as well."""
    if weights:
        network.to(memory_format=layout)
    forward = network.unet.forward

    def relaid(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return forward(x.contiguous(memory_format=layout), *arguments, **named)

    network.unet.forward = relaid


def fuse_attention(network: nn.Module) -> None:
    """MONAI's attention by torch's own kernel, which never holds the matrix of weights."""
    for module in network.modules():
        if isinstance(module, SABlock):
            module.use_flash_attention = True


def compiled(state: dict[str, Tensor], batch: FusionBatch, turns: int) -> list[Variant]:
    """``torch.compile`` of the U-Net, beside eager; the first call, which compiles, apart."""
    precision = precision_here()
    plain, changed = denoiser_of(state), denoiser_of(state)
    changed.network.unet = torch.compile(changed.network.unet)  # type: ignore[assignment]
    try:
        first = seconds_of(lambda: prediction(changed, batch, precision))
        eager = seconds_of(lambda: prediction(plain, batch, precision))
        step = training_step(changed, noise(batch.mri.shape[2:]).to(DEVICE), precision)
        training = seconds_of(step) - seconds_of(step)
    except Exception as error:  # no C++ compiler, or one that the graph is too much for
        print(f"torch.compile failed here: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return []
    note = f"compiling took {first - eager:.0f} s, for training {training:.0f} s"
    return both(
        "torch.compile", (plain, precision), (changed, precision), batch, turns, note, warmup=2
    )


def checkpointed(shape: tuple[int, ...], turns: int) -> list[Variant]:
    """Gradient checkpointing of every residual block: time and memory of training."""
    precision, batch = precision_here(), noise(shape).to(DEVICE)
    plain, changed = WaveletDenoiser(), WaveletDenoiser()
    checkpoint_blocks(changed.network)
    seconds = in_turns(
        {
            "plain": training_step(plain, batch, precision),
            "changed": training_step(changed, batch, precision),
        },
        turns,
    )
    mib = {
        name: in_child("precision:training_peak", shape=shape, change=name)
        for name in ("plain", "checkpointed", "fused_attention")
    }
    middle = {name: median(s) for name, s in seconds.items()}
    name = "gradient checkpointing"
    return [
        Variant("fused attention", "training", mib["plain"], mib["fused_attention"], "MiB"),
        Variant(name, "training", middle["plain"], middle["changed"]),
        Variant(name, "training", mib["plain"], mib["checkpointed"], "MiB"),
    ]


def checkpoint_blocks(network: nn.Module) -> None:
    """Have every residual block keep its input alone, and work out the rest again backwards."""
    for module in network.modules():
        if isinstance(module, DiffusionUNetResnetBlock):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def training_peak(shape: list[int], change: str) -> float:
    """MiB of two training steps, in this process: for ``in_child``."""
    denoiser, batch = WaveletDenoiser(), noise(shape).to(DEVICE)
    changes: dict[str, Callable[[nn.Module], None]] = {
        "plain": lambda network: None,
        "checkpointed": checkpoint_blocks,
        "fused_attention": fuse_attention,
    }
    changes[change](denoiser.network)
    step = training_step(denoiser, batch, precision_here())
    with peak_memory() as taken:
        step()
        step()
    return taken.mib


def sampling(state: dict[str, Tensor], batch: FusionBatch, turns: int) -> list[Variant]:
    """Five members in a batch, beside one by one; and what is known encoded once, not each step."""
    precision, denoiser = precision_here(), denoiser_of(state)
    x_t = torch.randn(5, *batch.mri.shape[1:], generator=torch.Generator().manual_seed(0))
    x_t, level = x_t.to(DEVICE), torch.full((5,), 0.3, device=DEVICE)
    with torch.no_grad(), autocast(precision):
        condition = denoiser.encoded(batch)

    def together() -> Tensor:
        with torch.no_grad(), autocast(precision):
            return denoiser.network(x_t, condition, level).float()

    def one_by_one() -> Tensor:
        with torch.no_grad(), autocast(precision):
            parts = [denoiser.network(x, condition, level[:1]) for x in x_t.split(1)]
        return torch.cat(parts).float()

    def walked(times: int) -> None:
        with torch.no_grad(), autocast(precision):
            known = denoiser.encoded(batch)
            for step in range(4):
                if step and times == 4:
                    known = denoiser.encoded(batch)
                denoiser.network(x_t[:1], known, level[:1])

    differs = share_of_range(together(), one_by_one())
    calls = {
        "together": together,
        "one by one": one_by_one,
        "once": partial(walked, 1),
        "each step": partial(walked, 4),
    }
    s = {name: median(seconds) for name, seconds in in_turns(calls, turns).items()}
    return [
        Variant("members in a batch", "5", s["one by one"], s["together"], "s", differs),
        Variant("known encoded once", "4 steps", s["each step"], s["once"]),
    ]


def kept_memory(state: dict[str, Tensor], batch: FusionBatch, turns: int) -> Variant:
    """A walk of four evaluations with freed memory kept at hand, beside glibc's usual way.

    glibc keeps blocks below 32 MiB anyway, so it is large volumes that it makes faster.
    """
    precision, denoiser = precision_here(), denoiser_of(state)
    denoiser.network.eval()

    def walked() -> None:
        for _ in range(4):
            prediction(denoiser, batch, precision)

    s = in_turns({"plain": walked, "changed": freed_memory_kept()(walked)}, turns)
    return Variant("freed memory kept", "4 steps", median(s["plain"]), median(s["changed"]))


def averaging(turns: int) -> Variant:
    """Averaging the weights in place, all at once as the training does, beside one by one."""
    network = WaveletDenoiser().network
    one_by_one = AveragedModel(network, avg_fn=get_ema_avg_fn(0.99))
    at_once = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    calls = {
        "plain": lambda: one_by_one.update_parameters(network),
        "changed": lambda: at_once.update_parameters(network),
    }
    s = {name: median(seconds) for name, seconds in in_turns(calls, 5 * turns, 2).items()}
    return Variant("EMA without copies", "an update", s["plain"], s["changed"])


def whole_fusion(run: str, cases: int = 6) -> list[Variant]:
    """The fused volume of a run in half precision, beside single precision, of several phantoms.

    Once as it is, and once with the motion of the CT that single precision finds.
    """
    from clinfuse.configuration import trained_method
    from clinfuse.networks.rigid_registration import registration_error_mm

    method = trained_method(run).to(DEVICE)
    anchor = method.anchor if hasattr(method, "anchor") else method.teacher.anchor
    found = anchor.registration.forward
    seconds: dict[str, list[float]] = {"32-true": [], "bf16-mixed": [], "same motion": []}
    off: dict[str, list[Tensor]] = {"bf16-mixed": [], "same motion": []}
    apart_mm: list[float] = []
    for case in range(cases):
        batch = phantom(case, 77 + case, (32, 96, 96), ("t1", "t2", "adc")[case % 3]).to(DEVICE)
        fused, motions = {}, []

        def kept(*sources: Tensor) -> Any:
            registration = found(*sources)
            motions.append(registration.motion)  # noqa: B023
            return registration

        def moved(*sources: Tensor) -> Any:
            registration = found(*sources)
            brain, spacing_mm = batch.brain.float(), batch.spacing_mm  # noqa: B023
            apart_mm.append(
                float(registration_error_mm(motions[0], registration.motion, brain, spacing_mm))  # noqa: B023
            )
            return replace(registration, motion=motions[0])  # noqa: B023

        for name, forward in (("32-true", kept), ("bf16-mixed", found), ("same motion", moved)):
            anchor.registration.forward = forward
            with torch.no_grad(), autocast("bf16-mixed" if name == "same motion" else name):
                seconds[name].append(
                    seconds_of(lambda n=name: fused.update({n: method.fuse(batch).float()}))  # noqa: B023
                )
        for name, each in off.items():
            each.append((fused[name] - fused["32-true"]).abs() / DATA_RANGE)
    times = {name: median(each) for name, each in seconds.items()}
    rows = []
    for name, label in (("bf16-mixed", ""), ("same motion", ", CT moved as in single precision")):
        largest = max(float(each.max()) for each in off[name])
        usual = sum(float(each.mean()) for each in off[name]) / cases
        variant = f"bf16-mixed autocast{label}"
        note = f"mean {usual:.1e}, motions up to {max(apart_mm):.3f} mm apart"
        rows.append(
            Variant(variant, "whole fusion", times["32-true"], times[name], "s", largest, note)
        )
    return rows


def show_variants(found: list[Variant]) -> None:
    """Print a table."""
    print("\n| change | of | plain | changed | ratio | differs | |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for v in found:
        digits = 0 if v.unit == "MiB" else 4
        differs = "" if v.differs is None else f"{v.differs:.1e}"
        plain, changed = (f"{x:.{digits}f} {v.unit}" for x in (v.plain, v.changed))
        print(
            f"| {v.name} | {v.of} | {plain} | {changed} | {v.ratio:.2f} | {differs} | {v.note} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
