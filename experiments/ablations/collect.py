"""The tables of all sweeps, small enough to keep.

python experiments/ablations/collect.py SWEEPS OUT

SWEEPS is ``runs/sweeps``; each sweep at ``scale=small`` becomes a folder of OUT with its table, its
figures as PNG, and the rows of the scores that the table shows, to five digits.
"""

import sys
from pathlib import Path

import pandas as pd

from clinfuse.configuration import quiet_libraries, register_resolvers
from clinfuse.reporting.rows import read_rows
from clinfuse.tables import tables_of_sweep


def main(sweeps: str, out: str) -> None:
    register_resolvers()
    quiet_libraries()
    for sweep in sorted(Path(sweeps).glob("*/small/sweep.json")):
        folder = Path(out) / sweep.parent.parent.name
        if not list(sweep.parent.glob("*/cases.csv")):
            print(f"no scores: {sweep.parent}")
            continue
        for path in tables_of_sweep(sweep.parent, folder):
            if path.suffix == ".pdf":
                path.unlink()
        shown = set(pd.read_csv(folder / "table.csv")[["roi", "metric"]].itertuples(index=False))
        rows = read_rows(folder / "cases.csv")
        is_shown = [pair in shown for pair in rows[["roi", "metric"]].itertuples(index=False)]
        kept = rows[is_shown].drop(columns=["patient_id", "steps"])
        kept.to_csv(folder / "cases.csv", index=False, float_format="%.5g", na_rep="nan")


if __name__ == "__main__":
    main(*sys.argv[1:])
