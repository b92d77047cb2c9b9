"""Per-case rows to this folder's table: ``python table.py CASES_CSV``."""

import sys

import pandas as pd

from clinfuse.reporting.rows import read_rows
from clinfuse.reporting.tables import headline, paired_differences, to_markdown

SCORES = (
    ("bone", "psnr"),
    ("brain", "ssim"),
    ("whole", "ssim"),
    ("whole", "spread_error_correlation"),
)


def table(rows: pd.DataFrame) -> str:
    """Means with intervals for every method and misregistration, then ours against each other."""
    blocks = [to_markdown(headline(rows, SCORES))]
    if "clinfuse" in set(rows["method"]) and rows["method"].nunique() > 1:
        against = paired_differences(rows, "clinfuse", SCORES[:3])
        blocks += ["\nclinfuse minus each method, paired over cases:\n", to_markdown(against)]
    return "\n".join(blocks)


if __name__ == "__main__":
    print(table(read_rows(sys.argv[1])))
