"""Voxel sizes as callers hold them: one row for all cases, or one row a case."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

SpacingMm = Sequence[float | int] | Float[Tensor, "b n"]
"""Voxel size in mm in the order of the spatial axes: one row for all cases, or one row a case."""


def shared_spacing(spacing_mm: SpacingMm) -> tuple[float, ...]:
    """The one row of voxel sizes that all cases of a batch have.

    Raises:
        ValueError: if the cases differ, or a size is not positive.
    """
    if not isinstance(spacing_mm, Tensor):
        return _positive(spacing_mm)
    rows = spacing_mm.detach().cpu()
    if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-4):
        raise ValueError(f"expected one voxel spacing for the whole batch, got {rows.tolist()}")
    return _positive(rows[0].tolist())


def spacing_of_each(spacing_mm: SpacingMm, cases: int) -> list[tuple[float, ...]]:
    """One row of voxel sizes a case.

    Raises:
        ValueError: if there is not one row for each case, or a size is not positive.
    """
    if not isinstance(spacing_mm, Tensor):
        return [_positive(spacing_mm)] * cases
    if len(spacing_mm) != cases:
        raise ValueError(f"expected {cases} rows of voxel spacing, got {len(spacing_mm)}")
    return [_positive(row) for row in spacing_mm.detach().cpu().tolist()]


def _positive(row: Sequence[float | int]) -> tuple[float, ...]:
    if not all(size > 0 for size in row):
        raise ValueError(f"expected voxel sizes above 0 mm, got {list(row)}")
    return tuple(float(size) for size in row)
