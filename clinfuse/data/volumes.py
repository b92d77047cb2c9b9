"""NIfTI files read into canonical tensor order and written back onto the grid they came from."""

import logging
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from scipy.ndimage import gaussian_filter
from torch import Tensor

from clinfuse.functional.claims import check_room, check_texts, unpacked

log = logging.getLogger(__name__)

Box = tuple[slice, ...]
"""Voxels of a grid from ``start`` up to ``stop`` along each of its axes, as an index."""

GRID_TOLERANCE_MM = 0.05
"""Corners of two grids may differ by this much (header rounding) and still be called one grid."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie, as stored: what is needed to write onto it again.

    Attributes:
        affine: 4x4, stored voxel index (i, j, k) to RAS millimetres.
        shape: stored size (i, j, k).
        header: NIfTI header, kept for its units and its sform and qform codes.
    """

    affine: Float[np.ndarray, "4 4"]
    shape: tuple[int, int, int]
    header: nib.Nifti1Header

    @property
    def orientation(self) -> str:
        """Where the stored axes point to, as "RAS" or "LPS"."""
        return "".join(nib.aff2axcodes(self.affine))

    @property
    def shape_dhw(self) -> tuple[int, int, int]:
        """Size in tensor order."""
        axes = io_orientation(self.affine)[:, 0].astype(int).tolist()
        x, y, z = (self.shape[axes.index(axis)] for axis in range(3))
        return z, y, x


@dataclass(frozen=True)
class Volume:
    """A scan in canonical orientation and tensor order.

    Attributes:
        array: values, d towards superior, h towards anterior, w towards the patient's right.
        affine: 4x4, canonical index (x, y, z) = (w, h, d) to RAS millimetres.
        grid: the grid of the file, for writing back.
        path: the file, for messages.
    """

    array: Float[np.ndarray, "d h w"]
    affine: Float[np.ndarray, "4 4"]
    grid: Grid
    path: Path

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size (d, h, w)."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)


def read_volume(path: Path | str) -> Volume:
    """A 3-D NIfTI file as float32 in tensor order (d, h, w), reoriented to the closest RAS.

    Axes are flipped and permuted, never resampled. A fourth axis of length one is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not NIfTI, truncated, not 3-D, not real numbers, NaN or infinite voxels, a voxel
            size of zero, an affine without volume, more than there is memory for, or more packed
            than its header says.
    """
    path = Path(path)
    with _readable(path):
        image = _open(path)
        grid = _grid(image, path)
        stored = _voxels(image, path).reshape(grid.shape)
        to_canonical = io_orientation(grid.affine)
        canonical = apply_orientation(stored, to_canonical)
        return Volume(
            array=np.ascontiguousarray(canonical.transpose(2, 1, 0)),
            affine=grid.affine @ nib.orientations.inv_ornt_aff(to_canonical, grid.shape),
            grid=grid,
            path=path,
        )


def read_grid(path: Path | str) -> Grid:
    """The grid of a 3-D NIfTI file, by its header alone: no voxel is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as ``read_volume``, except for what is wrong with voxels.
    """
    path = Path(path)
    with _readable(path):
        return _grid(_open(path), path)


def count_voxels(path: Path | str) -> int:
    """How many a NIfTI file has by its header, of which nothing else is looked at.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it can't be read.
    """
    return math.prod(_open(Path(path)).shape)


def write_volume(
    path: Path | str,
    array: Float[np.ndarray, "d h w"] | Bool[np.ndarray, "d h w"],
    like: Volume | Grid,
) -> None:
    """Write a volume in tensor order onto the stored grid of ``like``: its axes, shape and affine.

    Masks are stored as uint8, values as float32. Texts and extensions of the header, which may name
    a patient, are left out. The file appears whole or not at all: it is written beside its place
    and then moved there.

    Raises:
        ValueError: the array does not have the shape of the grid in canonical order.
    """
    path, grid = Path(path), like.grid if isinstance(like, Volume) else like
    from_canonical = ornt_transform(axcodes2ornt("RAS"), io_orientation(grid.affine))
    if array.shape != grid.shape_dhw:
        raise ValueError(
            f"expected (d, h, w) = {grid.shape_dhw} to fill the {grid.orientation} grid of "
            f"{grid.shape}, got {array.shape}: {path}"
        )
    stored = apply_orientation(array.transpose(2, 1, 0), from_canonical)
    dtype = np.uint8 if array.dtype == bool else np.float32
    image = nib.Nifti1Image(stored.astype(dtype), grid.affine, _without_texts(grid.header))
    image.header.set_data_dtype(dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        nib.save(image, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def part_of(volume: Tensor, box: Box) -> Tensor:
    """What a volume has in a box of its last axes; a view."""
    index: tuple[Any, ...] = (..., *box)
    return volume[index]


def resize(
    array: Float[np.ndarray, "d h w"], shape: Sequence[int]
) -> Float[np.ndarray, "d2 h2 w2"]:
    """The volume in another number of voxels over the same field of view, linearly.

    Axes that get coarser are smoothed first by the Gaussian that the wider voxel calls for,
    sigma = sqrt((k² - 1) / (8 ln 2)) voxels at k times the size (Cardoso et al. 2015).
    """
    coarser = [max(old / new, 1.0) for old, new in zip(array.shape, shape, strict=True)]
    sigma = [math.sqrt((k**2 - 1) / (8 * math.log(2))) for k in coarser]
    smooth = gaussian_filter(array, sigma, mode="nearest")
    tensor = torch.from_numpy(smooth)[None, None]
    return F.interpolate(tensor, tuple(shape), mode="trilinear")[0, 0].numpy()


def resized_shape(volume: Volume, spacing_mm: Sequence[float | int]) -> tuple[int, ...]:
    """Voxels (d, h, w) that fill the field of view at about ``spacing_mm``."""
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"expected three positive voxel sizes (d, h, w), got {list(spacing_mm)}")
    sizes = zip(volume.array.shape, volume.spacing_mm, spacing_mm, strict=True)
    return tuple(max(round(n * old / new), 1) for n, old, new in sizes)


def check_one_grid(volume: Volume, other: Volume) -> None:
    """Refuse two volumes whose voxels do not coincide, with both affines in the message."""
    if volume.array.shape == other.array.shape:
        corners = _corners(volume.array.shape)
        apart_mm = np.abs(corners @ (volume.affine - other.affine).T).max()
        if apart_mm <= GRID_TOLERANCE_MM:
            return
    raise ValueError(
        f"expected one grid, got {_describe(volume)} and {_describe(other)}; "
        "register and resample them first"
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Reading a file whose header may say anything.

    Raises:
        ValueError: whatever goes wrong, with the file.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"expected a NIfTI file, got a damaged one ({type(error).__name__}): {path}"
        ) from error


def _without_texts(header: nib.Nifti1Header) -> nib.Nifti1Header:
    plain = header.copy()
    plain.extensions.clear()
    for text in {"data_type", "db_name", "descrip", "aux_file", "intent_name"} & set(plain.keys()):
        plain[text] = b""
    return plain


def _open(path: Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise FileNotFoundError(f"expected a NIfTI file, found nothing at {path}")
    try:
        check_texts(path)
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"expected a NIfTI file (.nii or .nii.gz), got something unreadable "
            f"({_one_line(error)}): {path}"
        ) from error
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"expected a NIfTI file, got {type(image).__name__}: {path}")
    return image


def _grid(image: nib.Nifti1Image, path: Path) -> Grid:
    shape = image.shape[:3] if image.shape[3:] == (1,) else image.shape
    if len(shape) != 3:
        raise ValueError(f"expected a 3-D volume, got shape {image.shape}: {path}")
    _check_voxel_size(image, path)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ValueError(f"expected an invertible affine, got {_one_line(affine)}: {path}")
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        log.warning("%s states no orientation (sform and qform codes are 0): left is a guess", path)
    return Grid(affine, shape, image.header.copy())


def _check_voxel_size(image: nib.Nifti1Image, path: Path) -> None:
    """Refuse a header without voxel sizes, as it is stored: nibabel puts 1 mm where it says 0."""
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
        stored = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    size_mm = np.abs(stored.astype(np.float64))  # some writers put the sign of an axis here
    if not (np.isfinite(size_mm) & (size_mm > 0)).all():
        raise ValueError(
            f"expected voxel sizes above zero in the header, got {stored.tolist()} mm: {path}"
        )


def _voxels(image: nib.Nifti1Image, path: Path) -> Float[np.ndarray, "..."]:
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        raise ValueError(f"expected one real number a voxel, got {dtype}: {path}")
    check_room(image.shape, dtype.itemsize, path)
    stored: Any = image.dataobj
    claimed = stored.offset + math.prod(image.shape) * dtype.itemsize
    try:
        if path.suffix == ".gz":  # nibabel reads no further than the voxels: not the checksum
            image = type(image).from_bytes(unpacked(path, claimed))
        array = np.asanyarray(image.dataobj).astype(np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"expected {image.shape} voxels, got a truncated or corrupt file "
            f"({_one_line(error)}): {path}"
        ) from error
    if array.size == 0:
        raise ValueError(f"expected voxels, got an empty volume of shape {image.shape}: {path}")
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ValueError(f"expected finite voxels, got {bad} that are NaN or infinite: {path}")
    return array


def _corners(shape_dhw: tuple[int, ...]) -> Float[np.ndarray, "8 4"]:
    d, h, w = (size - 1 for size in shape_dhw)
    return np.array([(x, y, z, 1.0) for x in (0, w) for y in (0, h) for z in (0, d)])


def _describe(volume: Volume) -> str:
    d, h, w = volume.array.shape
    return f"{volume.path} of ({w}, {h}, {d}) voxels with affine {_one_line(volume.affine)}"


def _one_line(value: object) -> str:
    if isinstance(value, np.ndarray):
        value = np.round(value, 4).tolist()
    return " ".join(str(value).split())
