"""Scores over a number that the runs of a sweep differ in: steps, strengths, members."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from clinfuse.reporting.figures import INK, QUIET, SERIES
from clinfuse.reporting.tables import better, score_label

MOST_PANELS = 6
"""Scores that a figure has room for."""

_STYLES, _MARKERS = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2))), "osD^vPX"


@dataclass(frozen=True)
class Axis:
    """What a sweep varies in numbers.

    Attributes:
        name: for the figure's axis, with a unit.
        values: by a method's name in the rows, the series that it belongs to and its number.
    """

    name: str
    values: Mapping[str, tuple[str, float]]


def parameter_figure(long: pd.DataFrame, axis: Axis) -> Figure:
    """Each score against the number: a colour a misregistration, a line style a series.

    Bands are bootstrap intervals, where there are any. The number has a logarithmic axis where it
    spans more than a decade.

    Args:
        long: of ``paper.long_table``.
        axis: methods that it does not know are left out.
    """
    frame = long[long["method"].isin(axis.values)].copy()
    frame["series"] = [axis.values[method][0] for method in frame["method"]]
    frame["x"] = [axis.values[method][1] for method in frame["method"]]
    scores = list(dict.fromkeys(zip(frame["roi"], frame["metric"], strict=True)))[:MOST_PANELS]
    amplitudes, series = sorted(frame["misregistration_mm"].unique()), sorted(set(frame["series"]))
    columns = min(len(scores), 3)
    lines = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.9 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, (roi, metric) in zip(panels, scores, strict=False):
        of = frame[(frame["roi"] == roi) & (frame["metric"] == metric)]
        for (amplitude, name), part in of.groupby(["misregistration_mm", "series"], sort=True):
            _draw(panel, part, amplitudes.index(amplitude), series.index(name))
        title = f"{score_label(roi, metric)} {better(metric)}".strip()
        panel.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
        _quiet(panel, np.sort(frame["x"].unique()), axis.name)
    for panel in panels[len(scores) :]:
        panel.set_axis_off()
    _legend(figure, amplitudes, series)
    return figure


def _draw(panel: Axes, part: pd.DataFrame, amplitude: int, series: int) -> None:
    part = part.sort_values("x")
    x, mean, low, high = (part[name].to_numpy(float) for name in ("x", "mean", "low", "high"))
    colour = SERIES[amplitude % len(SERIES)]
    style, marker = _STYLES[series % len(_STYLES)], _MARKERS[amplitude % len(_MARKERS)]
    if series == 0:
        panel.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
    panel.plot(x, mean, color=colour, ls=style, marker=marker, lw=1.6, ms=4)


def _quiet(panel: Axes, values: np.ndarray, name: str) -> None:
    positive = values[values > 0]
    if len(positive) == len(values) and values.max() > 10 * values.min():
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(length=0, which="minor")
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.set_xlabel(name, fontsize=9, color=QUIET)
    panel.tick_params(labelsize=8, colors=QUIET, length=2, pad=3, which="major")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(QUIET)
    panel.grid(color=QUIET, alpha=0.18, lw=0.6)


def _legend(figure: Figure, amplitudes: list[float], series: list[str]) -> None:
    handles = [
        Line2D([], [], color=SERIES[n % len(SERIES)], marker=_MARKERS[n % len(_MARKERS)], ms=4)
        for n in range(len(amplitudes))
    ]
    labels = [f"moved by {amplitude:g} mm" for amplitude in amplitudes]
    if len(series) > 1:
        handles += [Line2D([], [], color=INK, ls=s) for s, _ in zip(_STYLES, series, strict=False)]
        labels += series[: len(_STYLES)]
    figure.legend(
        handles,
        labels,
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=min(len(handles), 4),
        labelcolor=INK,
    )
