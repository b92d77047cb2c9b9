"""Three planes of a case, and curves over misregistration, as matplotlib figures.

``save_figures`` writes them as small PNG files; the report embeds the curves as SVG.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from scipy.spatial import KDTree

from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.tables import amplitudes_mm, headline_scores, score_columns, score_label
from clinfuse.reporting.views import (
    CANVAS_MARGIN_MM,
    COLOUR_MAPS,
    PLANES,
    CaseView,
    Panel,
    Plane,
    chosen_slices,
    cropped,
    head_box,
    outlines,
    palette,
    panels,
    png,
    shared_scales,
)

LARGEST_FIGURE_BYTES = 300_000
"""No PNG of ``save_figures`` is larger."""

INK, QUIET, ACCENT = "#1d2428", "#68737b", "#0b7a75"
SERIES = ("#2f6db5", "#c2571a", "#7d55a8", "#8a6d12", "#b8467f", "#4d7c3a", "#5d6b78")
"""Colours of text, of rules and ticks, of the highlighted method, and of the others in turn."""

FAR = 24.0
"""Distance of two colours, in levels of 255, that changes what a picture says."""

ON_BLACK = "#d8dcdf"
_LESION = "#ffb000"
_MARKERS = "osD^vPX"


def case_figure(
    view: CaseView, difference_high: float | None = None, spread_high: float | None = None
) -> Figure:
    """Three planes (rows) by ``panels`` (columns) of one case, with labels and colour bars.

    All tiles have one scale in mm, stated by a bar of 50 mm; the lesion is outlined on the MRI.
    """
    at, box = chosen_slices(view), head_box(view)
    view = cropped(view)
    columns = panels(view, difference_high, spread_high)
    depth, height, width = np.multiply(view.mri.shape, view.spacing_mm) + 2 * CANVAS_MARGIN_MM
    rows_mm, widest_mm = (height, depth, depth), max(height, width)
    tiles_in = sum(rows_mm) * 2.1 / widest_mm
    total_in = tiles_in + 1.1
    figure = Figure(figsize=(2.15 * len(columns), total_in), facecolor="white")
    grid = figure.subplots(
        len(PLANES),
        len(columns),
        squeeze=False,
        gridspec_kw={"height_ratios": rows_mm, "wspace": 0.02, "hspace": 0.03},
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.6 / total_in, bottom=0.5 / total_in)
    for plane, line in zip(PLANES, grid, strict=True):
        index = at[plane.axis] - box[plane.axis].start
        for panel, axes in zip(columns, line, strict=True):
            draw_tile(axes, panel, plane, index, view.spacing_mm, widest_mm)
        _draw_facts(line[0], plane, index, at[plane.axis], view)
    for panel, top, bottom in zip(columns, grid[0], grid[-1], strict=True):
        top.set_title(panel.name, fontsize=9, pad=4, color=INK)
        if panel.colours != "grey":
            _draw_colour_bar(bottom, panel)
    title = view.case_id + (f": {view.caption}" if view.caption else "")
    figure.suptitle(title, x=0.012, y=1 - 0.1 / total_in, ha="left", va="top", fontsize=10)
    return figure


def robustness_figure(
    table: pd.DataFrame,
    highlight: str | None = None,
    scores: Sequence[tuple[str, str]] | None = None,
) -> Figure:
    """Each score of a headline table against misregistration in mm, one line a method.

    Lines are named at their right end. ``highlight`` is thick, in the accent, with its interval
    as a band; so is every method where they are three or fewer.
    """
    scores = headline_scores(table) if scores is None else scores
    height = float(np.clip(0.48 * len(table), 3.3, 5.5))
    figure = Figure(figsize=(5.4 * len(scores), height), layout="constrained")
    line = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (roi, metric) in zip(line, scores, strict=True):
        _draw_curves(axes, table, roi, metric, highlight)
    return figure


def reliability_figure(
    points: Mapping[str, Mapping[str, Float[np.ndarray, "n 2"]]],
) -> Figure:
    """Error found against error stated, root mean squares in bins: one panel a region.

    On the diagonal an uncertainty says the truth; above it, it says too little, below it too much,
    as each panel is labelled. All panels have one scale.

    Args:
        points: by region, then by kind (before and after calibration, say; the last one is set
            off), the stated and the found of each bin, in model space.
    """
    figure = Figure(figsize=(3.6 * len(points), 4.0), layout="compressed")
    found = [part for kinds in points.values() for part in kinds.values() if len(part)]
    low, high = (0.005, 1.0)
    if found:
        values = np.concatenate(found)
        low, high = 0.8 * values[values > 0].min(initial=1.0), 1.25 * values.max()
    line = figure.subplots(1, len(points), squeeze=False)[0]
    for axes, (region, kinds) in zip(line, points.items(), strict=True):
        (diagonal,) = axes.plot([low, high], [low, high], color=QUIET, lw=0.8, ls=(0, (4, 3)))
        for text, x, y, across, along in (
            ("says too little", 0.04, 0.96, "left", "top"),
            ("says too much", 0.96, 0.04, "right", "bottom"),
        ):
            place: dict[str, Any] = {"ha": across, "va": along, "transform": axes.transAxes}
            axes.text(x, y, text, fontsize=8, color=QUIET, style="italic", **place)
        for number, (kind, part) in enumerate(kinds.items()):
            is_last = number == len(kinds) - 1
            colour = ACCENT if is_last else SERIES[number]
            style: dict[str, Any] = {"lw": 2.2 if is_last else 1.2, "ms": 4 if is_last else 3}
            marker = "o" if is_last else _MARKERS[1 + number]
            axes.plot(part[:, 0], part[:, 1], color=colour, marker=marker, label=kind, **style)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_title(region, loc="left", fontsize=10, color=INK, pad=8)
        axes.set_xlabel("error stated (s.d., model units)", fontsize=8, color=QUIET)
        axes.set_ylabel("error found (r.m.s., model units)", fontsize=8, color=QUIET)
        axes.tick_params(labelsize=8, colors=QUIET, length=2, pad=3, which="major")
        axes.tick_params(length=0, which="minor")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(QUIET)
        axes.grid(color=QUIET, alpha=0.18, lw=0.6)
    handles, kinds_shown = line[0].get_legend_handles_labels()
    figure.legend(
        [diagonal, *handles],
        ["stated = found", *kinds_shown],
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=1 + len(handles),
        labelcolor=INK,
    )
    return figure


def pictures_figure(
    rows: Sequence[Mapping[str, Image.Image]], width_in: float = 2.6, largest_px: int = 384
) -> Figure:
    """Pictures as they are, one row a case, each under its name: levels and colours unchanged.

    Args:
        rows: pictures by name, as many in every row.
        width_in: of a column.
        largest_px: pictures larger than this are reduced to it.
    """
    shown = [{name: image.copy() for name, image in row.items()} for row in rows]
    for row in shown:
        for image in row.values():
            image.thumbnail((largest_px, largest_px))
    heights = [max(i.height / i.width for i in row.values()) for row in shown]
    columns = len(shown[0])
    size = (width_in * columns, sum(width_in * h + 0.3 for h in heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False, height_ratios=heights)
    for row, line in zip(shown, grid, strict=True):
        for (name, image), axes in zip(row.items(), line, strict=True):
            axes.imshow(image.convert("RGB"), interpolation="none")
            axes.set_title(name, fontsize=8, loc="left", color=INK, pad=3)
            axes.set_axis_off()
    return figure


def save_figures(
    folder: str | Path,
    cases: Sequence[CaseView],
    table: pd.DataFrame | None = None,
    highlight: str | None = None,
    charts: Mapping[str, Figure] | None = None,
) -> list[Path]:
    """Write ``<case_id>.png`` for each case, and ``robustness.png`` for a headline table.

    Each of ``charts`` is written beside them, as ``<name>.png``.

    Cases share the scales of difference and spread. Each file is at most 300 kB: resolution falls
    until it is. Letters that a file name should not have become ``_``; a name that comes twice is
    numbered.

    Returns:
        The paths written, cases first.
    """
    highs = shared_scales(cases)
    charts = dict(charts or {})
    figures: dict[str, Figure] = {}
    for view in cases:
        figures[_free_name(view.case_id, {*figures, *charts, "robustness"})] = case_figure(
            view, *highs
        )
    if table is not None and headline_scores(table):
        figures["robustness"] = robustness_figure(table, highlight)
    figures |= charts
    return [
        write_atomically(Path(folder) / f"{name}.png", figure_png(figure))
        for name, figure in figures.items()
    ]


def figure_png(
    figure: Figure, dpi: float = 170, largest_bytes: int = LARGEST_FIGURE_BYTES
) -> bytes:
    """The figure as a PNG of at most ``largest_bytes``, at ``dpi`` or less.

    One that is too large gets a palette before it gets coarser: 119 greys, 68 of each colour map
    and the outline's amber, or its own colours where these are others, without dithering, so that
    anatomy gains no pattern.
    """
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
        image = Image.open(buffer).convert("RGB")
        content = png(image)
        if len(content) > largest_bytes:
            content = png(_with_palette(image))
        if len(content) <= largest_bytes or dpi < 20:
            return content
        dpi *= max(0.5, min(0.93, (largest_bytes / len(content)) ** 0.5))


def figure_svg(figure: Figure, variables: Mapping[str, str] | None = None) -> str:
    """The figure as an ``<svg>`` element for a page: text stays text, no link, no metadata.

    Args:
        figure: what to draw; its background is left transparent.
        variables: CSS colour by the hex colour that it replaces, so that a theme can change it.
    """
    buffer = io.StringIO()
    quiet = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "clinfuse"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=quiet)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (
        r"<metadata>.*?</metadata>\s*",
        r"<style[^>]*>.*?</style>\s*",
        r"<!--.*?-->\s*",
        r"(?<=<svg)[^>]*?(?= viewBox)",
        r' version="[^"]*"',
        r' xmlns(:\w+)?="[^"]*"',
        r'(?<=<g) id="[^"]*"',
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    for colour, variable in (variables or {}).items():
        svg = svg.replace(colour, variable)
    return svg.replace("xlink:href", "href")


def _free_name(case_id: str, used: set[str]) -> str:
    name = re.sub(r"[^\w.-]", "_", case_id).lstrip(".") or "case"
    numbered = (f"{name}_{number}" for number in range(2, len(used) + 3))
    return next(free for free in (name, *numbered) if free not in used)


def _with_palette(image: Image.Image) -> Image.Image:
    """The picture with each pixel in the nearest of 256 colours; Pillow's own search is rougher.

    Where the reports' colours have nothing near more than a few pixels, as for the hue of a fused
    SPECT, it gets 256 colours of its own.
    """
    amber = np.array([tuple(bytes.fromhex(_LESION[1:]))], np.uint8)
    maps = [palette("grey", 119), palette("difference", 68), palette("spread", 68)]
    colours = np.concatenate([*maps, amber])
    pixels = np.asarray(image)
    code = pixels.reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1], np.int32)  # rows sort slowly
    used, which = np.unique(code, return_inverse=True)
    used = np.stack([used >> 16, used >> 8 & 255, used & 255], 1)
    distance, nearest = KDTree(colours.astype(float)).query(used.astype(float))
    if np.bincount(which.ravel())[distance > FAR].sum() > 0.005 * which.size:
        return image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    coded = Image.fromarray(nearest[which].reshape(pixels.shape[:2]).astype(np.uint8))
    coded.putpalette(colours.tobytes())
    return coded


def draw_tile(
    axes: Axes,
    panel: Panel,
    plane: Plane,
    index: int,
    spacing_mm: Sequence[float],
    widest_mm: float,
) -> None:
    """One slice on black, centred on a canvas ``widest_mm`` wide, with its four directions."""
    picture = plane.picture(panel.volume, index)
    rows_mm, columns_mm = np.multiply(picture.shape, plane.pixel_mm(spacing_mm))
    axes.imshow(
        picture,
        cmap=COLOUR_MAPS[panel.colours],
        vmin=panel.low,
        vmax=panel.high,
        extent=(0, columns_mm, rows_mm, 0),
        interpolation="bicubic",
        interpolation_stage="data",  # else colours are mixed, and not those of the bar
    )
    aside = (widest_mm - columns_mm) / 2
    axes.set(xlim=(-aside, columns_mm + aside), xticks=[], yticks=[], facecolor="black")
    axes.set(ylim=(rows_mm + CANVAS_MARGIN_MM, -CANVAS_MARGIN_MM))
    axes.spines[:].set_visible(False)
    for letter, x, y, across, along in (
        (plane.left, 0.02, 0.5, "left", "center"),
        (plane.right, 0.98, 0.5, "right", "center"),
        (plane.top, 0.5, 0.98, "center", "top"),
        (plane.bottom, 0.5, 0.02, "center", "bottom"),
    ):
        place: dict[str, Any] = {"ha": across, "va": along, "transform": axes.transAxes}
        axes.text(x, y, letter, fontsize=6.5, color=ON_BLACK, **place)


def _draw_facts(axes: Axes, plane: Plane, index: int, number: int, view: CaseView) -> None:
    """On the MRI: which slice of the whole volume, a bar of 50 mm, the lesion's outline."""
    draw_scale(axes, f"{plane.name} {number + 1}")
    if view.lesion is not None:
        mask = plane.picture(view.lesion, index)
        for border in outlines(mask, plane.pixel_mm(view.spacing_mm)):
            axes.plot(*border.T, color=_LESION, lw=0.9)


def draw_scale(axes: Axes, text: str) -> None:
    """What a slice is, and a bar of 50 mm, on a tile of ``draw_tile``."""
    left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]
    place: dict[str, Any] = {"color": ON_BLACK, "transform": axes.transAxes, "va": "top"}
    axes.text(0.02, 0.98, text, fontsize=6.5, **place)
    axes.plot([left + 5, left + 55], [bottom - 5, bottom - 5], color=ON_BLACK, lw=1.2)
    axes.text(left + 5, bottom - 8, "50 mm", color=ON_BLACK, fontsize=5.5, va="bottom")


def _draw_colour_bar(axes: Axes, panel: Panel) -> None:
    bar = axes.inset_axes((0.06, -0.12, 0.88, 0.045))
    ramp = np.linspace(0, 1, 256)[None]
    bar.imshow(
        ramp, cmap=COLOUR_MAPS[panel.colours], aspect="auto", extent=(panel.low, panel.high, 0, 1)
    )
    bar.set(yticks=[], xticks=[panel.low, panel.high / 2, panel.high])
    bar.tick_params(labelsize=6.5, length=2, pad=1.5, colors=QUIET)
    bar.spines[:].set_visible(False)


def _draw_curves(
    axes: Axes, table: pd.DataFrame, roi: str, metric: str, highlight: str | None
) -> None:
    amplitudes = np.array(amplitudes_mm(table, roi, metric))
    others = [m for m in table.index if m != highlight]
    ends = []
    for method in [*others, *([highlight] if highlight in table.index else [])]:
        is_ours = method == highlight
        number = 0 if is_ours else others.index(method)
        colour = ACCENT if is_ours else SERIES[number % len(SERIES)]
        part = score_columns(table, roi, metric).loc[method].unstack()
        mean, low, high = (
            part[name].replace([np.inf, -np.inf], np.nan).to_numpy(float)
            for name in ("mean", "low", "high")
        )
        if np.isnan(mean).all():
            continue
        if is_ours or len(table) <= 3:
            axes.fill_between(amplitudes, low, high, color=colour, alpha=0.13, lw=0)
        axes.plot(
            amplitudes,
            mean,
            color=colour,
            lw=2.4 if is_ours else 1.3,
            marker="o" if is_ours else _MARKERS[(number // len(SERIES) + number) % len(_MARKERS)],
            ms=5 if is_ours else 3.5,
        )
        last = np.flatnonzero(~np.isnan(mean))[-1]
        ends.append((mean[last], str(method), colour, is_ours))
    _name_lines(axes, ends)
    _quiet_axes(axes, amplitudes)
    axes.set_title(score_label(roi, metric), loc="left", fontsize=10, color=INK, pad=8)


def _name_lines(axes: Axes, ends: Sequence[tuple[float, str, str, bool]]) -> None:
    """Method names right of the axes, moved apart until none overlaps, each near its line."""
    low, high = axes.get_ylim()
    ends = sorted(ends)
    wanted = np.array([(end[0] - low) / (high - low) for end in ends])
    heights = _apart(wanted, min(0.068, 1.05 / max(len(ends), 1)))
    for (_, name, colour, is_ours), height in zip(ends, heights, strict=True):
        weight = "bold" if is_ours else "normal"
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "center"}
        axes.text(1.02, height, name, color=colour, fontsize=8, weight=weight, **place)


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Rising positions at least ``gap`` apart, close to those wanted: blocks share their mean.

    Pool-adjacent-violators on positions less their rank's offset, which is least squares.
    """
    offsets = gap * np.arange(len(wanted))
    blocks: list[tuple[float, int]] = []
    for value in wanted - offsets:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(n, value) for value, n in blocks] or [wanted]) + offsets


def _quiet_axes(axes: Axes, amplitudes: np.ndarray) -> None:
    axes.set_xticks(amplitudes, [f"{a:g}" for a in amplitudes])
    axes.set_xlabel("misregistration (mm)", fontsize=8, color=QUIET)
    axes.tick_params(labelsize=8, colors=QUIET, length=0, pad=4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.grid(axis="y", color=QUIET, alpha=0.22, lw=0.7)
    axes.set_axisbelow(True)
