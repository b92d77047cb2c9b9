"""Tables of cases.csv: python experiments/guidance/table.py CASES.csv

Means over cases (of conspicuity medians), and beside them the mean difference from ``off`` of the
same cases with its 95 % bootstrap interval over cases. Undefined values (no lesion, nothing found)
are left out, in pairs.
"""

import sys

import numpy as np
import pandas as pd

COLUMNS = (
    ("bone", "psnr", 2),
    ("bone", "ssim", 3),
    ("brain", "ssim", 4),
    ("lesion", "dice", 3),
    ("lesion", "nsd", 3),
    ("lesion", "hd95", 1),
)
ENDS = (
    ("bone", "psnr", 2),
    ("brain", "ssim", 4),
    ("whole", "ssim", 4),
    ("lesion", "dice", 3),
    ("lesion", "conspicuity", 2),
    ("findings", "conspicuity", 2),
    ("whole", "spread_error_correlation", 3),
)


def values(rows: pd.DataFrame, roi: str, metric: str) -> pd.Series:
    chosen = rows[(rows.roi == roi) & (rows.metric == metric)]
    return chosen.set_index("case_id").value


def interval(differences: pd.Series, seed: int = 0) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    draws = rng.choice(differences.to_numpy(), (5000, len(differences))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def table(
    rows: pd.DataFrame, columns: tuple[tuple[str, str, int], ...], base: str | None = "off"
) -> str:
    """One line a variant; differences from ``base`` in brackets."""
    head = [f"{roi} {metric.replace('_', ' ')}" for roi, metric, _ in columns]
    lines = ["| variant | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for variant in dict.fromkeys(rows.variant):
        cells = []
        for roi, metric, digits in columns:
            own = values(rows[rows.variant == variant], roi, metric)
            middle = own.median() if metric == "conspicuity" else own.mean()
            cell = f"{middle:.{digits}f}" if own.notna().any() else "–"
            if base and variant != base and own.notna().any():
                apart = (own - values(rows[rows.variant == base], roi, metric)).dropna()
                if len(apart):
                    low, high = interval(apart)
                    cell += f" ({apart.mean():+.{digits}f}: {low:+.{digits}f}…{high:+.{digits}f})"
            cells.append(cell)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(path: str) -> None:
    cases = pd.read_csv(path)
    cases["variant"] = cases.variant.astype(str)
    for amplitude, rows in cases.groupby("misregistration_mm"):
        expert = rows[(rows.mask_source == "expert") & (rows.variant != "default")]
        print(f"\n## CT moved by {amplitude:g} mm, {rows.case_id.nunique()} cases\n")
        every = pd.concat([expert, rows[(rows.variant == "default")]])
        print(table(every, COLUMNS))
        for source in ("automatic", "none"):
            other = rows[(rows.mask_source == source) & (rows.variant != "deterministic_unet")]
            if len(other):
                print(f"\nLesion mask: {source}\n\n{table(other, COLUMNS)}")
        ends = rows[rows.variant.isin(["default", "deterministic_unet"])]
        if len(ends):
            print(f"\nThe default beside direct regression\n\n{table(ends, ENDS, None)}")


if __name__ == "__main__":
    main(sys.argv[1])
