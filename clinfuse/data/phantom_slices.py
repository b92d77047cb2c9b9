"""Phantom patients as sets of 2-D pairs, in the layout that ``data.slices`` reads."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from clinfuse.data.made_once import one_at_a_time
from clinfuse.data.phantoms import Phantom, make_phantom

Bytes = NDArray[np.uint8]

FOLDERS = {"ct_mri": "CT", "spect_mri": "SPECT"}
"""Kind of pair -> folder of the second source; MRI is the first."""

CT_WINDOW_HU = (-160.0, 240.0)
"""40/400: bone saturates, as it does in the atlas."""

SPECT_BLUR_MM = 4.0
"""Standard deviation of the resolution of a SPECT camera (a full width of 9 mm), in the slice."""


def write_slices(
    folder: str | Path,
    kind: str,
    patients: int,
    slices: int = 4,
    seed: int = 0,
    shape: Sequence[int] = (128, 128),
    field_mm: float = 230.0,
) -> Path:
    """Write ``MRI`` and ``CT`` or ``SPECT`` of phantom patients as 8-bit PNG; returns the folder.

    Patient p's slice s is ``{p + 1}{s:03d}.png``, as in the Whole Brain Atlas. The CT is in the
    40/400 window; the SPECT shows brain tissue, less of it where there is an infarct, blurred and
    in pseudo-colour. A set that is there already is left alone, and none is there by halves.

    Args:
        folder: of the set.
        kind: ``ct_mri`` or ``spect_mri``.
        patients: how many heads, at most 99.
        slices: of each, evenly from the middle half of the head.
        seed: of the cohort.
        shape: (h, w) of a picture.
        field_mm: how wide it is along h.

    Raises:
        ValueError: for another kind, or more patients than names.
    """
    folder = Path(folder)
    if kind not in FOLDERS:
        raise ValueError(f"expected a kind of {', '.join(FOLDERS)}, got {kind!r}")
    if not 1 <= patients <= 99:
        raise ValueError(f"expected 1 to 99 patients, got {patients}")
    if folder.is_dir():
        return folder
    with one_at_a_time(folder.parent / f".{folder.name}.lock"):
        if not folder.is_dir():
            _write_set(folder, kind, patients, slices, seed, shape, field_mm)
    return folder


def _write_set(
    folder: Path,
    kind: str,
    patients: int,
    slices: int,
    seed: int,
    shape: Sequence[int],
    field_mm: float,
) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in ("MRI", FOLDERS[kind]):
            (scratch / name).mkdir()
        pixel_mm = field_mm / shape[0]
        for patient in range(patients):
            phantom = make_phantom(
                patient, seed, (2 * slices, *shape), (60.0 / slices, pixel_mm, pixel_mm), "t2"
            )
            second = ct_bytes(phantom) if kind == "ct_mri" else spect_bytes(phantom)
            for s in range(slices):
                name, at = f"{patient + 1}{s:03d}.png", slices // 2 + s
                for source, pixels in (("MRI", mri_bytes(phantom)), (FOLDERS[kind], second)):
                    # rows run from the front of the head to its back
                    Image.fromarray(np.ascontiguousarray(pixels[at, ::-1])).save(
                        scratch / source / name
                    )
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def mri_bytes(phantom: Phantom) -> Bytes:
    """The MRI from black to its 99.5th percentile in the head, (d, h, w)."""
    white = np.percentile(phantom.mri[phantom.brain | phantom.bone], 99.5)
    return _to_bytes(phantom.mri / white)


def ct_bytes(phantom: Phantom) -> Bytes:
    """The CT in ``CT_WINDOW_HU``, (d, h, w)."""
    low, high = CT_WINDOW_HU
    return _to_bytes((phantom.ct_hu - low) / (high - low))


def spect_bytes(phantom: Phantom) -> Bytes:
    """Uptake in pseudo-colour from black through red and yellow to white, (d, h, w, rgb)."""
    uptake = (phantom.brain & ~phantom.lesion) * (0.4 + 0.6 * (phantom.clean_ct_hu > 32))
    blur = [0.0, *(SPECT_BLUR_MM / mm for mm in phantom.spacing_mm[1:])]
    level = gaussian_filter(uptake.astype(np.float32), blur)
    return _to_bytes(np.stack([3 * level, 3 * level - 1, 3 * level - 2], -1))


def _to_bytes(values: NDArray[np.floating]) -> Bytes:
    return (255 * values.clip(0, 1)).round().astype(np.uint8)
