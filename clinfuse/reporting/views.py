"""What is shown of a case: its volumes, the slices chosen, and one tile a slice.

Volumes are (d, h, w) in canonical RAS order: d rises to superior, h to anterior, w to right. Slices
are shown in radiological convention: the patient's right is on the left of an axial or coronal
image, anterior on the left of a sagittal one.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from contourpy import contour_generator
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from PIL import Image
from scipy import ndimage

from clinfuse.metrics.calibration import AIR

Volume = Float[np.ndarray, "d h w"]
Picture = Float[np.ndarray, "rows columns"]

CANVAS_MARGIN_MM = 10.0
"""Black around a slice, where its directions are written."""

COLOUR_MAPS: dict[str, Colormap] = {
    "grey": colormaps["gray"],
    "difference": colormaps["inferno"],
    "spread": LinearSegmentedColormap.from_list(
        "spread", ["#000000", "#0d3a4a", "#1b7684", "#55b89d", "#f2f7c4"]
    ),
    "change": LinearSegmentedColormap.from_list(
        "change", ["#a8dcff", "#2f7fd0", "#000000", "#c2571a", "#ffd0a3"]
    ),
}
"""Each begins in black, as air does, and gets steadily brighter; ``change`` is black in its middle
and gets brighter to both ends."""


def _ramp(name: str, *stops: tuple[float, str, float]) -> Colormap:
    return LinearSegmentedColormap.from_list(
        name, [(at, to_rgba(colour, opacity)) for at, colour, opacity in stops]
    )


OVERLAY_MAPS: dict[str, Colormap] = {
    "parts": _ramp(
        "parts",
        (0.0, "#4b1a8c", 0.0),
        (0.12, "#7a2aa8", 0.4),
        (0.35, "#c93a85", 0.7),
        (0.65, "#fb8a5c", 0.9),
        (1.0, "#fcfdbf", 0.95),
    ),
    "probability": _ramp(
        "probability",
        (0.0, "#006d5b", 0.0),
        (0.05, "#006d5b", 0.0),
        (0.15, "#008a73", 0.3),
        (0.5, "#00c2a2", 0.6),
        (1.0, "#b9fff0", 0.75),
    ),
}
"""Colours laid over a grey image: each begins fully transparent and gets denser."""

LESION_LEVEL = 0.5
"""Lesion probability whose contour is drawn."""

MODEL_UNITS = "model units"

_HEAD = AIR + 0.15
"""Smoothed values above this are head."""

_MARGIN_MM = 6.0


@dataclass
class CaseView:
    """What the report shows of one case, in model space [-1, 1] on one grid.

    Attributes:
        case_id: the patient's MRI-CT pair.
        mri: MRI as the method was given it.
        ct: CT as given, perhaps misregistered.
        fused: what the method returned.
        spacing_mm: voxel size in (d, h, w) order.
        reference: the fused volume to aim at, if there is one.
        spread: predictive standard deviation, model units, if there is one.
        epistemic: its part by which models differ, as a standard deviation, if there is one.
        aleatoric: its part by which the noise draws of one model differ, likewise.
        lesion_probability: of a lesion head that read the fused volume, if there is one.
        lesion: lesion mask; chooses the slices and is outlined.
        bone: bone mask; chooses the slices where there is no lesion.
        brain: brain mask.
        caption: a sentence: method, preset, misregistration.
        scores: this case's numbers by name, shown beside the caption.

    Raises:
        ValueError: a volume's shape differs from the MRI's, a value is not finite, or the spacing
            is not three positive numbers.
    """

    case_id: str
    mri: Volume
    ct: Volume
    fused: Volume
    spacing_mm: Sequence[float]
    reference: Volume | None = None
    spread: Volume | None = None
    epistemic: Volume | None = None
    aleatoric: Volume | None = None
    lesion_probability: Volume | None = None
    lesion: Bool[np.ndarray, "d h w"] | None = None
    bone: Bool[np.ndarray, "d h w"] | None = None
    brain: Bool[np.ndarray, "d h w"] | None = None
    caption: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.spacing_mm) != 3 or not all(0 < s < np.inf for s in self.spacing_mm):
            raise ValueError(
                f"{self.case_id}: expected spacing_mm of three positive numbers, "
                f"got {list(self.spacing_mm)}"
            )
        for name, volume in self.volumes().items():
            if volume.ndim != 3 or volume.shape != self.mri.shape:
                raise ValueError(
                    f"{self.case_id}: expected {name} of shape (d, h, w) like the MRI, "
                    f"{self.mri.shape}, got {volume.shape}"
                )
            if not np.isfinite(volume).all():
                raise ValueError(
                    f"{self.case_id}: expected finite values in {name}, got NaN or inf"
                )

    def volumes(self) -> dict[str, Any]:
        """Every array by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class Plane:
    """An anatomical plane: the axis it cuts, and what lies at the picture's four edges."""

    name: str
    axis: int
    left: str
    right: str
    top: str
    bottom: str

    def picture(self, volume: np.ndarray, index: int) -> np.ndarray:
        """Slice ``index`` along the plane's axis, first row on top, as a radiologist expects it.

        Both axes are reversed: array order rises to superior, anterior and right, rows of a
        picture run down and columns away from the patient's right.
        """
        return np.take(volume, index, axis=self.axis)[::-1, ::-1]

    def pixel_mm(self, spacing_mm: Sequence[float]) -> tuple[float, float]:
        """Height and width of a pixel of ``picture``."""
        rows, columns = (float(s) for axis, s in enumerate(spacing_mm) if axis != self.axis)
        return rows, columns


PLANES = (
    Plane("axial", 0, left="R", right="L", top="A", bottom="P"),
    Plane("coronal", 1, left="R", right="L", top="S", bottom="I"),
    Plane("sagittal", 2, left="A", right="P", top="S", bottom="I"),
)


@dataclass(frozen=True)
class Panel:
    """One column of a case: a volume, its colour map and the values at both ends of it.

    Attributes:
        name: the column's heading.
        volume: what is shown.
        colours: one of ``COLOUR_MAPS``, or with ``under`` one of ``OVERLAY_MAPS``.
        low: value of the first colour.
        high: value of the last one.
        unit: of the values.
        under: volume in model space that lies beneath in grey.
        level: value whose contour is drawn.
    """

    name: str
    volume: Volume
    colours: str
    low: float
    high: float
    unit: str = MODEL_UNITS
    under: Volume | None = None
    level: float | None = None


def panels(
    view: CaseView, difference_high: float | None = None, spread_high: float | None = None
) -> list[Panel]:
    """MRI, CT, fused, |fused - reference| and uncertainty: those that the case has.

    The first three share one grey window, all of model space. The other two start at 0; their
    upper ends are ``scale_end`` of the case unless given, so that cases can share a scale.
    """
    columns = [
        Panel("MRI", view.mri, "grey", -1.0, 1.0),
        Panel("CT as given", view.ct, "grey", -1.0, 1.0),
        Panel("Fused", view.fused, "grey", -1.0, 1.0),
    ]
    if view.reference is not None:
        difference = np.abs(view.fused - view.reference)
        high = difference_high or scale_end([difference])
        columns.append(Panel("|Fused - reference|", difference, "difference", 0.0, high))
    if view.spread is not None:
        high = spread_high or scale_end([view.spread])
        columns.append(Panel("Uncertainty (s.d.)", view.spread, "spread", 0.0, high))
    return columns


def overlays(view: CaseView, parts_high: float | None = None) -> list[Panel]:
    """What is laid over the fused image: the parts of the uncertainty, and lesion probability.

    Epistemic and aleatoric share one scale, from 0 to ``parts_scale`` of the case unless given, so
    that they compare.
    """
    high, columns = parts_high or parts_scale([view]) or 1.0, []
    for name, part in (("Epistemic", view.epistemic), ("Aleatoric", view.aleatoric)):
        if part is not None:
            columns.append(
                Panel(f"{name} (s.d.) on fused", part, "parts", 0.0, high, under=view.fused)
            )
    if view.lesion_probability is not None:
        columns.append(
            Panel(
                "Lesion probability on fused",
                view.lesion_probability,
                "probability",
                0.0,
                1.0,
                unit="probability",
                under=view.fused,
                level=LESION_LEVEL,
            )
        )
    return columns


def differences(fused: Mapping[str, Volume]) -> list[Panel]:
    """Each volume less the first, signed, on one scale about 0; names are ``second − first``."""
    first_name, first = next(iter(fused.items()))
    changes = {name: volume - first for name, volume in fused.items() if name != first_name}
    high = scale_end([np.abs(change) for change in changes.values()])
    return [
        Panel(f"{name} − {first_name}", change, "change", -high, high)
        for name, change in changes.items()
    ]


def scale_end(volumes: Sequence[Float[np.ndarray, "_ _ _"]]) -> float:
    """Upper end of a scale that starts at 0: the largest 99.5th percentile, to two digits.

    Percentiles are over the voxels above 0, so that a large empty background does not empty the
    scale; without any the end is 1.
    """
    ends = [float(np.percentile(v[v > 0], 99.5)) for v in volumes if (v > 0).any()]
    return float(f"{max(ends):.2g}") if ends else 1.0


def chosen_slices(view: CaseView) -> tuple[int, int, int]:
    """The (d, h, w) index whose three planes say most about the case.

    With a lesion: through its largest connected part, along each axis the slice where that part's
    area is largest. Otherwise the axial slice with most bone among those with at least 70 % of the
    largest head area (the vertex is all bone and shows no brain), and the coronal and sagittal
    slices through the bone's centre. Without a bone mask, bone is the CT's brightest 5 % in the
    head.
    """
    if view.lesion is not None and view.lesion.any():
        parts, _ = ndimage.label(view.lesion)
        largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        d, h, w = (_middle_of_largest(_areas(largest, axis)) for axis in range(3))
        return d, h, w
    head = _head(view)
    bone = view.bone
    if bone is None or not bone.any():
        bone = head & (view.ct >= np.quantile(view.ct[head], 0.95))
    area = _areas(head, 0)
    d = _middle_of_largest(np.where(area >= 0.7 * area.max(), _areas(bone, 0), -1))
    _, h, w = (round(c) for c in ndimage.center_of_mass(bone))
    return d, h, w


def head_box(view: CaseView) -> tuple[slice, slice, slice]:
    """The part of the grid that holds the head, with 6 mm around it; all of it if unclear."""
    head = _head(view)
    box = []
    for axis, spacing in enumerate(view.spacing_mm):
        areas = _areas(head, axis)
        inside = np.flatnonzero(areas > 0.02 * areas.max())
        margin = round(_MARGIN_MM / spacing)
        box.append(slice(max(int(inside[0]) - margin, 0), int(inside[-1]) + margin + 1))
    return box[0], box[1], box[2]


def cropped(view: CaseView) -> CaseView:
    """The view on ``head_box`` only, so that pictures are filled by anatomy."""
    box = head_box(view)
    return replace(view, **{name: volume[box] for name, volume in view.volumes().items()})


def isotropic(
    picture: Picture, pixel_mm: tuple[float, float], mm_per_pixel: float
) -> Float[np.ndarray, "rows_out columns_out"]:
    """The picture on square pixels, so that millimetres are equal in both directions.

    Cubic interpolation, for display only; values stay within the picture's own range.
    """
    size = [
        max(1, round(n * mm / mm_per_pixel)) for n, mm in zip(picture.shape, pixel_mm, strict=True)
    ]
    image = Image.fromarray(np.ascontiguousarray(picture, dtype=np.float32))
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return resized.clip(picture.min(), picture.max())


def levels(picture: Picture, low: float, high: float) -> UInt8[np.ndarray, "rows columns"]:
    """Values as 0..255 over [low, high], clipped to it."""
    return np.round(255 * np.clip((picture - low) / (high - low), 0, 1)).astype(np.uint8)


def tile(
    panel: Panel, picture: Picture, pixel_mm: tuple[float, float], mm_per_pixel: float
) -> bytes:
    """One slice of a panel as an 8-bit PNG: grey, or with the panel's colours as palette.

    The tile of an overlay is its colours alone, transparent where they are; what lies ``under`` is
    a tile of its own.
    """
    image = Image.fromarray(
        levels(isotropic(picture, pixel_mm, mm_per_pixel), panel.low, panel.high)
    )
    if panel.under is not None:
        colours = overlay_palette(panel.colours)
        image.putpalette(colours[:, :3].tobytes())
        image.info["transparency"] = colours[:, 3].tobytes()
    elif panel.colours != "grey":
        image.putpalette(palette(panel.colours).tobytes())
    return png(image)


def palette(colours: str, size: int = 256) -> UInt8[np.ndarray, "size 3"]:
    """Colours of one of ``COLOUR_MAPS``, evenly spaced from its dark to its bright end."""
    return np.round(255 * COLOUR_MAPS[colours](np.linspace(0, 1, size))[:, :3]).astype(np.uint8)


def overlay_palette(colours: str, size: int = 256) -> UInt8[np.ndarray, "size 4"]:
    """Colours and opacities of one of ``OVERLAY_MAPS``, evenly spaced, clear end first."""
    return np.round(255 * OVERLAY_MAPS[colours](np.linspace(0, 1, size))).astype(np.uint8)


def shared_scales(cases: Sequence[CaseView]) -> tuple[float | None, float | None]:
    """Upper ends of the difference and the spread scale for all cases; None where none has one."""
    differences = [np.abs(c.fused - c.reference) for c in cases if c.reference is not None]
    spreads = [c.spread for c in cases if c.spread is not None]
    return (
        scale_end(differences) if differences else None,
        scale_end(spreads) if spreads else None,
    )


def parts_scale(cases: Sequence[CaseView]) -> float | None:
    """Upper end of the one scale of epistemic and aleatoric parts of all cases, if any has one."""
    parts = [p for c in cases for p in (c.epistemic, c.aleatoric) if p is not None]
    return scale_end(parts) if parts else None


def outlines(
    mask: Bool[np.ndarray, "rows columns"], pixel_mm: tuple[float, float]
) -> list[Float[np.ndarray, "points 2"]]:
    """Closed borders of a picture's mask as (x, y) in mm from the picture's top left corner."""
    return contours(mask.astype(float), 0.5, pixel_mm)


def contours(
    picture: Picture, level: float, pixel_mm: tuple[float, float]
) -> list[Float[np.ndarray, "points 2"]]:
    """Closed borders of where a picture exceeds a positive level, as ``outlines``; 0 around it."""
    padded = np.pad(picture, 1)
    rows_mm, columns_mm = pixel_mm
    borders = contour_generator(z=padded).lines(level)
    return [(np.asarray(border) - 0.5) * (columns_mm, rows_mm) for border in borders]


def png(image: Image.Image) -> bytes:
    """The bytes of a small PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _areas(mask: Bool[np.ndarray, "d h w"], axis: int) -> np.ndarray:
    return mask.sum(axis=tuple(other for other in range(3) if other != axis))


def _middle_of_largest(areas: np.ndarray) -> int:
    """Where areas are largest; the middle one of equals."""
    equals = np.flatnonzero(areas == areas.max())
    return int(equals[len(equals) // 2])


def _head(view: CaseView) -> Bool[np.ndarray, "d h w"]:
    """Where MRI or CT is smoothly above air; everywhere when nothing is."""
    sigma = [2.0 / s for s in view.spacing_mm]
    bright = np.maximum(view.mri, view.ct).astype(np.float32)
    head = ndimage.gaussian_filter(bright, sigma) > _HEAD
    return head if head.any() else np.ones_like(head)
