"""SynthRAD2023, task 1, brain: planning CT and T1-weighted MRI of radiotherapy patients.

Thummerer et al. (2023), "SynthRAD2023 Grand Challenge dataset: generating synthetic CT for
radiotherapy", Medical Physics 50 (arXiv:2303.16320). https://doi.org/10.5281/zenodo.7260705, no
registration, CC BY-NC 4.0. ``Task1.zip`` holds 180 brains for training::

    Task1/brain/1BA001/{mr,ct,mask}.nii.gz
    Task1/brain/overview/...

The name is task, anatomy (B, brain), centre (A, B or C of three Dutch hospitals) and patient.
CT is in HU, rigidly registered to MRI and on its grid. MRI is T1-weighted: without gadolinium at
centre A, with it in some patients of B and C, which nothing in the files tells.

``mask`` is the dilated outline of the patient, not of the brain: it is no mask of a study and is
left where it is. Faces were removed, so the face is no bone either. The validation set
(``Task1_val.zip``, 60 brains) has no CT beside its MRI. A folder is a patient; whether a patient of
task 1 is in task 2 too is not said.
"""

from collections.abc import Sequence
from pathlib import Path

from clinfuse.preparation.cohorts.inventory import collect, folders_named, images_named, required
from clinfuse.preparation.scan import CaseFiles

CENTRES = ("A", "B", "C")


def cases(
    root: Path,
    work: Path,
    centres: Sequence[str] = CENTRES,
    skip_incomplete: bool = False,
) -> list[CaseFiles]:
    """The pairs of the chosen centres.

    Args:
        root: any folder above the cases.
        work: not needed: nothing is converted.
        centres: of which hospitals.
        skip_incomplete: leave cases that lack a file out, as those of the validation set.

    Raises:
        FileNotFoundError: no cases, or files missing.
        ValueError: an unknown centre, or a case found twice.
    """
    unknown = sorted(set(centres) - set(CENTRES))
    if unknown or not centres:
        raise ValueError(f"expected centres of {CENTRES}, got {list(centres)}")
    folders = folders_named(root, rf"1B[{''.join(centres)}]\d{{3}}", work)
    layout = "1BA001/{mr,ct}.nii.gz"
    return collect(root, folders, _case, layout, skip_incomplete)


def _case(folder: Path) -> CaseFiles:
    images = images_named(folder, {"mr": "mr", "ct": "ct"})
    files = required(images, {"mri": "mr", "ct": "ct"}, folder.name, folder)
    return CaseFiles(folder.name, folder.name, files, is_registered=True)
