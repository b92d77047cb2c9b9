"""The scores of FMI's windows on a CPU, compiled by numba: ``fmi.window_scores`` defines them.

Windows that need it are worked out ``LANES`` at a time, and every loop over lanes is one that a
compiler turns into vector instructions: its rows have constant places, and nothing in it branches.
"""

from typing import no_type_check  # numba reads types itself, and no checker may come before it

import numpy as np
from jaxtyping import Float32

from clinfuse.functional.compiled import compiled, inlined, part_of_loop

WINDOW = 3
"""Pixels a side of the windows whose features are compared."""

LANES = 128
"""Windows at a time: what is known of them stays in a core's nearest cache."""

_PLACES = WINDOW**2
_LEAST, _SCALE, _SPREAD, _ENTROPY = range(4)
_COVARIANCE, _PHI, _REST, _INFORMATION = range(4)
_FLOAT, _INT = np.float32, np.int32
_ZERO, _ONE = _FLOAT(0), _FLOAT(1)
_TINY = _FLOAT(1e-18)  # has a logarithm, and times it is nothing


def window_scores(
    a: Float32[np.ndarray, "s h w"], b: Float32[np.ndarray, "s h w"]
) -> Float32[np.ndarray, "s h_inside w_inside"]:
    """``fmi.window_scores`` of single-precision features in a CPU's memory."""
    slices, height, width = a.shape
    scores = np.zeros((slices, height * width), np.float32)
    for picture_a, picture_b, out in zip(a, b, scores, strict=True):
        _score(picture_a.ravel(), picture_b.ravel(), width, out)
    inside = [max(size - WINDOW + 1, 0) for size in (height, width)]
    return scores.reshape(a.shape)[:, : inside[0], : inside[1]]


@part_of_loop
@no_type_check
def _log(x):
    """The natural logarithm of a positive number, to two units in the last place.

    x = 2^e (1 + m) with 1 + m in [1/sqrt(2), sqrt(2)), and log(1 + m) as in Moshier's Cephes.
    """
    bits = _INT(_FLOAT(x).view(_INT) - _ROOT_HALF)
    m = _INT((bits & _MANTISSA) + _ROOT_HALF).view(_FLOAT) - _ONE
    series = _SERIES[0]
    for factor in _SERIES[1:]:
        series = series * m + factor
    return m + (m * m * series + _FLOAT(_INT(bits >> _MANTISSA_BITS)) * _LOG_2)


_ROOT_HALF = _INT(0x3F3504F3)
_MANTISSA, _MANTISSA_BITS = _INT(0x7FFFFF), _INT(23)
_LOG_2 = _FLOAT(np.log(2))
_SERIES = tuple(
    _FLOAT(factor)
    for factor in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
        -0.5,
    )
)


@inlined
@no_type_check
def _compare(a, b, width, scores, windows):
    """Scores of windows that are equal or have no distribution; the others, and how many."""
    is_compared = np.empty(width, np.bool_)
    count = 0
    for start in range(0, len(a) - (WINDOW - 1) * width, width):
        for x in range(width - WINDOW + 1):
            first = start + x
            least_a, least_b, distance = a[first], b[first], _ZERO
            for h in range(WINDOW):
                for w in range(WINDOW):
                    value_a, value_b = a[first + h * width + w], b[first + h * width + w]
                    least_a = value_a if value_a < least_a else least_a
                    least_b = value_b if value_b < least_b else least_b
                    distance += abs(value_a - value_b)
            above_a = above_b = 0
            for h in range(WINDOW):
                for w in range(WINDOW):
                    above_a += a[first + h * width + w] > least_a
                    above_b += b[first + h * width + w] > least_b
            is_compared[x] = (above_a > 1) & (above_b > 1) & (distance > _ZERO)
            scores[first] = _ONE if distance == _ZERO else _ZERO * distance
        for x in range(width - WINDOW + 1):
            if is_compared[x]:
                windows[count] = start + x
                count += 1
    return count


@inlined
@no_type_check
def _distributions(shares, of_window):
    """Features to shares of what they are above their least, each window's entropy and spread."""
    for k in range(2 * LANES):
        least = total = shares[0, k]
        for place in range(1, _PLACES):
            least = shares[place, k] if shares[place, k] < least else least
            total += shares[place, k]
        of_window[_LEAST, k] = least
        of_window[_SCALE, k] = _ONE / (total - _FLOAT(_PLACES) * least)
        of_window[_SPREAD, k] = _FLOAT(-1 / _PLACES)
        of_window[_ENTROPY, k] = _ZERO
    for place in range(_PLACES):
        for k in range(2 * LANES):
            share = (shares[place, k] - of_window[_LEAST, k]) * of_window[_SCALE, k]
            shares[place, k] = share
            of_window[_SPREAD, k] += share * share
            of_window[_ENTROPY, k] -= share * _log(share + _TINY)


@inlined
@no_type_check
def _covariances(shares, of_pair):
    """How the shares of a pair go together; where they do not, b's places are counted backwards.

    The lower Fréchet bound is the upper one then.
    """
    for k in range(LANES):
        covariance = _FLOAT(-1 / _PLACES)
        for place in range(_PLACES):
            covariance += shares[place, k] * shares[place, LANES + k]
        of_pair[_COVARIANCE, k] = covariance
        for place in range(_PLACES // 2):
            low, high = shares[place, LANES + k], shares[_PLACES - 1 - place, LANES + k]
            shares[place, LANES + k] = high if covariance < _ZERO else low
            shares[_PLACES - 1 - place, LANES + k] = low if covariance < _ZERO else high


@inlined
@no_type_check
def _cut(shares, cuts, of_window):
    """The distribution function before each place, and the places' variance over the spread."""
    for k in range(2 * LANES):
        total = mean = variance = _ZERO
        for place in range(_PLACES):
            cuts[_PLACES - 1 + place, k] = total
            total += shares[place, k]
            mean += _FLOAT(place) * shares[place, k]
        for place in range(_PLACES):
            variance += (_FLOAT(place) - mean) ** 2 * shares[place, k]
        of_window[_SPREAD, k] = variance / of_window[_SPREAD, k]


@inlined
@no_type_check
def _weights(cuts, of_window, of_pair):
    """Phi, the weight of the Fréchet bound in the joint distribution."""
    for k in range(LANES):
        of_pair[_PHI, k] = _ZERO
    for i in range(_PLACES, 2 * _PLACES - 1):
        for k in range(LANES):
            shared = _ZERO  # of min(p, q) - p q, with p and q the distribution functions
            for j in range(_PLACES, 2 * _PLACES - 1):
                p, q = cuts[i, k], cuts[j, LANES + k]
                shared += p * (_ONE - q) if p < q else q * (_ONE - p)
            of_pair[_PHI, k] += shared
    for k in range(LANES):
        shared = max(of_pair[_PHI, k], _FLOAT(1e-6))
        scale = np.sqrt(of_window[_SPREAD, k] * of_window[_SPREAD, LANES + k])
        of_pair[_PHI, k] = abs(of_pair[_COVARIANCE, k]) * scale / shared


@inlined
@no_type_check
def _information(cuts, of_pair):
    """Mutual information: of the joint distribution r p q, the sum of r log(r) p q.

    Both distribution functions cut [0, 1] into pieces, and a piece is what the Fréchet bound gives
    to the cell (i, j) whose shares it lies in. The cells with a piece are a path from the first to
    the last which crosses each diagonal i + j at most once; beside the path, r is 1 - phi.
    """
    for k in range(LANES):
        of_pair[_REST, k] = _ONE
        of_pair[_INFORMATION, k] = _ZERO
    for diagonal in range(2 * _PLACES - 1):
        for k in range(LANES):
            piece = product = _ZERO
            for i in range(_PLACES):  # where j is none of the places, its share is 0
                i_from, i_to = cuts[_PLACES - 1 + i, k], cuts[_PLACES + i, k]
                j_from = cuts[_PLACES - 1 + diagonal - i, LANES + k]
                j_to = cuts[_PLACES + diagonal - i, LANES + k]
                overlap = (i_to if i_to < j_to else j_to) - (j_from if i_from < j_from else i_from)
                product = (i_to - i_from) * (j_to - j_from) if overlap > piece else product
                piece = overlap if overlap > piece else piece
            phi = of_pair[_PHI, k]
            r = _ONE - phi + phi * piece / (product + _FLOAT(1e-12))
            of_pair[_REST, k] -= product
            # Of r below 0 as the published code.
            of_pair[_INFORMATION, k] += product * r * _log(abs(r) + _TINY)
    for k in range(LANES):
        r = _ONE - of_pair[_PHI, k]
        of_pair[_INFORMATION, k] += of_pair[_REST, k] * r * _log(abs(r) + _TINY)


@compiled
@no_type_check
def _score(a, b, width, scores):
    """Scores of a picture's windows, by their first pixels in the row of all pixels."""
    windows = np.zeros(len(a) + LANES, np.intp)
    count = _compare(a, b, width, scores, windows)
    shares = np.zeros((_PLACES, 2 * LANES), np.float32)  # of a's windows, then of b's
    cuts = np.zeros((3 * _PLACES, 2 * LANES), np.float32)  # 0 before the first place, 1 after
    cuts[2 * _PLACES - 1 :] = 1
    of_window = np.zeros((4, 2 * LANES), np.float32)
    of_pair = np.zeros((4, LANES), np.float32)
    for start in range(0, count, LANES):
        some = windows[start : start + LANES]
        for place in range(_PLACES):
            offset = place % WINDOW * width + place // WINDOW  # column after column
            for k in range(LANES):
                shares[place, k] = a[some[k] + offset]
                shares[place, LANES + k] = b[some[k] + offset]
        _distributions(shares, of_window)
        _covariances(shares, of_pair)
        _cut(shares, cuts, of_window)
        _weights(cuts, of_window, of_pair)
        _information(cuts, of_pair)
        for k in range(min(LANES, count - start)):
            entropies = of_window[_ENTROPY, k] + of_window[_ENTROPY, LANES + k]
            scores[some[k]] = _FLOAT(2) * of_pair[_INFORMATION, k] / entropies
