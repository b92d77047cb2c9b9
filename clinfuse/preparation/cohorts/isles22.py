"""ISLES'22: acute and subacute stroke, FLAIR, DWI and ADC with an expert's lesion mask; no CT.

Hernandez Petzsche et al. (2022), "ISLES 2022: a multi-center magnetic resonance imaging stroke
lesion segmentation dataset", Scientific Data 9. https://doi.org/10.5281/zenodo.7960856, no
registration. Licence: the paper's record and copies of it name CC BY 4.0 or CC BY-SA 4.0; the one
in the archive you have counts. 250 cases in BIDS, in either of two layouts, or flat::

    sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz
    sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_{dwi,adc}.nii.gz
    derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz

    rawdata/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_{flair,dwi,adc}.nii.gz
    derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz

DWI, ADC and mask share a grid; FLAIR has its own, finer in the slice and thicker, which its affine
places in the same scanner coordinates. They were not registered, so that a patient who moved
between them is moved. The mask was drawn on DWI. ``sub-`` is the patient, whom sessions share.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from clinfuse.preparation.cohorts.inventory import check_contrast, collect, required
from clinfuse.preparation.scan import CaseFiles

CONTRASTS = ("flair", "dwi", "adc")

FILE_NAME = re.compile(
    r"(sub-[A-Za-z0-9]+)_(ses-[A-Za-z0-9]+)_(flair|dwi|adc|msk)\.nii(\.gz)?", re.I
)


def cases(
    root: Path, work: Path, contrast: str = "flair", skip_incomplete: bool = False
) -> list[CaseFiles]:
    """One case of each session: the chosen contrast as ``mri``, the others by name, and the mask.

    Args:
        root: any folder above the cases.
        work: not needed: nothing is converted.
        contrast: ``flair``, ``dwi`` or ``adc``.
        skip_incomplete: leave cases that lack one of the four files out.

    Raises:
        FileNotFoundError: no cases, or files missing.
        ValueError: an unknown contrast, or a file found twice.
    """
    check_contrast(contrast, CONTRASTS)
    if not root.is_dir():
        raise FileNotFoundError(f"expected the folder of a cohort, found none at {root}")
    sessions = _sessions(root)

    def case(session: tuple[str, str]) -> CaseFiles:
        return _case(session, sessions[session], contrast, root)

    layout = "sub-strokecase0001_ses-0001_{flair,dwi,adc,msk}.nii.gz"
    return collect(root, sorted(sessions), case, layout, skip_incomplete)


def _sessions(root: Path) -> dict[tuple[str, str], dict[str, Path]]:
    """Files by patient and session, then by what they are."""
    sessions: dict[tuple[str, str], dict[str, Path]] = {}
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            if not (match := FILE_NAME.fullmatch(name)):
                continue
            patient, session, what = match.group(1), match.group(2), match.group(3).lower()
            path = Path(folder, name)
            earlier = sessions.setdefault((patient, session), {}).setdefault(what, path)
            if earlier != path:
                raise ValueError(f"expected each file once, got {earlier} and {path}")
    return sessions


def _case(
    session: tuple[str, str], images: Mapping[str, Path], contrast: str, root: Path
) -> CaseFiles:
    patient, number = session
    case_id = f"{patient}_{number}"
    wanted = {"mri": contrast, **{one: one for one in CONTRASTS if one != contrast}}
    files = required(images, {**wanted, "lesion_mask": "msk"}, case_id, root)
    drawn_on = "dwi" if contrast == "flair" else "mri"
    return CaseFiles(case_id, patient, files, {"lesion_mask": drawn_on})
