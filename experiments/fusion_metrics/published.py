"""Do the fusion metrics have the size of published ones? Two voxel rules on CT-MRI pairs.

python experiments/fusion_metrics/published.py DATA [OUT.csv]

DATA holds the set CT-MRI of the Harvard whole brain atlas. ``average`` and ``maximum`` need no
training, so that figures which others published for them can be compared with ours. What has been
published is measured on all pairs, every other fusion metric on an evenly spaced few.
"""

import csv
import math
import sys
from pathlib import Path
from statistics import mean, median

import torch

from clinfuse.data.slices import KINDS, Pair, find_pairs, read_picture
from clinfuse.methods.rules import Maximum, Weighted
from clinfuse.metrics.fusion import FUSION_METRICS, OF_FUSED, WITH_SOURCES
from clinfuse.types import ROI_NAMES, SliceBatch

METHODS = {"average": Weighted(0.5), "maximum": Maximum()}

PUBLISHED = {
    "average": {
        "en": 4.45, "sd": 57.3, "sf": 19.6, "mi": 2.61,
        "scd": 0.99, "vif": 0.45, "qabf": 0.37, "ssim_published": 1.31,
    },
    "maximum": {
        "en": 4.47, "sd": 84.2, "sf": 33.5, "mi": 3.63,
        "scd": 1.50, "vif": 0.64, "qabf": 0.63, "ssim_published": 1.38,
    },
}  # fmt: skip
"""Means over the 21 CT-MRI pairs that fusion papers commonly test on, by others' evaluators."""

FEW = 21
"""Pairs of the smaller choice, evenly spaced in the list of all."""


def main(data: str, out: str = "experiments/fusion_metrics/cases.csv") -> None:
    pairs, rows = find_pairs(Path(data), KINDS["ct_mri"]), []
    few = {pairs[round(k * (len(pairs) - 1) / (FEW - 1))].name for k in range(FEW)}
    for pair in pairs:
        batch = as_batch(pair)
        for name, method in METHODS.items():
            for metric in FUSION_METRICS if pair.name in few else PUBLISHED[name]:
                value = score(metric, method.fuse(batch), batch)
                rows.append(
                    {"case_id": pair.name, "method": name, "metric": metric, "value": value}
                )
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "value": f"{row['value']:.6g}"} for row in rows)
    print(table(rows, few))


def as_batch(pair: Pair) -> SliceBatch:
    """Both pictures and no masks: neither the rules nor the metrics need them."""
    mri, ct = (2 * read_picture(path)[None, :1] - 1 for path in (pair.mri, pair.ct))
    roi = torch.zeros(1, len(ROI_NAMES), *mri.shape[2:], dtype=torch.bool)
    return SliceBatch(mri, ct, roi, torch.ones(1, 2), [pair.name])


def score(metric: str, fused: torch.Tensor, batch: SliceBatch) -> float:
    if metric in OF_FUSED:
        return OF_FUSED[metric](fused).item()
    return WITH_SOURCES[metric](fused, batch.mri, batch.ct).item()


def table(rows: list[dict], few: set[str]) -> str:
    """Means over all pairs and over the few beside the published, a row a metric."""
    lines = [
        "| metric | " + " | ".join(f"{m}: all | {FEW} | range | published" for m in METHODS) + " |",
        "| --- |" + " ---: |" * (4 * len(METHODS)),
    ]
    for metric in FUSION_METRICS:
        cells = []
        for method in METHODS:
            own = [r for r in rows if (r["method"], r["metric"]) == (method, metric)]
            defined = [r for r in own if not math.isnan(r["value"])]
            values = [r["value"] for r in defined]
            chosen = [r["value"] for r in defined if r["case_id"] in few]
            stated = PUBLISHED[method].get(metric)
            cells += [
                f"{mean(values):.3g}" if stated is not None else "",
                f"{mean(chosen):.3g}",
                f"{min(values):.3g} – {median(values):.3g} – {max(values):.3g}",
                "" if stated is None else f"{stated:.3g}",
            ]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
