"""Do fused pictures keep the hue of their functional source? Every pair of the five 2-D sets.

python experiments/colour/hue.py DATA [OUT.csv]

DATA holds harvard_aanlib, gfp_pc and roadscene. Each pair is fused with ``average``, written as PNG
by ``write_colour`` and read again; its (Cb, Cr) is compared with the source's, pixel by pixel, in
levels of 255. Beside it stands what clipping R, G and B would have given.
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from clinfuse.data.slices import KINDS, find_pairs, read_pair, read_picture, write_colour
from clinfuse.functional.colour import into_gamut, rgb_to_ycbcr, ycbcr_to_rgb
from clinfuse.methods.rules import Weighted
from clinfuse.types import SliceBatch

FOLDERS = {
    "ct_mri": "harvard_aanlib",
    "pet_mri": "harvard_aanlib",
    "spect_mri": "harvard_aanlib",
    "gfp_pc": "gfp_pc",
    "vis_ir": "roadscene",
}

COLOURED = 16.0
"""Chroma, in levels, from which on an angle means something; half a level is then 2 degrees."""


def main(data: str, out: str = "experiments/colour/cases.csv") -> None:
    rows = [row for name, folder in FOLDERS.items() for row in of_set(name, Path(data) / folder)]
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    names = [name for name in rows[0] if name not in ("kind", "case_id")]
    print("| kind | pairs | " + " | ".join(names) + " |\n| --- |" + " ---: |" * (1 + len(names)))
    for kind in FOLDERS:
        own = [row for row in rows if row["kind"] == kind]
        cells = []
        for name in names:
            values = [row[name] for row in own if not np.isnan(row[name])]
            whole = max(values, default=np.nan) if "largest" in name else np.mean(values or np.nan)
            cells.append(f"{whole:.3g}")
        print(f"| {kind} | {len(own)} | " + " | ".join(cells) + " |")


def of_set(name: str, root: Path) -> list[dict]:
    """One row a pair. ``largest`` is over a picture's pixels, what is not is a share or a mean."""
    kind, average, rows = KINDS[name], Weighted(0.5), []
    with tempfile.TemporaryDirectory() as folder:
        for pair in find_pairs(root, kind):
            found = read_pair(pair, kind)
            batch = SliceBatch(
                found.mri[None], found.ct[None], found.roi[None],
                torch.tensor([found.spacing_mm]), [pair.name], chroma=None,
            )  # fmt: skip
            fused = average.fuse(batch)[0]
            path = write_colour(Path(folder) / "fused.png", fused, found.chroma)
            row = {"kind": name, "case_id": pair.name, **hue(path, fused, found.chroma)}
            rows.append({n: v if isinstance(v, str) else round(v, 5) for n, v in row.items()})
    return rows


def hue(path: Path, fused: torch.Tensor, chroma: torch.Tensor | None) -> dict:
    """How far the written picture is from the fused luma and the source's hue."""
    written = 255 * rgb_to_ycbcr(read_picture(path)[None].double())[0]
    luma = 255 * (fused.double() + 1) / 2
    source = torch.zeros_like(written[1:]) if chroma is None else 255 * chroma.double()
    length = source.norm(dim=0)
    kept = into_gamut(luma[None] / 255, source[None] / 255)[0].norm(dim=0) * 255
    inside = kept > length - 1e-6
    clipped = 255 * rgb_to_ycbcr(
        ycbcr_to_rgb(torch.cat((luma, source))[None] / 255).clamp(0, 1)
    )[0]  # fmt: skip
    shown = (length > COLOURED) & (kept > COLOURED)
    return {
        "luma largest": float((written[:1] - luma).abs().max()),
        "coloured share": float((length > COLOURED).double().mean()),
        "out of gamut share": float((~inside).double().mean()),
        "chroma kept there": float((kept / length)[~inside].mean()),
        "in gamut chroma largest": largest((written[1:] - source).norm(dim=0)[inside]),
        "off the hue largest": largest(aside(written[1:], source)),
        "angle largest": largest(angle(written[1:], source)[shown]),
        "clipped angle largest": largest(angle(clipped[1:], source)[shown]),
        "clipped luma largest": float((clipped[:1] - luma).abs().max()),
    }


def aside(chroma: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Distance from the source's direction, in levels; grey has no direction to leave."""
    cross = chroma[0] * source[1] - chroma[1] * source[0]
    return cross.abs() / source.norm(dim=0).clamp(min=1e-9) * (source.norm(dim=0) > 0.5)


def angle(chroma: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Degrees between two hues."""
    cross = chroma[0] * source[1] - chroma[1] * source[0]
    return torch.rad2deg(torch.atan2(cross, (chroma * source).sum(0))).abs()


def largest(values: torch.Tensor) -> float:
    return float(values.max()) if len(values) else float("nan")


if __name__ == "__main__":
    main(*sys.argv[1:])
