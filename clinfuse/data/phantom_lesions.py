"""What a stroke cohort's heads contain besides anatomy: infarcts, blood and calcium."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from clinfuse.data.phantom_anatomy import (
    HEAD_CENTRE,
    PARENCHYMA,
    Anatomy,
    Array,
    SmoothNoise,
    Tissue,
)

COHORT = 60
"""Cases in a block: every block of as many cases follows the cohort facts exactly."""
CASES_WITH_LESION = 54
MEDIAN_ML, LOG_SD, SMALLEST_ML, LARGEST_ML = 2.2, 2.1, 0.01, 57.8
"""Lognormal lesion load: after clipping, mean about 9 ml and s.d. about 16 ml."""

Indices = NDArray[np.int64]


def lesion_volume_ml(case: int, seed: int = 0) -> float:
    """Total infarct volume of a case, 0 for the one in ten without a lesion.

    Stratified: the cases of each block of 60 take, in random order, one volume from each of 54
    equal slices of the distribution, and 6 take none. So a cohort of 60 has the published
    median and spread for every seed, not just on average.
    """
    block, place = divmod(case, COHORT)
    rng = np.random.default_rng([seed, block, 54])
    rank = int(rng.permutation(COHORT)[place])
    if rank >= CASES_WITH_LESION:
        return 0.0
    within = np.random.default_rng([seed, case, 55]).uniform(0.2, 0.8)
    volume = MEDIAN_ML * np.exp(LOG_SD * ndtri((rank + within) / CASES_WITH_LESION))
    return float(np.clip(volume, SMALLEST_ML, LARGEST_ML))


def split_volume(rng: np.random.Generator, total_ml: float) -> list[float]:
    """Share a lesion load among one to four infarcts, the largest first; sums to the total."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.6, 0.22, 0.12, 0.06]))
    if total_ml < 20 * SMALLEST_ML:
        count = 1
    shares = rng.dirichlet(np.full(count, 1.2))
    shares = np.maximum(shares, 0.02)
    return sorted((total_ml * shares / shares.sum()).tolist(), reverse=True)


@dataclass
class Findings:
    """Lesions of one head, as flat indices into the fine lattice.

    Attributes:
        infarcts: one array of indices a lesion.
        dense: (kind, indices, HU) of blood and calcium, visible on CT only.
    """

    infarcts: list[Indices] = field(default_factory=list)
    dense: list[tuple[str, Indices, float]] = field(default_factory=list)


def draw_findings(
    rng: np.random.Generator, anatomy: Anatomy, noise: SmoothNoise, volume_ml: float
) -> Findings:
    """Place infarcts of the given total volume, and in some heads blood or calcium."""
    found = Findings()
    texture = noise(7.0) + 0.6 * noise(4.0)
    for part_ml in split_volume(rng, volume_ml) if volume_ml > 0 else []:
        centre = draw_centre(rng, anatomy)
        blob = grow(rng, anatomy, centre, part_ml, texture, roughness=0.33)
        anatomy.labels.ravel()[blob] = Tissue.INFARCT
        found.infarcts.append(blob)
    _add_pathology(rng, anatomy, texture, found)
    _add_physiological_calcium(rng, anatomy, texture, found)
    return found


def draw_pathology(rng: np.random.Generator) -> str:
    """What a head has that only the CT shows: in about a third, blood or calcium."""
    return str(rng.choice(["none", "haemorrhage", "calcification"], p=[0.65, 0.20, 0.15]))


def _add_pathology(
    rng: np.random.Generator, anatomy: Anatomy, texture: Array, found: Findings
) -> None:
    kind = draw_pathology(rng)
    if kind == "haemorrhage":
        volume_ml = float(np.clip(rng.lognormal(1.0, 0.8), 0.4, 15))
        centre = draw_centre(rng, anatomy)
        blob = grow(rng, anatomy, centre, volume_ml, texture, 0.12, allowed=_BRAIN_OR_CSF)
        found.dense.append(("haemorrhage", blob, float(rng.uniform(60, 82))))
    if kind == "calcification":
        for _ in range(rng.integers(1, 4)):
            volume_ml = float(rng.uniform(0.06, 0.5))
            blob = grow(rng, anatomy, draw_centre(rng, anatomy), volume_ml, texture, roughness=0.2)
            found.dense.append(("calcification", blob, float(rng.uniform(150, 400))))


def _add_physiological_calcium(
    rng: np.random.Generator, anatomy: Anatomy, texture: Array, found: Findings
) -> None:
    """Pineal gland and choroid plexus, calcified in about half of adults."""
    sites = [((0, -31, 3), 0.06, 0.45)]
    sites += [((s * 25, -41, 10), 0.12, 0.4) for s in (-1, 1)]
    for site, volume_ml, probability in sites:
        if rng.random() < probability:
            centre = scanner_mm(anatomy, np.array(site, float))
            volume_ml *= float(rng.uniform(0.5, 2))
            blob = grow(rng, anatomy, centre, volume_ml, texture, 0.2, allowed=_BRAIN_OR_CSF)
            found.dense.append(("physiological", blob, float(rng.uniform(120, 300))))


_BRAIN_OR_CSF = (*PARENCHYMA, Tissue.CSF)


def scanner_mm(anatomy: Anatomy, head_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where a head-frame point (x, y, z) lies in the scanner, in mm along x, y, z."""
    build = anatomy.build
    return build.rotation @ (build.scale * (head_mm - HEAD_CENTRE)) + build.shift_mm


def draw_centre(rng: np.random.Generator, anatomy: Anatomy) -> NDArray[np.float64]:
    """A random scanner point (x, y, z in mm) in the parenchyma; the same one on any lattice.

    Most lie in the territory of a middle cerebral artery, as infarcts do.
    """
    for _ in range(500):
        side = rng.choice([-1, 1])
        middle = rng.normal([38, -8, 18], [14, 28, 16])
        anywhere = rng.uniform([3, -100, -50], [62, 65, 70])
        head_mm = (middle if rng.random() < 0.7 else anywhere) * [side, 1, 1]
        point = scanner_mm(anatomy, head_mm)
        if _label_at(anatomy, point) in PARENCHYMA:
            return point
    raise AssertionError("no parenchyma in the field of view")


def _label_at(anatomy: Anatomy, point_mm: NDArray[np.float64]) -> int:
    axes = anatomy.lattice.axes_mm()
    index = []
    for axis, value in zip(axes, point_mm[::-1], strict=True):
        step = axis[1] - axis[0]
        index.append(round(float((value - axis[0]) / step)))
        if not 0 <= index[-1] < len(axis):
            return Tissue.AIR
    return int(anatomy.labels[tuple(index)])


def grow(
    rng: np.random.Generator,
    anatomy: Anatomy,
    centre_mm: NDArray[np.float64],
    volume_ml: float,
    texture: Array,
    roughness: float,
    allowed: tuple[Tissue, ...] = PARENCHYMA,
) -> Indices:
    """Flat indices of an irregular blob of the given volume around a point, in allowed tissue.

    The points nearest to the centre in a random ellipsoidal metric that ``texture`` roughens, on
    the centre's side of the midline. Smaller than asked only where the tissue runs out.
    """
    stretch = rng.lognormal(0, 0.22, 3)
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    metric = turn @ np.diag(stretch / np.cbrt(stretch.prod())) @ turn.T
    count = max(1, round(volume_ml / anatomy.lattice.fine_voxel_ml))
    reach = 4 * np.cbrt(3 * 1000 * volume_ml / (4 * np.pi)) + 6
    corner, box, offset = _box(anatomy, centre_mm, reach)
    bent = [sum(metric[i, j] * offset[j] for j in range(3)) for i in range(3)]
    distance = np.sqrt(sum(b * b for b in bent)) * np.exp(roughness * texture[box])
    same_side = _lateral(anatomy, offset, centre_mm)
    good = np.isin(anatomy.labels[box], allowed) & same_side
    candidates = np.flatnonzero(good)
    order = np.argsort(distance.ravel()[candidates], kind="stable")[:count]
    local = np.unravel_index(candidates[order], good.shape)
    shifted = tuple(i + c for i, c in zip(local, corner, strict=True))
    return np.ravel_multi_index(shifted, anatomy.labels.shape)


def _box(
    anatomy: Anatomy, centre_mm: NDArray[np.float64], reach_mm: float
) -> tuple[list[int], tuple[slice, ...], list[Array]]:
    """Lattice box around a point: its corner, slices, and offsets (x, y, z) from the point."""
    slices, sides = [], []
    for axis, value in zip(anatomy.lattice.axes_mm(), centre_mm[::-1], strict=True):
        low, high = np.searchsorted(axis, [value - reach_mm, value + reach_mm])
        slices.append(slice(int(low), int(high)))
        sides.append(axis[low:high] - np.float32(value))
    z, y, x = np.meshgrid(*sides, indexing="ij", sparse=True)
    return [s.start for s in slices], tuple(slices), [x, y, z]


def _lateral(
    anatomy: Anatomy, offset: list[Array], centre_mm: NDArray[np.float64]
) -> NDArray[np.bool_]:
    across = anatomy.build.rotation[:, 0]
    centre_x = float((centre_mm - anatomy.build.shift_mm) @ across)
    x = np.asarray(centre_x)
    for a, o in zip(across, offset, strict=True):
        x = x + float(a) * o
    if abs(centre_x) < 5:
        return np.ones(x.shape, bool)
    return x * np.sign(centre_x) > 1.0
