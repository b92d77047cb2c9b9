"""Phase congruency and similarity on a CPU, picture by picture: ``fsim`` defines them.

The transforms are torch's, and what lies between them is compiled by numba: a picture and its
responses at all scales of one orientation stay in a core's cache.
"""

from typing import no_type_check  # numba reads types itself, and no checker may come before it

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from clinfuse.functional.compiled import PLACE, compiled

SCALES = 4
"""Of the filters: a constant, so that a compiler makes vector instructions of the loops over it."""

_FLOAT, _INT = np.float32, np.int32
_ZERO, _TWO = _FLOAT(0), _FLOAT(2)
_INFINITE = _INT(0x7F800000)  # the bits of the largest number


def phase_congruency(
    pictures: Float32[Tensor, "n h w"],
    banks: Float32[np.ndarray, "orientations scales h w"],
    noise_gain: Float32[np.ndarray, " orientations"],
    epsilon: float,
) -> Float32[Tensor, "n h w"]:
    """``fsim.phase_congruency`` of single-precision pictures in a CPU's memory.

    Args:
        pictures: without their means.
        banks: filters of real gain.
        noise_gain: what multiplies the median amplitude at an orientation's finest scale.
        epsilon: what guards divisions.
    """
    filtered = torch.empty(SCALES, *pictures.shape[1:], dtype=torch.complex64)
    spectra = [_flat(torch.fft.fft2(picture)) for picture in pictures]
    energy, amplitude = np.zeros((2, *pictures.flatten(1).shape), np.float32)
    amplitude += _FLOAT(epsilon)
    squares = np.empty_like(energy[0])
    for bank, gain in zip(banks, noise_gain, strict=True):
        for spectrum, *sums in zip(spectra, energy, amplitude, strict=True):
            _filter(spectrum, bank.reshape(SCALES, -1), _flat(filtered).reshape(SCALES, -1))
            responses = _flat(torch.fft.ifft2(filtered)).reshape(SCALES, -1)
            _add_orientation(responses, _FLOAT(gain), _FLOAT(epsilon), squares, *sums)
    return torch.from_numpy(energy / amplitude).view_as(pictures)


def similarity_sums(
    levels: Float32[Tensor, "n h w"],
    congruency: Float32[Tensor, "n h w"],
    masks: Bool[Tensor, "others h w"],
    constants: tuple[float, float],
) -> Float64[Tensor, "others 2"]:
    """``fsim._similarity_sums`` of one slice: of the first picture and each of the others.

    Args:
        levels: pictures on 0..255.
        congruency: of their phases.
        masks: pixels that count, by picture but the first.
        constants: T1 of the congruency and T2 of the gradient.
    """
    found = np.zeros((len(masks), 2))
    strength = np.zeros(levels.shape, np.float32)
    padded = torch.nn.functional.pad(levels, (1, 1, 1, 1)).numpy()
    for picture, squares in zip(padded, strength, strict=True):
        _squared_gradient(picture, squares)
    t_1, t_2 = (_FLOAT(constant) for constant in constants)
    features = congruency.numpy()
    for n, mask in enumerate(masks.numpy(), 1):
        pair = features[0], features[n], strength[0], strength[n]
        _add_similarity(*pair, mask, t_1, t_2, found[n - 1])
    return torch.from_numpy(found)


def _flat(numbers: Tensor) -> np.ndarray:
    """Real and imaginary parts in turn."""
    return torch.view_as_real(numbers).numpy().reshape(-1)


@compiled
@no_type_check
def _squared_gradient(padded, squares):
    """``fsim.gradient_magnitude``'s square of a picture with a frame of zeros."""
    height, width = squares.shape
    width &= PLACE
    for y in range(height):
        for x in range(width):
            above = padded[y, x + 2] - padded[y, x]
            beside = padded[y + 1, x + 2] - padded[y + 1, x]
            below = padded[y + 2, x + 2] - padded[y + 2, x]
            along_w = _TEN * beside + _THREE * (above + below)
            left = padded[y + 2, x] - padded[y, x]
            here = padded[y + 2, x + 1] - padded[y, x + 1]
            right = padded[y + 2, x + 2] - padded[y, x + 2]
            along_h = _TEN * here + _THREE * (left + right)
            squares[y, x] = (along_w * along_w + along_h * along_h) * _OF_SCHARR


_THREE, _TEN, _OF_SCHARR = _FLOAT(3), _FLOAT(10), _FLOAT(1 / 256)


@compiled
@no_type_check
def _add_similarity(congruency_a, congruency_b, squares_a, squares_b, mask, t_1, t_2, found):
    """Adds the sums of weighted similarity and of weights over the mask."""
    height, width = mask.shape
    similar, weights = np.zeros(width), np.zeros(width)
    for y in range(height):
        for x in range(width):
            a, b = congruency_a[y, x], congruency_b[y, x]
            alike = (_TWO * a * b + t_1) / (a * a + b * b + t_1)
            c, d = squares_a[y, x], squares_b[y, x]
            alike *= (_TWO * np.sqrt(c * d) + t_2) / (c + d + t_2)
            weight = (a if a > b else b) if mask[y, x] else _ZERO
            similar[x] += weight * alike
            weights[x] += weight
    found[0] += similar.sum()
    found[1] += weights.sum()


@compiled
@no_type_check
def _filter(spectrum, bank, filtered):
    size = bank.shape[1] & PLACE
    for scale in range(SCALES):
        for i in range(size):
            gain = bank[scale, i]
            filtered[scale, 2 * i] = gain * spectrum[2 * i]
            filtered[scale, 2 * i + 1] = gain * spectrum[2 * i + 1]


@compiled
@no_type_check
def _add_orientation(responses, noise_gain, epsilon, squares, energy, amplitude):
    """Adds the energy above noise, and the amplitudes, of one orientation's responses."""
    size = len(squares) & PLACE
    for i in range(size):
        even, odd = responses[0, 2 * i], responses[0, 2 * i + 1]
        squares[i] = even * even + odd * odd
    noise = noise_gain * np.sqrt(_lower_median(squares))
    for i in range(size):
        sum_even = sum_odd = across = amplitudes = _ZERO
        for scale in range(SCALES):
            even, odd = responses[scale, 2 * i], responses[scale, 2 * i + 1]
            sum_even += even
            sum_odd += odd
            amplitudes += np.sqrt(even * even + odd * odd)
        for scale in range(SCALES):
            even, odd = responses[scale, 2 * i], responses[scale, 2 * i + 1]
            across += abs(even * sum_odd - odd * sum_even)
        length = np.sqrt(sum_even * sum_even + sum_odd * sum_odd)
        above = length - across / (length + epsilon) - noise
        energy[i] += above if above > _ZERO else _ZERO
        amplitude[i] += amplitudes


@compiled
@no_type_check
def _lower_median(values):
    """The lower of the middle two of numbers that are not negative.

    Their bits are in the order of the numbers. A sample says between which two it must be nearly
    always, and only the numbers between these are looked at again.
    """
    bits = values.view(np.int32)
    rank = (len(bits) - 1) // 2
    sample = bits[:: len(bits) // _SAMPLE | 1].copy()  # odd: not always the same columns
    middle, spread = len(sample) // 2, 3 * int(np.sqrt(len(sample)))
    low = _at_rank(sample, max(middle - spread, 0))
    high = _at_rank(sample, min(middle + spread, len(sample) - 1))
    near = np.empty(len(bits) + 1, np.int32)
    below = count = 0
    for i in range(len(bits)):
        near[count] = bits[i]
        count += (low <= bits[i]) & (bits[i] <= high)
        below += bits[i] < low
    if below <= rank < below + count:
        return _INT(_at_rank(near[:count], rank - below)).view(_FLOAT)
    return _INT(_at_rank(bits, rank)).view(_FLOAT)


_SAMPLE = 1024


@compiled
@no_type_check
def _at_rank(bits, rank):
    """The number that so many are smaller than, by halving what it can be.

    Counting those under a bound is one pass of vector instructions.
    """
    low, high = _INT(0), _INFINITE
    while low < high:
        middle = _INT(low + (high - low) // 2)
        count = _INT(0)
        for i in range(len(bits)):
            count = _INT(count + _INT(bits[i] <= middle))
        if count > rank:
            high = middle
        else:
            low = _INT(middle + 1)
    return _INT(low)
