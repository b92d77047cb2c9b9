"""Quality against network evaluations: a teacher's walks of several lengths, and its students.

python experiments/distillation/quality.py TEACHER STUDENT... [--steps 1,2,4,20,1000] [--cases 3]
    [--mm 0,2] [--keep FOLDER] [--out FOLDER]

TEACHER is a run of method=clinfuse, each STUDENT one of method=distill with that teacher. Test
patients are sampled one at a time from the same noise, each by every sampler in turn, with as many
members. The longest walk is the reference: FOLDER/cases.csv has for each case and sampler PSNR in
bone and SSIM in brain and the whole against the truth, the root mean square difference of the fused
volume and of the spread from the reference's, and the seconds of sampling (the anchor's included,
and by itself); FOLDER/table.md the means, the differences from the reference case by case with the
most unfavourable one, and ratios of time. FOLDER/curve.png draws quality over evaluations. What was
sampled once is kept in KEEP, and another command goes on from there.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from torch import Tensor

from clinfuse.configuration import (
    quiet_libraries,
    register_resolvers,
    run_config,
    run_facts,
    trained_method,
)
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.metrics.regional import brightness
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.figures import figure_png
from clinfuse.types import FusionBatch

SCORES = {"bone_psnr": "bone PSNR (dB)", "brain_ssim": "brain SSIM", "whole_ssim": "whole SSIM"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("students", nargs="*")
    parser.add_argument("--steps", default="1,2,4,20,1000")
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--mm", default="0,2")
    parser.add_argument("--keep", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", default="experiments/distillation")
    asked = parser.parse_args()
    register_resolvers()
    quiet_libraries()
    cfg = run_config(asked.teacher)
    data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    samplers = samplers_of(asked.teacher, asked.students, [int(s) for s in asked.steps.split(",")])
    rows = []
    for amplitude_mm in (float(mm) for mm in asked.mm.split(",")):
        for batch in list(data.test_batches(amplitude_mm))[: asked.cases]:
            rows += scored(batch, amplitude_mm, samplers, asked.keep)
            print(pd.DataFrame(rows).tail(len(samplers)).to_string(), flush=True)
    table = pd.DataFrame(rows)
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    table.round(6).to_csv(out / "cases.csv", index=False)
    write_atomically(out / "table.md", text_of(table, asked))
    write_atomically(out / "curve.png", figure_png(curve(table)))


def samplers_of(
    teacher: str, students: list[str], steps: list[int]
) -> dict[str, tuple[int, Callable[[FusionBatch], Tensor], Callable[[FusionBatch], object]]]:
    """Network evaluations a member, the ensemble, and the anchor by itself, by sampler's name."""
    method = trained_method(teacher)
    method.other_anchors = torch.nn.ModuleList()

    def walked(count: int) -> Callable[[FusionBatch], Tensor]:
        def ensemble(batch: FusionBatch) -> Tensor:
            method.steps = count
            return method.ensemble(batch)

        return ensemble

    found = {named("teacher", n): (n, walked(n), method.anchor) for n in steps}
    for folder in students:
        student = trained_method(folder)
        student.members = method.members
        found[named("student", student.steps)] = (
            student.steps + 1,
            student.ensemble,
            student.teacher.anchor,
        )
    return found


def named(kind: str, steps: int) -> str:
    return f"{kind}, {steps} step{'s' if steps > 1 else ''}"


def sampled(
    batch: FusionBatch,
    ensemble: Callable[[FusionBatch], Tensor],
    anchor: Callable[[FusionBatch], object],
    path: Path,
) -> tuple[Tensor, float, float]:
    """The members, the processor seconds that they took, and those of the anchor by itself."""
    if not path.is_file():
        with torch.no_grad():
            times = [time.process_time()]
            anchor(batch)
            times.append(time.process_time())
            members = ensemble(batch)
            times.append(time.process_time())
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((members, times[2] - times[1], times[1] - times[0]), path)
    kept: tuple[Tensor, float, float] = torch.load(path, weights_only=True)
    return kept


def scored(batch: FusionBatch, amplitude_mm: float, samplers: dict, keep: Path) -> list[dict]:
    """A row for each sampler; the teacher's longest walk is the reference."""
    mri, ct, roi = batch.truth()
    assert batch.reference is not None
    draws, rows = {}, []
    for name, (evaluations, ensemble, anchor) in samplers.items():
        path = keep / f"{batch.case_id[0]}_{amplitude_mm:g}_{name.replace(', ', '_')}.pt"
        draws[name], seconds, seconds_of_anchor = sampled(batch, ensemble, anchor, path)
        fused = draws[name].mean(0).clamp(-1, 1)
        whole = torch.ones_like(roi[:, :1])
        a, b = brightness(fused), brightness(mri)
        rows.append(
            {
                "case": batch.case_id[0],
                "misregistration_mm": amplitude_mm,
                "sampler": name,
                "evaluations": evaluations,
                "bone_psnr": psnr(fused, ct, roi[:, 1:2]).item(),
                "brain_ssim": ssim(a, b, roi[:, :1], batch.spacing_mm).item(),
                "whole_ssim": ssim(a, brightness(batch.reference), whole, batch.spacing_mm).item(),
                "seconds": seconds,
                "seconds_of_anchor": seconds_of_anchor,
            }
        )
    reference = max((n for n in samplers if n.startswith("teacher")), key=lambda n: samplers[n][0])
    of_reference = draws[reference]
    for row in rows:
        ensemble = draws[row["sampler"]]
        row["rms_from_reference"] = rms(ensemble.mean(0) - of_reference.mean(0))
        row["spread"] = ensemble.std(0).mean().item()
        row["rms_of_spread"] = rms(ensemble.std(0) - of_reference.std(0))
    return rows


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


def text_of(table: pd.DataFrame, asked: argparse.Namespace) -> str:
    """The means, and how far from the reference at worst."""
    longest = table[table.sampler.str.startswith("teacher")].evaluations.max()
    reference = table[table.evaluations == longest].set_index(["case", "misregistration_mm"])
    facts = run_facts()
    lines = [
        f"Processor seconds of one thread; {table.case.nunique()} test patients, moved by "
        f"{asked.mm} mm; commit {facts['commit']}, torch {facts['torch']}. Differences are from "
        f"{longest} steps, case by case; in brackets the worst case.",
        "",
        "| sampler | evaluations | "
        + " | ".join(f"{name} | Δ (worst)" for name in SCORES.values())
        + " | RMS from reference | RMS of spread | mean spread | seconds | anchor's | ratio |",
        "| --- |" + " ---: |" * (3 + 2 * len(SCORES) + 4),
    ]
    for name, own in table.groupby("sampler", sort=False):
        at = own.set_index(["case", "misregistration_mm"])
        cells = []
        for score in SCORES:
            change = at[score] - reference[score]
            digits = 2 if score.endswith("psnr") else 4
            cells.append(f"{at[score].mean():.{digits}f}")
            cells.append(f"{change.mean():+.{digits}f} ({change.min():+.{digits}f})")
        ratio = (reference.seconds / at.seconds).mean()
        lines.append(
            f"| {name} | {own.evaluations.iloc[0]} | {' | '.join(cells)} | "
            f"{own.rms_from_reference.mean():.5f} | {own.rms_of_spread.mean():.5f} | "
            f"{own.spread.mean():.5f} | {own.seconds.mean():.2f} | "
            f"{own.seconds_of_anchor.mean():.2f} | {ratio:.1f} |"
        )
    return "\n".join(lines) + "\n"


def curve(table: pd.DataFrame) -> Figure:
    """Each score over evaluations, teacher and students."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, (score, name) in zip(figure.subplots(1, len(SCORES)), SCORES.items(), strict=True):
        for kind, colour, marker in (("teacher", "#0072B2", "o"), ("student", "#D55E00", "s")):
            own = table[table.sampler.str.startswith(kind)]
            mean = own.groupby("evaluations")[score].mean()
            axis.plot(mean.index, mean, marker=marker, color=colour, label=kind)
        axis.set(xscale="log", xlabel="network evaluations a member", ylabel=name)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    return figure


if __name__ == "__main__":
    main()
