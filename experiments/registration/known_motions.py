"""Trials of the registration: a CT moved by a known rigid motion, and how far it is found again.

    python experiments/registration/known_motions.py templates CASES.csv --data DATA_FOLDER

Rows are written after every trial, so that a stopped run keeps what it has.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from clinfuse.data.phantoms import make_phantom, ras_affine
from clinfuse.preparation.grids import on_grid
from clinfuse.preparation.registration import register
from clinfuse.preparation.registration_search import (
    head_points_mm,
    in_one_thread,
    moved_by,
    pyramid,
    search,
    target_error_mm,
)

LARGEST_MM, LARGEST_DEG = 20.0, 15.0
SHOWN = ("scans", "error_mm", "error_deg", "verdict", "reasons", "seconds", "cpu_seconds")
PHANTOM = {"shape": (28, 240, 210), "spacing_mm": (5.0, 0.9, 0.9)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("scans", choices=("templates", "phantoms", "harvard"))
    options.add_argument("output", type=Path)
    options.add_argument("--data", type=Path, default=None, help="the folder of real images")
    options.add_argument("--trials", type=int, default=None, help="fewer than all")
    asked = options.parse_args()
    rows = []
    for number, (name, mri, ct, true, cuts) in enumerate(pairs(asked.scans, asked.data)):
        if number == asked.trials:
            break
        rows.append(trial(number, mri, ct, true, cuts) | {"scans": name, "trial": number})
        print(*(rows[-1][key] for key in SHOWN), flush=True)
        table = pd.DataFrame(rows).set_index(["scans", "trial"]).round(4)
        table.to_csv(asked.output)
    print(
        table[["error_mm", "error_deg", "seconds", "cpu_seconds"]].describe(percentiles=[0.5, 0.95])
    )
    print(table.verdict.value_counts())


def pairs(
    scans: str, data: Path | None
) -> Iterator[tuple[str, sitk.Image, sitk.Image, sitk.Transform, bool]]:
    """MRI, CT, the true transform between them, and whether the CT is interpolated when moved."""
    still = sitk.Transform(3, sitk.sitkIdentity)
    if scans == "phantoms":
        for case in range(16):
            phantom = make_phantom(case, seed=4, contrast=("t1", "t2", "adc")[case % 3], **PHANTOM)
            mri, ct = (
                image_of(array, phantom.spacing_mm) for array in (phantom.mri, phantom.ct_hu)
            )
            yield f"phantom_{case:02d}", mri, ct, still, False
        return
    if data is None:
        raise SystemExit("expected --data, the folder of real images, for scans that are real")
    if scans == "templates":
        folder = data / "templates_mni_2mm"
        mri, ct = (read(folder / f"{name}.nii.gz") for name in ("MNI152_T1_2mm", "scct_hu"))
        reference = searched(mri, ct)
        for _ in range(40):
            yield "templates", mri, ct, reference, True
        return
    references: dict[str, sitk.Transform] = {}
    for folder in 2 * sorted((data / "harvard_studies").iterdir()):
        mri, ct = (read(folder / f"{name}.nii.gz") for name in ("mri", "ct"))
        if folder.name not in references:
            references[folder.name] = searched(mri, ct)
        yield folder.name, mri, ct, references[folder.name], False


def searched(mri: sitk.Image, ct: sitk.Image) -> sitk.Transform:
    """Where the unmoved CT lies: what trials on real scans are measured against."""
    with in_one_thread():
        return search(pyramid(mri, ct), seed=199)[0]


def trial(
    number: int, mri: sitk.Image, ct: sitk.Image, true: sitk.Transform, is_cut: bool
) -> dict[str, str | float]:
    points_mm = head_points_mm(mri)
    motion = drawn_motion(np.random.default_rng([4, number]), points_mm.mean(axis=0))
    if is_cut:  # on its own grid: what leaves the field of view is lost
        air = float(sitk.GetArrayViewFromImage(ct).min())
        moved = on_grid(ct, ct, motion, fill=air)
    else:
        moved = moved_by(ct, motion)
    goal = sitk.CompositeTransform([motion.GetInverse(), true])
    load, started = os.getloadavg()[0], time.process_time()
    found = register(mri, moved, seed=number)
    cpu_seconds = time.process_time() - started
    error_mm = target_error_mm(found.transform, goal, points_mm)
    return {
        "true_mm": float(np.linalg.norm(motion.GetTranslation())),
        "true_deg": float(np.degrees(Rotation.from_matrix(matrix(motion)).magnitude())),
        "error_mm": float(error_mm.mean()),
        "worst_error_mm": float(error_mm.max()),
        "error_deg": turn_deg(found.transform, goal, points_mm),
        "load": load,
        "cpu_seconds": cpu_seconds,
        **found.facts(),
    }


def drawn_motion(stream: np.random.Generator, centre_mm: np.ndarray) -> sitk.Euler3DTransform:
    """About the head's centre: any axis and direction, any size up to the largest."""
    turn = Rotation.from_rotvec(direction(stream) * np.radians(stream.uniform(0, LARGEST_DEG)))
    motion = sitk.Euler3DTransform()
    motion.SetCenter(centre_mm.tolist())
    motion.SetMatrix(turn.as_matrix().ravel().tolist())
    motion.SetTranslation((direction(stream) * stream.uniform(0, LARGEST_MM)).tolist())
    return motion


def direction(stream: np.random.Generator) -> np.ndarray:
    arrow = stream.normal(size=3)
    return arrow / np.linalg.norm(arrow)


def turn_deg(found: sitk.Transform, goal: sitk.Transform, points_mm: np.ndarray) -> float:
    """The angle between two rigid transforms."""
    here, there = (
        np.array([transform.TransformPoint(point) for point in points_mm.tolist()])
        for transform in (found, goal)
    )
    turn, _ = Rotation.align_vectors(here - here.mean(axis=0), there - there.mean(axis=0))
    return float(np.degrees(turn.magnitude()))


def matrix(motion: sitk.Euler3DTransform) -> np.ndarray:
    return np.array(motion.GetMatrix()).reshape(3, 3)


def image_of(array: np.ndarray, spacing_mm: tuple[float, float, float]) -> sitk.Image:
    """A phantom's array (d, h, w) where its study folder would put it."""
    image = sitk.GetImageFromArray(array.astype(np.float32))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ras_affine(array.shape, spacing_mm)
    image.SetSpacing(spacing_mm[::-1])
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    return image


def read(path: Path) -> sitk.Image:
    return sitk.ReadImage(str(path), sitk.sitkFloat32)


if __name__ == "__main__":
    main()
