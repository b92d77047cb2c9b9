"""One HTML file that shows what became of a cohort's scans, the doubtful cases first.

Like the report of a run it needs nothing but itself. Each picture is stored once: outlines and the
checkerboard are drawn over it by the browser. Panels are made case by case, so that no more than
one case is in memory.
"""

import base64
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from clinfuse.functional.intensity import ct_to_model, looks_like_hu
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.figures import ACCENT, INK, QUIET, figure_svg
from clinfuse.reporting.views import (
    CANVAS_MARGIN_MM,
    PLANES,
    CaseView,
    Panel,
    Picture,
    Plane,
    chosen_slices,
    contours,
    cropped,
    head_box,
    isotropic,
    tile,
)
from clinfuse.roi.masks import BONE_8BIT, BONE_HU, head_mask
from clinfuse.types import ROI_NAMES

VERDICTS = ("fail", "warn", "pass")
"""In the order of the report."""

LARGEST_PANELS_BYTES = 240_000
"""No case has larger panels."""

TABLE_FACTS = (
    "brain",
    "bone",
    "lesion",
    "registration",
    "disagreement",
    "head overlap",
    "moved",
    "turned",
)
"""Facts that are columns of the summary, where any case has them."""

_TILE_MM = (0.8, 1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0)
_UNITS_PER_MM = 10
_DRAWN = ("bone", "brain", "lesion")
_COLOURS = {INK: "var(--ink)", QUIET: "var(--quiet)", ACCENT: "var(--accent)"}


@dataclass(frozen=True)
class PlanePanel:
    """One slice of a case, as the page stores it: strings and numbers alone.

    Attributes:
        plane: axial, coronal or sagittal.
        number: of the slice, from 1.
        slices: along that axis.
        rows_mm, columns_mm: size of the pictures.
        mri: PNG as a data URI.
        ct: likewise; empty where there is no CT.
        ct_edges: borders of what is dense as bone on the CT, an SVG path in tenths of a millimetre.
        outlines: the same of each mask, by ROI.
    """

    plane: str
    number: int
    slices: int
    rows_mm: float
    columns_mm: float
    mri: str
    ct: str
    ct_edges: str
    outlines: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        """Of what takes room."""
        texts = (self.mri, self.ct, self.ct_edges, *self.outlines.values())
        return sum(len(text) for text in texts)


@dataclass(frozen=True)
class PreparedCase:
    """What the report shows of one case.

    Attributes:
        case_id: the only name of the patient that is shown.
        verdict: one of ``VERDICTS``.
        reasons: a sentence for every doubt.
        facts: by name.
        panels: of ``panels_of``; None for a case of which nothing could be read.
        histograms: counts and edges, by image and unit.
        notes: sentences on what was mended.

    Raises:
        ValueError: for another verdict.
    """

    case_id: str
    verdict: str
    reasons: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    panels: Sequence[PlanePanel] | None = None
    histograms: Mapping[str, tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n_plus_1"]]] = field(
        default_factory=dict
    )
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.case_id}: expected one of {VERDICTS}, got {self.verdict!r}")


def write_cohort_report(
    path: str | os.PathLike[str],
    title: str,
    cases: Sequence[PreparedCase],
    facts: Mapping[str, Any],
    columns: Sequence[str] = TABLE_FACTS,
) -> Path:
    """Write the quality of a cohort as one self-contained HTML file, atomically.

    Args:
        path: of the file.
        title: its heading.
        cases: shown as fail, warn, pass, and then by name.
        facts: what is worth knowing of the preparation; values are shown as text.
        columns: facts of the cases that the summary has columns for.

    Returns:
        The path.
    """
    environment = Environment(
        loader=PackageLoader("clinfuse.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    common = _common(cases, columns)
    ordered = sorted(cases, key=lambda case: (VERDICTS.index(case.verdict), case.case_id))
    counts = Counter(case.verdict for case in cases)
    page = environment.get_template("cohort.html.jinja").render(
        title=title,
        facts={name: str(value) for name, value in facts.items()},
        counts={verdict: counts[verdict] for verdict in VERDICTS},
        columns=[
            name
            for name in columns
            if name not in common and any(name in case.facts for case in cases)
        ],
        common=common,
        cases=[_case_context(case) for case in ordered],
        margin_mm=CANVAS_MARGIN_MM,
        units_per_mm=_UNITS_PER_MM,
    )
    return write_atomically(path, page)


def panels_of(
    volumes: Mapping[str, Float[np.ndarray, "_ _ _"] | Bool[np.ndarray, "_ _ _"]],
    spacing_mm: Sequence[float | int],
    largest_bytes: int = LARGEST_PANELS_BYTES,
) -> tuple[PlanePanel, ...]:
    """An axial, a coronal and a sagittal slice of a study, as fine as fits into ``largest_bytes``.

    The axial one goes through the lesion where there is one, otherwise where the brain is largest;
    the others through the middle of the skull, where a wrong registration shows.

    Args:
        volumes: ``mri``, and as far as there are ``ct``, ``brain_mask``, ``bone_mask`` and
            ``lesion_mask``; d from inferior to superior, h to anterior, w to the right.
        spacing_mm: voxel size (d, h, w).
        largest_bytes: of all three.

    Raises:
        ValueError: volumes of different shapes, or not finite.
    """
    for name, volume in volumes.items():
        if volume.shape != volumes["mri"].shape:
            raise ValueError(
                f"expected {name} of shape (d, h, w) = {volumes['mri'].shape} like the MRI, "
                f"got {volume.shape}"
            )
    shown = _Shown.of(volumes, spacing_mm)
    panels: tuple[PlanePanel, ...] = ()
    for mm_per_pixel in _TILE_MM:
        panels = tuple(_plane_panel(shown, plane, mm_per_pixel) for plane in PLANES)
        if sum(panel.size_bytes for panel in panels) <= largest_bytes:
            break
    return panels


@dataclass(frozen=True)
class _Shown:
    """A study cut to its head, in model space, and where the cut began.

    ``dense`` is the CT in its own units and the value from which it is bone.
    """

    view: CaseView
    masks: Mapping[str, Bool[np.ndarray, "d h w"]]
    dense: tuple[Float[np.ndarray, "d h w"], float] | None
    at: tuple[int, ...]
    start: tuple[int, ...]
    slices: tuple[int, ...]

    @classmethod
    def of(cls, volumes: Mapping[str, np.ndarray], spacing_mm: Sequence[float | int]) -> "_Shown":
        masks = {
            name: volumes[f"{name}_mask"] > 0.5 for name in ROI_NAMES if f"{name}_mask" in volumes
        }
        mri, ct = volumes["mri"].astype(np.float32), volumes.get("ct")
        mri_model = _mri_in_model_space(mri)
        view = CaseView(
            "study",
            mri_model,
            mri_model if ct is None else _ct_in_model_space(ct.astype(np.float32)),
            mri_model,
            spacing_mm,
            lesion=masks.get("lesion"),
            bone=masks.get("bone"),
        )
        box = head_box(view)
        return cls(
            view=cropped(view),
            masks={name: mask[box] for name, mask in masks.items()},
            dense=None if ct is None else _dense(ct.astype(np.float32)[box]),
            at=_slices(view, masks.get("brain")),
            start=tuple(part.start for part in box),
            slices=mri.shape,
        )


def _slices(view: CaseView, brain: Bool[np.ndarray, "d h w"] | None) -> tuple[int, int, int]:
    """Axial through the lesion or else where the brain is largest; the others through the skull."""
    d, h, w = chosen_slices(replace(view, lesion=None))
    if view.lesion is not None and view.lesion.any():
        d = chosen_slices(view)[0]
    elif brain is not None and brain.any():
        d = int(brain.sum(axis=(1, 2)).argmax())
    return d, h, w


def _dense(ct: Float[np.ndarray, "d h w"]) -> tuple[Float[np.ndarray, "d h w"], float]:
    """The CT without table and head rest, and the value above which it is bone."""
    in_head = np.where(head_mask(np.maximum(ct, -1000)), ct, min(ct.min(), 0))
    return in_head, BONE_HU if ct.min() < -200 else BONE_8BIT


def _plane_panel(shown: _Shown, plane: Plane, mm_per_pixel: float) -> PlanePanel:
    number = shown.at[plane.axis]
    index, pixel_mm = number - shown.start[plane.axis], plane.pixel_mm(shown.view.spacing_mm)

    def uri(volume: Float[np.ndarray, "d h w"]) -> str:
        panel = Panel(plane.name, volume, "grey", -1.0, 1.0)
        content = tile(panel, plane.picture(volume, index), pixel_mm, mm_per_pixel)
        return "data:image/png;base64," + base64.b64encode(content).decode()

    def borders(volume: np.ndarray, level: float) -> str:
        picture = plane.picture(volume, index).astype(np.float32)
        return _border_path(picture, level, pixel_mm, mm_per_pixel)

    picture = plane.picture(shown.view.mri, index)
    rows_mm, columns_mm = (float(mm) for mm in np.multiply(picture.shape, pixel_mm))
    return PlanePanel(
        plane=plane.name,
        number=number + 1,
        slices=shown.slices[plane.axis],
        rows_mm=rows_mm,
        columns_mm=columns_mm,
        mri=uri(shown.view.mri),
        ct="" if shown.dense is None else uri(shown.view.ct),
        ct_edges="" if shown.dense is None else borders(*shown.dense),
        outlines={name: borders(mask, 0.5) for name, mask in shown.masks.items()},
    )


def _border_path(
    picture: Picture, level: float, pixel_mm: tuple[float, float], mm_per_pixel: float
) -> str:
    """Where a picture exceeds ``level``, as an SVG path of whole ``_UNITS_PER_MM``."""
    fine = isotropic(picture, pixel_mm, mm_per_pixel)
    rows_mm, columns_mm = np.multiply(picture.shape, pixel_mm)
    fine_mm = (float(rows_mm / fine.shape[0]), float(columns_mm / fine.shape[1]))
    path = []
    for border in contours(fine, level, fine_mm):
        points = np.round(_UNITS_PER_MM * border).astype(int)
        steps = np.diff(points, axis=0)
        steps = steps[steps.any(axis=1)]
        moves = " ".join(f"{x} {y}" for x, y in steps.tolist())
        if moves:
            path.append(f"M{points[0, 0]} {points[0, 1]}l{moves}z")
    return "".join(path)


def _mri_in_model_space(mri: Float[np.ndarray, "d h w"]) -> Float[np.ndarray, "d h w"]:
    """For display: from the 0.5th to the 99.5th percentile of the head, else of everything."""
    head = head_mask(mri) if mri.max() > mri.min() else np.ones(mri.shape, bool)
    low, high = np.percentile(mri[head] if head.any() else mri, (0.5, 99.5))
    scale = 2 / (high - low) if high > low else 1.0
    return np.clip((mri - low) * scale - 1, -1, 1).astype(np.float32)


def _ct_in_model_space(ct: Float[np.ndarray, "d h w"]) -> Float[np.ndarray, "d h w"]:
    values = torch.from_numpy(np.ascontiguousarray(ct))
    return ct_to_model(values, "piecewise" if looks_like_hu(values) else "window_8bit").numpy()


def _common(cases: Sequence[PreparedCase], columns: Sequence[str]) -> dict[str, str]:
    """What is the same in every case and so said once: facts by name, and reasons by themselves."""
    if len(cases) < 2:
        return {}
    first, *others = cases
    facts = {
        name: first.facts[name]
        for name in columns
        if name in first.facts and all(case.facts.get(name) == first.facts[name] for case in others)
    }
    reasons = [r for r in first.reasons if all(r in case.reasons for case in others)]
    return facts | dict.fromkeys(reasons, "")


def _case_context(case: PreparedCase) -> dict[str, Any]:
    return {
        "id": case.case_id,
        "verdict": case.verdict,
        "reasons": list(case.reasons),
        "notes": list(case.notes),
        "facts": dict(case.facts),
        "panels": [
            {"panel": panel, "plane": plane}
            for panel in case.panels or ()
            for plane in PLANES
            if plane.name == panel.plane
        ],
        "widest_mm": max((panel.columns_mm for panel in case.panels or ()), default=0.0),
        "has_ct": any(panel.ct for panel in case.panels or ()),
        "outlined": [
            name for name in _DRAWN if any(panel.outlines.get(name) for panel in case.panels or ())
        ],
        "histograms": Markup(figure_svg(_histogram_figure(case.histograms), _COLOURS))
        if case.histograms
        else None,
    }


def _histogram_figure(
    histograms: Mapping[str, tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n_plus_1"]]],
) -> Figure:
    """One small panel each, voxels on a logarithmic scale: bone is rare."""
    figure = Figure(figsize=(3.4 * len(histograms), 1.75), layout="constrained")
    for (name, (counts, edges)), axes in zip(
        histograms.items(), figure.subplots(1, len(histograms), squeeze=False)[0], strict=True
    ):
        axes.stairs(np.maximum(counts, 0.5), edges, fill=True, color=ACCENT, alpha=0.75)
        axes.set(yscale="log", ylim=(0.5, None), xlim=(edges[0], edges[-1]))
        axes.set_title(name, loc="left", fontsize=8.5, color=INK, pad=5)
        axes.tick_params(which="both", labelsize=7.5, colors=QUIET, length=0, pad=3)
        axes.minorticks_off()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(QUIET)
        axes.grid(axis="y", color=QUIET, alpha=0.22, lw=0.7)
        axes.set_axisbelow(True)
    return figure
