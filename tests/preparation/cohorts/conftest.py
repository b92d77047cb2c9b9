"""Cohorts drawn in a temporary folder: tiny images under the names that the real ones have."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk


@pytest.fixture
def write() -> Callable[..., Path]:
    """Writes a tiny image, or the array it is given, and makes its folder."""

    def write_image(path: Path, array: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if array is None:
            array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        sitk.WriteImage(sitk.GetImageFromArray(array), path)
        return path

    return write_image
