"""One patient's study folder, read, checked, brought into model space and held in memory."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, find_objects, label
from torch import Tensor

from clinfuse.data.volumes import (
    Box,
    Grid,
    Volume,
    check_one_grid,
    read_volume,
    resize,
    resized_shape,
    write_volume,
)
from clinfuse.functional.composite import composite
from clinfuse.functional.intensity import (
    CtMap,
    ct_from_model,
    ct_to_model,
    looks_like_hu,
    mri_from_model,
    mri_to_model,
)
from clinfuse.functional.surface import signed_distance_mm
from clinfuse.roi import masks
from clinfuse.roi.findings import ct_dense_findings
from clinfuse.roi.masks import bone_mask, brain_mask, head_mask
from clinfuse.types import ROI_NAMES

log = logging.getLogger(__name__)

MR_TASK = "total_mr"
"""TotalSegmentator's task that finds the brain in the MRI; every other tool finds it in the CT."""

STUDY_FILES = (
    "mri",
    "ct",
    "brain_mask",
    "bone_mask",
    "lesion_mask",
    "reference",
    "clean_mri",
    "clean_ct",
)
"""What a study folder may hold, each as NAME.nii.gz or NAME.nii."""

MaskSource = Literal["file", "segmented", "absent"]


@dataclass(frozen=True)
class Study:
    """An MRI-CT pair with its regions of interest, in model space and tensor order.

    Attributes:
        case_id: name of the folder.
        patient_id: ``patient`` of ``study.json``, else the case itself.
        mri: MRI, in [-1, 1].
        ct: CT, in [-1, 1].
        roi: masks in ``ROI_NAMES`` order.
        findings: haemorrhage and calcification in the brain that only CT shows; none unless HU.
        clean_mri: noise-free MRI; the MRI itself where the folder has no ``clean_mri``.
        clean_ct: noise-free CT; the CT itself where the folder has no ``clean_ct``.
        reference: the fused volume to aim at: ``reference`` of the folder, else the composite.
        has_own_reference: whether the folder ships it.
        lesion_distance_mm: signed, negative inside; a large constant without a lesion.
        far_mm: the largest of it.
        has_lesion: whether there is one.
        finding_boxes: where ``findings`` are, those less than three voxels apart in one box.
        spacing_mm: voxel size, (d, h, w).
        ct_map: how CT units became model space.
        mri_limits: MRI intensities that became -1 and 1.
        mask_source: for each ROI, whether the mask was given, segmented by a tool, or is absent.
        brain_of_ct: whether the brain was segmented in the CT, and so lies where that lies.
        grid: stored grid of the MRI file, for writing back.
    """

    case_id: str
    patient_id: str
    mri: Float[Tensor, "1 d h w"]
    ct: Float[Tensor, "1 d h w"]
    roi: Bool[Tensor, "3 d h w"]
    findings: Bool[Tensor, "1 d h w"]
    clean_mri: Float[Tensor, "1 d h w"]
    clean_ct: Float[Tensor, "1 d h w"]
    reference: Float[Tensor, "1 d h w"]
    has_own_reference: bool
    lesion_distance_mm: Float[Tensor, "1 d h w"]
    far_mm: float
    has_lesion: bool
    finding_boxes: Sequence[Box]
    spacing_mm: tuple[float, float, float]
    ct_map: CtMap
    mri_limits: tuple[float, float]
    mask_source: Mapping[str, MaskSource]
    brain_of_ct: bool
    grid: Grid

    @property
    def lesion(self) -> Bool[Tensor, "1 d h w"]:
        """The lesion mask, empty where there is none."""
        return self.roi[2:3]

    @property
    def ct_units(self) -> str:
        """What a CT value was before model space: "HU" or "8-bit window"."""
        return "8-bit window" if self.ct_map == "window_8bit" else "HU"

    @property
    def has_clean_pair(self) -> bool:
        """Whether the folder ships a noise-free image besides what it gives as input."""
        return self.clean_mri is not self.mri or self.clean_ct is not self.ct

    def write(self, path: Path | str, volume: Tensor, units: str = "model") -> None:
        """Write a volume of this study onto the grid its MRI was stored on.

        Args:
            volume: ``1 d h w``, float in model space or a mask.
            units: "model" writes [-1, 1] as it is, "mri" and "ct" the scanner's units.
        """
        to_units: dict[str, Callable[[Tensor], Tensor]] = {
            "model": lambda v: v,
            "mri": lambda v: mri_from_model(v, self.mri_limits),
            "ct": lambda v: ct_from_model(v, self.ct_map),
        }
        if units not in to_units:
            raise ValueError(f"expected units of {list(to_units)}, got {units!r}")
        volume = volume.detach().cpu()
        array = (volume if volume.dtype == torch.bool else to_units[units](volume.float()))[0]
        write_volume(path, _resized(array.numpy(), self.grid.shape_dhw), self.grid)


def load_study(
    folder: Path | str,
    ct_map: CtMap = "piecewise",
    cache_dir: Path | str | None = None,
    resample_mm: Sequence[float | int] | None = None,
) -> Study:
    """Read and check a study folder, and segment brain and bone from CT where masks are missing.

    The folder holds ``mri`` and ``ct``, optionally ``brain_mask``, ``bone_mask``, ``lesion_mask``,
    ``reference`` (in model space) and the noise-free ``clean_mri`` and ``clean_ct``, each as
    ``.nii.gz`` or ``.nii`` and all on one grid. It is never written to.

    Args:
        ct_map: for CT in HU. CT that is an 8-bit window (0..255) is always mapped as one.
        cache_dir: keeps segmented masks between runs; None segments them every time.
        resample_mm: voxel size (d, h, w) to resample to, linearly; the grid's field of view is
            kept, so that sizes come out as near to it as whole voxels allow.

    Raises:
        FileNotFoundError: no folder, MRI or CT.
        ValueError: a file that cannot be used (see ``read_volume``), grids that differ, uniform
            images, an empty brain or bone mask, CT in unknown units.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a study folder, found none at {folder}")
    files = {name: path for name in STUDY_FILES if (path := _file(folder, name))}
    for name in ("mri", "ct"):
        if name not in files:
            raise FileNotFoundError(f"expected {name}.nii.gz, found none in {folder}")
    study = load_pair(files, folder.name, _patient(folder), ct_map, cache_dir, resample_mm)
    return replace(
        study,
        mask_source={**study.mask_source, **_segmented_before(folder)},
        brain_of_ct=study.brain_of_ct or _brain_was_found_in_ct(folder),
    )


def load_pair(
    files: Mapping[str, Path | str],
    case_id: str,
    patient_id: str | None = None,
    ct_map: CtMap = "piecewise",
    cache_dir: Path | str | None = None,
    resample_mm: Sequence[float] | None = None,
) -> Study:
    """``load_study`` for files that lie anywhere, under the names of ``STUDY_FILES``.

    Args:
        files: paths by name; ``mri`` and ``ct`` at least.
        case_id: what to call the study.
        patient_id: whose it is; None for the case itself.
        ct_map: as in ``load_study``.
        cache_dir: as in ``load_study``.
        resample_mm: as in ``load_study``.

    Raises:
        FileNotFoundError: a file that is named does not exist.
        ValueError: as ``load_study``.
    """
    paths = {name: Path(path) for name, path in files.items()}
    unknown = sorted(set(paths) - set(STUDY_FILES))
    if unknown:
        raise ValueError(f"expected files of {STUDY_FILES}, got {unknown}")
    volumes = _read(paths)
    mri, ct = volumes["mri"], volumes["ct"]
    is_hu = _is_hu(ct)
    cache = None if cache_dir is None else Path(cache_dir) / "masks"
    roi_masks, sources = _masks(case_id, paths, volumes, is_hu, cache)

    shape = resized_shape(mri, resample_mm) if resample_mm else mri.array.shape
    spacing_mm = tuple(
        old * n / new for old, n, new in zip(mri.spacing_mm, mri.array.shape, shape, strict=True)
    )
    images = {name: _tensor(_resized(v.array, shape)) for name, v in volumes.items()}
    roi = torch.cat([_tensor(_resized(roi_masks[name], shape)) for name in ROI_NAMES])

    head = _tensor(_resized(head_mask(mri.array), shape))
    units: CtMap = ct_map if is_hu else "window_8bit"
    mri_model, limits = mri_to_model(images["mri"], head)
    ct_model = ct_to_model(images["ct"], units)
    clean_ct_units = images.get("clean_ct", images["ct"])
    clean = {
        "clean_mri": _scaled(images["clean_mri"], limits) if "clean_mri" in images else mri_model,
        "clean_ct": ct_to_model(clean_ct_units, units) if "clean_ct" in images else ct_model,
    }
    findings = torch.zeros_like(roi[:1])
    if is_hu:
        found = ct_dense_findings(clean_ct_units[0].numpy(), roi[0].numpy(), spacing_mm)
        findings = _tensor(found)
    reference = images.get("reference")
    if reference is None:
        reference = reference_of(
            clean["clean_ct"], clean["clean_mri"], roi, findings, spacing_mm, units
        )
    lesion_distance_mm = signed_distance_mm(roi[None, 2:3], spacing_mm)[0].float()
    return Study(
        case_id=case_id,
        patient_id=patient_id or case_id,
        mri=mri_model,
        ct=ct_model,
        roi=roi,
        findings=findings,
        **clean,
        reference=reference,
        has_own_reference="reference" in images,
        lesion_distance_mm=lesion_distance_mm,
        far_mm=float(lesion_distance_mm.max()),
        has_lesion=bool(roi[2].any()),
        finding_boxes=_boxes(findings[0].numpy()),
        spacing_mm=spacing_mm,
        ct_map=units,
        mri_limits=limits,
        mask_source=sources,
        brain_of_ct=sources["brain"] == "segmented",
        grid=mri.grid,
    )


def reference_of(
    clean_ct: Float[Tensor, "1 d h w"],
    clean_mri: Float[Tensor, "1 d h w"],
    roi: Bool[Tensor, "3 d h w"],
    findings: Bool[Tensor, "1 d h w"],
    spacing_mm: Sequence[float | int],
    ct_map: CtMap,
) -> Float[Tensor, "1 d h w"]:
    """The pseudo-reference of one registered, clean pair (method, §3)."""
    return composite(
        clean_ct[None],
        clean_mri[None],
        roi[None, 1:2],
        findings[None] if findings.any() else None,
        brain=roi[None, 0:1],
        spacing_mm=tuple(spacing_mm),
        ct_map=ct_map,
    )[0]


def study_folders(root: Path | str) -> list[Path]:
    """Folders of a cohort that hold a study, by name.

    A folder counts when it has an ``mri`` or a ``ct``: one that lacks the other is an error to
    report on loading, not a folder to pass over.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder of studies, found no folder at {root}")
    folders = [
        folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and (_file(folder, "mri") or _file(folder, "ct"))
    ]
    if not folders:
        raise FileNotFoundError(
            f"expected study folders with mri.nii.gz and ct.nii.gz, found none in {root}"
        )
    return folders


def patient_of(folder: Path | str) -> str:
    """The patient a study folder belongs to: ``patient`` in its ``study.json``, else its name."""
    return _patient(Path(folder))


def _read(paths: Mapping[str, Path]) -> dict[str, Volume]:
    images = ("mri", "ct", "clean_mri", "clean_ct", "reference")
    volumes = {name: read_volume(paths[name]) for name in images if name in paths}
    for volume in volumes.values():
        check_one_grid(volumes["mri"], volume)
        if volume.array.min() == volume.array.max():
            value = volume.array.flat[0]
            raise ValueError(f"expected an image, got {value:g} in every voxel: {volume.path}")
    if "reference" in volumes:
        _check_model_space(volumes["reference"])
    return volumes


def _check_model_space(reference: Volume) -> None:
    low, high = reference.array.min(), reference.array.max()
    if low < -1.001 or high > 1.001:
        raise ValueError(
            f"expected a reference in model space [-1, 1], got [{low:g}, {high:g}]: "
            f"{reference.path}"
        )


def _is_hu(ct: Volume) -> bool:
    if looks_like_hu(torch.from_numpy(ct.array)):
        return True
    low, high = ct.array.min(), ct.array.max()
    if low < 0 or high > 255:
        raise ValueError(
            "expected CT in HU (air near -1000) or in an 8-bit window (0 to 255), "
            f"got {low:g} to {high:g}: {ct.path}"
        )
    return False


def _masks(
    case_id: str,
    paths: Mapping[str, Path],
    volumes: Mapping[str, Volume],
    is_hu: bool,
    cache: Path | None,
) -> tuple[dict[str, np.ndarray], dict[str, MaskSource]]:
    mri, ct = volumes["mri"], volumes["ct"]
    read = {name: _read_mask(paths.get(f"{name}_mask"), name, mri) for name in ROI_NAMES}
    lacking = [name for name in ("brain", "bone") if read[name] is None]
    if lacking:
        log.info("%s has no %s mask: segmented from CT", case_id, " and no ".join(lacking))
    sources: dict[str, MaskSource] = {
        name: "file" if mask is not None else "absent" if name == "lesion" else "segmented"
        for name, mask in read.items()
    }
    bone, brain, lesion = read["bone"], read["brain"], read["lesion"]
    if bone is None:
        bone = _segmented(
            "bone", lambda: bone_mask(ct.array, ct.spacing_mm, is_hu), ct, None, cache
        )
    if brain is None:
        skull = bone
        brain = _segmented(
            "brain", lambda: brain_mask(ct.array, skull, ct.spacing_mm), ct, skull, cache
        )
    if lesion is None:
        lesion = np.zeros(mri.array.shape, bool)
    return {"brain": brain, "bone": bone, "lesion": lesion}, sources


def _read_mask(path: Path | None, name: str, mri: Volume) -> np.ndarray | None:
    if path is None:
        return None
    volume = read_volume(path)
    check_one_grid(mri, volume)
    mask = volume.array > 0.5
    if name != "lesion" and not mask.any():
        raise ValueError(f"expected a {name} mask with voxels in it, got an all-zero one: {path}")
    return mask


def _segmented(
    name: str,
    segment: Callable[[], np.ndarray],
    ct: Volume,
    bone: np.ndarray | None,
    cache: Path | None,
) -> np.ndarray:
    """The mask, from the cache if the CT, the bone mask and the code that makes it are the same."""
    kept = None
    if cache is not None:
        inputs = [ct.array.tobytes(), ct.affine.tobytes(), Path(masks.__file__).read_bytes()]
        inputs += [] if bone is None else [bone.tobytes()]
        digest = hashlib.sha256(b"".join(inputs)).hexdigest()[:16]  # folders may name patients
        kept = cache / digest / f"{name}_mask.nii.gz"
        if kept.is_file():
            return read_volume(kept).array > 0.5
    mask = segment()
    if not mask.any():
        raise ValueError(
            f"expected to find {name} in the CT, segmented no voxel; add {name}_mask.nii.gz "
            f"to the folder: {ct.path}"
        )
    if kept is not None:
        write_volume(kept, mask, ct)
    return mask


def _boxes(findings: np.ndarray) -> list[Box]:
    """Bounding boxes of findings, each a voxel wider; of those whose wider forms touch, one."""
    if not findings.any():
        return []
    around = np.ones((3, 3, 3), bool)
    parts, _ = label(binary_dilation(findings, around), around)
    return [(d, h, w) for d, h, w in find_objects(parts)]


def _file(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}.nii.gz", folder / f"{name}.nii")
    return next((path for path in candidates if path.is_file()), None)


def _patient(folder: Path) -> str:
    return str(_facts(folder).get("patient", folder.name))


def _segmented_before(folder: Path) -> dict[str, MaskSource]:
    """The masks whose files ``clinfuse.prepare`` made, by a tool: nobody drew them."""
    made = _provenance(folder)
    return {roi: "segmented" for roi, how in made.items() if how["tool"] != "file"}


def _brain_was_found_in_ct(folder: Path) -> bool:
    how = _provenance(folder).get("brain", {"tool": "file"})
    return how["tool"] != "file" and how.get("task") != MR_TASK


def _provenance(folder: Path) -> dict[str, dict[str, Any]]:
    """What ``clinfuse.prepare`` recorded of each mask that it wrote."""
    made = _facts(folder).get("masks")
    if not isinstance(made, dict):
        return {}
    kept = {roi: made[f"{roi}_mask"] for roi in ROI_NAMES if f"{roi}_mask" in made}
    if wrong := [roi for roi, how in kept.items() if not (isinstance(how, dict) and "tool" in how)]:
        raise ValueError(
            f"expected the tool that made each mask, got none of {', '.join(wrong)}: "
            f"{folder / 'study.json'}"
        )
    return kept


def _facts(folder: Path) -> dict[str, Any]:
    """What ``study.json`` says; nothing where there is none."""
    path = folder / "study.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {error}: {path}") from error
    return facts if isinstance(facts, dict) else {}


def _scaled(mri: Float[Tensor, "1 d h w"], limits: tuple[float, float]) -> Float[Tensor, "1 d h w"]:
    """Another image in the units of the MRI, mapped by the MRI's limits."""
    low, high = limits
    return (2 * (mri - low) / (high - low) - 1).clamp(-1, 1)


def _resized(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if array.shape == tuple(shape):
        return array
    if array.dtype == bool:
        return resize(array.astype(np.float32), shape) > 0.5
    return resize(array, shape)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))[None]
