"""APIS: acute ischaemic stroke, paired non-contrast CT and ADC with two experts' lesion masks.

Gómez et al. (2024), "APIS: a paired CT-MRI dataset for ischemic stroke segmentation - methods and
challenges", Scientific Reports 14 (arXiv:2309.15243), the challenge of ISBI 2023. Handed out on
registration at https://bivl2ab.uis.edu.co/challenges/apis under its own agreement; we know of no
open licence, so do not redistribute. 60 patients to train on::

    train_000/train_000_ncct.nii.gz
    train_000/train_000_adc.nii.gz
    train_000/masks/train_000_r1_mask.nii.gz
    train_000/masks/train_000_r2_mask.nii.gz

36 to test on have an ``_ncct`` only. Both experts drew on ADC. Some masks are empty: those strokes
showed nothing to draw. A folder is a patient.

Uncertain, for want of the files themselves: the layout is what three public users of the cohort
read; all three lay the masks on ADC and CT alike, and a survey says the pairs are skull-stripped
and registered, whence ``is_registered``. A skull-stripped CT has no bone to fuse: look at it first.
"""

from pathlib import Path
from typing import Literal, get_args

from clinfuse.preparation.cohorts.inventory import (
    collect,
    folders_named,
    images_named,
    is_current,
    read_image,
    required,
    write_image,
)
from clinfuse.preparation.scan import CaseFiles

Expert = Literal["r1", "r2", "both", "either"]


def cases(
    root: Path,
    work: Path,
    expert: Expert = "r1",
    is_registered: bool = True,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """The training pairs; test cases, which have no MRI, are passed over.

    Args:
        root: any folder above the cases.
        work: where masks of two experts together are written, as ``CASE/both_mask.nii.gz``.
        expert: whose mask: one's, what ``both`` drew, or what ``either`` did.
        is_registered: see above; False lets CT be registered to ADC again.
        skip_incomplete: leave cases that lack a file out.

    Raises:
        FileNotFoundError: no cases, or files missing.
        ValueError: an unknown expert, a case found twice, masks of two grids.
    """
    if expert not in get_args(Expert):
        raise ValueError(f"expected an expert of {get_args(Expert)}, got {expert!r}")

    def case(folder: Path) -> CaseFiles:
        return _case(folder, work, expert, is_registered)

    layout = "train_000/train_000_{ncct,adc}.nii.gz"
    return collect(root, folders_named(root, r"train_\d+", work), case, layout, skip_incomplete)


def _case(folder: Path, work: Path, expert: Expert, is_registered: bool) -> CaseFiles:
    name = folder.name
    names = {"ncct": f"{name}_ncct", "adc": f"{name}_adc"}
    masks = {one: f"masks/{name}_{one}_mask" for one in ("r1", "r2")}
    images = images_named(folder, names | masks)
    wanted = {"mri": "adc", "ct": "ncct"}
    if expert in masks:
        files = required(images, {**wanted, "lesion_mask": expert}, name, folder)
    else:
        files = required(images, wanted, name, folder)
        first, second = required(images, {one: one for one in masks}, name, folder).values()
        to = work / name / f"{expert}_mask.nii.gz"
        if not is_current(to, first, second):
            write_together(first, second, to, is_union=expert == "either")
        files["lesion_mask"] = to
    return CaseFiles(name, name, files, {"lesion_mask": "mri"}, is_registered)


def write_together(first: Path, second: Path, to: Path, is_union: bool) -> Path:
    """Write one mask of two: what either holds, or what both do.

    Raises:
        ValueError: they do not lie on one grid.
    """
    one, other = (read_image(path) != 0 for path in (first, second))
    if not one.IsSameImageGeometryAs(other):
        raise ValueError(f"expected two masks on one grid, got {first} and {second} on two")
    return write_image(one | other if is_union else one & other, to)
