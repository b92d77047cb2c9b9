"""Per-case rows, losses and costs to this folder's tables: ``python table.py SET [CASES_CSV]``.

Reads cases_SET.csv, losses_SET.csv and cost_SET.csv, those that are there, beside this file. With
CASES_CSV, the rows of an evaluation, cases_SET.csv is made of it first: the tables' scores alone.
"""

import sys
from pathlib import Path

import pandas as pd

from clinfuse.reporting.rows import read_rows, write_rows
from clinfuse.reporting.tables import HEADLINE_SCORES, KEPT_SCORES, headline, to_markdown

HERE = Path(__file__).parent


def table(rows: pd.DataFrame) -> str:
    """What is kept of both sources, or how near the registered clean ones a volume is."""
    is_moved = rows["misregistration_mm"].nunique() > 1
    return to_markdown(headline(rows, HEADLINE_SCORES if is_moved else KEPT_SCORES))


def losses_table(rows: pd.DataFrame) -> str:
    """Means over cases of the loss that a method was trained by, its own and the simple rule's."""
    lines = [
        "| trained by its loss | its loss | of the rule | Qabf | of the rule |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for trained, group in rows.groupby("trained", sort=False):
        means = group.groupby("method", sort=False)[["loss", "qabf"]].mean()
        (own, simple) = means.index
        values = [f"{means.loc[name, what]:.4f}" for what in means for name in (own, simple)]
        lines.append(f"| `{trained}`, `{simple}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def cost_table(rows: pd.DataFrame) -> str:
    """Weights in millions, training in minutes, seconds and megabytes for one case."""
    first = rows.iloc[0]
    lines = [
        f"One case of {first['shape']}, {first['threads']} threads, {first['device']}:\n",
        "| method | weights (M) | trained (M) | steps | training (min) | evaluations | s a case "
        "| MB a case |",
        "| --- " + "| ---: " * 7 + "|",
    ]
    for row in rows.itertuples():
        lines.append(
            f"| `{row.method}` | {row.parameters / 1e6:.2f} | {row.trained_parameters / 1e6:.2f} | "
            f"{row.training_steps} | {row.training_seconds / 60:.1f} | {row.evaluations} | "
            f"{row.seconds:.3g} | {row.megabytes} |"
        )
    return "\n".join(lines)


def main(which: str, cases: str | None = None) -> None:
    if cases is not None:
        rows = read_rows(cases)
        shown = pd.MultiIndex.from_frame(rows[["roi", "metric"]]).isin(
            [*HEADLINE_SCORES, *KEPT_SCORES]
        )
        (HERE / f"cases_{which}.csv").unlink(missing_ok=True)
        write_rows(HERE / f"cases_{which}.csv", rows[shown].round({"value": 5}))
    made = {"cases": lambda path: table(read_rows(path))}
    made |= {"losses": lambda path: losses_table(pd.read_csv(path))}
    made |= {"cost": lambda path: cost_table(pd.read_csv(path))}
    for name, of in made.items():
        if (path := HERE / f"{name}_{which}.csv").exists():
            print(of(path), end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
