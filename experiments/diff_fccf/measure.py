"""Does a trained diff_fccf register, denoise and keep the hue?

python experiments/diff_fccf/measure.py RUN [OUT]

RUN is the folder of a run of method=diff_fccf on 2-D pairs. Its test pairs are taken as they lie,
and their functional source is moved by exactly three pixels, right, left, down and up in turn.
OUT/cases.csv has a row a pair: the error of the deformation over what either source shows, before
and after, in pixels; the angle between the chroma fused and the registered one, and how many
coloured pixels keep at least half of their chroma. For the pair in place, with noise on both
sources: the squared error in each source, in the fused luma (against the fused luma without that
noise), and in the sources' average. So that blur does not pass for denoising, beside it stands the
average blurred until it errs no more than the fused luma: for both, the share of detail kept, which
is the slope of their detail (x - G x) on that of the nearest weighted sum of the two clean sources,
1 for all and less for a blur, whatever noise there is; and the SSIM with the same fusion without
noise.
OUT/stages.png has the three stages of one pair, without noise and with it, and below them the
weights of the loss over the training; leave real images out of the project, and this figure with
them.
"""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from PIL import Image

from clinfuse.configuration import register_resolvers, run_config, trained_method
from clinfuse.data.paired_slices import slice_item
from clinfuse.data.slices import Slice, colour_picture
from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.ssim import ssim
from clinfuse.methods.diff_fccf import AIR, DiffFccf, clean_pair, misplaced
from clinfuse.reporting.atomic import write_atomically
from clinfuse.types import SliceBatch

SHIFT_PIXELS = 3
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))
NOISE_STD = 0.1
"""In model space, of both sources."""

DETAIL_PX = 1.5
"""Standard deviation of the window that takes detail away."""

COLOURED = 0.06
"""Chroma from which on an angle means something: 16 of 255 levels."""

DPI = 110


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
    write_atomically(Path(out) / "stages.png", png_of(figure))


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
    colour = method.fuse_colour(moved)
    return {
        "case_id": pair.case_id,
        "error_before_px": round(before, 4),
        "error_after_px": round(after, 4),
        "hue_off_deg": round(hue_off_deg(colour, functional), 3),
        "colour_kept": round(colour_kept(colour, functional), 4),
        **{name: round(value, 6) for name, value in denoised(method, still, index).items()},
    }


def denoised(method: DiffFccf, still: SliceBatch, seed: int) -> dict[str, float]:
    """What noise on both sources leaves in the fused luma and in their average."""
    inside, noisy = still.mri > AIR, noised(still, seed)
    mri, ct = noisy.mri, noisy.ct
    fused, clean_fused = method.fuse(noisy), method.fuse(still)
    average, clean_average = (mri + ct) / 2, (still.mri + still.ct) / 2
    left = error(fused, clean_fused, inside)
    blurred = blurred_until(average, clean_average, inside, left)

    def likeness(picture: torch.Tensor, other: torch.Tensor) -> float:
        return ssim(picture + 1, other + 1, inside, still.spacing_mm).item()

    return {
        "noise_anatomical": error(mri, still.mri, inside),
        "noise_functional": error(ct, still.ct, inside),
        "noise_left": left,
        "noise_in_average": error(average, clean_average, inside),
        "detail_kept": detail_kept(fused, clean_fused, still, inside),
        "detail_without_noise": detail_kept(clean_fused, clean_fused, still, inside),
        "detail_blurred": detail_kept(blurred, clean_average, still, inside),
        "ssim_fused": likeness(fused, clean_fused),
        "ssim_average": likeness(average, clean_average),
        "ssim_blurred": likeness(blurred, clean_average),
    }


def noised(batch: SliceBatch, seed: int) -> SliceBatch:
    """The pair with noise on both sources, within [-1, 1] as every picture."""
    generator = torch.Generator().manual_seed(seed)
    mri, ct = (
        (source + NOISE_STD * torch.randn(source.shape, generator=generator)).clamp(-1, 1)
        for source in (batch.mri, batch.ct)
    )
    return replace(batch, mri=mri, ct=ct)


def error(a: torch.Tensor, b: torch.Tensor, inside: torch.Tensor) -> float:
    return (a - b)[inside].square().mean().item()


def blurred_until(
    noisy: torch.Tensor, clean: torch.Tensor, inside: torch.Tensor, left: float
) -> torch.Tensor:
    """The picture under the narrowest Gaussian that leaves no more of the noise than ``left``.

    Only noise counts, not what the blur takes from the picture, which flatters it.
    """
    for sigma in torch.arange(0.0, 4.0, 0.05).tolist():
        blurred = gaussian_smooth(noisy, (sigma, sigma))
        if error(blurred, gaussian_smooth(clean, (sigma, sigma)), inside) <= left:
            break
    return blurred


def detail_kept(
    fused: torch.Tensor, clean_fused: torch.Tensor, still: SliceBatch, inside: torch.Tensor
) -> float:
    """Slope of the detail fused on that of the clean sources, in the shares that fusion gives them.

    The shares are those of the least squares fit of ``clean_fused`` by a weighted sum.
    """
    sources = torch.stack([still.mri[inside], still.ct[inside], torch.ones_like(still.mri[inside])])
    shares = torch.linalg.lstsq(sources.T, clean_fused[inside][:, None]).solution[:2, 0]
    blend = shares[0] * still.mri + shares[1] * still.ct
    ours, theirs = (x - gaussian_smooth(x, (DETAIL_PX, DETAIL_PX)) for x in (fused, blend))
    return ((ours * theirs)[inside].sum() / theirs[inside].square().sum()).item()


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
    print("| | mean | median | least | largest |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in columns.items():
        middle = f"{mean(values):.4g} | {median(values):.4g}"
        print(f"| {name} | {middle} | {min(values):.4g} | {max(values):.4g} |")


def weights_of(run: str) -> pd.DataFrame:
    """Weight of each term by training step."""
    logged = pd.read_csv(Path(run) / "metrics.csv")
    names = [name for name in logged if name.startswith("weight/")]
    return logged.dropna(subset=names).set_index("step")[names]


def pictures(method: DiffFccf, batch: SliceBatch) -> dict[str, np.ndarray]:
    """The sources of a pair and what each stage of its inference ends with."""
    chroma = None if batch.chroma is None else batch.chroma[0]
    shown = {
        "anatomical": colour_picture(batch.mri[0], None),
        f"functional, {SHIFT_PIXELS} px off": colour_picture(batch.ct[0], chroma),
    }
    for result in method.stages(batch):
        luma, colour = result.picture[0].clamp(-1, 1).tensor_split([1])
        shown[f"stage: {result.sight.name}"] = colour_picture(luma, colour / 2)
    return shown


def stages_figure(method: DiffFccf, batch: SliceBatch, weights: pd.DataFrame) -> Figure:
    """Sources and the picture at the end of each stage, without noise and with it.

    Below them are the weights during training.
    """
    rows = [pictures(method, batch), pictures(method, noised(batch, 0))]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1.6))
    grid = above.subplots(len(rows), len(rows[0]))
    for row, line in zip(grid, rows, strict=True):
        for axes, (title, picture) in zip(row, line.items(), strict=True):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set_title(title if line is rows[0] else f"{title}, noise", fontsize=9)
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


def png_of(figure: Figure) -> bytes:
    """The figure in 256 colours of its own: the reports' palette has none for a fused hue."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
