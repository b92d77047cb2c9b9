"""Every score against everything that was made wrong with the cases, as one figure and its numbers.

A perturbation's curve starts where nothing is perturbed: at the rows of the same misregistration.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clinfuse.reporting.figures import ACCENT, INK, QUIET, figure_png
from clinfuse.reporting.latex import figure_pdf
from clinfuse.reporting.rows import Rows, as_rows
from clinfuse.reporting.tables import KEPT_SCORES, STATISTICS, better, score_label, summary

MISREGISTRATION = "misregistration_mm"

AXES = {
    MISREGISTRATION: "Misregistration\n(mm)",
    "rotation_deg": "CT turned\n(degrees)",
    "mask_shift_mm": "Masks shifted\n(mm)",
    "mask_dilation_mm": "Masks dilated\n(mm, − eroded)",
    "mask_holes": "Holes in masks\n(share of volume)",
    "noise_std": "Noise\n(s.d., model units)",
    "without_lesion": "Lesion mask",
}
"""What a reader calls the columns of the figure, in their order; others follow under their name."""

SHOWN_SCORES = (
    ("bone", "psnr"),
    ("bone", "ssim"),
    ("brain", "ssim"),
    ("whole", "ssim"),
    ("lesion", "dice"),
    ("lesion", "conspicuity"),
)
"""Rows of the figure, as (roi, metric), those that are defined."""

FILES = ("perturbations.csv", "perturbations.png", "perturbations.pdf")
"""What ``robustness_files`` makes."""

TEXT = (
    "One thing is wrong at a time, in what methods are given; scores are against the true, "
    "registered case. Each line begins where nothing is wrong, at the left end or at 0. Mean over "
    "cases; bands, of the method set off or of all if they are three or fewer, are 95% bootstrap "
    "intervals over patients. All masks a method sees go wrong, the lesion's with them."
)
"""How to read the figure."""

COLOURS = ("#6656d8", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", INK)
"""Of all methods but the one set off, in turn: Okabe & Ito (2008) with a violet for their blue,
which tritanopes would take for ``ACCENT``."""

MARKERS = "sD^vPX<>phd*"
DASHES = ("-", "--", ":")

_CONDITION = ("method", MISREGISTRATION, "perturbation", "amount")
_FEW = 3


def is_perturbed(rows: Rows) -> bool:
    """Whether anything but misregistration was wrong with any case."""
    return bool((as_rows(rows)["perturbation"] != "").any())


def robustness_table(
    rows: Rows, scores: Sequence[tuple[str, str]] = SHOWN_SCORES, resamples: int = 2000
) -> pd.DataFrame:
    """The statistics of each score at each amount of each axis that the rows have.

    Variants of a method are methods of their own, as in ``summary``. Axes that were tried under
    several misregistrations come once for each.

    Returns:
        One row an axis, amount, method and score: ``axis``, ``at_mm`` (the misregistration beside
        it; 0 for misregistration itself), ``amount``, method, roi, metric, then ``STATISTICS``.
    """
    frame = as_rows(rows)
    wanted = pd.MultiIndex.from_frame(frame[["roi", "metric"]]).isin(list(scores))
    long = summary(frame[wanted], _CONDITION, resamples=resamples)
    plain = long[long["perturbation"] == ""]
    parts = []
    if plain[MISREGISTRATION].nunique() > 1:
        amount = plain[MISREGISTRATION]
        parts.append(plain.assign(axis=MISREGISTRATION, at_mm=0.0, amount=amount))
    perturbations = list(dict.fromkeys([*AXES, *long["perturbation"]]))
    for perturbation in (name for name in perturbations if name):
        of_axis = long[long["perturbation"] == perturbation]
        for at_mm, wrong in of_axis.groupby(MISREGISTRATION):
            is_start = (plain[MISREGISTRATION] == at_mm) & plain["method"].isin(wrong["method"])
            start = plain[is_start] if not (wrong["amount"] == 0).any() else plain[:0]
            parts.append(pd.concat([start, wrong]).assign(axis=perturbation, at_mm=at_mm))
    columns = ["axis", "at_mm", "amount", "method", "roi", "metric", *STATISTICS]
    if not parts:
        return pd.DataFrame(columns=columns)
    return pd.concat(parts, ignore_index=True)[columns]


def robustness_grid(table: pd.DataFrame, highlight: str | None = None) -> Figure:
    """Scores (rows) by axes (columns) of ``robustness_table``, one line a method, one legend.

    A row has one scale, so that axes can be compared. Methods differ in colour, marker and dashes;
    ``highlight`` is thick, in the accent.
    """
    axes_shown = list(table[["axis", "at_mm"]].drop_duplicates().itertuples(index=False))
    defined = table[np.isfinite(table["mean"].astype(float))]
    found = dict.fromkeys(zip(defined["roi"], defined["metric"], strict=True))
    order = {score: number for number, score in enumerate((*SHOWN_SCORES, *KEPT_SCORES))}
    scores = sorted(found, key=lambda score: order.get(score, len(order)))
    styles = _styles(list(table["method"].unique()), highlight)
    width, height = 1.62 * len(axes_shown) + 0.9, 1.22 * len(scores) + 1.0
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(scores), len(axes_shown), squeeze=False, sharey="row", sharex="col")
    has_bands = len(styles) <= _FEW
    for (roi, metric), panels in zip(scores, grid, strict=True):
        of_score = table[(table["roi"] == roi) & (table["metric"] == metric)]
        for (axis, at_mm), axes in zip(axes_shown, panels, strict=True):
            part = of_score[(of_score["axis"] == axis) & (of_score["at_mm"] == at_mm)]
            for method, style in styles.items():
                band = has_bands or method == highlight
                _draw_line(axes, part[part["method"] == method], style, band)
            _quiet(axes)
        name = f"{score_label(roi, metric)} {better(metric)}".strip()
        panels[0].set_ylabel(name, fontsize=8, color=INK)
    for (axis, at_mm), top, bottom in zip(axes_shown, grid[0], grid[-1], strict=True):
        title = AXES.get(axis, axis.replace("_", " "))
        moved = f"\nCT moved by {at_mm:g} mm" if at_mm else ""
        top.set_title(title + moved, fontsize=8.5, color=INK, pad=6)
        amounts = table.loc[(table["axis"] == axis) & (table["at_mm"] == at_mm), "amount"]
        _set_ticks(bottom, axis, sorted(amounts.unique()))
    figure.align_ylabels(grid[:, 0])
    figure.set_figheight(height + 0.2 * _add_legend(figure, styles))
    return figure


def _add_legend(figure: Figure, styles: dict[str, dict[str, Any]]) -> int:
    """Under the figure, in as few lines as its width allows: how many those are."""
    handles = [
        Line2D([], [], label=method.replace("$", r"\$"), **style)
        for method, style in styles.items()
    ]
    for lines in range(1, len(handles) + 1):
        legend = figure.legend(
            handles=handles,
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            loc="outside lower center",
            ncols=-(-len(handles) // lines),
            handlelength=3.2,
        )
        if legend.get_window_extent().width <= figure.bbox.width or lines == len(handles):
            break
        legend.remove()
    return lines


def robustness_of(rows: Rows, highlight: str | None = None) -> tuple[pd.DataFrame, Figure] | None:
    """The table and the figure of rows, or None where nothing was perturbed.

    Pairs without regions or a reference are shown by what they keep of both sources.
    """
    frame = as_rows(rows)
    if not is_perturbed(frame):
        return None
    has_value = frame[frame["value"].notna()].groupby(["roi", "metric"]).groups
    scores = SHOWN_SCORES if set(SHOWN_SCORES) & set(has_value) else KEPT_SCORES[:5]
    table = robustness_table(frame, scores)
    return table, robustness_grid(table, highlight)


def robustness_files(table: pd.DataFrame, figure: Figure) -> dict[str, str | bytes]:
    """What ``robustness_of`` gives, as the contents of ``FILES`` by name."""
    text = table.to_csv(index=False, na_rep="nan", lineterminator="\n")
    return dict(zip(FILES, (text, figure_png(figure), figure_pdf(figure)), strict=True))


def _styles(methods: Sequence[str], highlight: str | None) -> dict[str, dict[str, Any]]:
    """How each method is drawn; the one set off comes first, above the others."""
    styles: dict[str, dict[str, Any]] = {}
    if highlight in methods:
        assert highlight is not None
        accent = {"color": ACCENT, "marker": "o", "ls": "-", "lw": 2.4, "ms": 5.0, "zorder": 3}
        styles[highlight] = accent
    for number, method in enumerate(method for method in methods if method != highlight):
        styles[method] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "ls": DASHES[number // len(COLOURS) % len(DASHES)],
            "lw": 1.2,
            "ms": 4.0,
            "zorder": 2,
        }
    return styles


def _draw_line(axes: Axes, part: pd.DataFrame, style: dict[str, Any], has_band: bool) -> None:
    part = part.sort_values("amount")
    amount, mean, low, high = (
        part[name].replace([np.inf, -np.inf], np.nan).to_numpy(float)
        for name in ("amount", "mean", "low", "high")
    )
    if has_band:
        axes.fill_between(amount, low, high, color=style["color"], alpha=0.13, lw=0)
    axes.plot(amount, mean, **style, markeredgecolor="white", markeredgewidth=0.4)


def _set_ticks(axes: Axes, axis: str, amounts: Sequence[float]) -> None:
    if axis == "without_lesion":
        axes.set_xticks([0, 1], ["given", "withheld"])
        axes.set_xlim(-0.35, 1.35)
    else:
        axes.set_xticks(amounts, [f"{amount:g}".replace("-", "−") for amount in amounts])


def _quiet(axes: Axes) -> None:
    axes.tick_params(labelsize=7.5, colors=QUIET, length=0, pad=3)
    axes.locator_params(axis="y", nbins=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.grid(color=QUIET, alpha=0.2, lw=0.6)
    axes.set_axisbelow(True)
