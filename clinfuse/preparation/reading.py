"""A scan from any file a scanner, an archive or a cohort hands out, checked before it is used."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from pydicom.misc import is_dicom

from clinfuse.functional.claims import check_room, check_texts, unpacked
from clinfuse.preparation.affines import affine_of, image_at, upright
from clinfuse.preparation.dicom.headers import list_series, series_of_file
from clinfuse.preparation.dicom.series import choose_series
from clinfuse.preparation.dicom.volume import read_series
from clinfuse.preparation.images import check_header
from clinfuse.preparation.scan import Scan

NIFTI, ITK_FORMATS = (".nii", ".nii.gz"), (".nrrd", ".nhdr", ".mha", ".mhd")
"""File endings, by who reads them."""

SHEAR_TOLERANCE = 2e-4
"""Cosine between two axes that are still called perpendicular (headers of four digits)."""

SOFT_TISSUE_HU = (-20.0, 100.0)
"""Brain, CSF, muscle and blood."""

LEAST_HU = -1024.0
"""CT has nothing below: scanners fill the corners that they do not see with -2048 or so."""

LEAST_EXTENT_MM, MOST_EXTENT_MM = 2.0, 20_000.0
"""A head whose header counts in metres is 0.2 across, and in micrometres 200,000."""

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_scan(path: Path | str, series: str | int | None = None) -> Scan:
    """The scan in a NIfTI, NRRD or MetaImage file, in a DICOM file, or in a folder of DICOM.

    Axes and voxels are as stored, float32, in LPS millimetres, CT in HU. Only sheared axes (a
    gantry tilt) are resampled onto perpendicular ones, with a note.

    Args:
        path: a file (.nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or DICOM whatever its name) or a
            folder.
        series: which series of the folder: UID, number in the list of ``list_series`` (from 1), or
            a part of one description. None takes the only one that is a volume.

    Raises:
        FileNotFoundError: nothing there, or no DICOM in the folder.
        ValueError: what cannot be used, in one sentence: see ``choose_series`` and
            ``read_series``; and a truncated file, an image that is not 3-D, colour, NaN,
            a voxel size of zero or in metres, a header that contradicts itself on left and right.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a scan, found nothing at {path}")
    try:
        return _scan(path, series)
    except FileNotFoundError:
        raise
    except Exception as error:  # reading a damaged header may fail in any way
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(
            f"expected a scan, got a truncated or corrupt one ({type(error).__name__}): {path}"
        ) from error


def _scan(path: Path, series: str | int | None) -> Scan:
    if path.is_dir():
        return _dicom(path, series)
    if path.name.lower().endswith(NIFTI):
        return _nifti(path)
    if path.suffix.lower() in ITK_FORMATS:
        return _itk(path)
    if is_dicom(path):
        return _dicom(path, series)
    raise ValueError(
        f"expected DICOM or a file in {', '.join(NIFTI + ITK_FORMATS)}, got another: {path}"
    )


def looks_like_ct(image: sitk.Image) -> bool | None:
    """Whether the intensities are those of a CT in HU; None where they do not tell.

    CT has air near -1000 and a fifth or more of the rest between -20 and 100 HU; MRI has nothing
    far below zero. An 8-bit window, values scaled to [0, 1], a CT cropped to the brain or stored
    with an offset of 1000 do not tell.
    """
    values = sitk.GetArrayViewFromImage(image)
    low = values < -200
    if low.all():
        return None
    if low.mean() > 1e-3:
        air = (values[low] <= -800).mean()
        return True if air > 0.2 and _share(values[~low], *SOFT_TISSUE_HU) > 0.2 else None
    least, most = float(values.min()), float(values.max())
    if least >= 0 and (most <= 1 or (most <= 255 and bool((values == np.rint(values)).all()))):
        return None
    tissue = values[values > 200]
    if (values < -20).mean() > 1e-3 or (tissue.size and _share(tissue, 980.0, 1124.0) > 0.4):
        return None
    return False


def check_not_swapped(mri: Scan, ct: Scan) -> None:
    """Refuse a CT given as MRI, an MRI given as CT, and both.

    By what the files say where they do, else by intensities; what these do not tell passes.

    Raises:
        ValueError: in one sentence, with the file.
    """
    mri_is_ct, ct_is_ct = _is_ct(mri), _is_ct(ct)
    if mri_is_ct and ct_is_ct is False:
        raise ValueError(f"expected mri={ct.source} and ct={mri.source}, got them swapped")
    if mri_is_ct:
        raise ValueError(f"expected an MRI, got a CT{_evidence(mri)}: {mri.source}")
    if ct_is_ct is False:
        raise ValueError(f"expected a CT, got an MRI{_evidence(ct)}: {ct.source}")


def check_not_uniform(scan: Scan) -> None:
    """Refuse a scan that shows nothing: one value in every voxel.

    Raises:
        ValueError: in one sentence, with the file.
    """
    values = sitk.GetArrayViewFromImage(scan.image)
    if values.min() == values.max():
        raise ValueError(
            f"expected an image, got {values.min() + 0.0:g} in every voxel: {scan.source}"
        )


def mixed_up(mri: Scan, ct: Scan) -> list[str]:
    """The doubt that files which name two patients raise; none where one of them names nobody."""
    if mri.patient is None or ct.patient is None or mri.patient == ct.patient:
        return []
    return ["the files of MRI and CT name two patients: one person in two archives, or a mix-up"]


def _is_ct(scan: Scan) -> bool | None:
    return looks_like_ct(scan.image) if scan.modality is None else scan.modality == "CT"


def _evidence(scan: Scan) -> str:
    return " by its intensities" if scan.modality is None else f" (its files say {scan.modality})"


def _share(values: Float[np.ndarray, "..."], low: float, high: float) -> float:
    return float(((values >= low) & (values <= high)).mean())


def _dicom(path: Path, series: str | int | None) -> Scan:
    found = list_series(path) if path.is_dir() else series_of_file(path)
    chosen = choose_series(found, path, series)
    return read_series(chosen, path)


def _nifti(path: Path) -> Scan:
    header, array = _nifti_content(path)
    notes = []
    sform, qform = header.get_sform(coded=True), header.get_qform(coded=True)
    if not sform[1]:
        _check_voxel_size(header, path)
    if sform[1] and qform[1]:
        _check_left_and_right(sform[0], qform[0], path)
        corners = np.array([*np.ndindex(2, 2, 2)]) * np.subtract(array.shape[::-1], 1)
        corners = np.c_[corners, np.ones(8)]
        apart_mm = np.linalg.norm(corners @ (sform[0] - qform[0]).T, axis=1).max()
        if apart_mm > 1:
            notes.append(
                f"sform and qform place it up to {apart_mm:.0f} mm apart; the sform counts"
            )
    elif not sform[1] and not qform[1]:
        notes.append("the header states no orientation (sform and qform codes are 0): assumed")
    affine = RAS_TO_LPS @ header.get_best_affine()
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not spacing_mm.min() > 0:
        raise ValueError(f"expected voxel sizes above zero, got {spacing_mm.tolist()}: {path}")
    if abs(np.linalg.det(affine[:3, :3] / spacing_mm)) < 0.1:
        raise ValueError(f"expected three axes, got an affine of fewer: {path}")
    return _checked(image_at(array, affine), path, notes)


def _nifti_content(path: Path) -> tuple[nib.Nifti1Header, Float[np.ndarray, "k j i"]]:
    try:
        check_texts(path)
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise ValueError(f"expected a NIfTI file, got {type(image).__name__}: {path}")
        if image.get_data_dtype().kind not in "iufb":
            raise ValueError(
                f"expected one real number a voxel, got {image.get_data_dtype()}, colour or "
                f"complex: {path}"
            )
        shape = _three_dimensional(image.shape, path)
        each = image.get_data_dtype().itemsize
        check_room(shape, each, path)
        if path.suffix == ".gz":  # nibabel reads no further than the voxels: not the checksum
            stored: Any = image.dataobj
            whole = unpacked(path, stored.offset + math.prod(shape) * each)
            image = type(image).from_bytes(whole)
        array = np.asanyarray(image.dataobj).reshape(shape)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"expected a whole NIfTI file, got a truncated or corrupt one: {path}"
        ) from error
    return image.header, np.ascontiguousarray(array.T.astype(np.float32))


def _check_voxel_size(header: nib.Nifti1Header, path: Path) -> None:
    """Refuse sizes of zero as they are in the file: nibabel makes them 1 when it opens it."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        raw = type(header)(file.read(header.sizeof_hdr), check=False)
    sizes = raw["pixdim"][1:4]
    if not np.isfinite(sizes).all() or not sizes.min() > 0:
        raise ValueError(f"expected voxel sizes above zero, got {sizes.tolist()}: {path}")


def _check_left_and_right(
    sform: Float[np.ndarray, "4 4"], qform: Float[np.ndarray, "4 4"], path: Path
) -> None:
    codes = [nib.aff2axcodes(affine) for affine in (sform, qform)]
    is_mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    if is_mirrored or any({a, b} == {"L", "R"} for a, b in zip(*codes, strict=True)):
        raise ValueError(
            "expected sform and qform to agree on left and right, got "
            f"{' and '.join(''.join(map(str, code)) for code in codes)}, of which one is flipped: "
            f"{path}"
        )


def _itk(path: Path) -> Scan:
    check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise ValueError(
                f"expected one number a voxel, got {reader.GetNumberOfComponents()}, as of "
                f"colour: {path}"
            )
        size = reader.GetSize()
        check_room(_three_dimensional(size, path), 1, path)  # at least
        reader.SetExtractSize([*size[:3], *(0 for _ in size[3:])])
        image = reader.Execute()
    except RuntimeError as error:
        if "spacing" in str(error):
            raise ValueError(f"expected voxel sizes above zero, got one of zero: {path}") from error
        raise ValueError(
            "expected a whole image, got one that is truncated, corrupt or without its data file: "
            f"{path}"
        ) from error
    if not min(image.GetSpacing()) > 0:
        raise ValueError(f"expected voxel sizes above zero, got {image.GetSpacing()}: {path}")
    notes = []
    if path.suffix.lower() in (".nrrd", ".nhdr") and not reader.HasMetaDataKey("NRRD_space"):
        notes.append("the header states no orientation (no space): assumed")
    return _checked(sitk.Cast(image, sitk.sitkFloat32), path, notes)


def _three_dimensional(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise ValueError(f"expected a 3-D image, got {len(shape)}-D {tuple(shape)}: {path}")
    return shape[:3]


def _checked(image: sitk.Image, path: Path, notes: list[str]) -> Scan:
    """A scan of finite voxels and perpendicular axes, without padding below air."""
    extent_mm = max(n * size for n, size in zip(image.GetSize(), image.GetSpacing(), strict=True))
    if not LEAST_EXTENT_MM <= extent_mm <= MOST_EXTENT_MM:
        units = "metres" if extent_mm < LEAST_EXTENT_MM else "other units"
        raise ValueError(
            f"expected a head in millimetres, got a field of view of {extent_mm:.2g} mm, as of a "
            f"header in {units}: {path}"
        )
    array = sitk.GetArrayViewFromImage(image)
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ValueError(f"expected finite voxels, got {bad} that are NaN or infinite: {path}")
    if array.min() < LEAST_HU and looks_like_ct(image):
        notes.append(
            f"{int((array < LEAST_HU).sum())} voxels below {LEAST_HU:g} HU, which are padding, "
            "were set to air, -1000 HU"
        )
        image = sitk.Threshold(image, LEAST_HU, float(array.max()), -1000.0)
        array = sitk.GetArrayViewFromImage(image)
    axes = np.reshape(image.GetDirection(), (3, 3))
    shear = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if shear > SHEAR_TOLERANCE:
        image = upright(image, outside=float(array.min()))
        notes.append(
            f"its axes are {90 - np.degrees(np.arcsin(shear)):.1f} degrees apart, as of a tilted "
            "gantry; it was resampled onto perpendicular ones"
        )
    else:
        image = image_at(sitk.GetArrayFromImage(image), _perpendicular(affine_of(image)))
    return Scan(image=image, source=path, notes=tuple(notes))


def _perpendicular(affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The affine with the rounding of its header taken out of its axes."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing_mm)
    closest = affine.copy()
    closest[:3, :3] = left @ right * spacing_mm
    return closest
