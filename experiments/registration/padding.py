"""What the edge of a cut scan costs: the last level with the padding looked at, and left out.

    python experiments/registration/padding.py PADDING.csv --data DATA_FOLDER --trials 11 25 32

Trials are those of ``known_motions.py templates``, by number; both ways start at the same place,
where the search ends at 4 mm, and look at the same points.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from known_motions import drawn_motion, pairs

from clinfuse.preparation.grids import on_grid
from clinfuse.preparation.registration_search import (
    head_points_mm,
    in_one_thread,
    pyramid,
    refined,
    search,
    target_error_mm,
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("output", type=Path)
    options.add_argument("--data", type=Path, required=True, help="the folder of real images")
    options.add_argument("--trials", type=int, nargs="+", default=range(40))
    asked = options.parse_args()
    _, mri, ct, true, _ = next(pairs("templates", asked.data))
    points_mm = head_points_mm(mri)
    air = float(sitk.GetArrayViewFromImage(ct).min())
    rows = []
    for trial in asked.trials:
        motion = drawn_motion(np.random.default_rng([4, trial]), points_mm.mean(axis=0))
        goal = sitk.CompositeTransform([motion.GetInverse(), true])
        with in_one_thread():
            both = pyramid(mri, on_grid(ct, ct, motion, fill=air))
            start = search(both, 2 * trial, levels=2)[0]
            fine = both.levels[-1]
            looked_at, left_out = (
                refined(level, start, 2 * trial) for level in (replace(fine, seen=None), fine)
            )
        errors_mm = {
            "looked_at_mm": target_error_mm(looked_at, goal, points_mm).mean(),
            "left_out_mm": target_error_mm(left_out, goal, points_mm).mean(),
        }
        rows.append({"trial": trial, **errors_mm})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).round(4).to_csv(asked.output, index=False)


if __name__ == "__main__":
    main()
