"""One picture of a benchmark's record: ratios as bars, and how cost grows with the volume.

python experiments/performance/picture.py RECORD.json PICTURE.png draws a record anew.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OURS, OTHER, LINE = "#2a6f97", "#c9a227", "#9d0208"


def draw(record: dict[str, Any], path: Path) -> Path:
    """Write the picture of a record; returns its path."""
    bars = bars_of(record)
    growth = record.get("growth", {}).get("growth", [])
    figure, axes = plt.subplots(
        1, 2 if growth else 1, figsize=(12 if growth else 7, 1.2 + 0.32 * max(len(bars), 6)),
        width_ratios=[1.5, 1] if growth else [1], layout="constrained", squeeze=False,
    )  # fmt: skip
    draw_ratios(axes[0, 0], bars)
    if growth:
        draw_growth(axes[0, 1], growth)
    facts = next(iter(record.values()))["machine"]
    figure.suptitle(
        f"{facts.get('gpu', facts['processor'])}, {facts['threads']} threads, "
        f"torch {facts['torch']}, commit {facts['commit']}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def bars_of(record: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Label, ratio, and the least and most in single turns, of every pair of every part."""
    pairs = [p for part in record.values() for p in part.get("pairs", [])]
    bars = [
        (
            f"{p['section']}, {p['case']}: {'memory' if p['unit'] == 'MiB' else 'time'} "
            f"({p['against'].split(',')[0]})",
            p["ratio"],
            p["least"],
            p["most"],
        )
        for p in pairs
    ]
    return bars + loading_bars(record.get("loading", {}).get("loading", []))


def loading_bars(loading: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    """Seconds an item from files by TorchIO over ours, of whole studies and of windows."""
    bars = []
    for row in loading:
        seconds, size = row["seconds_an_item"], " x ".join(map(str, row["shape"]))
        for what in ("whole", "window"):
            ours, other = (seconds[f"{what}: {w}"] for w in ("ours, spline", "TorchIO, from files"))
            ratios = [b / a for a, b in zip(ours, other, strict=True)]
            label = f"loading, {what} of {size}: time (TorchIO from files)"
            bars.append((label, median(other) / median(ours), min(ratios), max(ratios)))
    return bars


def draw_ratios(axes: Axes, bars: list[tuple[str, float, float, float]]) -> None:
    """Times as much as the reference takes, on a logarithmic axis."""
    for row, (_, ratio, least, most) in enumerate(reversed(bars)):
        axes.barh(row, ratio - 1, left=1, color=OURS if ratio >= 1 else OTHER, height=0.7)
        axes.plot([least, most], [row, row], color="black", lw=1)
        axes.annotate(f" {ratio:.3g}×", (max(ratio, most, 1), row), va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for label, *_ in reversed(bars)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=0.8)
    axes.axvline(3, color=LINE, lw=0.8, ls=":", label="3×")
    highest = max([most for *_, most in bars] + [ratio for _, ratio, *_ in bars] + [3.0])
    axes.set_xlim(min([0.8] + [least * 0.8 for _, _, least, _ in bars]), highest * 2)
    ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if t < 2 * highest]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("reference ÷ ours", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_growth(axes: Axes, growth: list[dict[str, Any]]) -> None:
    """Seconds over voxels, with the fitted exponents."""
    for row in growth:
        axes.plot(
            row["voxels"],
            row["seconds"],
            marker="o",
            ms=4,
            color=OURS,
            ls="--" if "sampling" in row["work"] else ":" if "whole" in row["work"] else "-",
            label=f"{row['work']}: exponent {row['exponent_of_time']:.2f}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    voxels = growth[0]["voxels"]
    axes.set_xticks(voxels, [f"{v / 1000:.0f}" for v in voxels], fontsize=8)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_ylim(top=5 * max(max(row["seconds"]) for row in growth))  # room for the legend
    axes.set_xlabel("thousand voxels", fontsize=9)
    axes.set_ylabel("seconds", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
