"""Whether a prepared study can be used: a verdict, a sentence for every doubt, and the numbers.

What reading, registration and masks say of themselves is gathered here, beside checks on the images
themselves. A limit that is a choice says so; none of them replaces a look at the pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float, Int

from clinfuse.functional.intensity import looks_like_hu
from clinfuse.preparation.grids import volume_ml
from clinfuse.preparation.registration import Registration
from clinfuse.preparation.scan import Scan
from clinfuse.roi.masks import head_mask
from clinfuse.types import ROI_NAMES

Verdict = Literal["pass", "warn", "fail"]

VERDICTS: tuple[Verdict, ...] = ("fail", "warn", "pass")
"""Worst first."""

VOXEL_MM = (0.2, 8.0)
"""Head scans have voxels between: smaller ones come of a wrong header or of upsampling."""

ANISOTROPY = 15.0
"""Longest by shortest side of a voxel; slices of 5 mm with pixels of 0.4 mm come to 12."""

EMPTY_SLICES = (0.1, 0.5)
"""Share of the slices with a head in one image that may be empty in the other."""

CUT_HEAD_CM2 = 15.0
"""Of a head on the border of its field of view: a nose or an ear is less, a missing vertex more."""

CUT_BRAIN_CM2 = 20.0
"""Of a brain on the lowest slice: what is inside the foramen magnum is less."""

UNSEEN_HEAD = 0.1
"""Share of the MRI's head that may lie outside the CT's field of view."""

BRAIN_OUTSIDE = (0.05, 0.25)
"""Share of the brain mask that may lie outside the head as the MRI shows it."""

BONE_IN_BRAIN = (0.05, 0.25)
"""Share of the bone mask that may lie inside the brain mask, as where the two do not register."""

BONE_MEDIAN = {"HU": (200.0, 100.0), "8-bit window": (200.0, 120.0)}
"""CT that at least half of the bone mask must exceed, or it is doubtful, or wrong."""

BRAIN_MEDIAN_HU = (-10.0, 80.0)
"""CSF is near 0 HU, grey matter near 40; the median of a brain lies between with room to spare."""

HISTOGRAM_BINS = 100
AIR_HU = -1000.0
COARSE_MM = 2.0
"""Whether a field of view cuts a head is looked at on voxels of about this size."""

_TITLES = {"mri": "MRI", "ct": "CT"}

_Found = list[tuple[Verdict | None, str]]
"""Sentences, and what they would do to the verdict; None where they do not hold."""


class Histogram(NamedTuple):
    """How often values lie between edges; those beyond the ends count in the first and last."""

    counts: Int[np.ndarray, " n"]
    edges: Float[np.ndarray, " n_plus_1"]


@dataclass(frozen=True)
class Quality:
    """What there is to say of one study; no number in it is NaN.

    Attributes:
        verdict: the worst of all findings.
        reasons: a sentence for each finding, the worst first; none for a pass.
        facts: numbers and names as text, by what they are.
        notes: what reading found and mended; not held against the study.
        histograms: by image and unit, inside the head as the MRI shows it.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    facts: dict[str, str]
    notes: tuple[str, ...] = ()
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Strings, lists and numbers alone."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "histograms": {
                name: {"counts": counts.tolist(), "edges": edges.tolist()}
                for name, (counts, edges) in self.histograms.items()
            },
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Quality":
        """The inverse of ``as_json``."""
        return cls(
            verdict=said["verdict"],
            reasons=tuple(said["reasons"]),
            facts=dict(said["facts"]),
            notes=tuple(said["notes"]),
            histograms={
                name: Histogram(np.array(h["counts"], np.int64), np.array(h["edges"], float))
                for name, h in said["histograms"].items()
            },
        )


def quality(
    mri: sitk.Image,
    ct: sitk.Image | None,
    masks: Mapping[str, sitk.Image],
    scans: Mapping[str, Scan],
    notes: Sequence[str] = (),
    registration: Registration | None = None,
    plausibility: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
) -> Quality:
    """Verdict, reasons and facts of a study.

    Args:
        mri: of the study.
        ct: of the study, registered; None where a cohort has none.
        masks: of the study, ``brain_mask``, ``bone_mask`` and ``lesion_mask``, as far as there are.
        scans: as they were read: ``mri``, ``ct`` where there is one, and whatever else.
        notes: of reading.
        registration: of the CT; None says that CT and MRI lie in one frame.
        plausibility: sentences on the masks; each is a warning.
        sources: for each mask, where it is from.

    Raises:
        ValueError: images that are not on one grid, or not finite.
    """
    for name, image in {"mri": mri, "ct": ct, **masks}.items():
        if image is not None:
            _check(name, image, mri)
    study = _study(mri, ct, masks)
    titled = {_TITLES.get(name, name): scan.image for name, scan in scans.items()}
    facts = {name: _grid_text(image) for name, image in titled.items()}
    facts |= {"study": _grid_text(mri), **_mask_facts(masks, sources or {})}
    found = [*_scan_findings(titled), *_mri_findings(study)]
    found += [("warn", sentence) for sentence in plausibility]
    way = sitk.Transform(3, sitk.sitkIdentity)
    if registration is not None:
        way = registration.transform
        found += registration.quality.findings()
        facts |= _registration_facts(registration.facts())
    if ct is not None:
        found += _ct_findings(study)
        ct_scan = scans["ct"].image
        unseen = _unseen(study.mri_head, mri, ct_scan, way)
        found.append(
            (
                _warn(unseen > UNSEEN_HEAD),
                f"{unseen:.0%} of the MRI's head lies outside the CT's field of view",
            )
        )
        facts["MRI's head unseen by CT"] = f"{unseen:.1%}"
        facts["CT's head unseen by MRI"] = f"{_unseen_by_grid(ct_scan, mri, way):.1%}"
    held = sorted(
        ((verdict, sentence) for verdict, sentence in found if verdict not in (None, "pass")),
        key=lambda finding: VERDICTS.index(finding[0]),
    )
    return Quality(
        verdict=held[0][0] if held else "pass",
        reasons=tuple(dict.fromkeys(sentence for _, sentence in held)),
        facts=facts | _intensity_facts(study),
        notes=tuple(notes),
        histograms=_histograms(study),
    )


@dataclass(frozen=True)
class _Study:
    """A study as arrays, d from inferior to superior."""

    mri: Float[np.ndarray, "d h w"]
    mri_head: Bool[np.ndarray, "d h w"]
    ct: Float[np.ndarray, "d h w"] | None
    ct_head: Bool[np.ndarray, "d h w"] | None
    masks: Mapping[str, Bool[np.ndarray, "d h w"]]
    spacing_mm: tuple[float, ...]

    @property
    def head(self) -> Bool[np.ndarray, "d h w"]:
        """Where values of MRI and CT are looked at."""
        return self.mri_head if self.mri_head.any() else np.ones_like(self.mri_head)

    @property
    def ct_units(self) -> str:
        """HU, 8-bit window, or unknown."""
        assert self.ct is not None
        if looks_like_hu(torch.from_numpy(self.ct)):
            return "HU"
        return "8-bit window" if self.ct.min() > -0.5 and self.ct.max() < 255.5 else "unknown"


def _study(mri: sitk.Image, ct: sitk.Image | None, masks: Mapping[str, sitk.Image]) -> _Study:
    mri_array, ct_array = _array(mri), None if ct is None else _array(ct)
    return _Study(
        mri=mri_array,
        mri_head=_head(mri_array),
        ct=ct_array,
        ct_head=None if ct_array is None else _head(ct_array),
        masks={name: _array(mask) > 0.5 for name, mask in masks.items()},
        spacing_mm=sitk.DICOMOrient(mri, "RAS").GetSpacing()[::-1],
    )


def _scan_findings(scans: Mapping[str, sitk.Image]) -> _Found:
    """What is odd about the grids of the scans, and where they cut the head."""
    found: _Found = []
    for name, image in scans.items():
        sizes, (low, high) = image.GetSpacing(), VOXEL_MM
        ratio = max(sizes) / min(sizes)
        found += [
            (
                _warn(min(sizes) < low or max(sizes) > high),
                f"voxels of the {name} are {_times(sizes)} mm, expected {low:g} to {high:g} mm",
            ),
            (
                _warn(ratio > ANISOTROPY),
                f"voxels of the {name} are {ratio:.0f} times as long as wide, expected up to "
                f"{ANISOTROPY:g}",
            ),
        ]
        if name in _TITLES.values():
            found += _cut_findings(name, image)
    return found


def _cut_findings(name: str, image: sitk.Image) -> _Found:
    """The borders, but for the lowest, at which a field of view ends before the head does."""
    coarse = _coarse(image)
    head, (w, h, d) = _head(_array(coarse)), coarse.GetSpacing()
    borders = {
        "top": (head[-1], h * w),
        "front": (head[:, -1], d * w),
        "back": (head[:, 0], d * w),
        "patient's right": (head[..., -1], d * h),
        "patient's left": (head[..., 0], d * h),
    }
    cut_cm2 = {border: int(plane.sum()) * mm2 / 100 for border, (plane, mm2) in borders.items()}
    return [
        (
            _warn(cm2 > CUT_HEAD_CM2),
            f"the field of view of the {name} cuts the head at the {border}, over {cm2:.0f} cm²",
        )
        for border, cm2 in cut_cm2.items()
    ]


def _mri_findings(study: _Study) -> _Found:
    if not study.mri_head.any():
        return [("fail", "no head was found in the MRI")]
    if (brain := study.masks.get("brain_mask")) is None:
        return []
    _, h, w = study.spacing_mm
    cut_cm2 = int(brain[0].sum()) * h * w / 100
    bone = study.masks.get("bone_mask", np.zeros_like(brain))
    in_brain = _share(bone & brain, bone)
    outside = _share(brain & ~study.mri_head, brain)
    return [
        (
            _warn(cut_cm2 > CUT_BRAIN_CM2),
            f"the lowest slice cuts the brain, over {cut_cm2:.0f} cm²",
        ),
        (
            _above(outside, BRAIN_OUTSIDE),
            f"{outside:.0%} of the brain mask lies outside the head in the MRI",
        ),
        (
            _above(in_brain, BONE_IN_BRAIN),
            f"{in_brain:.0%} of the bone mask lies inside the brain mask",
        ),
    ]


def _ct_findings(study: _Study) -> _Found:
    assert study.ct is not None and study.ct_head is not None
    found: _Found = [] if study.ct_head.any() else [("fail", "no head was found in the CT")]
    with_head = (study.mri_head | study.ct_head).any(axis=(1, 2))
    for name, array in (("MRI", study.mri), ("CT", study.ct)):
        empty = (array.max(axis=(1, 2)) == array.min(axis=(1, 2))) & with_head
        found.append(
            (
                _above(_share(empty, with_head), EMPTY_SLICES),
                f"the {name} is empty in {empty.sum()} of the {with_head.sum()} axial slices that "
                "show the head",
            )
        )
    return found + _unit_findings(study)


def _unit_findings(study: _Study) -> _Found:
    """Whether CT values are what they should be, as a whole, in the brain and in bone."""
    assert study.ct is not None
    ct, units = study.ct, study.ct_units
    values = f"{ct.min():.4g} to {ct.max():.4g}"
    if units == "unknown":
        return [
            (
                "fail",
                "expected CT in HU (air below -200) or in an 8-bit window (0 to 255), got "
                + values,
            )
        ]
    found: _Found = [
        (
            _warn(units != "HU"),
            f"the CT is in an 8-bit window ({values}), not in HU: bone is saturated",
        )
    ]
    if (bone := study.masks.get("bone_mask")) is not None and bone.any():
        median = float(np.median(ct[bone]))
        found.append(
            (
                _below(median, BONE_MEDIAN[units]),
                f"the bone mask is not bright on the CT: its median is {median:.0f} "
                f"{'HU' if units == 'HU' else 'of 255'}, expected above {BONE_MEDIAN[units][0]:g}",
            )
        )
    brain = study.masks.get("brain_mask")
    if units == "HU" and brain is not None and brain.any():
        median, (low, high) = float(np.median(ct[brain])), BRAIN_MEDIAN_HU
        found.append(
            (
                _warn(not low <= median <= high),
                f"the median of the CT in the brain mask is {median:.0f} HU, expected {low:g} to "
                f"{high:g}",
            )
        )
    return found


def _unseen(
    head: Bool[np.ndarray, "d h w"], grid: sitk.Image, scan: sitk.Image, way: sitk.Transform
) -> float:
    """Share of a head on ``grid`` to which ``way`` gives no voxel of ``scan``."""
    view = sitk.Resample(_ones(scan), grid, way, sitk.sitkNearestNeighbor, 0)
    return _share(head & (_array(view) == 0), head)


def _unseen_by_grid(scan: sitk.Image, grid: sitk.Image, way: sitk.Transform) -> float:
    """Share of the head in ``scan`` that lies outside ``grid``.

    Counted in the frame of the grid, on a lattice wide enough for all of the scan, since ``way``,
    from the grid to the scan, may have no inverse.
    """
    coarse = _coarse(scan)
    mask = sitk.GetImageFromArray(_head(_array(coarse)).astype(np.uint8))
    mask.CopyInformation(coarse)
    reach_mm = float(np.linalg.norm(np.multiply(scan.GetSize(), scan.GetSpacing())))
    n = 128
    middle = grid.TransformContinuousIndexToPhysicalPoint([(k - 1) / 2 for k in grid.GetSize()])
    lattice = sitk.Image([n] * 3, sitk.sitkUInt8)
    lattice.SetSpacing([2 * reach_mm / n] * 3)
    lattice.SetOrigin([centre - reach_mm * (n - 1) / n for centre in middle])
    still = sitk.Transform(3, sitk.sitkIdentity)
    head, view = (
        sitk.GetArrayFromImage(sitk.Resample(image, lattice, motion, sitk.sitkNearestNeighbor, 0))
        for image, motion in ((mask, way), (_ones(grid), still))
    )
    return _share((head > 0) & (view == 0), head > 0)


def _mask_facts(masks: Mapping[str, sitk.Image], sources: Mapping[str, str]) -> dict[str, str]:
    facts = {}
    for name in ROI_NAMES:
        mask = masks.get(f"{name}_mask")
        facts[name] = "no mask" if mask is None else f"{volume_ml(mask):.4g} ml"
        if f"{name}_mask" in sources:
            facts[f"{name} mask from"] = sources[f"{name}_mask"]
    return facts


def _registration_facts(facts: Mapping[str, str | float]) -> dict[str, str]:
    """As text, a unit at the end of a name behind the number; verdict and reasons are elsewhere."""
    text = {}
    for name, value in facts.items():
        if name in ("verdict", "reasons", "is_given"):
            continue
        plain, _, unit = name.rpartition("_")
        if unit not in ("mm", "deg"):
            plain, unit = name, ""
        said = value if isinstance(value, str) else f"{value:.3g}" if math.isfinite(value) else "–"
        text[plain.replace("_", " ")] = f"{said} {unit}".strip()
    return text


def _intensity_facts(study: _Study) -> dict[str, str]:
    """Of the head as the MRI shows it."""
    facts = {"MRI, 1st to 99th percentile": _percentiles(study.mri[study.head])}
    if study.ct is not None:
        facts[f"CT ({study.ct_units}), 1st to 99th percentile"] = _percentiles(study.ct[study.head])
    return facts


def _percentiles(values: Float[np.ndarray, " n"]) -> str:
    low, middle, high = np.percentile(values, (1, 50, 99))
    return f"{low:.4g} to {high:.4g}, median {middle:.4g}"


def _histograms(study: _Study) -> dict[str, Histogram]:
    """Of the MRI up to its 99.5th percentile; of CT in steps of 25 HU, or 4 of 255."""
    values = study.mri[study.head]
    low, high = (float(value) for value in np.percentile(values, (0, 99.5)))
    step = (high - low) / HISTOGRAM_BINS or 1.0
    if (values == np.round(values)).all():  # else some bins would hold more integers than others
        step = float(math.ceil(step))
    histograms = {"MRI (scanner units)": _histogram(values, low, high, step)}
    if study.ct is not None:
        low, high, step = (0.0, 255.0, 4.0) if study.ct_units != "HU" else (-1000.0, 2000.0, 25.0)
        if study.ct_units == "unknown":
            low, high = float(study.ct.min()), float(study.ct.max())
            step = (high - low) / HISTOGRAM_BINS or 1.0
        histograms[f"CT ({study.ct_units})"] = _histogram(study.ct[study.head], low, high, step)
    return histograms


def _histogram(values: Float[np.ndarray, " n"], low: float, high: float, step: float) -> Histogram:
    """Bins centred on ``low``, ``low`` + ``step`` and so on up to ``high``."""
    bins = round((high - low) / step) + 1
    edges = low + step * (np.arange(bins + 1) - 0.5)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(counts, edges)


def _array(image: sitk.Image) -> Float[np.ndarray, "d h w"]:
    """Values in canonical order."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(image, "RAS")).astype(np.float32)


def _head(array: Float[np.ndarray, "d h w"]) -> Bool[np.ndarray, "d h w"]:
    """The head, whatever a CT has for padding below air."""
    if array.min() == array.max():
        return np.zeros(array.shape, bool)
    return head_mask(np.maximum(array, AIR_HU))


def _coarse(image: sitk.Image) -> sitk.Image:
    """The image in canonical order, averaged over blocks of voxels up to ``COARSE_MM``."""
    image = sitk.DICOMOrient(image, "RAS")
    factors = [max(math.floor(COARSE_MM / mm), 1) for mm in image.GetSpacing()]
    return sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), factors)


def _ones(image: sitk.Image) -> sitk.Image:
    ones = sitk.Image(image.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(image)
    return ones


def _share(part: Bool[np.ndarray, "..."], whole: Bool[np.ndarray, "..."]) -> float:
    return float(part.sum() / max(whole.sum(), 1))


def _warn(is_so: bool) -> Verdict | None:
    return "warn" if is_so else None


def _above(value: float, limits: Sequence[float]) -> Verdict | None:
    doubtful, wrong = limits
    return "fail" if value > wrong else "warn" if value > doubtful else None


def _below(value: float, limits: Sequence[float]) -> Verdict | None:
    doubtful, wrong = limits
    return "fail" if value < wrong else "warn" if value < doubtful else None


def _grid_text(image: sitk.Image) -> str:
    """Size, voxel size and where the stored axes point to, as RAS or LPS."""
    towards = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    return f"{_times(image.GetSize())} voxels of {_times(image.GetSpacing())} mm, axes {towards}"


def _times(numbers: Sequence[float | int]) -> str:
    return " × ".join(f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in numbers)


def _check(name: str, image: sitk.Image, mri: sitk.Image) -> None:
    values = sitk.GetArrayViewFromImage(image)
    if bad := int(values.size - np.isfinite(values).sum()):
        raise ValueError(f"expected finite voxels in {name}, got {bad} that are NaN or infinite")
    is_on_one_grid = image.GetSize() == mri.GetSize() and all(
        np.allclose(get(image), get(mri), atol=1e-3)
        for get in (sitk.Image.GetOrigin, sitk.Image.GetSpacing, sitk.Image.GetDirection)
    )
    if not is_on_one_grid:
        raise ValueError(
            f"expected {name} on the grid of the MRI, {_grid_text(mri)} at {mri.GetOrigin()}, "
            f"got {_grid_text(image)} at {image.GetOrigin()}"
        )
