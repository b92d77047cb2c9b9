"""Feature similarity (FSIM): phase congruency and gradient magnitude, slice by slice.

Zhang et al. (2011), "FSIM: a feature similarity index for image quality assessment", with the
phase congruency of Kovesi (1999) and the filter constants of the authors' ``FeatureSIM.m``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional import fsim_cpu
from clinfuse.functional.cores import on_every_core
from clinfuse.functional.fsim_cpu import SCALES

ORIENTATIONS = 4
SHORTEST_WAVE, WAVE_FACTOR = 6.0, 2.0  # pixels; ratio between scales
BANDWIDTH = 0.55  # of a log-Gabor filter: spread over centre frequency
ANGULAR_SPREAD = math.pi / ORIENTATIONS / 1.2
NOISE_STDS, NOISE_RESCALING = 2.0, 1.7
T_1, T_2 = 0.85, 160.0  # of phase congruency and gradient, on 0..255
EPSILON = 1e-4

SLICES_AT_A_TIME = 32
"""On a GPU: 0.3 GB of responses at 256 x 256. A CPU's core takes one."""


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
    limits the mean. Slices wider than 383 pixels are averaged down, as the authors do. A metric,
    without a gradient: it would not be defined on flat images.

    Args:
        a: one image, volumes or slices.
        b: the other.
        mask: voxels to average over, all true for the whole image.
        data_range: width of the range of values from its lower end: 2 means [-1, 1]. Values are
            scaled to the 0..255 that the constants are for.
    """
    return fsim_to_each(a, [(b, mask)], data_range)[0]


def fsim_to_each(
    image: Float[Tensor, "b 1 *dhw"],
    others: Sequence[tuple[Float[Tensor, "b 1 *dhw"], Bool[Tensor, "b 1 *dhw"]]],
    data_range: float = 2.0,
) -> list[Float[Tensor, " b"]]:
    """``fsim`` of one image with each of several, whose features are worked out once.

    Args:
        image: volumes or slices.
        others: each with the mask to average over.
        data_range: width of the range of values.
    """
    slices = _slices(image)
    pairs = [(_slices(other), _slices(mask)) for other, mask in others]
    size = 1 if image.device.type == "cpu" else SLICES_AT_A_TIME

    def sums(start: int) -> Tensor:
        part = slice(start, start + size)
        return _sums(slices[part], [(o[part], m[part]) for o, m in pairs], 255 / data_range)

    found = torch.cat(on_every_core(sums, range(0, len(slices), size)), dim=-1)
    weighted, weights = found.unflatten(-1, (len(image), -1)).sum(-1).unbind(1)
    return list(torch.where(weights > 0, weighted / weights.clamp(min=1e-30), torch.nan))


def _slices(images: Tensor) -> Tensor:
    return images.movedim(1, -3).reshape(-1, 1, *images.shape[-2:])


def _sums(slices: Tensor, others: Sequence[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """For each of the others, and each slice: the sums of weighted similarity and of weights."""
    found = slices.new_zeros(len(others), 2, len(slices))
    seen = [n for n, (_, mask) in enumerate(others) if mask.any()]
    if not seen:
        return found
    levels = _reduced(torch.cat([slices, *(others[n][0] for n in seen)], 1) * scale + 127.5)
    masks = torch.cat([_reduced(others[n][1]) for n in seen], 1)
    congruency = phase_congruency(levels)
    if _is_compiled(levels):
        each = zip(levels, congruency, masks, strict=True)
        parts = [fsim_cpu.similarity_sums(*of_slice, (T_1, T_2)) for of_slice in each]
        found[seen] = torch.stack(parts, -1).to(found)
    else:
        found[seen] = _similarity_sums(levels, congruency, masks)
    return found


def _similarity_sums(levels: Tensor, congruency: Tensor, masks: Tensor) -> Tensor:
    """``_sums`` from the features of the images, the first of which is compared."""
    gradient = gradient_magnitude(levels)
    sums = []
    for channel in range(1, levels.shape[1]):
        own_and_theirs = [0, channel]
        congruencies = congruency[:, own_and_theirs]
        similarity = _ratio(congruencies, T_1) * _ratio(gradient[:, own_and_theirs], T_2)
        mask = masks[:, channel - 1 : channel]
        weight = torch.where(mask, congruencies.amax(1, keepdim=True), 0)
        sums.append(torch.stack([weight * similarity, weight]).flatten(2).sum(2))
    return torch.stack(sums)


def _is_compiled(slices: Tensor) -> bool:
    return slices.device.type == "cpu" and slices.dtype == torch.float32


def _reduced(slices: Tensor) -> Tensor:
    """Slices of 384 pixels and more averaged down, their masks to where any pixel was in."""
    factor = max(1, round(min(slices.shape[-2:]) / 256))
    if factor == 1:
        return slices
    if slices.dtype == torch.bool:
        return F.max_pool2d(slices.float(), factor) > 0
    return F.avg_pool2d(slices, factor)


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

    Kovesi (1999), with noise estimated from the median response at the finest scale. In single
    precision on a CPU by a compiled loop, without a gradient.

    Args:
        slices: images on 0..255.
    """
    mean = slices.mean((-2, -1), keepdim=True)  # no filter sees it; without it flat is exactly 0
    if _is_compiled(slices):
        filters = _single_filters(*slices.shape[-2:])
        pictures = (slices - mean).flatten(0, 1)
        return fsim_cpu.phase_congruency(pictures, *filters, EPSILON).view_as(slices)
    banks, noise_gain = _filters(*slices.shape[-2:])
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


@lru_cache(maxsize=16)
def _single_filters(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    filters, noise_gain = _filters(height, width)
    return filters.astype(np.float32), noise_gain.astype(np.float32)


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
