"""One item from one study: what is drawn, the part of the study it needs, and what comes of it.

A training item of a window is made of the part of the study that the window's movements reach, and
of nothing else: what lies elsewhere in the files is not read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.data.augmentation import Augmentation, AugmentationDraw, mirrored, with_gamma
from clinfuse.data.jitter import CT_AIR, Mover, about_another_centre, is_still, move, move_mask
from clinfuse.data.studies import Study, reference_of
from clinfuse.data.volumes import Box, part_of
from clinfuse.types import FusionBatch

SPLINE_REACH = 12
"""Voxels beyond which a voxel's part in a cubic spline's coefficients is under 1e-6 of itself."""

FEATHER_REACH_MM, AROUND_REACH_MM = 3.5, 10.5
"""How far the pseudo-reference looks around a voxel, and around a finding: Gaussians of 1 mm and of
3 mm in ``composite``, cut off at 3.5 standard deviations."""

PATCH_TRIES = 10_000
"""Voxels to look at for one of brain or bone, of which heads have one in three."""

NO_AUGMENTATION = Augmentation(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Drawn:
    """An item that is drawn and not made yet: of a study, or of a part of it.

    Attributes:
        study: with volumes of the part alone; what it says in words is the whole study's.
        misregistration: of the CT against the MRI, about the centre of the part.
        varied: the augmentation, its matrix about the centre of the part.
        window: of the part, moved, what the item holds.
        composed: of the part, moved, what its reference is composed from; the window and around it.
    """

    study: Study
    misregistration: Float[Tensor, "4 4"]
    varied: AugmentationDraw
    window: Box
    composed: Box

    def on(self, device: torch.device | str) -> "Drawn":
        """The same with the study's volumes on another device."""
        return replace(self, study=_changed(self.study, lambda volume: volume.to(device)))

    def apart(self) -> "Drawn":
        """The same with volumes of its own, read now, which keep nothing else of the study."""
        return replace(self, study=_changed(self.study, torch.clone))


def study_item(
    study: Study,
    misregistration: Float[Tensor, "4 4"],
    varied: AugmentationDraw | None = None,
    window: Box | None = None,
    by: Mover = move,
) -> FusionBatch:
    """A batch of one study: everything augmented alike, then the CT and its masks moved.

    Its masks are bone, and the brain where that was segmented in the CT: were it left behind, it
    would tell a method where the CT belongs.

    What the network sees of the CT is interpolated once: augmentation and misregistration are one
    transform. The pseudo-reference is composed anew from the augmented clean pair; a reference that
    the study ships is moved along, and its contrast (gamma) then left alone.

    Args:
        study: what to make it of.
        misregistration: of the CT, about the centre of the study's grid.
        varied: what is augmented; None for nothing.
        window: the part of the item that is asked for: its voxels are the whole item's, to the
            rounding of splines, and its misregistration is about its own centre. None for all.
        by: what resamples.
    """
    varied = varied or NO_AUGMENTATION.draw(torch.Generator())
    return item_of(drawn(study, misregistration, varied, window), by)


def drawn(
    study: Study,
    misregistration: Float[Tensor, "4 4"],
    varied: AugmentationDraw,
    window: Box | None = None,
) -> Drawn:
    """The part of a study that an item of a window needs; by the arguments of ``study_item``."""
    shape = tuple(study.mri.shape[1:])
    whole: Box = tuple(slice(0, size) for size in shape)
    if window is None:
        return Drawn(study, misregistration, varied, whole, whole)
    composed = window
    if not study.has_own_reference and not _is_unchanged(varied):
        composed = _composed_from(study, varied, window)
    moved_matrix = misregistration @ varied.matrix
    sources = [
        _source(composed, varied.matrix, shape, study.spacing_mm),
        _source(window, moved_matrix, shape, study.spacing_mm),
    ]
    part = _within(_around(sources), shape)
    stored = _mirrored(part, shape) if varied.flips else part  # flips come before movements
    centre_mm = _centre_mm(part, shape, study.spacing_mm)
    return Drawn(
        _changed(study, lambda volume: part_of(volume, stored)),
        about_another_centre(misregistration, centre_mm),
        replace(varied, matrix=about_another_centre(varied.matrix, centre_mm)),
        _relative(window, part),
        _relative(composed, part),
    )


def item_of(drawn: Drawn, by: Mover = move) -> FusionBatch:
    """The item, made on the device of the study's volumes; ``by`` is what resamples there."""
    study, misregistration, varied = drawn.study, drawn.misregistration, drawn.varied
    spacing_mm, matrix = study.spacing_mm, varied.matrix
    gamma = 1.0 if study.has_own_reference else varied.gamma
    moved_matrix = misregistration @ matrix
    composed, inner = drawn.composed, _relative(drawn.window, drawn.composed)

    def turn(volume: Tensor) -> Tensor:
        return mirrored(volume) if varied.flips else volume

    def images(
        volumes: list[Tensor], by_matrix: Tensor = matrix, box: Box = composed
    ) -> Sequence[Tensor]:
        if is_still(by_matrix):
            return [part_of(turn(volume), box).clamp(-1, 1) for volume in volumes]
        return by(turn(torch.cat(volumes)), by_matrix, spacing_mm, window=box).clamp(-1, 1).split(1)

    def masks(roi: Tensor, by_matrix: Tensor = matrix, box: Box = composed) -> Tensor:
        return move_mask(turn(roi), by_matrix, spacing_mm, box, by)

    def cut(volume: Tensor) -> Tensor:
        return part_of(volume, inner).contiguous()[None]

    still = is_still(misregistration)
    together = {"clean_mri": study.clean_mri, "clean_ct": study.clean_ct}
    if study.mri is not study.clean_mri:
        together["mri"] = study.mri
    if still and study.ct is not study.clean_ct:
        together["ct"] = study.ct
    if study.has_own_reference or _is_unchanged(varied):
        together["reference"] = study.reference
    moved = dict(zip(together, images(list(together.values())), strict=True))
    clean_ct, clean_mri = moved["clean_ct"], with_gamma(moved["clean_mri"], gamma)
    mri = with_gamma(moved["mri"], gamma) if "mri" in moved else clean_mri
    clean_roi, findings = masks(study.roi), part_of(study.findings, composed)
    if study.finding_boxes:
        findings = masks(study.findings)
    if "reference" in moved:
        reference = moved["reference"]
    else:
        reference = reference_of(clean_ct, clean_mri, clean_roi, findings, spacing_mm, study.ct_map)
    roi = cut(clean_roi).clone()
    if still:
        ct = cut(moved.get("ct", clean_ct))
    else:
        ct = images([study.ct], moved_matrix, drawn.window)[0].contiguous()[None]
        of_ct = [1, 0] if study.brain_of_ct else [1]
        roi[0, of_ct] = masks(study.roi[of_ct], moved_matrix, drawn.window)
    distance_mm = by(
        turn(study.lesion_distance_mm), matrix, spacing_mm, study.far_mm, "linear", drawn.window
    )
    centre_mm = _centre_mm(drawn.window, study.mri.shape[1:], spacing_mm)
    about_own_centre = about_another_centre(misregistration, centre_mm)
    return FusionBatch(
        mri=cut(mri),
        ct=ct,
        roi=roi,
        spacing_mm=torch.tensor([spacing_mm], device=study.mri.device),
        case_id=[study.case_id],
        ct_map=[study.ct_map],
        reference=cut(reference),
        clean_mri=cut(clean_mri),
        clean_ct=cut(clean_ct),
        clean_roi=cut(clean_roi),
        lesion_distance_mm=(distance_mm * varied.scale if study.has_lesion else distance_mm)[None],
        misregistration=about_own_centre.float()[None].to(study.mri.device),
        findings=cut(findings),
    )


def random_window(
    study: Study,
    varied: AugmentationDraw,
    shape: Sequence[int],
    generator: torch.Generator,
) -> Box:
    """A window (d, h, w) around where a random voxel of brain or bone has come to lie.

    Along an axis on which the study is smaller it is the study, which ``padded`` makes up for.

    Raises:
        ValueError: a study with too little brain and bone to find any of it.
    """
    sizes = study.mri.shape[1:]
    for _ in range(PATCH_TRIES):
        chance = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        d, h, w = (min(int(u * size), size - 1) for u, size in zip(chance, sizes, strict=True))
        if not study.roi[:2, d, h, w].any():
            continue
        point: Box = tuple(slice(at, at + 1) for at in (d, h, w))
        point = _mirrored(point, sizes) if varied.flips else point
        around = [s.start for s in _mapped(point, varied.matrix, sizes, study.spacing_mm)]
        if all(0 <= at < size for at, size in zip(around, sizes, strict=True)):
            break
    else:
        raise ValueError(
            f"expected brain or bone to draw patches around, found none in {PATCH_TRIES} voxels: "
            f"{study.case_id}"
        )
    starts = [
        min(max(at - patch // 2, 0), max(size - patch, 0))
        for at, patch, size in zip(around, shape, sizes, strict=True)
    ]
    stops = [
        min(start + patch, size) for start, patch, size in zip(starts, shape, sizes, strict=True)
    ]
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def padded(item: FusionBatch, shape: Sequence[int]) -> FusionBatch:
    """The item in the middle of a larger grid, where it is smaller.

    Padding is air, no mask, and the border's distance. The misregistration is written about the
    larger grid's centre.
    """
    lacking = [max(p - n, 0) for p, n in zip(shape, item.mri.shape[2:], strict=True)]
    if not any(lacking):
        return item
    before = [n // 2 for n in lacking]
    sides = [(b, n - b) for n, b in zip(lacking, before, strict=True)]
    padding = [side for pair in reversed(sides) for side in pair]  # F.pad: the last axis first
    values: dict[str, Any] = {field.name: getattr(item, field.name) for field in fields(item)}
    for name, value in values.items():
        if name == "lesion_distance_mm":
            values[name] = F.pad(value, padding, mode="replicate")
        elif isinstance(value, Tensor) and value.ndim == 5:
            fill = False if value.dtype == torch.bool else CT_AIR
            values[name] = F.pad(value, padding, value=fill)
    assert item.misregistration is not None
    off = [(after - before) / 2 for before, after in sides]
    centre_mm = torch.tensor(off, dtype=torch.float64) * item.spacing_mm[0].cpu().double()
    matrix = about_another_centre(item.misregistration[0].cpu().double(), centre_mm)
    return replace(FusionBatch(**values), misregistration=matrix.to(item.misregistration)[None])


def _is_unchanged(varied: AugmentationDraw) -> bool:
    """Whether the reference stays as the study has it."""
    return not varied.flips and is_still(varied.matrix) and varied.gamma == 1


def _changed(study: Study, how: Callable[[Tensor], Tensor]) -> Study:
    """The study with other volumes; what was one volume under two names stays one."""
    volumes = {f.name: v for f in fields(study) if isinstance(v := getattr(study, f.name), Tensor)}
    each = {id(volume): volume for volume in volumes.values()}
    changed = {name: how(volume) for name, volume in each.items()}
    values: dict[str, Any] = {name: changed[id(volume)] for name, volume in volumes.items()}
    return replace(study, **values)


def _composed_from(study: Study, varied: AugmentationDraw, window: Box) -> Box:
    """What the pseudo-reference of a window depends on, in the augmented grid.

    That is what its feathering reaches, and each finding that this touches, whole and with what is
    around it: whether a finding is shown bright or dark is decided for all of it at once.
    """
    shape, spacing_mm = tuple(study.mri.shape[1:]), study.spacing_mm
    feathered = _grown(window, _voxels(FEATHER_REACH_MM, spacing_mm))
    around = _voxels(AROUND_REACH_MM + FEATHER_REACH_MM, spacing_mm)
    needed = [feathered]
    for box in study.finding_boxes:
        turned = _mirrored(box, shape) if varied.flips else box
        seen = _grown(_mapped(turned, varied.matrix, shape, spacing_mm), (1, 1, 1))
        if all(a.start < b.stop and b.start < a.stop for a, b in zip(seen, feathered, strict=True)):
            needed.append(_grown(seen, around))
    return _within(_around(needed), shape)


def _source(window: Box, matrix: Tensor, shape: Sequence[int], spacing_mm: Sequence[float]) -> Box:
    """The part of a volume from which ``matrix`` moves something into the window."""
    if is_still(matrix):
        return window
    seen = _mapped(window, torch.linalg.inv(matrix), shape, spacing_mm)
    return _grown(seen, (SPLINE_REACH,) * 3)


def _mirrored(box: Box, shape: Sequence[int]) -> Box:
    """Where a box comes to lie when left and right are exchanged."""
    *others, last = box
    return (*others, slice(shape[-1] - last.stop, shape[-1] - last.start))


def _mapped(box: Box, matrix: Tensor, shape: Sequence[int], spacing_mm: Sequence[float]) -> Box:
    """The smallest box around where the voxels of a box come to lie, perhaps off the grid."""
    corners = torch.tensor(list(product(*((s.start, s.stop - 1) for s in box)))).double()
    spacing = torch.tensor(spacing_mm, dtype=torch.float64)
    centre = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    moved_mm = ((corners - centre) * spacing) @ matrix[:3, :3].T + matrix[:3, 3]
    voxels = (moved_mm / spacing + centre).round(decimals=6)  # not one further for rounding
    low, high = voxels.amin(0).floor().int().tolist(), voxels.amax(0).ceil().int().tolist()
    return tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))


def _grown(box: Box, voxels: Sequence[int]) -> Box:
    return tuple(slice(s.start - n, s.stop + n) for s, n in zip(box, voxels, strict=True))


def _voxels(reach_mm: float, spacing_mm: Sequence[float]) -> list[int]:
    return [math.ceil(reach_mm / size) + 1 for size in spacing_mm]


def _around(boxes: Sequence[Box]) -> Box:
    return reduce(
        lambda one, other: tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop))
            for a, b in zip(one, other, strict=True)
        ),
        boxes,
    )


def _within(box: Box, shape: Sequence[int]) -> Box:
    """What a box has of a grid, one voxel at least."""
    starts = [min(max(s.start, 0), size - 1) for s, size in zip(box, shape, strict=True)]
    stops = [min(max(s.stop, 0), size) for s, size in zip(box, shape, strict=True)]
    return tuple(slice(a, max(a + 1, b)) for a, b in zip(starts, stops, strict=True))


def _relative(box: Box, to: Box) -> Box:
    return tuple(slice(s.start - t.start, s.stop - t.start) for s, t in zip(box, to, strict=True))


def _centre_mm(box: Box, shape: Sequence[int], spacing_mm: Sequence[float]) -> Float[Tensor, " n"]:
    """From the centre of a grid to that of a box in it."""
    off = [(s.start + s.stop - size) / 2 for s, size in zip(box, shape, strict=True)]
    return torch.tensor(off, dtype=torch.float64) * torch.tensor(spacing_mm, dtype=torch.float64)
