"""Registration of a CT to the MRI of the same head, with a verdict on whether it can be trusted.

The transform is found here; ``grids.on_grid`` applies it, once. ``registration_search`` finds rigid
motions, ``registration_quality`` judges them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.registration_deformation import affine, deformable
from clinfuse.preparation.registration_elastix import by_elastix
from clinfuse.preparation.registration_quality import Quality, Verdict, measured
from clinfuse.preparation.registration_search import Pyramid, in_one_thread, pyramid, search

Kind = Literal["none", "rigid", "affine", "deformable"]
Engine = Literal["simpleitk", "elastix"]

MIN_VOXELS = 4
"""Along an axis: fewer cannot be turned about the others."""


@dataclass(frozen=True)
class Registration:
    """Where the moving scan lies, and how sure that is.

    Attributes:
        transform: from points of the fixed scan to points of the moving one, LPS mm, as
            ``sitk.Resample`` wants it.
        kind: rigid, affine or deformable; none where the scans came aligned.
        engine: what found it.
        quality: what was measured of it.
        seconds: it took.
        seed: that gives it again.
    """

    transform: sitk.Transform
    kind: Kind
    engine: Engine
    quality: Quality
    seconds: float
    seed: int

    @property
    def verdict(self) -> Verdict:
        """Pass, warn or fail."""
        return self.quality.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """A sentence for everything that is not as it should be; none for a pass."""
        return self.quality.reasons

    def facts(self) -> dict[str, str | float]:
        """What a table can hold of it, one column each."""
        said = {"registration": self.kind, "engine": self.engine, "verdict": self.verdict}
        numbers = {name: float(value) for name, value in asdict(self.quality).items()}
        return {**said, "reasons": "; ".join(self.reasons), **numbers,
                "seconds": self.seconds, "seed": float(self.seed)}  # fmt: skip


def register(
    fixed: sitk.Image,
    moving: sitk.Image,
    kind: Kind = "rigid",
    engine: Engine = "simpleitk",
    seed: int = 0,
    control_spacing_mm: float = 40.0,
    smallest_jacobian: float = 0.3,
) -> Registration:
    """The moving scan (CT) registered to the fixed one (MRI); the same bits for the same seed.

    Args:
        fixed: 3-D, on any grid.
        moving: 3-D, on any grid; in HU, or in an 8-bit window.
        kind: none judges the alignment that the files state and changes nothing.
        engine: of the last levels; starts are always searched by SimpleITK. ``elastix`` wants the
            package itk-elastix and knows rigid and affine.
        seed: of starts and samples.
        control_spacing_mm: between control points of a deformable registration.
        smallest_jacobian: a deformation that compresses more than this is weakened until it does
            not.

    Raises:
        ValueError: for images that are not 3-D or have no contrast, and kinds an engine has not.
        ModuleNotFoundError: for elastix where it is not installed.
    """
    started = time.perf_counter()
    for name, image in (("fixed", fixed), ("moving", moving)):
        _check(name, image)
    if not 0 <= smallest_jacobian < 1 or control_spacing_mm <= 0:
        raise ValueError(
            "expected a control spacing above 0 mm and a smallest Jacobian in [0, 1), got "
            f"{control_spacing_mm} mm and {smallest_jacobian}"
        )
    ways: dict[tuple[Kind, Engine], Callable[[Pyramid, int], sitk.Transform]] = {
        ("none", "simpleitk"): _rigid,
        ("rigid", "simpleitk"): _rigid,
        ("affine", "simpleitk"): affine,
        ("deformable", "simpleitk"): partial(
            deformable,
            control_spacing_mm=control_spacing_mm,
            least_jacobian=smallest_jacobian,
        ),
        ("rigid", "elastix"): partial(by_elastix, kind="rigid"),
        ("affine", "elastix"): partial(by_elastix, kind="affine"),
    }
    if (kind, engine) not in ways:
        raise ValueError(f"expected one of {sorted(ways)}, got {(kind, engine)}")
    way, is_given = ways[kind, engine], kind == "none"
    with in_one_thread():
        both = pyramid(fixed, moving)
        still = sitk.Transform(3, sitk.sitkIdentity)
        transform = still if is_given else way(both, 2 * seed)
        elsewhere = way(both, 2 * seed + 1)
        quality = measured(both, transform, elsewhere, 2 * seed, is_given)
    return Registration(transform, kind, engine, quality, time.perf_counter() - started, seed)


def write_transform(transform: sitk.Transform, path: Path | str) -> Path:
    """Write a transform as an ITK text file (.tfm), which 3D Slicer opens; whole or not at all.

    Raises:
        ValueError: for another suffix.
    """
    path = Path(path)
    if path.suffix != ".tfm":
        raise ValueError(f"expected a file name that ends in .tfm, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        sitk.WriteTransform(transform, str(partial_file))
        partial_file.replace(path)
    finally:
        partial_file.unlink(missing_ok=True)
    return path


def _rigid(pyramid: Pyramid, seed: int) -> sitk.Transform:
    return search(pyramid, seed)[0]


def _check(name: str, image: sitk.Image) -> None:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(
            f"expected a {name} scan of one value a voxel in 3-D, got "
            f"{image.GetNumberOfComponentsPerPixel()} in {image.GetDimension()}-D"
        )
    values = sitk.GetArrayViewFromImage(image)
    if min(image.GetSize()) < MIN_VOXELS:
        raise ValueError(
            f"expected at least {MIN_VOXELS} voxels along every axis of the {name} scan, got "
            f"{image.GetSize()}"
        )
    if not np.isfinite(values).all() or values.min() == values.max():
        raise ValueError(
            f"expected finite and different values in the {name} scan, got "
            f"{values.min()} to {values.max()}"
        )
