"""Results known to be right or wrong, and what the verdict says of each: the confusion table.

    python experiments/registration/failures.py CASES.csv --data DATA_FOLDER

Wrong ones are of three kinds: a true result moved away; what a single start at full resolution
arrives at from far away; and pairs that have no true result (noise, another kind of object).
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from known_motions import direction, drawn_motion, pairs, read, searched
from scipy.ndimage import gaussian_filter

from clinfuse.preparation.registration import register
from clinfuse.preparation.registration_quality import measured
from clinfuse.preparation.registration_search import (
    Pyramid,
    apart_mm,
    in_one_thread,
    moved_by,
    pyramid,
    refined,
    search,
)

SHOWN = ("scans", "what", "error_mm", "verdict", "reasons")

RIGHT_MM = 3.0
"""A result nearer than this to the true one is called right; half a thick slice and a little."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("output", type=Path)
    options.add_argument("--data", type=Path, required=True, help="the folder of real images")
    asked = options.parse_args()
    rows = []
    for row in trials(asked.data):
        rows.append(row)
        print(
            row["scans"], row["what"], row["error_mm"], row["verdict"], row["reasons"], flush=True
        )
        pd.DataFrame(rows).round(4).to_csv(asked.output, index=False)
    table = pd.DataFrame(rows)
    table["truth"] = np.where(table.error_mm < RIGHT_MM, "right", "wrong")
    print(pd.crosstab([table.truth, table.what], table.verdict))


def trials(data: Path) -> Iterator[dict[str, str | float]]:
    stream = np.random.default_rng(4)
    chosen = list(islice(pairs("phantoms", None), 1, 3))
    chosen.append(next(pairs("templates", data)))
    for name in ("case_02", "case_34"):
        folder = data / "harvard_studies" / name
        mri, ct = (read(folder / f"{scan}.nii.gz") for scan in ("mri", "ct"))
        chosen.append((name, mri, ct, searched(mri, ct), False))
    with in_one_thread():
        for name, mri, ct, true, _ in chosen:
            both = pyramid(mri, ct)
            elsewhere = search(both, seed=7)[0]
            for what, found in results(both, true, stream):
                quality = measured(both, found, elsewhere, seed=8)
                yield {
                    "scans": name,
                    "what": what,
                    "error_mm": apart_mm(found, true, both.points_mm),
                    "verdict": quality.verdict,
                    "reasons": "; ".join(quality.reasons),
                    **vars(quality),
                }
    for what, mri, ct in hopeless(data, stream):
        registration = register(mri, ct)
        yield {"scans": "none", "what": what, "error_mm": np.inf, **registration.facts()}


def results(
    both: Pyramid, true: sitk.Transform, stream: np.random.Generator
) -> Iterator[tuple[str, sitk.Transform]]:
    """Results of one pair: the true one, some near it, and local optima far from it."""
    centre = both.centre_mm
    yield "true", true
    for far_mm in (5.0, 15.0):
        yield (
            "moved",
            sitk.CompositeTransform(
                [true, sitk.TranslationTransform(3, (direction(stream) * far_mm).tolist())]
            ),
        )
    for _ in range(2):  # a single start, far away, on the finest level only
        start = drawn_motion(stream, centre)
        start.SetTranslation((direction(stream) * stream.uniform(40, 70)).tolist())
        yield "single start", refined(both.levels[-1], start, seed=9)


def hopeless(
    data: Path, stream: np.random.Generator
) -> Iterator[tuple[str, sitk.Image, sitk.Image]]:
    """Pairs that have no right result: whatever comes of them must not pass."""
    harvard, templates = data / "harvard_studies", data / "templates_mni_2mm"
    mri, ct = (read(harvard / "case_02" / f"{name}.nii.gz") for name in ("mri", "ct"))
    for what, sigma in (("noise", 0.0), ("smooth noise", 4.0)):
        array = gaussian_filter(stream.normal(size=ct.GetSize()[::-1]), sigma)
        noise = sitk.GetImageFromArray((100 + 100 * array / array.std()).astype(np.float32))
        noise.CopyInformation(ct)
        yield what, mri, noise
    shuffled = sitk.GetImageFromArray(stream.permutation(sitk.GetArrayFromImage(ct)))
    shuffled.CopyInformation(ct)
    yield "shuffled slices", mri, shuffled
    yield "three slices of the vertex", mri, ct[:, :, -4:]
    yield "another patient", mri, read(harvard / "case_20" / "ct.nii.gz")
    yield "another patient", read(harvard / "case_34" / "mri.nii.gz"), ct
    yield "another patient", mri, read(templates / "scct_hu.nii.gz")
    upside = sitk.Euler3DTransform()
    upside.SetRotation(np.pi, 0, 0)
    yield "upside down", mri, moved_by(ct, upside)


if __name__ == "__main__":
    main()
