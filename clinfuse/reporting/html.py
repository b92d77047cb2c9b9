"""One HTML file that shows a run: facts, headline scores, curves, and every case in three planes.

It needs nothing but itself: images are base64 PNG, curves inline SVG, styles inline, no script.
"""

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.figures import (
    ACCENT,
    INK,
    QUIET,
    SERIES,
    figure_svg,
    robustness_figure,
)
from clinfuse.reporting.tables import (
    CONSPICUITY_TEXT,
    amplitudes_mm,
    conspicuity_blocks,
    footnote,
    headline_scores,
    is_conspicuity,
    is_headline,
    plain_cells,
    score_blocks,
)
from clinfuse.reporting.views import (
    CANVAS_MARGIN_MM,
    LESION_LEVEL,
    PLANES,
    CaseView,
    Panel,
    Plane,
    chosen_slices,
    contours,
    cropped,
    differences,
    head_box,
    outlines,
    overlay_palette,
    overlays,
    palette,
    panels,
    parts_scale,
    shared_scales,
    tile,
)

LARGEST_REPORT_BYTES = 6_000_000
"""No report is larger."""

_Contexts = tuple[list[dict[str, Any]], dict[str, Any] | None]
"""What the template shows of the cases, and of presets side by side."""

_TILE_MM = (0.75, 0.95, 1.2, 1.5, 1.9, 2.4, 3.0)
_STACK_MM = 1.2
_MOST_COLUMNS = 6
_TIMES = " \N{MULTIPLICATION SIGN} "
_MOST_STACK_SLICES = 48
_INCH_PX = 105
"""CSS pixels that an inch of a chart may take."""

_COLUMNS_TEXT = "Columns: how far the CT was moved against the MRI."
_SVG_COLOURS = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    ACCENT: "var(--accent)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}


def write_report(
    path: str | os.PathLike[str],
    title: str,
    cases: Sequence[CaseView],
    tables: Mapping[str, pd.DataFrame],
    run_facts: Mapping[str, Any],
    highlight: str | None = None,
    charts: Mapping[str, tuple[Figure, str]] | None = None,
    largest_bytes: int = LARGEST_REPORT_BYTES,
    presets: Mapping[str, CaseView] | None = None,
) -> Path:
    """Write the report of a run as one self-contained HTML file, atomically.

    Pictures become coarser until they fit into ``largest_bytes``; if the coarsest do not, the last
    cases are left out and the report says so. Stacks of all axial slices are then added, case by
    case, while there is room.

    Args:
        path: of the HTML file.
        title: its heading.
        cases: shown in this order, on shared scales of difference and spread.
        tables: by heading; a table of ``headline`` is shown with intervals, and with curves where
            the CT was moved by more than one distance; one of ``conspicuity_table`` by finding.
        run_facts: what is worth knowing about the run (preset, alpha, beta, gamma, data, split,
            seed, versions, commit), by name; values are shown as text.
        highlight: the method that tables and curves set off, usually ours.
        charts: by heading, a figure and the sentence that says how to read it.
        largest_bytes: of the file.
        presets: one patient fused several ways, by name, on one grid, to be shown side by side:
            the same slices in the same window, and how each differs from the first. Captions say
            what was asked for. The scroll through the slices is then theirs alone.

    Returns:
        The path.
    """
    template = Environment(
        loader=PackageLoader("clinfuse.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    page = {
        "title": title,
        "facts": {name: str(value) for name, value in run_facts.items()},
        "tables": [_table_context(name, table, highlight) for name, table in tables.items()],
        "highlight": highlight,
        "charts": {
            name: {
                "svg": Markup(figure_svg(figure, _SVG_COLOURS)),
                "text": text,
                "width_px": round(_INCH_PX * figure.get_figwidth()),
            }
            for name, (figure, text) in (charts or {}).items()
        },
        "number_of_cases": len(cases),
        "lesion_level": LESION_LEVEL,
    }

    def render(contexts: _Contexts) -> str:
        return template.render(**page, cases=contexts[0], presets=contexts[1])

    contexts = _fitting(
        cases, presets or {}, lambda contexts: len(render(contexts).encode()), largest_bytes
    )
    return write_atomically(path, render(contexts))


def _fitting(
    cases: Sequence[CaseView],
    presets: Mapping[str, CaseView],
    size: Callable[[_Contexts], int],
    largest_bytes: int,
) -> _Contexts:
    """Cases and presets as fine as fits, leaving 40 % of the room for stacks, then those."""
    scales, contexts, beside = (*shared_scales(cases), parts_scale(cases)), [], None
    for mm_per_pixel in _TILE_MM:
        contexts = [_case_context(view, scales, mm_per_pixel) for view in cases]
        beside = _presets_context(presets, mm_per_pixel) if presets else None
        if size((contexts, beside)) <= 0.6 * largest_bytes:
            break
    while contexts and size((contexts, beside)) > largest_bytes:
        contexts.pop()
    if beside:
        stack = _stack_context(next(iter(presets.values())), _side_by_side(presets))
        fuller = {**beside, "stack": stack}
        return contexts, fuller if size((contexts, fuller)) <= largest_bytes else beside
    for number, view in enumerate(cases[: len(contexts)]):
        with_stack = list(contexts)
        with_stack[number] = {**contexts[number], "stack": _stack_context(view, panels(view)[:3])}
        if size((with_stack, None)) > largest_bytes:
            break
        contexts = with_stack
    return contexts, None


def _side_by_side(presets: Mapping[str, CaseView]) -> list[Panel]:
    """MRI and CT, then what each preset fused them to, in one grey window."""
    fused = [replace(panels(view)[2], name=name) for name, view in presets.items()]
    return [*panels(next(iter(presets.values())))[:2], *fused]


def _presets_context(presets: Mapping[str, CaseView], mm_per_pixel: float) -> dict[str, Any]:
    """Presets as columns; under each but the first, how it differs from the first."""
    first = next(iter(presets.values()))
    at, box, part = chosen_slices(first), head_box(first), cropped(first)
    parts = {name: replace(part, fused=view.fused[box]) for name, view in presets.items()}
    columns = _side_by_side(parts)
    changes = differences({name: view.fused for name, view in parts.items()})
    scales = [*columns[:3], *changes]
    return {
        "notes": ["", "", *(view.caption for view in presets.values())],
        "columns": [_column_context(panel) for panel in columns],
        "scales": [_column_context(panel) for panel in scales],
        "first": next(iter(presets)),
        "planes": [
            {"fused": fused, "changes": changed}
            for fused, changed in zip(
                _planes_context(first, part, columns, at, box, mm_per_pixel),
                _planes_context(first, part, changes, at, box, mm_per_pixel),
                strict=True,
            )
        ],
        "is_same": not any(panel.volume.any() for panel in changes),
        "stack": None,
    }


def _case_context(
    view: CaseView,
    scales: tuple[float | None, float | None, float | None],
    mm_per_pixel: float,
) -> dict[str, Any]:
    at, box, part = chosen_slices(view), head_box(view), cropped(view)
    columns, over = panels(part, *scales[:2]), overlays(part, scales[2])
    if len(columns) + len(over) <= _MOST_COLUMNS:
        columns, over = [*columns, *over], []
    return {
        "id": view.case_id,
        "caption": view.caption,
        "scores": {name: _score_text(value) for name, value in view.scores.items()},
        "has_lesion": view.lesion is not None and bool(view.lesion.any()),
        "grid_facts": _grid_facts(view),
        "columns": [_column_context(panel) for panel in columns],
        "planes": _planes_context(view, part, columns, at, box, mm_per_pixel),
        "overlays": [_column_context(panel) for panel in over],
        "overlay_planes": _planes_context(view, part, over, at, box, mm_per_pixel),
        "has_parts": view.epistemic is not None or view.aleatoric is not None,
        "has_contour": view.lesion_probability is not None,
        "stack": None,
    }


def _planes_context(
    view: CaseView,
    part: CaseView,
    columns: Sequence[Panel],
    at: Sequence[int],
    box: Sequence[slice],
    mm_per_pixel: float,
) -> list[dict[str, Any]]:
    """A row of tiles for each plane; ``part`` and ``columns`` are the view cropped to ``box``."""
    widest_mm = max(_size_mm(part)[1:])
    return [
        {
            "plane": plane,
            "slice": at[plane.axis] + 1,
            "slices": view.mri.shape[plane.axis],
            "tiles": [
                _tile_context(
                    part,
                    panel,
                    plane,
                    at[plane.axis] - box[plane.axis].start,
                    widest_mm,
                    mm_per_pixel,
                )
                for panel in columns
            ],
        }
        for plane in PLANES
    ]


def _stack_context(view: CaseView, columns: Sequence[Panel]) -> dict[str, Any]:
    """Axial slices of some of its panels from the lowest up, at most 48 evenly spread.

    Browsers that can, open it at the chosen slice, the others at the lowest.
    """
    box, part = head_box(view), cropped(view)
    start = box[0].start
    columns = [replace(panel, volume=panel.volume[box]) for panel in columns]
    depth, axial = len(part.mri), PLANES[0]
    indices = np.unique(np.linspace(0, depth - 1, min(depth, _MOST_STACK_SLICES)).round())
    opening = min(indices, key=lambda index: abs(start + index - chosen_slices(view)[0]))
    _, rows_mm, columns_mm = _size_mm(part)
    return {
        "columns_mm": columns_mm,
        "rows_mm": rows_mm,
        "names": [panel.name for panel in columns],
        "slices": [
            {
                "number": start + index + 1,
                "is_first": index == opening,
                "tiles": [
                    _tile_context(part, panel, axial, index, columns_mm, _STACK_MM)
                    for panel in columns
                ],
            }
            for index in indices.astype(int).tolist()
        ],
    }


def _size_mm(view: CaseView) -> list[float]:
    """Extent of the canvas of its slices along (d, h, w), margins included."""
    return [
        n * mm + 2 * CANVAS_MARGIN_MM for n, mm in zip(view.mri.shape, view.spacing_mm, strict=True)
    ]


def _tile_context(
    view: CaseView,
    panel: Panel,
    plane: Plane,
    index: int,
    widest_mm: float,
    mm_per_pixel: float,
) -> dict[str, Any]:
    """A picture as the template places it: centred on a canvas ``widest_mm`` wide."""
    picture, pixel_mm = plane.picture(panel.volume, index), plane.pixel_mm(view.spacing_mm)
    rows_mm, columns_mm = (float(mm) for mm in np.multiply(picture.shape, pixel_mm))
    content, under = tile(panel, picture, pixel_mm, mm_per_pixel), None
    if panel.under is not None:
        grey = Panel("", panel.under, "grey", -1.0, 1.0)
        under = tile(grey, plane.picture(panel.under, index), pixel_mm, mm_per_pixel)
    return {
        "name": panel.name,
        "source": _png_uri(content),
        "under": None if under is None else _png_uri(under),
        "alt": f"{panel.name}, {plane.name} plane, case {view.case_id}",
        "plane": plane,
        "rows_mm": rows_mm,
        "columns_mm": columns_mm,
        "canvas_mm": (widest_mm, rows_mm + 2 * CANVAS_MARGIN_MM),
        "outline": _outline_path(view, plane, index)
        if panel.colours in ("grey", "probability")
        else "",
        "contour": "" if panel.level is None else _path(contours(picture, panel.level, pixel_mm)),
    }


def _png_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _outline_path(view: CaseView, plane: Plane, index: int) -> str:
    """The lesion's border as an SVG path in mm, empty without a lesion in the slice."""
    if view.lesion is None:
        return ""
    return _path(outlines(plane.picture(view.lesion, index), plane.pixel_mm(view.spacing_mm)))


def _path(borders: Sequence[np.ndarray]) -> str:
    return " ".join(
        "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in border) + "Z" for border in borders
    )


def _column_context(panel: Panel) -> dict[str, Any]:
    in_colours = palette if panel.under is None else overlay_palette
    stops = ["#" + bytes(colour).hex() for colour in in_colours(panel.colours, 17).tolist()]
    return {
        "name": panel.name,
        "unit": panel.unit,
        "gradient": ", ".join(stops),
        "ticks": [f"{v:.3g}" for v in np.linspace(panel.low, panel.high, 3)],
    }


def _grid_facts(view: CaseView) -> str:
    spacing = _TIMES.join(f"{mm:.3g}" for mm in reversed(view.spacing_mm))
    size = _TIMES.join(str(n) for n in reversed(view.mri.shape))
    text = f"{size} voxels of {spacing} mm (R-L, A-P, S-I)"
    if view.lesion is not None:
        volume_ml = float(view.lesion.sum() * np.prod(view.spacing_mm) / 1000)
        text += f", lesion {volume_ml:.1f} ml" if volume_ml else ", no lesion"
    return text


def _score_text(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4g}"


def _table_context(name: str, table: pd.DataFrame, highlight: str | None) -> dict[str, Any]:
    """A table as cards, each a block and perhaps its curves; any other as it stands."""
    if is_conspicuity(table):
        cards = [{"block": block, "curves": []} for block in conspicuity_blocks(table)]
        return {"name": name, "text": f"{CONSPICUITY_TEXT} {_COLUMNS_TEXT}", "cards": cards}
    if not is_headline(table):
        header, body = plain_cells(table)
        return {"name": name, "header": header, "body": body, "cards": None}
    blocks, text = score_blocks(table), footnote(table)
    amplitudes = {a for score in headline_scores(table) for a in amplitudes_mm(table, *score)}
    has_curves, is_set_off = len(amplitudes) > 1, len(table) > 1 and highlight in table.index
    if has_curves:
        text += f" {_COLUMNS_TEXT}"
    if is_set_off:
        lines = "row and the thick line are" if has_curves else "row is"
        text += f" The shaded {lines} {highlight}."
    cards = [
        {
            "block": block,
            "curves": [
                _curves(table, highlight, score, is_named=len(block.scores) > 1)
                for score in block.scores
                if has_curves
            ],
        }
        for block in blocks
    ]
    return {"name": name, "text": text, "cards": cards}


def _curves(
    table: pd.DataFrame, highlight: str | None, score: tuple[str, str], is_named: bool
) -> Markup:
    figure = robustness_figure(table, highlight, [score])
    if not is_named:
        figure.axes[0].set_title("", loc="left")
    return Markup(figure_svg(figure, _SVG_COLOURS))
