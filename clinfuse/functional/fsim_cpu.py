"""Phase congruency on a CPU, picture by picture: ``fsim.phase_congruency`` defines it.

The transforms are torch's, and what lies between them is compiled by numba: a picture and its
responses at all scales of one orientation stay in a core's cache.
"""

from typing import no_type_check  # numba reads types itself, and no checker may come before it

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from clinfuse.functional.fmi_cpu import compiled

SCALES = 4
"""Of the filters: a constant, so that a compiler makes vector instructions of the loops over it."""

_FLOAT, _INT = np.float32, np.int32
_ZERO = _FLOAT(0)
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
            _filter(spectrum, bank.reshape(SCALES, -1), _flat(filtered))
            responses = _flat(torch.fft.ifft2(filtered)).reshape(SCALES, -1)
            _add_orientation(responses, _FLOAT(gain), _FLOAT(epsilon), squares, *sums)
    return torch.from_numpy(energy / amplitude).view_as(pictures)


def _flat(numbers: Tensor) -> np.ndarray:
    """Real and imaginary parts in turn."""
    return torch.view_as_real(numbers).numpy().reshape(-1)


@compiled
@no_type_check
def _filter(spectrum, bank, filtered):
    size = bank.shape[1]
    for scale in range(SCALES):
        for i in range(size):
            gain = bank[scale, i]
            filtered[2 * (scale * size + i)] = gain * spectrum[2 * i]
            filtered[2 * (scale * size + i) + 1] = gain * spectrum[2 * i + 1]


@compiled
@no_type_check
def _add_orientation(responses, noise_gain, epsilon, squares, energy, amplitude):
    """Adds the energy above noise, and the amplitudes, of one orientation's responses."""
    size = len(squares)
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
    """The lower of the middle two of numbers that are not negative: halving what their bits can be.

    Bits of such numbers are in the order of the numbers, and counting those under a bound is one
    pass of vector instructions.
    """
    bits = values.view(np.int32)
    rank = _INT((len(values) - 1) // 2)
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
    return _INT(low).view(_FLOAT)
