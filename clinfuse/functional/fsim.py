"""Feature similarity (FSIM): phase congruency and gradient magnitude, slice by slice.

Zhang et al. (2011), "FSIM: a feature similarity index for image quality assessment", with the
phase congruency of Kovesi (1999) and the filter constants of the authors' ``FeatureSIM.m``.
"""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SCALES, ORIENTATIONS = 4, 4
SHORTEST_WAVE, WAVE_FACTOR = 6.0, 2.0  # pixels; ratio between scales
BANDWIDTH = 0.55  # of a log-Gabor filter: spread over centre frequency
ANGULAR_SPREAD = math.pi / ORIENTATIONS / 1.2
NOISE_STDS, NOISE_RESCALING = 2.0, 1.7
T_1, T_2 = 0.85, 160.0  # of phase congruency and gradient, on 0..255
EPSILON = 1e-4


def fsim(
    a: Float[Tensor, "b 1 *dhw"],
    b: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    data_range: float = 2.0,
) -> Float[Tensor, " b"]:
    """Feature similarity over the mask's voxels, in [0, 1]; NaN where nothing in it has features.

    Zhang et al. (2011), Eq. 10. Volumes are read as slices along their first spatial axis, and
    all slices of a case are pooled in one mean weighted by phase congruency, so a slice counts
    for what it shows and an empty one for nothing. Both images are seen whole; the mask only
    limits the mean. Slices wider than 383 pixels are averaged down, as the authors do. A metric:
    its gradient is not defined on flat images.

    Args:
        a: one image, volumes or slices.
        b: the other.
        mask: voxels to average over, all true for the whole image.
        data_range: width of the range of values from its lower end: 2 means [-1, 1]. Values are
            scaled to the 0..255 that the constants are for.
    """
    images = torch.cat((a, b), dim=1) * (255 / data_range) + 127.5
    slices = images.movedim(1, -3).reshape(-1, 2, *images.shape[-2:])
    masks = mask.movedim(1, -3).reshape(-1, 1, *mask.shape[-2:])
    seen = masks.flatten(1).any(1)
    if not seen.any():
        return a.new_full((len(a),), torch.nan)
    weights, weighted = _similarity(*_reduced(slices[seen], masks[seen]))

    cases = torch.arange(len(a), device=a.device).repeat_interleave(len(masks) // len(a))[seen]
    total, norm = (
        a.new_zeros(len(a)).index_add(0, cases, part.flatten(1).sum(1))
        for part in (weighted, weights)
    )
    return torch.where(norm > 0, total / norm.clamp(min=1e-30), torch.nan)


def _reduced(slices: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    factor = max(1, round(min(slices.shape[-2:]) / 256))
    if factor == 1:
        return slices, masks
    return F.avg_pool2d(slices, factor), F.max_pool2d(masks.float(), factor) > 0


def _similarity(slices: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of each pixel, and its similarity times that weight; 0 outside the mask."""
    congruency, gradient = phase_congruency(slices), gradient_magnitude(slices)
    similarity = _ratio(congruency, T_1) * _ratio(gradient, T_2)
    weight = torch.where(masks, congruency.amax(1, keepdim=True), 0)
    return weight, weight * similarity


def _ratio(pair: Tensor, constant: float) -> Tensor:
    x, y = pair.split(1, dim=1)
    return (2 * x * y + constant) / (x**2 + y**2 + constant)


def gradient_magnitude(slices: Float[Tensor, "s c h w"]) -> Float[Tensor, "s c h w"]:
    """Length of the Scharr gradient (Zhang et al. (2011), Table I); beyond the border is 0."""
    padded = F.pad(slices, (1, 1, 1, 1))
    lines = [padded[..., 1:-1, :], padded[..., :-2, :] + padded[..., 2:, :]]
    along_w = (10 * lines[0] + 3 * lines[1]).diff(dim=-1)
    along_w = along_w[..., 1:] + along_w[..., :-1]
    columns = [padded[..., 1:-1], padded[..., :-2] + padded[..., 2:]]
    along_h = (10 * columns[0] + 3 * columns[1]).diff(dim=-2)
    along_h = along_h[..., 1:, :] + along_h[..., :-1, :]
    return torch.sqrt(along_w**2 + along_h**2) / 16


def phase_congruency(slices: Float[Tensor, "s c h w"]) -> Float[Tensor, "s c h w"]:
    """How far the Fourier components agree in phase at each pixel, in [0, 1]; 0 on flat images.

    Kovesi (1999), with noise estimated from the median response at the finest scale.

    Args:
        slices: images on 0..255.
    """
    banks, noise_gain = _filters(*slices.shape[-2:])
    mean = slices.mean((-2, -1), keepdim=True)  # no filter sees it; without it flat is exactly 0
    spectrum = torch.fft.fft2(slices - mean)
    energy, amplitude = torch.zeros_like(slices), torch.full_like(slices, EPSILON)
    for bank, gain in zip(torch.from_numpy(banks).to(slices), noise_gain, strict=True):
        responses = torch.fft.ifft2(spectrum[..., None, :, :] * bank)
        amplitudes = torch.sqrt(responses.real**2 + responses.imag**2)
        noise = amplitudes[..., 0, :, :].flatten(2).median(dim=2).values[..., None, None]
        energy = energy + (_energy(responses) - float(gain) * noise).clamp(min=0)
        amplitude = amplitude + amplitudes.sum(-3)
    return energy / amplitude


def _energy(responses: Tensor) -> Tensor:
    """Sum over scales of A_n (cos(phase deviation) - |sin(phase deviation)|): Kovesi's PC_2."""
    even, odd = responses.real, responses.imag
    sum_even, sum_odd = even.sum(-3, keepdim=True), odd.sum(-3, keepdim=True)
    length = torch.sqrt(sum_even**2 + sum_odd**2)
    across = (even * sum_odd - odd * sum_even).abs().sum(-3) / (length.squeeze(-3) + EPSILON)
    return length.squeeze(-3) - across


@lru_cache(maxsize=16)
def _filters(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-Gabor filters (orientation, scale, h, w), and what multiplies the median amplitude of
    each orientation's finest scale to give its noise threshold."""
    y, x = np.meshgrid(_frequencies(height), _frequencies(width), indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(-x, y)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    radius[0, 0] = 1
    waves = SHORTEST_WAVE * WAVE_FACTOR ** np.arange(SCALES)[:, None, None]
    radial = np.exp(-(np.log(radius * waves) ** 2) / (2 * math.log(BANDWIDTH) ** 2)) * low_pass
    radial[:, 0, 0] = 0
    axes = np.arange(ORIENTATIONS)[:, None, None] * math.pi / ORIENTATIONS
    away = np.abs(np.angle(np.exp(1j * (angle - axes))))
    angular = np.exp(-(away**2) / (2 * ANGULAR_SPREAD**2))
    filters = angular[:, None] * radial
    return filters, _noise_gain(filters)


def _noise_gain(filters: np.ndarray) -> np.ndarray:
    """White noise with the median |response|^2 seen at the finest scale has an energy of mean
    and deviation given by a Rayleigh law; the threshold is k deviations above its mean."""
    kernels = np.fft.ifft2(filters).real * math.sqrt(filters.shape[-2] * filters.shape[-1])
    power = (kernels**2).sum((1, 2, 3))
    total = (kernels.sum(1) ** 2).sum((1, 2))
    energy_2 = 2 * power + 2 * (total - power)  # 2 Σ A_i² + 4 Σ_{i<j} A_i A_j
    rayleigh = np.sqrt(energy_2 / 2 / math.log(2) / (filters[:, 0] ** 2).sum((1, 2)))
    threshold = math.sqrt(math.pi / 2) + NOISE_STDS * math.sqrt(2 - math.pi / 2)
    return rayleigh * threshold / NOISE_RESCALING


def _frequencies(size: int) -> np.ndarray:
    """Frequencies in cycles a pixel with 0 first; odd sizes reach +-0.5, as in ``FeatureSIM.m``."""
    half = size // 2
    centred = np.arange(size) - half
    return np.fft.ifftshift(centred / (size - size % 2))
