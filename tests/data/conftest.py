"""A head simple enough to know every voxel of, written as a study folder."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SPACING_MM = (4.0, 3.0, 2.0)
SHAPE = (14, 20, 26)

MakeStudy = Callable[..., Path]


def head(shape: tuple[int, ...] = SHAPE, spacing_mm: tuple[float, ...] = SPACING_MM) -> dict:
    """Arrays (d, h, w): an ellipsoid head, brain 30 HU, skull 1000 HU, a lesion to the right."""
    axes = [np.arange(n) - (n - 1) / 2 for n in shape]
    grid = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(sum((x / (0.5 * n)) ** 2 for x, n in zip(grid, shape, strict=True)))
    brain, bone = radius < 0.65, (radius >= 0.65) & (radius < 0.85)
    position_mm = [x * s for x, s in zip(grid, spacing_mm, strict=True)]
    lesion = brain & (sum((p - c) ** 2 for p, c in zip(position_mm, (0, 0, 8), strict=True)) < 36)
    texture = np.random.default_rng(0).normal(0, 20, shape)
    return {
        "mri": np.where(brain, 400 + 200 * lesion + texture, np.where(bone, 60.0, 5.0)),
        "ct": np.where(brain, 30.0, np.where(bone, 1000.0, -1000.0)),
        "brain_mask": brain,
        "bone_mask": bone,
        "lesion_mask": lesion,
    }


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """A tensor-order array as NIfTI, written by nibabel alone."""
    stored = array.transpose(2, 1, 0).astype(np.uint8 if array.dtype == bool else np.float32)
    nib.save(nib.Nifti1Image(stored, affine), path)


@pytest.fixture
def head_of() -> Callable[..., dict]:
    """``head``: the arrays that ``make_study`` writes, of any shape."""
    return head


@pytest.fixture
def make_study(tmp_path: Path) -> MakeStudy:
    """Writes ``case`` under a cohort folder; ``without`` and ``instead`` drop and replace files."""

    def make(case: str = "case_01", without: tuple[str, ...] = (), **instead: np.ndarray) -> Path:
        folder = tmp_path / "cohort" / case
        folder.mkdir(parents=True)
        affine = np.diag([*reversed(SPACING_MM), 1.0])
        affine[:3, 3] = (-25.0, -28.5, -26.0)
        for name, array in {**head(), **instead}.items():
            if name not in without:
                write(folder / f"{name}.nii.gz", array, affine)
        return folder

    return make
