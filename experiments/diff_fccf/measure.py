"""Does a trained diff_fccf register, denoise and keep the hue?

python experiments/diff_fccf/measure.py RUN [OUT]

RUN is the folder of a run of method=diff_fccf on 2-D pairs. Its test pairs are taken as they lie,
and their functional source is moved by exactly three pixels, right, left, down and up in turn.
OUT/cases.csv has a row a pair: the error of the deformation over what either source shows, before
and after, in pixels; the squared error that noise on both sources leaves in the fused luma, and
what it leaves in their average; the angle between the chroma fused and the registered one, and how
many coloured pixels keep at least half of their chroma.
OUT/stages.png has the three stages of one pair, and below them the weights of the loss over
the training; leave real images out of the project, and this figure with them.
"""

import csv
import sys
from pathlib import Path
from statistics import mean, median

import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure

from clinfuse.configuration import register_resolvers, run_config, trained_method
from clinfuse.data.paired_slices import slice_item
from clinfuse.data.slices import Slice, colour_picture
from clinfuse.methods.diff_fccf import AIR, DiffFccf, clean_pair, misplaced
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.figures import figure_png
from clinfuse.types import SliceBatch

SHIFT_PIXELS = 3
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
NOISE_STD = 0.1
"""In model space, of both sources."""

COLOURED = 0.06
"""Chroma from which on an angle means something: 16 of 255 levels."""

LARGEST_BYTES = 280_000


def main(run: str, out: str = "experiments/diff_fccf") -> None:
    register_resolvers()
    data = instantiate(run_config(run).data, _convert_="all")
    method = trained_method(run).eval()
    slices = data.slices("test")
    rows = [measured(method, pair, index) for index, pair in enumerate(slices)]
    Path(out).mkdir(parents=True, exist_ok=True)
    with (Path(out) / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print_table(rows)
    figure = stages_figure(method, shifted(slices[len(slices) // 2], 0), weights_of(run))
    write_atomically(Path(out) / "stages.png", figure_png(figure, largest_bytes=LARGEST_BYTES))


def shifted(pair: Slice, index: int) -> SliceBatch:
    """The pair with its functional source three pixels off."""
    matrix = torch.eye(3, dtype=torch.float64)
    for axis, step in enumerate(DIRECTIONS[index % len(DIRECTIONS)]):
        matrix[axis, 2] = SHIFT_PIXELS * step * pair.spacing_mm[axis]
    return slice_item(pair, matrix)


def measured(method: DiffFccf, pair: Slice, index: int) -> dict:
    moved, still = shifted(pair, index), slice_item(pair, torch.eye(3, dtype=torch.float64))
    anatomical, functional = clean_pair(moved)
    where, pixel = torch.maximum(anatomical, functional[:, :1]) > AIR, pair.spacing_mm[0]
    u = method.displacement_mm(moved)
    before, after = (misplaced(field, moved, where).sqrt().item() / pixel for field in (0 * u, u))
    generator = torch.Generator().manual_seed(index)
    noisy = slice_item(pair, torch.eye(3, dtype=torch.float64))
    noisy.mri = noisy.mri + NOISE_STD * torch.randn(noisy.mri.shape, generator=generator)
    noisy.ct = noisy.ct + NOISE_STD * torch.randn(noisy.ct.shape, generator=generator)
    inside = anatomical > AIR
    left = (method.fuse(noisy) - method.fuse(still))[inside].square().mean()
    averages = ((batch.mri + batch.ct) / 2 for batch in (noisy, still))
    in_average = torch.sub(*averages)[inside].square().mean()
    return {
        "case_id": pair.case_id,
        "error_before_px": round(before, 4),
        "error_after_px": round(after, 4),
        "noise_left": round(left.item(), 6),
        "noise_in_average": round(in_average.item(), 6),
        "hue_off_deg": round(hue_off_deg(colour := method.fuse_colour(moved), functional), 3),
        "colour_kept": round(colour_kept(colour, functional), 4),
    }


def hue_off_deg(fused: torch.Tensor, functional: torch.Tensor) -> float:
    """Median angle between two chromas where both have colour; NaN in a grey pair."""
    ours, theirs = fused[:, 1:], functional[:, 1:] / 2
    cross = ours[:, 0] * theirs[:, 1] - ours[:, 1] * theirs[:, 0]
    angle = torch.rad2deg(torch.atan2(cross, (ours * theirs).sum(1))).abs()
    return float(angle[(ours.norm(dim=1) > COLOURED) & (theirs.norm(dim=1) > COLOURED)].median())


def colour_kept(fused: torch.Tensor, functional: torch.Tensor) -> float:
    """Share of the functional source's coloured pixels that keep at least half of their chroma."""
    ours, theirs = fused[:, 1:].norm(dim=1), functional[:, 1:].norm(dim=1) / 2
    return float((ours > theirs / 2)[theirs > COLOURED].float().mean())


def print_table(rows: list[dict]) -> None:
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "case_id"}
    print("| | mean | median | largest |\n| --- | ---: | ---: | ---: |")
    for name, values in columns.items():
        print(f"| {name} | {mean(values):.4g} | {median(values):.4g} | {max(values):.4g} |")


def weights_of(run: str) -> pd.DataFrame:
    """Weight of each term by training step."""
    logged = pd.read_csv(Path(run) / "metrics.csv")
    names = [name for name in logged if name.startswith("weight/")]
    return logged.dropna(subset=names).set_index("step")[names]


def stages_figure(method: DiffFccf, batch: SliceBatch, weights: pd.DataFrame) -> Figure:
    """Sources and the picture at the end of each stage, over the weights during training."""
    chroma = None if batch.chroma is None else batch.chroma[0]
    pictures = {
        "anatomical": colour_picture(batch.mri[0], None),
        f"functional, {SHIFT_PIXELS} px off": colour_picture(batch.ct[0], chroma),
    }
    for result in method.stages(batch):
        luma, colour = result.picture[0].clamp(-1, 1).tensor_split([1])
        pictures[f"stage: {result.sight.name}"] = colour_picture(luma, colour / 2)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1.6))
    for axes, (title, picture) in zip(
        above.subplots(1, len(pictures)), pictures.items(), strict=True
    ):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    axes = below.subplots()
    for name in weights:
        base = method.policy.base[name.removeprefix("weight/")]
        axes.plot(weights.index, weights[name] / base, label=name.removeprefix("weight/"), lw=1)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("training step", fontsize=8)
    axes.set_ylabel("weight / base", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])
