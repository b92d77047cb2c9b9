"""Phantom patients: synthetic MRI-CT studies of stroke with a known clean pair and true masks.

Not a substitute for patients: heads of the right size and tissue with the right physics, so that
every claim of the package can be tried without data. ``make_phantom`` draws one, ``write_cohort``
writes a data set in the layout that ``data.studies`` reads.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, get_start_method
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from clinfuse.data.made_once import one_at_a_time
from clinfuse.data.phantom_anatomy import (
    BONE,
    INTRACRANIAL,
    Array,
    Lattice,
    Mask,
    Numbers,
    SmoothNoise,
    Tissue,
    draw_head,
    lattice_for,
)
from clinfuse.data.phantom_lesions import Findings, draw_findings, lesion_volume_ml
from clinfuse.data.phantom_signals import CONTRASTS, Scanner, ct_pair, draw_scanner, mri_pair

GENERATOR_VERSION = 1
"""Raise when the same (seed, case) gives other voxels: cohorts on disk then no longer match."""


@dataclass
class Phantom:
    """One synthetic patient on one grid, arrays of shape (d, h, w).

    d grows to superior, h to anterior, w to the patient's right.

    Attributes:
        mri: scan with Rician noise and receive field, in scanner units (percent, or 1e-6 mm^2/s).
        clean_mri: the same without noise and field.
        ct_hu, clean_ct_hu: CT with and without noise.
        brain: intracranial space: parenchyma, ventricles, sulcal CSF, falx.
        bone: skull, all tables.
        lesion: acute infarct, empty in one case of ten.
        findings: blood and calcium inside the brain, visible on CT only.
        contrast: one of ``CONTRASTS``.
        spacing_mm: voxel size (d, h, w).
        case_id: ``case_000`` and so on.
        facts: what was drawn: volumes in ml, kinds of findings, protocol.
    """

    mri: Array
    clean_mri: Array
    ct_hu: Array
    clean_ct_hu: Array
    brain: Mask
    bone: Mask
    lesion: Mask
    findings: Mask
    contrast: str
    spacing_mm: tuple[float, float, float]
    case_id: str
    facts: dict[str, Any]


def make_phantom(
    case: int,
    seed: int = 0,
    shape: Sequence[int] = (32, 96, 96),
    spacing_mm: Numbers = (4.0, 2.0, 2.0),
    contrast: str = "t2",
) -> Phantom:
    """The phantom patient number ``case`` of cohort ``seed``.

    The same arguments give the same voxels. Another grid or contrast shows the same head, unless
    the grid is too narrow for it: then the head is drawn smaller, with a margin of air in-plane.
    Above and below, the field of view cuts.

    Raises:
        ValueError: for a contrast outside ``CONTRASTS`` or a grid that is not three positive axes.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"expected a contrast of {CONTRASTS}, got {contrast!r}")
    if len(shape) != 3 or len(spacing_mm) != 3 or min(shape) < 2 or min(spacing_mm) <= 0:
        raise ValueError(f"expected (d, h, w) shape and spacing, got {shape} at {spacing_mm} mm")
    stream = partial(_stream, seed, case)
    lattice = lattice_for(shape, spacing_mm)
    anatomy = draw_head(stream("anatomy"), lattice)
    fine_noise = SmoothNoise(stream("lesion texture"), lattice.axes_mm())
    volume_ml = lesion_volume_ml(case, seed)
    found = draw_findings(stream("lesions"), anatomy, fine_noise, volume_ml)
    scanner = draw_scanner(stream("scanner"))
    grid = Lattice(lattice.shape, lattice.spacing_mm, (1, 1, 1)).axes_mm()
    mri, clean_mri = mri_pair(
        stream(contrast), anatomy.labels, lattice, contrast, scanner,
        SmoothNoise(stream("receive field"), grid),
    )  # fmt: skip
    ct_hu, clean_ct_hu = ct_pair(
        stream("ct"), anatomy.labels, [(i, hu) for _, i, hu in found.dense], lattice, scanner,
        SmoothNoise(stream("bone density"), grid),
    )  # fmt: skip
    brain = _fraction(anatomy.labels, INTRACRANIAL, lattice) > 0.5  # halves are bone
    return Phantom(
        mri=mri,
        clean_mri=clean_mri,
        ct_hu=ct_hu,
        clean_ct_hu=clean_ct_hu,
        brain=brain,
        bone=_fraction(anatomy.labels, BONE, lattice) >= 0.5,
        lesion=_mask_of(found.infarcts, lattice) & brain,
        findings=_mask_of([i for _, i, _ in found.dense], lattice) & brain,
        contrast=contrast,
        spacing_mm=lattice.spacing_mm,
        case_id=case_name(case),
        facts=_facts(found, volume_ml, scanner, lattice),
    )


def case_name(case: int) -> str:
    return f"case_{case:03d}"


def _stream(seed: int, case: int, purpose: str) -> np.random.Generator:
    """A generator of its own for every purpose, so that one choice does not shift another."""
    return np.random.default_rng([seed, case, *purpose.encode()])


def _fraction(labels: NDArray[np.uint8], tissues: Sequence[Tissue], lattice: Lattice) -> Array:
    chosen = np.zeros(len(Tissue), np.float32)
    chosen[list(tissues)] = 1
    return lattice.average(chosen[labels])


def _mask_of(parts: Sequence[NDArray[np.int64]], lattice: Lattice) -> Mask:
    """Voxels that hold most of what the parts occupy: as many as their volume, at least one."""
    fine = np.zeros(lattice.fine_shape, np.float32)
    for part in parts:
        fine.ravel()[part] = 1
    fraction = lattice.average(fine)
    count = int(np.ceil(fraction.sum() - 0.5)) if parts else 0
    mask = np.zeros(lattice.shape, bool)
    if parts:
        mask.ravel()[np.argsort(-fraction, axis=None, kind="stable")[: max(1, count)]] = True
    return mask


def _facts(found: Findings, volume_ml: float, scanner: Scanner, lattice: Lattice) -> dict[str, Any]:
    return {
        "lesion_volume_ml": round(volume_ml, 4),
        "lesion_volumes_ml": [round(len(i) * lattice.fine_voxel_ml, 4) for i in found.infarcts],
        "findings": [
            {"kind": kind, "volume_ml": round(len(i) * lattice.fine_voxel_ml, 4), "hu": round(hu)}
            for kind, i, hu in found.dense
        ],
        "field_t": scanner.field_t,
        "white_matter_snr": round(scanner.snr, 2),
        "ct_noise_hu": round(scanner.ct_noise_hu, 2),
    }


# --- a cohort on disk ---------------------------------------------------------------------------


def write_cohort(
    folder: str | Path,
    cases: int,
    seed: int = 0,
    shape: Sequence[int] = (32, 96, 96),
    spacing_mm: Numbers = (4.0, 2.0, 2.0),
    contrasts: Sequence[str] = ("t1", "t2", "adc"),
    workers: int = 2,
) -> Path:
    """Write a cohort of study folders with ``splits.json``; returns the folder.

    Case i has the contrast ``contrasts[i % len(contrasts)]``. A cohort that is already there with
    the same parameters is left alone, an interrupted one is continued: every case appears whole,
    by a rename. Processes that want the same cohort at once wait for the one that makes it.

    Raises:
        ValueError: if the folder holds a cohort of other parameters.
    """
    folder = Path(folder)
    record = {
        "generator": "clinfuse.data.phantoms",
        "version": GENERATOR_VERSION,
        "cases": cases,
        "seed": seed,
        "shape": list(map(int, shape)),
        "spacing_mm": list(map(float, spacing_mm)),
        "contrasts": list(contrasts),
    }
    if (folder / "splits.json").exists() and not _missing(folder, cases):
        _claim(folder, record)
        return folder
    with one_at_a_time(folder.parent / f".{folder.name}.lock"):
        _claim(folder, record)
        _write_missing(folder, record, workers)
    return folder


def _missing(folder: Path, cases: int) -> list[int]:
    return [i for i in range(cases) if not (folder / case_name(i)).is_dir()]


def _write_missing(folder: Path, record: dict[str, Any], workers: int) -> None:
    missing = _missing(folder, record["cases"])
    of_all = (record["seed"], *(tuple(record[k]) for k in ("shape", "spacing_mm", "contrasts")))
    work = partial(_write_case, folder, *of_all)
    in_a_pool = get_start_method(allow_none=True) == "loky"  # joblib's, which cannot spawn another
    if workers > 1 and len(missing) > 1 and not in_a_pool:
        with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn")) as pool:
            list(pool.map(work, missing))
    else:
        list(map(work, missing))
    if not (folder / "splits.json").exists():
        _write_json(folder / "splits.json", cohort_splits(record["cases"]))


def _claim(folder: Path, record: dict[str, Any]) -> None:
    path = folder / "cohort.json"
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"expected an empty folder or a phantom cohort, got files of others in {folder}; "
                "for studies of your own say data=studies"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, record)
        return
    there = json.loads(path.read_text())
    differing = sorted(k for k in record.keys() | there.keys() if record.get(k) != there.get(k))
    if differing:
        asked, found = ({k: r.get(k) for k in differing} for r in (record, there))
        raise ValueError(f"{folder} holds a phantom cohort with {found}, but {asked} was asked for")


def cohort_splits(cases: int, seed: int = 42) -> dict[str, list[str]]:
    """Train, validation and test lists by patient, 70/15/15, shuffled."""
    order = np.random.default_rng(seed).permutation(cases)
    names = [case_name(int(i)) for i in order]
    held_out = round(0.15 * cases)
    train = cases - 2 * held_out
    return {
        "train": sorted(names[:train]),
        "val": sorted(names[train : train + held_out]),
        "test": sorted(names[train + held_out :]),
    }


def _write_case(
    folder: Path,
    seed: int,
    shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    contrasts: tuple[str, ...],
    case: int,
) -> None:
    phantom = make_phantom(case, seed, shape, spacing_mm, contrasts[case % len(contrasts)])
    scratch = Path(tempfile.mkdtemp(prefix=f".{phantom.case_id}-", dir=folder))
    try:
        write_study(scratch, phantom, seed)
        scratch.chmod(0o755)
        scratch.rename(folder / phantom.case_id)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_study(folder: Path, phantom: Phantom, seed: int) -> None:
    """One patient's NIfTI volumes and ``study.json`` in a folder that exists."""
    images = {
        "mri": phantom.mri,
        "clean_mri": phantom.clean_mri,
        "ct": phantom.ct_hu,
        "clean_ct": phantom.clean_ct_hu,
        "brain_mask": phantom.brain,
        "bone_mask": phantom.bone,
        "lesion_mask": phantom.lesion,
    }
    affine = ras_affine(phantom.mri.shape, phantom.spacing_mm)
    for name, volume in images.items():
        stored = volume.astype(np.uint8 if volume.dtype == bool else np.float32)
        image = nib.Nifti1Image(stored.transpose(2, 1, 0), affine)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / f"{name}.nii.gz")
    provenance = {
        "case_id": phantom.case_id,
        "source": "phantom: synthetic, no patient",
        "seed": seed,
        "mri_contrast": phantom.contrast,
        "ct_units": "HU",
        "masks": "true, from the drawing",
        **phantom.facts,
    }
    _write_json(folder / "study.json", provenance)


def ras_affine(shape: Sequence[int], spacing_mm: Numbers) -> NDArray[np.float64]:
    """Affine of an (x, y, z) array in RAS mm with the origin at the grid's centre.

    Args:
        shape: of the (d, h, w) tensor.
        spacing_mm: (d, h, w).
    """
    steps = np.array(spacing_mm[::-1], float)
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.array(shape[::-1]) - 1) / 2
    return affine


def _write_json(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2) + "\n")
    scratch.replace(path)
