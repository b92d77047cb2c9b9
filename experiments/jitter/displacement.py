"""How far images really move: jitter and fixed misregistration, measured by centroids of blobs.

python experiments/jitter/displacement.py [OUT.csv] [DRAWS]

Four bright Gaussian blobs in a black volume are moved by ``clinfuse.data.jitter.move``, as the CT
of a study is; each blob's centroid is taken before and after, and the rigid motion that explains
the four (Kabsch, 1976) is compared with what was asked for. The matrix that moved them is looked at
only for ``error_mm``, how far the measurement itself is off.
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from clinfuse.data.jitter import RegistrationJitter, fixed_misregistration, move

SPACINGS_MM = ((5.0, 0.9, 0.9), (4.0, 4.0, 4.0))
"""Voxel sizes (d, h, w)."""

CENTRES_MM = 26.0 * np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)], float)
"""Of the blobs, from the grid's centre: corners of a tetrahedron, 45 mm from it."""

BLOB_MM, REACH_MM, HALF_MM = 6.0, 30.0, 66.0
"""Standard deviation of a blob, how far around its old place it is looked for, half the volume."""

JITTER = RegistrationJitter(max_mm=4.0, max_deg=4.0, probability=0.9)
"""As in ``conf/data/phantom.yaml``."""

AMPLITUDES = (0.0, 1.0, 2.0, 4.0)
"""Of fixed misregistration, in mm and in degrees."""


def main(out: str = "experiments/jitter/cases.csv", draws: str = "400") -> None:
    rows = [row for spacing in SPACINGS_MM for row in measured(spacing, int(draws))]
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print_tables(rows)


def measured(spacing_mm: tuple[float, ...], draws: int) -> list[dict]:
    """One row a movement: what was asked for, and shift and rotation as the image shows them."""
    points_mm, volume = scene(spacing_mm)
    before = centroids(points_mm, volume)
    generator = torch.Generator().manual_seed(0)
    asked = [("jitter", JITTER.max_mm, JITTER.draw(generator)) for _ in range(draws)]
    asked += [
        ("fixed", amplitude, fixed_misregistration(f"case_{case:02d}", amplitude, amplitude))
        for amplitude in AMPLITUDES
        for case in range(max(draws // 40, 1))
    ]
    rows = []
    for kind, amplitude, matrix in asked:
        after = centroids(points_mm, move(volume, matrix, spacing_mm, fill=0.0))
        shift_mm, rotation = rigid_motion(before, after)
        about_d, about_h, about_w = rotation.as_euler("ZXY", degrees=True)[[1, 2, 0]]
        told = after_told(before, matrix.numpy())
        rows.append(
            {
                "spacing_mm": " x ".join(f"{mm:g}" for mm in spacing_mm),
                "kind": kind,
                "amplitude": amplitude,
                "shift_d_mm": shift_mm[0],
                "shift_h_mm": shift_mm[1],
                "shift_w_mm": shift_mm[2],
                "about_d_deg": about_d,
                "about_h_deg": about_h,
                "about_w_deg": about_w,
                "shift_mm": np.linalg.norm(shift_mm),
                "angle_deg": np.degrees(rotation.magnitude()),
                "displacement_mm": np.linalg.norm(after - before, axis=1).mean(),
                "error_mm": np.linalg.norm(after - told, axis=1).max(),
            }
        )
    return [
        {n: v if isinstance(v, str) else round(float(v), 4) for n, v in r.items()} for r in rows
    ]


def scene(spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, torch.Tensor]:
    """Where the voxels lie, in mm about the grid's centre, and the blobs there."""
    sizes = [round(2 * HALF_MM / mm) for mm in spacing_mm]
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(sizes, spacing_mm, strict=True)]
    points_mm = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    squares = (((points_mm - centre) ** 2).sum(-1) for centre in CENTRES_MM)
    volume = sum(np.exp(-square / (2 * BLOB_MM**2)) for square in squares)
    return points_mm, torch.from_numpy(volume).float()[None]


def centroids(points_mm: np.ndarray, volume: torch.Tensor) -> np.ndarray:
    """The centroid of what is bright around each blob's first place."""
    bright = volume[0].double().numpy()
    found = []
    for centre in CENTRES_MM:
        near = np.linalg.norm(points_mm - centre, axis=-1) < REACH_MM
        found.append(np.average(points_mm[near], axis=0, weights=bright[near].clip(min=0)))
    return np.array(found)


def rigid_motion(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, Rotation]:
    """Shift of the grid's centre, and rotation about it, that map the points best."""
    rotation, _ = Rotation.align_vectors(after - after.mean(0), before - before.mean(0))
    return after.mean(0) - rotation.apply(before.mean(0)), rotation


def after_told(before: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Where the matrix says that the points go: for the error alone."""
    return before @ matrix[:3, :3].T + matrix[:3, 3]


def print_tables(rows: list[dict]) -> None:
    shown = spacings(rows)
    moved = {s: [r for r in of(rows, s, "jitter") if r["displacement_mm"] > 0.001] for s in shown}
    line("jitter", "stated", *shown)
    line("---", *["---:"] * (1 + len(shown)))
    shares = (f"{len(moved[s]) / len(of(rows, s, 'jitter')):.3f}" for s in shown)
    line("draws that move", f"{JITTER.probability:g}", *shares)
    for name, unit, most in (
        *((f"shift_{axis}_mm", "mm", JITTER.max_mm) for axis in "dhw"),
        *((f"about_{axis}_deg", "degrees", JITTER.max_deg) for axis in "dhw"),
    ):
        what, axis = name.split("_")[:2]
        stated = f"-{most:g} to {most:g}, {most / 3**0.5:.2f}"
        cells = (of_uniform([row[name] for row in moved[s]], most) for s in shown)
        line(f"{what} {axis}, {unit}: from, to; s.d.; p of uniform", stated, *cells)
    line(
        "displacement 45 mm from the centre, mm: mean, largest",
        "",
        *(
            ", ".join(f"{f(r['displacement_mm'] for r in moved[s]):.2f}" for f in (mean, max))
            for s in shown
        ),
    )
    print()
    line("fixed", *(f"{s}: shift (mm), angle (degrees)" for s in shown))
    line("---", *["---:"] * len(shown))
    for amplitude in AMPLITUDES:
        at = ([r for r in of(rows, s, "fixed") if r["amplitude"] == amplitude] for s in shown)
        line(f"{amplitude:g} mm, {amplitude:g} degrees", *map(shift_and_angle, at))
    print()
    for s in shown:
        error = max(row["error_mm"] for row in rows if row["spacing_mm"] == s)
        print(f"{s} mm: no centroid is further than {error:.4f} mm from where the matrix puts it")


def of_uniform(values: list[float], most: float) -> str:
    """Range and spread, and the p-value of the values being uniform (Kolmogorov-Smirnov)."""
    p = kstest(values, "uniform", (-most, 2 * most)).pvalue
    return f"{min(values):.2f} to {max(values):.2f}; {np.std(values):.2f}; {p:.2f}"


def shift_and_angle(rows: list[dict]) -> str:
    """Both as the smallest and the largest found."""
    columns = ([row[name] for row in rows] for name in ("shift_mm", "angle_deg"))
    return ", ".join(f"{min(values):.3f} to {max(values):.3f}" for values in columns)


def line(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def spacings(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["spacing_mm"] for row in rows))


def of(rows: list[dict], spacing: str, kind: str) -> list[dict]:
    return [row for row in rows if row["spacing_mm"] == spacing and row["kind"] == kind]


if __name__ == "__main__":
    main(*sys.argv[1:])
