"""The anatomy of a phantom head: level sets in a head frame, painted to tissue labels.

Everything here is drawn in a *head frame* that resembles MNI space: millimetres of a large adult
head, x to the right, y anterior, z superior, the anterior commissure near the origin. A case is a
pose (size, aspect, rotation, shift) of that frame in the scanner, plus smooth random fields that
bend every surface and fold the cortex. Labels are hard, on a lattice finer than the scan's voxels:
averaging over a voxel then gives partial volume where thick slices should have it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Number = int | float
Numbers = Sequence[Number]
Points = tuple[Array, Array, Array]
"""x (right), y (anterior), z (superior) of many points, in head-frame mm."""

HEAD_CENTRE = (0.0, -14.0, 21.0)
"""Head-frame point in mm that lies at the middle of the scan: body of the lateral ventricles."""
HEAD_EXTENT_MM = (174.0, 218.0)
"""Largest width and length of the drawn head in the head frame, skin to skin."""
AIR_MARGIN_MM = 8.0
"""In-plane air kept around the head, so that a small jitter cuts nothing off."""


class Tissue(IntEnum):
    """What a point of the head is made of."""

    AIR = 0
    SKIN = auto()
    FAT = auto()
    MUSCLE = auto()
    CORTICAL_BONE = auto()
    DIPLOE = auto()
    DURA = auto()
    CSF = auto()
    GREY_MATTER = auto()
    WHITE_MATTER = auto()
    DEEP_GREY = auto()
    PALLIDUM = auto()
    BLOOD = auto()
    VITREOUS = auto()
    LENS = auto()
    NERVE = auto()
    INFARCT = auto()


BONE = (Tissue.CORTICAL_BONE, Tissue.DIPLOE)
PARENCHYMA = (
    Tissue.GREY_MATTER,
    Tissue.WHITE_MATTER,
    Tissue.DEEP_GREY,
    Tissue.PALLIDUM,
    Tissue.INFARCT,
)
INTRACRANIAL = (*PARENCHYMA, Tissue.CSF, Tissue.DURA, Tissue.BLOOD)


@dataclass(frozen=True)
class Build:
    """How one person's head differs from the drawing.

    Attributes:
        scale: head-frame mm to scanner mm along x, y, z.
        rotation: from head frame to scanner, a few degrees.
        shift_mm: of the head in the scanner, x, y, z.
        ventricle: factor on the ventricles' radii; old brains have large ones.
        atrophy: 0 for tight sulci, 1 for wide ones.
    """

    scale: Array
    rotation: NDArray[np.float64]
    shift_mm: Array
    ventricle: float
    atrophy: float


@dataclass(frozen=True)
class Lattice:
    """Fine sampling of a scan: ``factor`` sub-voxels per voxel along each of d, h, w."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    factor: tuple[int, int, int]

    @property
    def fine_shape(self) -> tuple[int, int, int]:
        d, h, w = (n * f for n, f in zip(self.shape, self.factor, strict=True))
        return d, h, w

    @property
    def fine_voxel_ml(self) -> float:
        return float(np.prod(self.spacing_mm) / np.prod(self.factor)) / 1000

    def axes_mm(self) -> list[Array]:
        """Scanner coordinates along d, h, w, centred on the grid."""
        steps = [s / f for s, f in zip(self.spacing_mm, self.factor, strict=True)]
        return [
            ((np.arange(n) - (n - 1) / 2) * step).astype(np.float32)
            for n, step in zip(self.fine_shape, steps, strict=True)
        ]

    def average(self, fine: NDArray) -> Array:
        """Mean over the sub-voxels of every voxel: fine lattice to scan grid."""
        (d, h, w), (i, j, k) = self.shape, self.factor
        blocks = fine.reshape(d, i, h, j, w, k)
        return blocks.mean(axis=(1, 3, 5), dtype=np.float32)


def lattice_for(shape: Sequence[int], spacing_mm: Numbers, finest_mm: float = 1.7) -> Lattice:
    """Sub-voxels no longer than ``finest_mm`` along any axis, but at most three a voxel."""
    depth, height, width = shape
    z, y, x = map(float, spacing_mm)
    d, h, w = (min(3, max(1, int(np.ceil(s / finest_mm)))) for s in (z, y, x))
    return Lattice((depth, height, width), (z, y, x), (d, h, w))


def draw_build(rng: np.random.Generator, lattice: Lattice) -> Build:
    """A random person who fits the scan in-plane with a margin of air."""
    stature = rng.normal(0.89, 0.02)
    scale = stature * np.exp(rng.normal(0, [0.02, 0.02, 0.025]))
    rotation = Rotation.from_euler("xyz", rng.normal(0, [3.0, 1.5, 2.5]), degrees=True)
    age = rng.beta(2, 2)
    fit = _fit_in_plane(lattice, scale)
    return Build(
        scale=(scale * fit).astype(np.float32),
        rotation=rotation.as_matrix(),
        shift_mm=(rng.uniform(-1, 1, 3) * [1.5, 1.5, 3.0]).astype(np.float32),
        ventricle=float(0.75 + 0.75 * age + rng.normal(0, 0.08)),
        atrophy=float(age),
    )


def _fit_in_plane(lattice: Lattice, scale: NDArray) -> float:
    room_h, room_w = (
        n * s - 2 * AIR_MARGIN_MM
        for n, s in zip(lattice.shape[1:], lattice.spacing_mm[1:], strict=True)
    )
    return float(
        min(1.0, room_w / (HEAD_EXTENT_MM[0] * scale[0]), room_h / (HEAD_EXTENT_MM[1] * scale[1]))
    )


class SmoothNoise:
    """Random fields with unit variance that are functions of scanner mm, not of voxels.

    A cubic B-spline over random coefficients; the same seed gives the same field on any grid.
    """

    def __init__(self, rng: np.random.Generator, axes_mm: Sequence[Array], reach_mm: float = 170.0):
        self.rng, self.axes_mm, self.reach_mm = rng, axes_mm, reach_mm

    def __call__(self, knot_mm: Number) -> Array:
        """A field on the grid whose details are about two ``knot_mm`` apart."""
        count = int(np.ceil(2 * self.reach_mm / knot_mm)) + 3
        field = self.rng.standard_normal((count, count, count)).astype(np.float32)
        for axis_mm in self.axes_mm:
            basis = _spline_basis(axis_mm, knot_mm, count, self.reach_mm)
            _, *rest = field.shape
            field = (basis @ field.reshape(count, -1)).reshape(-1, *rest).transpose(1, 2, 0)
        return np.ascontiguousarray(field)


def _spline_basis(axis_mm: Array, knot_mm: Number, count: int, reach_mm: Number) -> csr_array:
    """Sparse (n, count) weights of the knots at every coordinate, for unit variance on average."""
    spline = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    offset = (axis_mm[:, None] + reach_mm) / knot_mm - np.arange(count)[None] + 1
    energy = 151 / 315  # integral of the squared cubic B-spline
    return csr_array((np.nan_to_num(spline(offset)) / np.sqrt(energy)).astype(np.float32))


# --- level sets: negative inside, in head-frame mm -----------------------------------------------


def ellipsoid(p: Points, centre: Numbers, radii: Numbers) -> Array:
    """Approximate signed distance to an ellipsoid, exact on its surface to first order."""
    scaled = [(a - c) / r for a, c, r in zip(p, centre, radii, strict=True)]
    k0 = np.sqrt(sum(s * s for s in scaled) + 1e-6)
    k1 = np.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True)) + 1e-9)
    return k0 * (k0 - 1) / k1


def capsule(p: Points, a: Numbers, b: Numbers, radius_a: Number, radius_b: Number) -> Array:
    """Signed distance to a rod from a to b whose radius changes linearly."""
    axis = np.subtract(b, a).astype(np.float32)
    offset = [u - np.float32(v) for u, v in zip(p, a, strict=True)]
    along = sum(o * d for o, d in zip(offset, axis, strict=True)) / float(axis @ axis)
    along = np.clip(along, 0, 1)
    squared = sum((o - along * d) ** 2 for o, d in zip(offset, axis, strict=True))
    return np.sqrt(squared) - (radius_a + (radius_b - radius_a) * along)


def tube(p: Points, stations: Sequence[Numbers], scale: Number) -> Array:
    """Signed distance to a rod through (x, y, z, radius) stations."""
    distance = None
    for (*a, radius_a), (*b, radius_b) in pairwise(stations):
        rod = capsule(p, a, b, radius_a * scale, radius_b * scale)
        distance = rod if distance is None else smooth_union(distance, rod, 3.0)
    assert distance is not None
    return distance


def smooth_union(a: Array, b: Array, blend_mm: Number) -> Array:
    """Union of two level sets with a fillet of about ``blend_mm``."""
    overlap = np.maximum(blend_mm - np.abs(a - b), 0) / blend_mm
    return np.minimum(a, b) - overlap**2 * (blend_mm / 4)


def beyond(*excess: Array) -> Array:
    """Distance to a patch, from how far a point lies beyond each of its limits."""
    return np.sqrt(sum(np.maximum(e, 0) ** 2 for e in excess))


# --- the drawing --------------------------------------------------------------------------------


@dataclass
class Anatomy:
    """A labelled head on the fine lattice.

    Attributes:
        labels: ``Tissue`` values, uint8, shape ``lattice.fine_shape``.
        build: the person.
        lattice: the sampling.
    """

    labels: NDArray[np.uint8]
    build: Build
    lattice: Lattice


def draw_head(rng: np.random.Generator, lattice: Lattice) -> Anatomy:
    """A random head's labels; deterministic in ``rng``, the same anatomy on any lattice."""
    build = draw_build(rng, lattice)
    noise = SmoothNoise(rng, lattice.axes_mm())
    inside, p = _head_points(lattice, build, noise)
    ripple = [noise(15.0).ravel()[inside] for _ in range(2)]
    broad = noise(45.0).ravel()[inside]
    cavity = cranial_cavity(p)
    thickness = skull_thickness(p, broad, ripple[0])
    labels = soft_tissue(p, cavity, thickness, ripple[1])
    paint_skull(labels, p, cavity, thickness, ripple)
    paint_face(labels, p, ripple)
    cranial = np.flatnonzero(cavity < 0)
    within: Points = tuple(c[cranial] for c in p)  # type: ignore[assignment]
    labels[cranial] = brain_labels(
        rng, within, -cavity[cranial], [r[cranial] for r in ripple], build
    )
    volume = np.zeros(lattice.fine_shape, np.uint8)
    volume.ravel()[inside] = labels
    return Anatomy(volume, build, lattice)


def _head_points(
    lattice: Lattice, build: Build, noise: SmoothNoise
) -> tuple[NDArray[np.int64], Points]:
    """Flat indices and head-frame coordinates of the lattice points near the head."""
    z, y, x = np.meshgrid(*lattice.axes_mm(), indexing="ij", sparse=True)
    x, y, z = (c - s for c, s in zip((x, y, z), build.shift_mm, strict=True))
    turned = [
        (x * np.float32(r[0]) + y * np.float32(r[1]) + z * np.float32(r[2])) / s + np.float32(c)
        for r, s, c in zip(build.rotation.T, build.scale, HEAD_CENTRE, strict=True)
    ]
    near = ellipsoid(tuple(turned), (0, -18, -10), (96, 116, 112)) < 0
    inside = np.flatnonzero(near)
    bend_mm = np.float32(1.7)
    p = tuple(t.ravel()[inside] + bend_mm * noise(50.0).ravel()[inside] for t in turned)
    return inside, p


def cranial_cavity(p: Points) -> Array:
    """The inside of the skull: cerebral vault, middle fossae, posterior fossa, foramen magnum."""
    x, y, z = p
    taper = 1 + 0.0016 * (y + 25) + 0.0006 * np.maximum(z - 20, 0)
    egg = (np.abs(x) * taper, y, z)
    vault = superellipsoid(egg, (0, -16, 9), (69, 88, 71, 34), 2.35)
    mirrored = (np.abs(x), y, z)
    middle = ellipsoid(mirrored, (38, -12, -20), (27, 36, 24))
    posterior = ellipsoid(p, (0, -62, -28), (58, 44, 32))
    canal = capsule(p, (0, -38, -45), (0, -46, -95), 16, 13)
    cavity = smooth_union(smooth_union(vault, middle, 8.0), posterior, 10.0)
    cavity = smooth_union(cavity, canal, 6.0)
    ridges = np.minimum.reduce([capsule(mirrored, *rod) for rod in _RIDGES])
    return -smooth_union(-cavity, ridges, 3.0)


_RIDGES = (
    ((13, -18, -37), (54, -36, -34), 4.0, 8.0),  # petrous pyramids
    ((10, 12, -24), (52, 24, -16), 2.5, 3.0),  # lesser wings of the sphenoid
    ((0, -4, -34), (0, -10, -28), 7.0, 4.0),  # sella and dorsum
)
"""Bone that stands up into the cavity: rods (from, to, radius from, radius to), mirrored."""


def superellipsoid(p: Points, centre: Numbers, radii: Numbers, power: Number) -> Array:
    """Like ``ellipsoid`` but boxier for power > 2, with its own radius below (fourth radius)."""
    x, y, z = (a - np.float32(c) for a, c in zip(p, centre, strict=True))
    radius_z = np.where(z > 0, np.float32(radii[2]), np.float32(radii[3]))
    sx, sy, sz = np.abs(x) / radii[0], np.abs(y) / radii[1], np.abs(z) / radius_z
    k0 = (sx**power + sy**power + sz**power + 1e-6) ** (1 / power)
    k1 = np.sqrt((sx / radii[0]) ** 2 + (sy / radii[1]) ** 2 + (sz / radius_z) ** 2 + 1e-9)
    euclidean = np.sqrt(sx * sx + sy * sy + sz * sz + 1e-6)
    return euclidean * (k0 - 1) / k1


def skull_thickness(p: Points, broad: Array, ripple: Array) -> Array:
    """Thickness of the calvaria: thick in front and behind, thin over the temples."""
    x, y, z = p
    temple = np.exp(-(((np.abs(x) - 66) / 16) ** 2 + ((y + 2) / 32) ** 2 + ((z + 8) / 24) ** 2))
    poles = np.exp(-(((y + 105) / 25) ** 2 + (z / 40) ** 2)) + np.exp(-(((y - 75) / 22) ** 2))
    base = 1 / (1 + np.exp((z + 17) / 3) + np.exp((-y - 5) / 6))
    thickness = 6.6 + 0.9 * broad + 0.5 * ripple - 3.2 * temple + 2.0 * poles - 3.6 * base
    return np.maximum(thickness, 3.0) + 5 * sinus_bulge(p)


def sinus_bulge(p: Points) -> Array:
    """Between 0 and 1: where the frontal bone splits around the frontal sinuses."""
    x, y, z = p
    bulge = np.exp(-((np.abs(x) - 9) ** 4 / 9.0**4 + ((z + 9) / 9) ** 2))
    return np.where(y > 40, bulge, np.float32(0))


def soft_tissue(p: Points, cavity: Array, thickness: Array, ripple: Array) -> NDArray[np.uint8]:
    """Skin, fat and muscle around the skull; air outside."""
    x, y, z = p
    side = np.abs(x)
    temporalis = 6 * np.exp(
        -(((side - 70) / 18) ** 2 + ((y - 18) / 28) ** 2 + ((z + 22) / 26) ** 2)
    )
    scalp = cavity - (thickness + 5.2 + 0.8 * ripple + temporalis)
    face = superellipsoid((side, y, z), (0, 20, -60), (70, 68, 50, 60), 2.4)
    neck = ellipsoid((x, y, z), (0, -52, -100), (66, 64, 80))
    nose = capsule((x, y, z), (0, 80, -30), (0, 92, -60), 6, 8)
    skin = smooth_union(smooth_union(smooth_union(scalp, face, 12.0), neck, 16.0), nose, 8.0)
    fat_mm = 3.4 + 0.9 * ripple + 2.5 * np.exp(-(((z + 50) / 25) ** 2))
    labels = np.where(skin < 0, np.uint8(Tissue.SKIN), np.uint8(Tissue.AIR))
    labels[skin < -1.9] = Tissue.FAT
    labels[skin < -1.9 - np.maximum(fat_mm, 1.5)] = Tissue.MUSCLE
    return labels


def paint_skull(
    labels: NDArray[np.uint8], p: Points, cavity: Array, thickness: Array, ripple: Sequence[Array]
) -> None:
    """Inner table, diploe and outer table over the cavity; open at the foramen magnum."""
    z = p[2]
    shell = (cavity >= 0) & (cavity < thickness) & (z > -66)
    inner, outer = 1.7 + 0.2 * ripple[1], 1.9 + 0.3 * ripple[0]
    labels[shell] = Tissue.CORTICAL_BONE
    spongy = shell & (cavity > inner) & (cavity < thickness - outer)
    labels[spongy] = Tissue.DIPLOE
    labels[spongy & (sinus_bulge(p) + 0.1 * ripple[0] > 0.45)] = Tissue.AIR


def paint_face(labels: NDArray[np.uint8], p: Points, ripple: Sequence[Array]) -> None:
    """Skull base, orbits and sinuses: enough of a face for an axial slice to be recognised."""
    x, y, z = p
    q = (np.abs(x), y, z)
    lumpy = ripple[0]
    septa = (labels == Tissue.MUSCLE) & (np.abs(ripple[1] + 0.4 * lumpy) < 0.13) & (z < -22)
    labels[septa] = Tissue.FAT
    for rod in _BASE_BONES:
        labels[capsule(q, *rod) + 0.8 * lumpy < 0] = Tissue.CORTICAL_BONE
    clivus = capsule(p, (0, -8, -32), (0, -22, -58), 7, 5) < 0
    labels[clivus] = Tissue.DIPLOE
    ethmoid = ellipsoid(q, (0, 42, -36), (15, 26, 17))
    labels[ethmoid < 0] = Tissue.CORTICAL_BONE
    cells = (np.abs(((x + 40) % 8) - 4) > 0.7) & (np.abs(((y + 1.5 * lumpy) % 11) - 5.5) > 0.8)
    labels[(ethmoid < -1.2) & cells] = Tissue.AIR
    _paint_cavity(labels, ellipsoid(q, (0, 13, -38), (14, 11, 10)) + lumpy)
    _paint_cavity(labels, ellipsoid(q, (34, 44, -66), (15, 18, 15)) + lumpy)
    _paint_cavity(labels, capsule(q, (5, 20, -58), (5, 66, -58), 4, 3))
    mastoid = ellipsoid(q, (56, -42, -44), (9, 13, 15))
    bubbles = np.sin(x * 1.3) * np.sin(y * 1.3 + lumpy) * np.sin(z * 1.1)
    labels[mastoid < 0] = Tissue.DIPLOE
    labels[(mastoid < -2) & (bubbles > -0.15)] = Tissue.AIR
    labels[capsule(q, (50, -22, -44), (90, -22, -46), 3.2, 3.5) < 0] = Tissue.AIR
    _paint_orbit(labels, q)


_BASE_BONES = (
    *_RIDGES,
    ((24, 20, -36), (46, 50, -36), 3.0, 3.5),  # lateral walls of the orbits
    ((46, 54, -36), (60, 36, -46), 4.5, 4.0),  # zygoma
    ((60, 36, -46), (68, -8, -46), 3.0, 2.5),  # zygomatic arches
    ((14, 78, -20), (44, 62, -20), 4.5, 4.0),  # upper orbital rims
    ((0, 84, -24), (3, 90, -44), 3.0, 2.5),  # nasal bones
)
"""Rods (from, to, radius from, radius to) on the right half, mirrored."""


def _paint_cavity(labels: NDArray[np.uint8], cavity: Array) -> None:
    labels[cavity < 1.6] = Tissue.CORTICAL_BONE
    labels[cavity < 0] = Tissue.AIR


def _paint_orbit(labels: NDArray[np.uint8], q: Points) -> None:
    cone = capsule(q, (31, 58, -36), (15, 20, -32), 15, 4)
    labels[cone < 0] = Tissue.FAT
    for side in ((10, 0), (-10, 0), (0, 10), (0, -10)):
        muscle = capsule(q, (31 + side[0], 52, -36 + side[1]), (16, 23, -32), 1.8, 1.2)
        labels[muscle < 0] = Tissue.MUSCLE
    labels[capsule(q, (30, 47, -36), (12, 16, -30), 2.2, 2.2) < 0] = Tissue.NERVE
    eye = ellipsoid(q, (31, 57, -36), (12.5, 12.5, 12.5))
    labels[eye < 0] = Tissue.MUSCLE
    labels[eye < -1.2] = Tissue.VITREOUS
    labels[ellipsoid(q, (31, 66, -36), (5, 2.3, 5)) < 0] = Tissue.LENS


# --- the brain ----------------------------------------------------------------------------------


def brain_labels(
    rng: np.random.Generator, p: Points, depth: Array, ripple: Sequence[Array], build: Build
) -> NDArray[np.uint8]:
    """Labels of the points inside the skull; ``depth`` is their distance below the inner table."""
    x, y, z = p
    midline = x + 0.6 * ripple[0]
    tentorium = z - (3 - 0.30 * np.abs(x) - 0.34 * np.maximum(-48 - y, 0) + 0.8 * ripple[1])
    behind = (y < -24 - 0.22 * np.abs(x)) & (z > -75)
    below = behind & (tentorium < 0)
    roof = np.where(behind, tentorium + 0.8, np.float32(99))
    from_csf = distance_from_csf(rng, p, midline, np.minimum(depth, roof), ripple, build)
    labels = np.full(x.shape, Tissue.CSF, np.uint8)
    labels[from_csf > 0] = Tissue.GREY_MATTER
    labels[from_csf > 2.9 + 0.25 * ripple[1]] = Tissue.WHITE_MATTER
    labels[below | (z < -48)] = Tissue.CSF
    _paint_deep_grey(labels, p)
    _paint_cisterns(labels, p)
    _paint_cerebellum(
        labels, p, np.minimum(depth, -np.where(behind, tentorium, -99)), below, ripple
    )
    _paint_brainstem(labels, p)
    _paint_ventricles(labels, p, midline, ripple, build)
    _paint_dura(labels, p, midline, depth, tentorium, behind)
    return labels


def distance_from_csf(
    rng: np.random.Generator,
    p: Points,
    midline: Array,
    depth: Array,
    ripple: Sequence[Array],
    build: Build,
) -> Array:
    """Distance of a point of the cerebrum from the nearest subarachnoid CSF, negative in CSF.

    The cortex is the ribbon where it is small, so grey matter follows every sulcus and fissure.
    """
    x, y, z = p
    side = np.abs(x)
    wide = 0.35 + 0.75 * build.atrophy
    gap = 1.3 + 1.8 * build.atrophy + 0.5 * ripple[0]
    sheet = sulcal_sheets(rng, p, ripple)
    sulcus = beyond(np.abs(sheet), depth - (22 + 5 * ripple[1]))
    opening = wide * (0.7 + 1.1 * np.exp(-np.maximum(depth, 0) / 5))
    core = ellipsoid(p, (0, -5, 6), (40, 41, 22))
    fissure = beyond(np.abs(midline), -core)
    insula = beyond(
        np.abs(side - 40 + 0.008 * (y - 2) ** 2), ellipsoid(p, (40, 2, 2), (60, 23, 13))
    )
    sylvian_z = 1 - 0.28 * y + 2.5 * ripple[0]
    sylvian = beyond(np.abs(z - sylvian_z), 39 - side, np.abs(y + 2) - 28)
    from_csf = np.minimum(depth - gap, sulcus - opening)
    for distance, width in ((fissure, 0.9), (insula, 0.9), (sylvian, 1.1)):
        from_csf = np.minimum(from_csf, distance - width - 0.8 * wide)
    return from_csf


def sulcal_sheets(
    rng: np.random.Generator, p: Points, ripple: Sequence[Array], spacing_mm: float = 2.5
) -> Array:
    """Signed distance to a random labyrinth of sheets that stand on the brain's surface.

    Zero crossings of band-passed noise lie half its wavelength apart, like neighbouring sulci.
    The noise is read along rays from the brain's middle, so sheets run inwards.
    """
    count = int(240 / spacing_mm)
    white = rng.standard_normal((count, count, count)).astype(np.float32)
    field = gaussian_filter(white, 1.7, mode="wrap") - gaussian_filter(white, 2.8, mode="wrap")
    slope = np.sqrt(sum(g * g for g in np.gradient(field, spacing_mm)))
    distance = np.clip(field / np.maximum(slope, 0.35 * slope.mean()), -12, 12)
    x, y, z = p[0], p[1] + 17, p[2] - 5
    radius = np.sqrt((x / 66) ** 2 + (y / 86) ** 2 + (z / 68) ** 2 + 1e-4)
    squeeze = np.minimum(radius, 1.3) ** -0.4
    at = [
        (c * squeeze + 1.6 * r) / spacing_mm + count / 2
        for c, r in zip((x, y, z), (*ripple, ripple[0]), strict=True)
    ]
    return map_coordinates(distance, at, order=1, mode="nearest")


def _paint_deep_grey(labels: NDArray[np.uint8], p: Points) -> None:
    q = (np.abs(p[0]), p[1], p[2])
    callosum = ellipsoid(q, (0, -5, 6), (40, 42, 23)) < 0
    labels[callosum & (labels == Tissue.GREY_MATTER) & (q[0] < 32)] = Tissue.WHITE_MATTER
    nuclei = np.minimum(
        ellipsoid(q, (11, -18, 6), (9.5, 15, 9)),  # thalamus
        ellipsoid(q, (27, 4, 1), (5, 17, 11)),  # putamen
    )
    caudate = tube(q, ((14, 20, 4, 5.0), (15, 8, 12, 5.5), (18, -10, 21, 3.0), (22, -26, 19, 2)), 1)
    labels[np.minimum(nuclei, caudate) < 0] = Tissue.DEEP_GREY
    labels[ellipsoid(q, (20, -3, -1), (4, 9, 7)) < 0] = Tissue.PALLIDUM
    hippocampus = tube(q, ((22, -6, -20, 7), (28, -20, -17, 5), (28, -34, -6, 4)), 1)
    labels[hippocampus < 0] = Tissue.GREY_MATTER


def _paint_cisterns(labels: NDArray[np.uint8], p: Points) -> None:
    q = (np.abs(p[0]), p[1], p[2])
    cisterns = ellipsoid(q, (0, 2, -22), (13, 9, 8))  # suprasellar
    for centre, radii in (((0, -40, -2), (8, 3.2, 6)), ((0, -10, -36), (14, 7, 16))):
        cisterns = np.minimum(cisterns, ellipsoid(q, centre, radii))
    ambient = np.abs(capsule(p, (0, -23, -6), (0, -25, -30), 16.5, 18)) - 1.3
    labels[(cisterns < 0) | ((ambient < 0) & (p[2] < 0) & (p[1] < 0))] = Tissue.CSF


def _paint_cerebellum(
    labels: NDArray[np.uint8], p: Points, depth: Array, below: Mask, ripple: Sequence[Array]
) -> None:
    x, y, z = p
    q = (np.abs(x), y, z)
    lobes = smooth_union(
        ellipsoid(q, (26, -64, -30), (33, 36, 28)), ellipsoid(q, (0, -66, -24), (17, 32, 28)), 5.0
    )
    inner = np.minimum(-lobes, depth - 1.4)
    inner = np.where(below, inner, np.float32(-1))
    arcs = np.sqrt(x * x * 0.45 + (y + 30) ** 2 + 0.8 * (z + 34) ** 2) + 2.0 * ripple[0]
    leaf = np.abs((arcs % 5.0) - 2.5)
    labels[inner > 0] = Tissue.GREY_MATTER
    labels[(inner > 0) & (inner < 9) & (leaf < 0.28)] = Tissue.CSF
    labels[(inner > 3) & (leaf > 1.9) & (inner < 13)] = Tissue.WHITE_MATTER
    labels[inner > 11 + 2.0 * ripple[1]] = Tissue.WHITE_MATTER
    labels[ellipsoid(q, (14, -56, -34), (7, 6, 5)) < 0] = Tissue.DEEP_GREY


def _paint_brainstem(labels: NDArray[np.uint8], p: Points) -> None:
    q = (np.abs(p[0]), p[1], p[2])
    stem = tube(p, ((0, -20, -6, 11), (0, -25, -16, 13), (0, -26, -32, 14), (0, -40, -55, 8.5)), 1)
    stem = np.minimum(stem, capsule(p, (0, -40, -55), (0, -47, -100), 8, 6.5))
    peduncle = capsule(q, (8, -18, -12), (15, -8, 0), 6.5, 6)
    middle = capsule(q, (8, -34, -33), (20, -50, -35), 7, 7)
    labels[np.minimum(np.minimum(stem, peduncle), middle) < 0] = Tissue.WHITE_MATTER
    labels[ellipsoid(q, (5, -21, -10), (3, 3, 4)) < 0] = Tissue.DEEP_GREY


_LATERAL_VENTRICLE = (
    ((14, 32, 2, 2.0), (9, 18, 9, 4.6), (9, 2, 19, 4.4), (14, -20, 22, 4.4), (25, -40, 13, 6.5)),
    ((25, -40, 13, 6.0), (26, -55, 8, 3.2), (24, -70, 5, 1.2)),
    ((25, -40, 13, 6.0), (34, -36, -4, 3.4), (35, -20, -14, 2.4), (30, -8, -19, 2.0)),
)
"""Frontal horn and body, occipital horn, temporal horn: (x, y, z, radius) on the right half."""


def _paint_ventricles(
    labels: NDArray[np.uint8], p: Points, midline: Array, ripple: Sequence[Array], build: Build
) -> None:
    x, y, z = p
    q = (np.abs(x), y, z)
    size = build.ventricle
    lateral = np.minimum.reduce([tube(q, horn, size) for horn in _LATERAL_VENTRICLE])
    third = ellipsoid(p, (0, -13, -2), (1.6 + 1.4 * size, 15, 10))
    fourth = ellipsoid(p, (0, -45, -32), (6.5 * size, 5 * size, 9))
    aqueduct = capsule(p, (0, -30, -5), (0, -40, -26), 1.2, 1.4)
    ventricles = np.minimum.reduce([third, fourth, aqueduct])
    ventricles = np.minimum(ventricles, np.where(np.abs(midline) > 0.9, lateral, np.float32(9)))
    labels[ventricles + 0.3 * ripple[0] < 0] = Tissue.CSF


def _paint_dura(
    labels: NDArray[np.uint8],
    p: Points,
    midline: Array,
    depth: Array,
    tentorium: Array,
    behind: Mask,
) -> None:
    x, y, z = p
    core = ellipsoid(p, (0, -5, 6), (40, 50, 32))
    falx = (
        (np.abs(midline) < 0.65)
        & (core > 0)
        & (z > np.where(y > 0, 5, -2))
        & (labels == Tissue.CSF)
    )
    fold = behind & (np.abs(tentorium) < 0.7) & (np.abs(x) > 6) & (z < 6)
    labels[(depth < 0.7) | falx | fold] = Tissue.DURA
    sinus = (np.abs(midline) + 1.1 * depth < 7.5) & (z > -10) & ((z > 45) | (y < -60))
    transverse = behind & (np.abs(tentorium) + depth < 7) & (np.abs(x) < 62)
    labels[sinus | transverse] = Tissue.BLOOD
