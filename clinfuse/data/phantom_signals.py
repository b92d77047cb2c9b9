"""From tissue to signal: MRI by signal equations, CT in Hounsfield units, and their noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from clinfuse.data.phantom_anatomy import Array, Lattice, Number, Numbers, SmoothNoise, Tissue

CONTRASTS = ("t1", "t2", "pd", "flair", "adc")
B_VALUE_S_MM2 = 1000.0
"""Diffusion weighting of the image that ADC is computed from."""


@dataclass(frozen=True)
class Properties:
    """What scanners measure of a tissue.

    Attributes:
        t1_ms, t2_ms: relaxation times at 1.5 T.
        proton_density: relative to water.
        adc: apparent diffusion coefficient in 1e-6 mm^2/s.
        ct_hu: mean Hounsfield units.
        t1_at_3t: factor on ``t1_ms`` at 3 T; fluids hardly change.
    """

    t1_ms: float
    t2_ms: float
    proton_density: float
    adc: float
    ct_hu: float
    t1_at_3t: float = 1.3


_FLUID = {"t1_at_3t": 1.02}
TISSUES: dict[Tissue, Properties] = {
    Tissue.AIR: Properties(1000.0, 50.0, 0.0, 0.0, -1000.0),
    Tissue.SKIN: Properties(500.0, 45.0, 0.55, 900.0, 45.0),
    Tissue.FAT: Properties(270.0, 85.0, 0.90, 60.0, -90.0, 1.1),
    Tissue.MUSCLE: Properties(950.0, 45.0, 0.75, 1400.0, 55.0),
    Tissue.CORTICAL_BONE: Properties(250.0, 2.0, 0.10, 100.0, 1350.0, 1.1),
    Tissue.DIPLOE: Properties(380.0, 55.0, 0.40, 300.0, 400.0, 1.15),
    Tissue.DURA: Properties(800.0, 25.0, 0.45, 700.0, 62.0),
    Tissue.CSF: Properties(4000.0, 1400.0, 1.00, 3000.0, 8.0, **_FLUID),
    Tissue.GREY_MATTER: Properties(980.0, 97.0, 0.83, 850.0, 38.0, 1.35),
    Tissue.WHITE_MATTER: Properties(620.0, 78.0, 0.70, 740.0, 30.0, 1.35),
    Tissue.DEEP_GREY: Properties(880.0, 84.0, 0.80, 780.0, 38.0, 1.35),
    Tissue.PALLIDUM: Properties(750.0, 70.0, 0.75, 780.0, 39.0, 1.35),
    Tissue.BLOOD: Properties(
        1400.0, 60.0, 0.12, 1500.0, 55.0
    ),  # flowing: most spins leave the slice
    Tissue.VITREOUS: Properties(3600.0, 800.0, 0.98, 2900.0, 7.0, **_FLUID),
    Tissue.LENS: Properties(1000.0, 35.0, 0.65, 900.0, 80.0),
    Tissue.NERVE: Properties(700.0, 80.0, 0.70, 900.0, 34.0, 1.35),
    Tissue.INFARCT: Properties(1150.0, 135.0, 0.88, 430.0, 24.0, 1.35),
}
"""At 1.5 T. Relaxation: Stanisz et al. (2005) and Bojorquez et al. (2017), rounded; ADC of acute
infarct about half of normal: Sevick et al. (1990); HU: textbook values, infarct a few HU below
normal brain. Air's relaxation times are placeholders behind a proton density of zero."""


@dataclass(frozen=True)
class Scanner:
    """How a case was scanned.

    Attributes:
        field_t: 1.5 or 3.
        snr: white matter over noise in a spin-echo image.
        ct_noise_hu: standard deviation of CT noise in the middle of the brain.
        bias: standard deviation of the log receive field.
        infarct_severity: 0 leaves lesions looking like grey matter, 1 is a full infarct.
    """

    field_t: float
    snr: float
    ct_noise_hu: float
    bias: float
    infarct_severity: float


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """A random protocol within clinical habits."""
    return Scanner(
        field_t=float(rng.choice([1.5, 3.0])),
        snr=float(rng.uniform(13, 19)),
        ct_noise_hu=float(rng.uniform(4, 6.5)),
        bias=float(rng.uniform(0.03, 0.06)),
        infarct_severity=float(rng.uniform(0.85, 1.0)),
    )


def tissue_table(scanner: Scanner) -> dict[str, Array]:
    """Properties by tissue label at the scanner's field strength, infarct by its severity."""
    table = {
        name: np.array([getattr(TISSUES[t], name) for t in Tissue], np.float32)
        for name in ("t1_ms", "t2_ms", "proton_density", "adc", "ct_hu", "t1_at_3t")
    }
    for name, values in table.items():
        normal = 0.5 * (values[Tissue.GREY_MATTER] + values[Tissue.WHITE_MATTER])
        if name != "t1_at_3t":
            values[Tissue.INFARCT] += (1 - scanner.infarct_severity) * (
                normal - values[Tissue.INFARCT]
            )
    if scanner.field_t > 2:
        table["t1_ms"] *= table["t1_at_3t"]
        table["t2_ms"] *= 0.9
    return table


def spin_echo(table: dict[str, Array], tr_ms: Number, te_ms: Number) -> Array:
    """Spin-echo signal by tissue: PD (1 - exp(-TR/T1)) exp(-TE/T2)."""
    recovered = 1 - np.exp(-tr_ms / table["t1_ms"])
    return table["proton_density"] * recovered * np.exp(-te_ms / table["t2_ms"])


def inversion_recovery(
    table: dict[str, Array], tr_ms: Number, ti_ms: Number, te_ms: Number
) -> Array:
    """Magnitude inversion recovery: PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)."""
    t1 = table["t1_ms"]
    recovered = np.abs(1 - 2 * np.exp(-ti_ms / t1) + np.exp(-tr_ms / t1))
    return table["proton_density"] * recovered * np.exp(-te_ms / table["t2_ms"])


def diffusion_weighted(table: dict[str, Array], b_s_mm2: Number) -> Array:
    """Fat-saturated echo-planar signal under diffusion weighting: S_0 exp(-b ADC)."""
    signal = spin_echo(table, tr_ms=6000.0, te_ms=85.0) * np.exp(-b_s_mm2 * 1e-6 * table["adc"])
    signal[[Tissue.FAT, Tissue.DIPLOE]] *= 0.05
    return signal


def mri_pair(
    rng: np.random.Generator,
    labels: NDArray[np.uint8],
    lattice: Lattice,
    contrast: str,
    scanner: Scanner,
    noise: SmoothNoise,
) -> tuple[Array, Array]:
    """The scan and its noise-free, bias-free twin.

    Weighted images are in percent of the brightest tissue's spin-echo signal, with Rician noise
    and a smooth multiplicative receive field. ADC is in 1e-6 mm^2/s, log(S_0 / S_b) / b of two
    noisy magnitudes: the receive field cancels, and voxels with no signal are 0, as scanners do.
    """
    table = tissue_table(scanner)
    field = np.exp(scanner.bias * np.clip(noise(70.0), -2, 2))
    if contrast == "adc":
        return _adc_pair(rng, labels, lattice, table, scanner, field)
    by_tissue = 100 * _weighting(table, contrast)
    clean = acquire(by_tissue, labels, lattice) * texture(noise)
    sigma = float(by_tissue[Tissue.WHITE_MATTER]) / scanner.snr
    return rician(rng, clean * field, sigma), clean


def _weighting(table: dict[str, Array], contrast: str) -> Array:
    if contrast == "t1":
        return inversion_recovery(table, tr_ms=2300, ti_ms=1000, te_ms=4)
    if contrast == "t2":
        return spin_echo(table, tr_ms=4500, te_ms=98)
    if contrast == "pd":
        return spin_echo(table, tr_ms=3200, te_ms=18)
    if contrast == "flair":
        fluid_t1 = float(table["t1_ms"][Tissue.CSF])
        tr_ms = 9000.0
        null = fluid_t1 * np.log(2 / (1 + np.exp(-tr_ms / fluid_t1)))
        return inversion_recovery(table, tr_ms, ti_ms=0.97 * null, te_ms=105)
    raise ValueError(f"expected a contrast of {CONTRASTS}, got {contrast!r}")


def _adc_pair(
    rng: np.random.Generator,
    labels: NDArray[np.uint8],
    lattice: Lattice,
    table: dict[str, Array],
    scanner: Scanner,
    field: Array,
) -> tuple[Array, Array]:
    unweighted, weighted = (100 * diffusion_weighted(table, b) for b in (0.0, B_VALUE_S_MM2))
    s_0, s_b = (acquire(s, labels, lattice) for s in (unweighted, weighted))
    sigma = 1.25 * float(unweighted[Tissue.WHITE_MATTER]) / scanner.snr
    seen = s_0 > 0.25 * unweighted[Tissue.WHITE_MATTER]
    clean = apparent_diffusion(s_0, s_b, seen)
    sigma_b = sigma / 3**0.5  # the trace image averages three directions
    noisy_0 = rician(rng, s_0 * field, sigma)
    noisy_b = rician(rng, s_b * field, sigma_b)
    return apparent_diffusion(noisy_0, noisy_b, seen), clean


def texture(noise: SmoothNoise) -> Array:
    """Factor near 1 for what tissue parameters vary by within one tissue: about 3 percent."""
    return 1 + 0.02 * np.clip(noise(5.0), -3, 3) + 0.02 * np.clip(noise(16.0), -3, 3)


def apparent_diffusion(s_0: Array, s_b: Array, seen: NDArray[np.bool_]) -> Array:
    """ADC in 1e-6 mm^2/s from two magnitudes, clipped to [0, 3500], 0 where nothing is seen."""
    ratio = np.log(np.maximum(s_0, 1e-3) / np.maximum(s_b, 1e-3))
    adc = np.clip(ratio / B_VALUE_S_MM2 * 1e6, 0, 3500)
    return np.where(seen, adc, 0).astype(np.float32)


def acquire(by_tissue: Array, labels: NDArray[np.uint8], lattice: Lattice) -> Array:
    """The image of a labelled head: voxel averages under a slight in-plane blur."""
    return blur(lattice.average(by_tissue.astype(np.float32)[labels]))


def blur(volume: Array) -> Array:
    """The scanner's point spread beyond the voxel itself: in-plane, half a voxel."""
    return gaussian_filter(volume, (0, 0.5, 0.5), mode="nearest")


def rician(rng: np.random.Generator, signal: Array, sigma: Number) -> Array:
    """Magnitude of a complex signal with Gaussian noise in both channels. Gudbjartsson (1995)."""
    real, imaginary = rng.standard_normal((2, *signal.shape), dtype=np.float32) * np.float32(sigma)
    return np.hypot(signal + real, imaginary)


def ct_pair(
    rng: np.random.Generator,
    labels: NDArray[np.uint8],
    dense: Sequence[tuple[NDArray[np.int64], float]],
    lattice: Lattice,
    scanner: Scanner,
    noise: SmoothNoise,
) -> tuple[Array, Array]:
    """The CT in Hounsfield units and its noise-free twin.

    Args:
        dense: flat fine-lattice indices and HU of what only the CT shows.
    """
    by_tissue = tissue_table(scanner)["ct_hu"]
    fine = by_tissue[labels]
    for where, hu in dense:
        fine.ravel()[where] = hu
    average = blur(lattice.average(fine))
    mineral = np.clip(average / 1000, 0, 1.5)
    density = 0.13 * noise(14.0) + 0.06 * noise(6.0)
    soft = (np.abs(average) < 150) * (0.7 * noise(5.0) + 0.7 * noise(16.0))
    clean = average * (1 + mineral * np.clip(density, -0.45, 0.45) / 1.5) + soft
    sigma = ct_noise_sigma(clean, lattice.spacing_mm, scanner.ct_noise_hu)
    noisy = clean + sigma * correlated_noise(rng, lattice)
    return np.clip(noisy, -1024, 3071).astype(np.float32), clean.astype(np.float32)


def ct_noise_sigma(ct_hu: Array, spacing_mm: Numbers, brain_sigma_hu: Number) -> Array:
    """Local noise: Poisson, so it grows with the attenuation that the rays around passed.

    Counts fall as exp(-path), the log of them varies as exp(path / 2): a wide blur of the density
    stands in for the path. Bone adds 12 % of its own density, for beam hardening and starvation.
    """
    widths = [12 / s for s in spacing_mm]
    around = gaussian_filter(np.clip(ct_hu, -1000, 1500) / 1000 + 1, widths, mode="nearest")
    path = np.clip(around - 1.05, -1, 1)
    return brain_sigma_hu * np.exp(1.6 * path) + 0.12 * np.clip(ct_hu - 150, 0, None)


def correlated_noise(rng: np.random.Generator, lattice: Lattice) -> Array:
    """Unit-variance noise with the grain of a soft-tissue reconstruction kernel, in-plane."""
    white = rng.standard_normal(lattice.shape, dtype=np.float32)
    widths = [min(1.2, 1.0 / s) for s in lattice.spacing_mm[1:]]
    grain = gaussian_filter(white, (0, *widths)) - 0.5 * gaussian_filter(
        white, (0, *(3 * w for w in widths))
    )
    return grain / grain.std()
