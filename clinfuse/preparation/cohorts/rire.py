"""RIRE: unregistered CT and MRI (T1, T2, PD) of surgical patients, made to test registration.

West et al. (1997), "Comparison and evaluation of retrospective intermodality brain image
registration techniques", J Comput Assist Tomogr 21. https://rire.insight-journal.org, no
registration, CC BY 3.0 US. 18 patients, a folder to each, an archive to each image::

    patient_001/ct/{header.ascii,image.bin.Z,patient_001_ct.mhd}
    patient_001/mr_T1/{header.ascii,image.bin.Z,patient_001_mr_T1.mhd}

Archives of whole patients nest the folder twice. 16 have CT (008 and 009 do not); the patients
001 to 009 have T1, T2 and PD, some also ``_rectified`` (scanner distortion taken out), on 4 mm
slices; most of 101 to 109 have T1, T2, PD or MP-RAGE on 3 mm slices. There are no masks. The true
transformations were kept back: only ``training_001`` came with one.

``header.ascii`` and ``image.bin`` hold an image: two-byte signed big-endian integers, by column,
row and slice, CT in HU; ``.Z`` is the same after ``compress``. The MetaImage header names
``image.bin``, which has to be unpacked first, and a stray second one is about; so each image is
written anew, as MetaImage, from its ASCII header. Where there is none, a MetaImage file is taken as
it is. No position is stored: the middle of each image is put at the origin.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from clinfuse.functional.claims import check_room
from clinfuse.preparation.cohorts.inventory import (
    check_contrast,
    collect,
    folders_named,
    is_current,
    required,
    write_image,
)
from clinfuse.preparation.scan import CaseFiles

FOLDERS = {
    "t1": "mr_T1",
    "t2": "mr_T2",
    "pd": "mr_PD",
    "mprage": "mr_MP-RAGE",
    "t1_rectified": "mr_T1_rectified",
    "t2_rectified": "mr_T2_rectified",
    "pd_rectified": "mr_PD_rectified",
}
"""Our contrasts, and the folders they are in."""

LPS = {
    "L": (1, 0, 0),
    "R": (-1, 0, 0),
    "P": (0, 1, 0),
    "A": (0, -1, 0),
    "H": (0, 0, 1),
    "F": (0, 0, -1),
}
"""Where the letters of "Patient Orientation" point."""


def cases(
    root: Path, work: Path, contrast: str = "t1", skip_incomplete: bool = False
) -> list[CaseFiles]:
    """The patients' CT and the chosen MRI.

    Args:
        root: any folder above the patients.
        work: where images are written that only have an ASCII header, as ``PATIENT/ct.mha``.
        contrast: ``t1``, ``t2``, ``pd``, ``mprage``, or one of the first three ``_rectified``.
        skip_incomplete: leave patients without CT or this contrast out.

    Raises:
        FileNotFoundError: no patients, or images missing.
        ValueError: an unknown contrast, a header that cannot be used, or a patient found twice.
    """
    check_contrast(contrast, FOLDERS)

    def case(folder: Path) -> CaseFiles:
        return _case(folder, work, contrast)

    folders = [
        _innermost(folder) for folder in folders_named(root, r"(patient|training)_\d+", work)
    ]
    layout = "patient_001/{ct,mr_T1}/header.ascii"
    return collect(root, folders, case, layout, skip_incomplete)


def write_metaimage(folder: Path, to: Path) -> Path:
    """Write the image of a folder with ``header.ascii`` and ``image.bin`` or ``image.bin.Z``.

    Unpacking ``.Z`` calls the program gzip.

    Raises:
        FileNotFoundError: no voxels, or no gzip to unpack them with.
        ValueError: a header that lacks what is needed, a gantry tilt (its sign is not defined),
            or voxels that are more or fewer than it says.
    """
    header = _header(folder / "header.ascii")
    columns, rows, slices = (int(header[name]) for name in ("Columns", "Rows", "Slices"))
    check_room((columns, rows, slices), 2, folder / "header.ascii")
    voxels = _voxels(folder, 2 * columns * rows * slices)
    if len(voxels) != 2 * columns * rows * slices:
        raise ValueError(
            f"expected {columns} x {rows} x {slices} voxels of 2 bytes, got {len(voxels)} bytes: "
            f"{folder}"
        )
    array = np.frombuffer(voxels, ">i2").reshape(slices, rows, columns)
    image = sitk.GetImageFromArray(array.astype(np.int16))
    # between rows first, as ACR-NEMA has it; all the cohort's pixels are square
    between_rows, between_columns = _numbers(header["Pixel size"])
    image.SetSpacing((between_columns, between_rows, float(header["Slice thickness"])))
    letters = [letter.strip() for letter in header["Patient Orientation"].split(":")]
    image.SetDirection(np.array([LPS[letter] for letter in letters], float).T.ravel().tolist())
    middle = [(size - 1) / 2 for size in image.GetSize()]
    image.SetOrigin([-x for x in image.TransformContinuousIndexToPhysicalPoint(middle)])
    return write_image(image, to)


def _case(folder: Path, work: Path, contrast: str) -> CaseFiles:
    name = folder.name
    images = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_image(path)
    }
    found = required(images, {"mri": FOLDERS[contrast], "ct": "ct"}, name, folder)
    files = {what: _file(path, work / name) for what, path in found.items()}
    return CaseFiles(name, name, files)


def _innermost(folder: Path) -> Path:
    nested = folder / folder.name
    return _innermost(nested) if nested.is_dir() else folder


def _holds_image(folder: Path) -> bool:
    return (folder / "header.ascii").is_file() or bool(_metaimages(folder))


def _metaimages(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.mhd"), *folder.glob("*.mha")])


def _file(folder: Path, work: Path) -> Path:
    header = folder / "header.ascii"
    if header.is_file():
        to = work / f"{folder.name}.mha"
        if not is_current(to, header):
            write_metaimage(folder, to)
        return to
    there = _metaimages(folder)
    if len(there) > 1:
        raise ValueError(f"expected one MetaImage, got {[path.name for path in there]}: {folder}")
    return there[0]


def _header(path: Path) -> Mapping[str, str]:
    header: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        keyword, found, value = line.partition(":=")
        if found:
            header.setdefault(keyword.strip(), value.strip())
    needed = {
        "Columns": r"[1-9]\d*",
        "Rows": r"[1-9]\d*",
        "Slices": r"[1-9]\d*",
        "Pixel size": r"[\d.]+\s*:\s*[\d.]+",
        "Slice thickness": r"[\d.]+",
        "Patient Orientation": r"[LR]\s*:\s*[PA]\s*:\s*[HF]",
    }
    for keyword, pattern in needed.items():
        if not re.fullmatch(pattern, header.get(keyword, "")):
            raise ValueError(f"expected {keyword!r}, got {header.get(keyword)!r}: {path}")
    if min(*_numbers(header["Pixel size"]), float(header["Slice thickness"])) <= 0:
        raise ValueError(f"expected positive voxel sizes, got 0 mm: {path}")
    tilt = header.get("Gantry tilt", "0")
    if not re.fullmatch(r"[-+]?[0.]*", tilt.split()[0] if tilt else "0"):
        raise ValueError(f"expected no gantry tilt, got {tilt}: {path}")
    return header


def _numbers(value: str) -> list[float]:
    return [float(number) for number in value.split(":")]


def _voxels(folder: Path, claimed: int) -> bytes:
    """What is stored; of more than the header claims only so much that it can be seen."""
    plain, packed = folder / "image.bin", folder / "image.bin.Z"
    if plain.is_file():
        return plain.read_bytes()
    if not packed.is_file():
        raise FileNotFoundError(f"expected image.bin or image.bin.Z, found neither: {folder}")
    gzip = shutil.which("gzip")
    if gzip is None:
        raise FileNotFoundError(f"expected the program gzip to unpack {packed}, found none")
    command = [gzip, "-dc", str(packed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        content = running.stdout.read(claimed + 1)
        if len(content) > claimed:
            running.kill()
            return content
        said = running.stderr.read()
    if running.returncode != 0:
        raise ValueError(f"expected a file of compress, got {said.decode()!r}: {packed}")
    return content
