"""The CT of one head registered to the MRI of another: results that must not pass.

    python experiments/registration/strangers.py STRANGERS.csv --data DATA_FOLDER

Both heads of a pair are of one half of the heads (even or odd numbers), so that ``limits.py`` can
fit on pairs whose heads it does not judge afterwards.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from known_motions import drawn_motion, read

from clinfuse.preparation.registration import register
from clinfuse.preparation.registration_search import head_points_mm, moved_by

SHIFTS = (2, 4)
"""The MRI of a head meets the CT of the head so many numbers on, which is in the same half."""

TWICE, TEMPLATES = 2, 4
"""So many heads meet two others, and so many one of the population averages."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("output", type=Path)
    options.add_argument("--data", type=Path, required=True, help="the folder of real images")
    asked = options.parse_args()
    rows = []
    for trial, (half, mri_of, mri, ct_of, ct) in enumerate(strangers(asked.data)):
        centre_mm = head_points_mm(mri).mean(axis=0)
        motion = drawn_motion(np.random.default_rng([5, trial]), centre_mm)
        found = register(mri, moved_by(ct, motion), seed=trial)
        rows.append({"half": half, "mri_of": mri_of, "ct_of": ct_of, **found.facts()})
        print(half, mri_of, ct_of, found.verdict, found.reasons, flush=True)
        pd.DataFrame(rows).round(4).to_csv(asked.output, index=False)


def strangers(data: Path) -> Iterator[tuple[int, str, sitk.Image, str, sitk.Image]]:
    """Half (0 or 1), whose MRI, the MRI, whose CT, the CT."""
    heads = [
        (folder.name, *(read(folder / f"{scan}.nii.gz") for scan in ("mri", "ct")))
        for folder in sorted((data / "harvard_studies").iterdir())
    ]
    average = [
        read(data / "templates_mni_2mm" / f"{name}.nii.gz") for name in ("MNI152_T1_2mm", "scct_hu")
    ]
    for number, (name, mri, ct) in enumerate(heads):
        if number < TEMPLATES // 2:
            yield number % 2, name, mri, "template", average[1]
        elif number < TEMPLATES:
            yield number % 2, "template", average[0], name, ct
        for shift in SHIFTS if number < TWICE else SHIFTS[:1]:
            other, _, other_ct = heads[(number + shift) % len(heads)]
            yield number % 2, name, mri, other, other_ct


if __name__ == "__main__":
    main()
