"""Any volumes of a case side by side in anatomical planes: the figure of the notebooks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clinfuse.reporting.figures import INK, QUIET, draw_scale, draw_tile
from clinfuse.reporting.views import (
    CANVAS_MARGIN_MM,
    COLOUR_MAPS,
    PLANES,
    CaseView,
    Panel,
    Plane,
    chosen_slices,
    head_box,
    outlines,
)

BORDER_COLOURS = {
    "brain": "#56b4e9",
    "bone": "#2fbf8f",
    "lesion": "#ffb000",
    "findings": "#ff6fb5",
}
"""Of what is outlined, by its name; any other name is white."""


def slices_figure(
    view: CaseView,
    panels: Sequence[Panel],
    borders: Mapping[str, Bool[np.ndarray, "d h w"]] | None = None,
    planes: Sequence[Plane] = PLANES,
    at: Sequence[int] | None = None,
    width_in: float = 2.3,
) -> Figure:
    """Planes (rows) by volumes (columns), in radiological convention, at one scale in millimetres.

    Below each column is its colour bar with its unit. The first picture of a row says which slice
    it is and has a bar of 50 mm.

    Args:
        view: the case, whose head is cut out and whose slices are chosen.
        panels: volumes on the grid of the case.
        borders: masks that are outlined on the grey columns, by name.
        planes: of ``PLANES``.
        at: (d, h, w) index of the slices; None for ``chosen_slices``.
        width_in: of a column, in inches.

    Raises:
        ValueError: a volume or a mask that is not on the grid of the case.
    """
    for name, volume in [*((p.name, p.volume) for p in panels), *(borders or {}).items()]:
        if volume.shape != view.mri.shape:
            raise ValueError(
                f"{view.case_id}: expected {name} on the grid of the case, {view.mri.shape}, "
                f"got {volume.shape}"
            )
    at, box = chosen_slices(view) if at is None else at, head_box(view)
    panels = [replace(panel, volume=panel.volume[box]) for panel in panels]
    masks = {name: mask[box] for name, mask in (borders or {}).items()}
    shape_mm = np.multiply(panels[0].volume.shape, view.spacing_mm) + 2 * CANVAS_MARGIN_MM
    sizes_mm = [[mm for axis, mm in enumerate(shape_mm) if axis != p.axis] for p in planes]
    rows_mm, widest_mm = [size[0] for size in sizes_mm], max(size[1] for size in sizes_mm)
    tiles_in = sum(rows_mm) / widest_mm * width_in
    below_in = 0.55 + 0.25 * bool(masks)
    figure = Figure(figsize=(width_in * len(panels), tiles_in + 0.3 + below_in), facecolor="white")
    grid = figure.subplots(
        len(planes),
        len(panels),
        squeeze=False,
        gridspec_kw={"height_ratios": rows_mm, "wspace": 0.02, "hspace": 0.02},
    )
    total_in = tiles_in + 0.3 + below_in
    figure.subplots_adjust(0.005, below_in / total_in, 0.995, 1 - 0.3 / total_in)
    for plane, line in zip(planes, grid, strict=True):
        index = at[plane.axis] - box[plane.axis].start
        for panel, axes in zip(panels, line, strict=True):
            draw_tile(axes, panel, plane, index, view.spacing_mm, widest_mm)
            if panel.colours == "grey":
                _draw_borders(axes, masks, plane, index, view.spacing_mm)
        draw_scale(line[0], f"{plane.name} {at[plane.axis] + 1}")
    for panel, top, bottom in zip(panels, grid[0], grid[-1], strict=True):
        top.set_title(panel.name, fontsize=9, pad=4, color=INK)
        _draw_bar(bottom, panel, bottom_in=rows_mm[-1] / widest_mm * width_in)
    if masks:
        lines = [Line2D([], [], color=_colour(name), lw=2, label=name) for name in masks]
        figure.legend(
            handles=lines, loc="lower left", ncols=len(lines), fontsize=8, frameon=True,
            facecolor="#3a4146", edgecolor="none", labelcolor="white", borderpad=0.4,
        )  # fmt: skip
    return figure


def slices_through(mask: Bool[np.ndarray, "d h w"]) -> tuple[int, int, int]:
    """The (d, h, w) index of the three planes in which most of a mask lies; the middle if empty."""
    areas = [mask.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    d, h, w = (int(a.argmax()) if a.any() else len(a) // 2 for a in areas)
    return d, h, w


def _draw_borders(
    axes: Axes,
    masks: Mapping[str, Bool[np.ndarray, "d h w"]],
    plane: Plane,
    index: int,
    spacing_mm: Sequence[float],
) -> None:
    for name, mask in masks.items():
        for border in outlines(plane.picture(mask, index), plane.pixel_mm(spacing_mm)):
            axes.plot(*border.T, color=_colour(name), lw=0.9)


def _draw_bar(axes: Axes, panel: Panel, bottom_in: float) -> None:
    bar = axes.inset_axes((0.08, -0.17 / bottom_in, 0.84, 0.08 / bottom_in))
    ramp, middle = np.linspace(0, 1, 256)[None], (panel.low + panel.high) / 2
    bar.imshow(
        ramp, cmap=COLOUR_MAPS[panel.colours], aspect="auto", extent=(panel.low, panel.high, 0, 1)
    )
    bar.set(yticks=[], xticks=[panel.low, middle, panel.high])
    bar.xaxis.set_major_formatter("{x:g}")
    bar.tick_params(labelsize=7, length=2, pad=1.5, colors=QUIET)
    bar.set_xlabel(panel.unit, fontsize=7, color=QUIET, labelpad=1)
    bar.spines[:].set_visible(False)


def _colour(name: str) -> str:
    return BORDER_COLOURS.get(name, "#ffffff")
