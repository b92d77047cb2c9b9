"""What every importer checks: that there are cases, that each is complete, and named once."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import SimpleITK as sitk

from clinfuse.preparation import images
from clinfuse.preparation.scan import CaseFiles

log = logging.getLogger(__name__)

Source = TypeVar("Source")

PAIR = {"mri": "mri", "ct": "ct"}
"""Files that are called what a study calls them."""

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
"""Formats of single files that ``reading`` reads."""


def collect(
    root: Path,
    sources: Iterable[Source],
    case: Callable[[Source], CaseFiles],
    layout: str,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """The cases of a cohort, by name, each made of one source.

    All cases are looked at before any of them is complained of.

    Args:
        root: the cohort's folder, for messages.
        sources: what ``case`` makes cases of: folders, for most cohorts.
        layout: what was looked for, as ``1BA001/{mr,ct,mask}.nii.gz``.
        skip_incomplete: leave cases that lack a file out, with a warning, instead of refusing all.

    Raises:
        FileNotFoundError: no cases, or some that lack a file.
        ValueError: cases that cannot be used, or two of one name.
    """
    found: list[CaseFiles] = []
    lacking: list[str] = []
    unusable: list[str] = []
    for source in sources:
        try:
            found.append(case(source))
        except FileNotFoundError as error:
            lacking.append(str(error))
        except ValueError as error:
            unusable.append(str(error))
    if unusable:
        raise ValueError(_listed(f"expected cases that can be used in {root}", unusable + lacking))
    if lacking and (not found or not skip_incomplete):
        raise FileNotFoundError(_listed(f"expected complete cases in {root}", lacking))
    if not found:
        raise FileNotFoundError(f"expected cases as {layout}, found none in {root}")
    for sentence in lacking:
        log.warning("left out: %s", sentence)
    _check_unique(found, root)
    return sorted(found, key=lambda one: one.case_id)


def folders_named(root: Path, pattern: str, work: Path | None = None) -> Iterator[Path]:
    """Folders at any depth of ``root``, or ``root`` itself, whose whole name matches ``pattern``.

    Nothing is looked for inside of those that match, in hidden folders, or in ``work``, where
    converted files lie under the same names.

    Raises:
        FileNotFoundError: ``root`` is no folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of a cohort, found none at {root}")
    if re.fullmatch(pattern, root.name):
        yield root
        return
    for name, inside, _ in os.walk(root):
        inside[:] = sorted(
            one for one in inside if not one.startswith(".") and not is_same(Path(name, one), work)
        )
        for folder in [one for one in inside if re.fullmatch(pattern, one)]:
            yield Path(name, folder)
        inside[:] = [one for one in inside if not re.fullmatch(pattern, one)]


def is_same(folder: Path, other: Path | None) -> bool:
    """Whether the two are one folder, by whatever path."""
    return other is not None and folder.resolve() == other.resolve()


def image_named(folder: Path, name: str) -> Path | None:
    """The image file of that name, in any of ``IMAGE_SUFFIXES``; None where there is none.

    Raises:
        ValueError: more than one.
    """
    there = [path for suffix in IMAGE_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
    if len(there) > 1:
        raise ValueError(f"expected one {name}, got {[path.name for path in there]}: {folder}")
    return there[0] if there else None


def images_named(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Those of several image files that there are, as ``image_named`` finds each.

    Args:
        names: of the files, without their suffixes, by what the cohort calls such an image.
    """
    return {what: path for what, name in names.items() if (path := image_named(folder, name))}


def required(
    images: Mapping[str, Path], wanted: Mapping[str, str], case_id: str, folder: Path
) -> dict[str, Path]:
    """The files of a case by what a study calls them.

    Args:
        images: what there is, by what the cohort calls it.
        wanted: what the cohort calls an image by what a study does, as ``{"mri": "adc"}``.
        folder: of the case, for the message.

    Raises:
        FileNotFoundError: one is missing; the message says what there is.
    """
    for name in wanted.values():
        if name not in images:
            raise FileNotFoundError(
                f"case {case_id}: expected {name}, found {sorted(images) or 'no image'}: {folder}"
            )
    return {ours: images[theirs] for ours, theirs in wanted.items()}


def check_contrast(contrast: str, known: Iterable[str]) -> None:
    """Refuse an MRI contrast that the cohort does not have."""
    known = list(known)
    if contrast not in known:
        raise ValueError(f"expected a contrast of {known}, got {contrast!r}")


def read_image(path: Path) -> sitk.Image:
    """An image file, as SimpleITK has it.

    Raises:
        ValueError: it cannot be read, or there is no memory for it.
    """
    try:
        return images.read_image(path)
    except RuntimeError as error:
        raise ValueError(f"expected an image, got something unreadable: {path}") from error


def is_current(path: Path, *sources: Path) -> bool:
    """Whether a converted file is there and no older than what it was made of."""
    if not path.is_file():
        return False
    return path.stat().st_mtime >= max(source.stat().st_mtime for source in sources)


def write_image(image: sitk.Image, path: Path) -> Path:
    """Write an image so that it appears whole or not at all; its folder is made.

    It is read back before it gets its name: on a full disk ITK writes part of a NIfTI file and
    says nothing.

    Raises:
        OSError: it could not be written, for want of space (``ENOSPC``) or of a right to.
    """
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, partial, useCompression=True)
        if sitk.Hash(sitk.ReadImage(partial)) != sitk.Hash(image):
            raise OSError("part of it")
        partial.replace(path)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        refused = OSError(f"expected to write an image, got {reason}: {path}")
        refused.errno = _errno_of(error, image, path.parent)
        raise refused from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _errno_of(error: Exception, image: sitk.Image, folder: Path) -> int:
    """The system's number of what went wrong, which ITK does not pass on."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    needed = image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()
    return errno.ENOSPC if shutil.disk_usage(folder).free < needed else errno.EIO


def _listed(expected: str, sentences: list[str]) -> str:
    if len(sentences) == 1:
        return f"{expected}, got one that is not: {sentences[0]}"
    return "\n  ".join([f"{expected}, got {len(sentences)} that are not:", *sentences])


def _check_unique(cases: list[CaseFiles], root: Path) -> None:
    ids = [case.case_id for case in cases]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1})
    if twice:
        places = {
            case_id: [str(c.files["mri"].parent) for c in cases if c.case_id == case_id]
            for case_id in twice
        }
        raise ValueError(f"expected each case once, got {places}: {root}")
