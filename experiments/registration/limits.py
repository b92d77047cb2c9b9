"""Limits of the shape measure, fitted on one half of the trials and judged on the other.

    python experiments/registration/limits.py STRANGERS.csv CASES.csv HARVARD.csv ...

The first table is of ``strangers.py``, the others of ``known_motions.py``. Halves are even and odd
trials, which are even and odd heads. Nothing is registered again.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from clinfuse.preparation.registration_quality import STRETCH_MM, Quality

RIGHT_MM = 3.0
"""A result nearer than this to the true one is called right; half a thick slice and a little."""

MEASURES = [field.name for field in fields(Quality)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("strangers", type=Path)
    options.add_argument("moved", type=Path, nargs="+")
    asked = options.parse_args()
    strangers = pd.read_csv(asked.strangers).assign(truth="wrong")
    moved = pd.concat([pd.read_csv(path) for path in asked.moved], ignore_index=True)
    moved["half"] = moved.trial % 2
    moved["truth"] = np.where(moved.error_mm < RIGHT_MM, "right", "wrong")
    trials = pd.concat([strangers, moved], ignore_index=True)
    fitted, other = (trials[trials.half == half] for half in (0, 1))
    print(f"fitted {fitted_limits(fitted)} mm on {len(fitted)} trials, in use {STRETCH_MM} mm")
    for name, half in (("fitted on", fitted), ("not fitted on", other)):
        print(f"\nThe half {name}: {len(half)} trials")
        for said, is_asked in (("with the shape", True), ("without", False)):
            verdicts = [quality(row, is_asked).verdict for _, row in half.iterrows()]
            print(pd.crosstab(half.truth, pd.Series(verdicts, half.index, name=said)))


def fitted_limits(trials: pd.DataFrame) -> tuple[float, float]:
    """A third and two thirds of the way, on a logarithmic scale, from right to wrong heads.

    Raises:
        ValueError: where they overlap.
    """
    largest = trials.stretch_mm[trials.truth == "right"].max()
    smallest = trials.stretch_mm[trials.truth == "wrong"].min()
    print(f"stretch: right up to {largest:.2f} mm, wrong from {smallest:.2f} mm")
    if not largest < smallest:
        raise ValueError(
            f"expected right results under the wrong ones, got up to {largest} and from {smallest}"
        )
    doubtful, failed = np.geomspace(largest, smallest, 4)[1:3]
    return round(float(doubtful), 1), round(float(failed), 1)


def quality(row: pd.Series, is_shape_asked: bool) -> Quality:
    """What was measured of a trial; its verdict is that of the limits in use."""
    measured = Quality(**{name: row[name] for name in MEASURES})
    return measured if is_shape_asked else replace(measured, stretch_mm=0.0)


if __name__ == "__main__":
    main()
