"""The slices of a series and the stack that they make: where each lies, and if they lie evenly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from clinfuse.preparation.dicom.sentences import some

FEWEST_SLICES = 5
"""Fewer are a localiser or a sample, not a volume."""

POSITION_TOLERANCE_MM = 0.01
"""Positions are decimal strings that scanners round, to this or better."""

DRIFT_TOLERANCE_MM = 0.1
"""Slices that run sideways by less than this over the whole stack are not called tilted."""

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """One slice: where its pixels are stored, and where they lie in the patient.

    Attributes:
        file: a single-frame file, or the one that holds this among other frames.
        index: of the frame in its file, from 0.
        instance_uid: SOP Instance UID of the file.
        class_uid: SOP Class UID of the file.
        size: (columns, rows).
        position_mm: centre of the first pixel, LPS; empty where the file says nothing.
        cosines: direction of the rows and of the columns, LPS; empty where the file says nothing.
        pixel_mm: pixel size (along a row, along a column); empty where the file says nothing.
        slope, intercept: stored value to the scanner's units (HU for CT).
    """

    file: Path
    index: int
    instance_uid: str
    class_uid: str
    size: tuple[int, int]
    position_mm: Vector
    cosines: Vector
    pixel_mm: Vector
    slope: float
    intercept: float


def along_normal(frames: Sequence[Frame]) -> Float[np.ndarray, " n"]:
    """Where parallel slices lie along the normal of the first, in mm."""
    return np.array([frame.position_mm for frame in frames]) @ _axes(frames[0])[:, 2]


def without_copies(
    frames: Sequence[Frame], voxels: Float[np.ndarray, "k j i"], source: Path
) -> list[int]:
    """Indices of the slices less identical copies, of slices that are sorted by position.

    Args:
        frames: the slices.
        voxels: of each slice.
        source: the folder or file, for messages.

    Raises:
        ValueError: slices at one position that differ.
    """
    along = along_normal(frames)
    kept: list[int] = []
    for k in range(len(frames)):
        if not kept or along[k] - along[kept[-1]] > POSITION_TOLERANCE_MM:
            kept.append(k)
        elif not np.array_equal(voxels[k], voxels[kept[-1]]):
            raise ValueError(
                f"expected one slice at each position, got two that differ at "
                f"{along[k]:.2f} mm ({_one_name(frames[kept[-1]])} and {_one_name(frames[k])}), "
                f"as of two echoes, times or reconstructions: {source}"
            )
    return kept


def stack_affine(frames: Sequence[Frame], source: Path) -> tuple[Float[np.ndarray, "4 4"], float]:
    """Index (i, j, k) to LPS millimetres for evenly spaced slices, and their tilt in degrees.

    Args:
        frames: the slices, sorted by position, each position once.
        source: the folder or file, for messages.

    Raises:
        ValueError: too few slices, uneven ones, as where some are missing, or one beside the line
            of the others.
    """
    if len(frames) < FEWEST_SLICES:
        raise ValueError(
            f"expected at least {FEWEST_SLICES} slices, got {len(frames)} positions: {source}"
        )
    axes, along = _axes(frames[0]), along_normal(frames)
    gaps_mm = np.diff(along)
    usual_mm = float(np.median(gaps_mm))
    tolerance_mm = 0.01 * usual_mm + POSITION_TOLERANCE_MM
    odd = np.flatnonzero(np.abs(gaps_mm - usual_mm) > tolerance_mm)
    if odd.size:
        gaps = [f"{gaps_mm[k]:.2f} mm from {along[k]:.2f} to {along[k + 1]:.2f} mm" for k in odd]
        raise ValueError(
            f"expected slices {usual_mm:.2f} mm apart, got {some(gaps)} along their normal, as "
            f"where slices are missing: {source}"
        )
    positions = np.array([frame.position_mm for frame in frames])
    steps = np.arange(len(frames))[:, None]
    step = (positions[-1] - positions[0]) / (len(frames) - 1)
    shifted = np.linalg.norm(positions - (positions[0] + steps * step), axis=1)
    if shifted.max() > tolerance_mm:
        raise ValueError(
            f"expected slices in one line, got {_one_name(frames[int(shifted.argmax())])} "
            f"{shifted.max():.2f} mm beside it: {source}"
        )
    across = step - (step @ axes[:, 2]) * axes[:, 2]
    drift = across * (len(frames) - 1)
    origin, tilt_deg = positions[0], 0.0
    if np.linalg.norm(drift) > DRIFT_TOLERANCE_MM:
        tilt_deg = float(np.degrees(np.arctan2(np.linalg.norm(across), step @ axes[:, 2])))
    else:
        origin, step = origin + drift / 2, step - across
    i_mm, j_mm = frames[0].pixel_mm
    affine = np.eye(4)
    affine[:3] = np.stack([axes[:, 0] * i_mm, axes[:, 1] * j_mm, step, origin], axis=1)
    return affine, tilt_deg


def _axes(frame: Frame) -> Float[np.ndarray, "3 3"]:
    """Unit vectors along rows, along columns and across slices, as columns of a matrix."""
    row, column = np.reshape(frame.cosines, (2, 3))
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column = column / np.linalg.norm(column)
    return np.stack([row, column, np.cross(row, column)], axis=1)


def _one_name(frame: Frame) -> str:
    return f"{frame.file.name} frame {frame.index + 1}" if frame.index else frame.file.name
