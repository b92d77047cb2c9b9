"""BraTS: brain tumours, T1, contrast-enhanced T1, T2 and FLAIR with expert labels; no CT.

Menze et al. (2015), IEEE TMI 34; Baid et al. (2021), arXiv:2107.02314; the challenges of 2023 and
later on Synapse (syn51156910). Handed out on registration, each year under its own terms; do not
redistribute. Names by year, a folder to each case::

    BraTS20_Training_001/BraTS20_Training_001_{t1,t1ce,t2,flair,seg}.nii(.gz)      2020
    BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz                  2021
    BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz           2023 and later

All contrasts are registered to one another, on 1 mm voxels, and skull-stripped: the head outside of
the brain is gone. Labels until 2021 are 1 (necrotic core), 2 (oedema) and 4 (enhancing tumour);
from 2023 on 3 is the enhancing tumour, and in the gliomas of 2024 that were treated 4 is the cavity
that surgery left, which is no lesion. The lesion mask is made of labels 1, 2 and 4, or 1, 2 and 3,
by the case's name; others are refused until ``labels`` says what to do with them.

From 2023 on the last number is the visit and what precedes it the patient: ``BraTS-GLI-00000-000``
and ``-001`` are one person. Before, each case is taken for a patient, for the names do not tell.
The same people appear in several years under other numbers: never split across years.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.cohorts.inventory import (
    check_contrast,
    collect,
    folders_named,
    image_named,
    is_current,
    read_image,
    required,
    write_image,
)
from clinfuse.preparation.scan import CaseFiles

NAMES = {
    "t1": ("t1", "t1n"),
    "t1c": ("t1ce", "t1c"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f"),
}
"""Our contrasts, and what files call them."""

SINCE_2023 = re.compile(r"(BraTS-[A-Za-z]+-\d+)-(\d+)")

FOLDER = rf"{SINCE_2023.pattern}|BraTS\d+_\w+"


def cases(
    root: Path,
    work: Path,
    contrast: str = "flair",
    labels: Sequence[int] | None = None,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """One case of each visit: the chosen contrast as ``mri``, the others by name, and the mask.

    Args:
        root: any folder above the cases.
        work: where the masks of merged labels are written, as ``CASE/lesion_mask.nii.gz``.
        contrast: ``t1``, ``t1c``, ``t2`` or ``flair``.
        labels: that make up the lesion, any others being background; None goes by the name.
        skip_incomplete: leave cases that lack a file out, as those of validation sets lack ``seg``.

    Raises:
        FileNotFoundError: no cases, or files missing.
        ValueError: an unknown contrast, labels beyond those known, or a case found twice.
    """
    check_contrast(contrast, NAMES)

    def case(folder: Path) -> CaseFiles:
        return _case(folder, work, contrast, labels)

    layout = "BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz"
    return collect(root, folders_named(root, FOLDER, work), case, layout, skip_incomplete)


def write_lesion(segmentation: Path, to: Path, labels: Sequence[int], is_all: bool) -> Path:
    """Write the mask of the labels of a segmentation file.

    Args:
        is_all: whether any other label is an error instead of background.

    Raises:
        ValueError: a label that is not of ``labels``, where these are all.
    """
    image = read_image(segmentation)
    array = sitk.GetArrayFromImage(image)
    others = sorted(set(np.unique(array).tolist()) - {0, *labels})
    if others and is_all:
        raise ValueError(
            f"expected labels of {list(labels)}, got {others} too: say with labels which of them "
            f"are lesion: {segmentation}"
        )
    mask = sitk.GetImageFromArray(np.isin(array, list(labels)).astype(np.uint8))
    mask.CopyInformation(image)
    return write_image(mask, to)


def _case(folder: Path, work: Path, contrast: str, labels: Sequence[int] | None) -> CaseFiles:
    name = folder.name
    visit = SINCE_2023.fullmatch(name)
    images = {
        ours: path
        for ours, theirs in {**NAMES, "seg": ("seg",)}.items()
        for mark in "-_"
        for one in theirs
        if (path := image_named(folder, f"{name}{mark}{one}"))
    }
    wanted = {"mri": contrast, **{one: one for one in NAMES if one != contrast}}
    files = required(images, {**wanted, "lesion_mask": "seg"}, name, folder)
    segmentation = files["lesion_mask"]
    known = (1, 2, 3) if visit else (1, 2, 4)
    chosen = known if labels is None else labels
    mark = "" if labels is None else "_of_" + "_".join(str(label) for label in sorted(labels))
    to = work / name / f"lesion_mask{mark}.nii.gz"
    if not is_current(to, segmentation):
        write_lesion(segmentation, to, chosen, is_all=labels is None)
    files["lesion_mask"] = to
    return CaseFiles(name, visit.group(1) if visit else name, files, {"lesion_mask": "mri"})
