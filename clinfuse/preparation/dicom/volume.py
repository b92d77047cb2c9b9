"""The volume of a DICOM series: its slices checked, in order, upright and in HU."""

from pathlib import Path
from typing import cast

import numpy as np

from clinfuse.preparation.affines import image_at, upright
from clinfuse.preparation.dicom.pixels import stack_voxels
from clinfuse.preparation.dicom.sentences import some
from clinfuse.preparation.dicom.series import Series
from clinfuse.preparation.dicom.stack import along_normal, stack_affine, without_copies
from clinfuse.preparation.scan import Modality, Scan


def read_series(series: Series, source: Path) -> Scan:
    """The volume of a series, float32, in HU for CT, its voxels where they are in the patient.

    A gantry tilt is taken out: see ``upright``. Of identical copies of a slice one is kept.
    Declared padding below -1024 HU becomes air (-1000 HU). Each with a note.

    Args:
        series: one whose ``unfit`` is empty.
        source: the folder or file it is of, for ``Scan.source`` and messages.

    Raises:
        ValueError: MONOCHROME1, slices of several sizes, no voxel size, missing, shifted or
            differing slices at one position, pixels that are cut off or cannot be decoded.
    """
    _check_slices(series, source)
    along = along_normal(series.frames)
    frames = [series.frames[k] for k in np.argsort(along, kind="stable")]
    voxels, padded = stack_voxels(frames, series.modality)
    notes = []
    kept = without_copies(frames, voxels, source)
    if len(kept) < len(frames):
        notes.append(f"{len(frames) - len(kept)} identical copies of slices were dropped")
        frames, voxels = [frames[k] for k in kept], voxels[kept]
    if padded:
        notes.append(f"{padded} voxels of padding were set to air, -1000 HU")
    if series.modality == "CT" and not series.is_rescaled:
        notes.append("the files state no rescaling: stored values were taken for HU")
    affine, tilt_deg = stack_affine(frames, source)
    image = image_at(voxels, affine)
    if tilt_deg:
        image = upright(image, outside=-1000.0 if series.modality == "CT" else 0.0)
        notes.append(f"a gantry tilt of {tilt_deg:.1f} degrees was taken out, by resampling")
    elif abs(series.gantry_tilt_deg) > 0.1:
        notes.append(
            f"the file states a gantry tilt of {series.gantry_tilt_deg:.1f} degrees, "
            "which the positions of its slices do not have"
        )
    return Scan(
        image=image,
        source=source,
        modality=cast(Modality, series.modality),
        patient=series.patient or None,
        description=series.description,
        series_uid=series.uid,
        frame_of_reference_uid=series.frame_of_reference_uid,
        notes=tuple(notes),
    )


def _check_slices(series: Series, source: Path) -> None:
    if series.photometric != "MONOCHROME2":
        raise ValueError(
            f"expected MONOCHROME2, got {series.photometric}, in which white is low and values "
            f"may be inverted: {source}"
        )
    sizes = sorted({frame.size for frame in series.frames})
    if len(sizes) > 1:
        raise ValueError(f"expected slices of one size, got {some(sizes)}: {source}")
    for frame in series.frames:
        if len(frame.pixel_mm) != 2 or not min(frame.pixel_mm) > 0:
            raise ValueError(
                f"expected a pixel size above zero, got {list(frame.pixel_mm) or 'none'}: "
                f"{frame.file}"
            )
        if not np.allclose(frame.pixel_mm, series.frames[0].pixel_mm, rtol=1e-3, atol=0):
            raise ValueError(
                f"expected slices of one pixel size, got {series.frames[0].pixel_mm} and "
                f"{frame.pixel_mm}: {frame.file}"
            )
