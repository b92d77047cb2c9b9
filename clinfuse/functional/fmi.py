"""FMI: mutual information of local features between a fused image and its sources."""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional import fmi_cpu
from clinfuse.functional.eight_bit import eight_bit_slices
from clinfuse.functional.fmi_cpu import WINDOW

PIXELS = 1 << 18
"""That torch compares at a time: some 100 MB for every number that a pixel has 81 of."""


def fmi_pixel(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """FMI of grey levels, 1 for three identical images and near 0 for unlike ones.

    Haghighat et al. (2011), Eq. 6 to 10, as the fast version by Haghighat & Razian (2014): in every
    3 x 3 window the features of source and fused image, less the window's least, are taken for two
    distributions over nine places. Their joint distribution lies between independence and the
    Fréchet bound in such a way that the places correlate as the features do, and twice its mutual
    information over both entropies is the window's score: 1 where the windows are equal, 0 where
    one is flat, and above 1 in some, where the features correlate better than the bound's places
    can. The mean is over windows and both sources, and over a volume's slices.
    """
    return _fmi(lambda slices: slices, fused, mri, ct)


def fmi_gradient(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """FMI of derivatives along w: central differences, one-sided at the border.

    As ``fmi_pixel``; the published code takes the one derivative too. NaN for slices of one column.
    """
    if fused.shape[-1] < 2:
        return fused.new_full((len(fused),), torch.nan)
    return _fmi(lambda slices: torch.gradient(slices, dim=-1)[0], fused, mri, ct)


def fmi_wavelet(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """FMI of one level of Meyer's wavelet transform, its four bands side by side.

    As ``fmi_pixel``; the published code does the same with a filter of as many taps, which differ
    from ours by less than 1e-3.
    """
    return _fmi(meyer_bands, fused, mri, ct)


def _fmi(feature: Callable[[Tensor], Tensor], *images: Tensor) -> Tensor:
    """The mean score of all windows of the fused image, the first, with those of its sources."""
    ours, *sources = (feature(eight_bit_slices(image)) for image in images)
    scores = torch.stack([window_scores(source, ours) for source in sources])
    return scores.unflatten(1, (len(images[0]), -1)).mean((0, 2, 3, 4))


def window_scores(
    a: Float[Tensor, "s h w"], b: Float[Tensor, "s h w"]
) -> Float[Tensor, "s h_inside w_inside"]:
    """Normalised mutual information of each window of ``a`` with that of ``b``.

    1 where they are equal, else 0 where one is flat, or has no more than one feature above its
    least. NaN where a feature is.

    In single precision on a CPU by a compiled loop, in a thirtieth of the time.
    """
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32:
        return torch.from_numpy(fmi_cpu.window_scores(a.detach().numpy(), b.detach().numpy()))
    together = max(PIXELS // a[0].numel(), 1)
    pairs = zip(a.split(together), b.split(together), strict=True)
    return torch.cat([scores_by_definition(*pair) for pair in pairs])


def scores_by_definition(
    a: Float[Tensor, "s h w"], b: Float[Tensor, "s h w"]
) -> Float[Tensor, "s h_inside w_inside"]:
    """``window_scores`` on any device and in any precision: all cells of the joint distribution."""
    p, q = _windows(a), _windows(b)
    distance = (p - q).abs().sum(0)
    scores = torch.where(distance == 0, 1, 0 * distance)
    above_least = [(x > x.amin(0)).sum(0) for x in (p, q)]
    is_compared = (torch.minimum(*above_least) > 1) & (distance > 0)
    scores[is_compared] = _information(p[:, is_compared], q[:, is_compared])
    return scores


def _windows(feature: Tensor) -> Tensor:
    """Places by windows, column after column of each."""
    inside = [max(size - WINDOW + 1, 0) for size in feature.shape[-2:]]
    places = [(h, w) for w in range(WINDOW) for h in range(WINDOW)]
    return torch.stack([feature[:, h : h + inside[0], w : w + inside[1]] for h, w in places])


def _information(p: Float[Tensor, "l n"], q: Float[Tensor, "l n"]) -> Float[Tensor, " n"]:
    """2 I(p, q) / (H(p) + H(q)) of the distributions over the places of two windows."""
    p, q = ((x - x.amin(0)) / (x - x.amin(0)).sum(0) for x in (p, q))
    even = 1 / len(p)
    covariance = (p * q).sum(0) - even
    correlation = covariance / ((p.square().sum(0) - even) * (q.square().sum(0) - even)).sqrt()
    # The lower Fréchet bound is the upper one of places counted backwards.
    q = torch.where(correlation < 0, q.flip(0), q)
    spread = (_variance(p) * _variance(q)).sqrt()
    p_to, q_to = (torch.stack([*accumulate(x)]) for x in (p[:, None], q))
    p_from, q_from = p_to - p[:, None], q_to - q
    shared = (torch.minimum(p_to, q_to) * (1 - torch.maximum(p_to, q_to))).sum((0, 1))
    phi = correlation.abs() * spread / shared.clamp(min=1e-6)
    bound = (torch.minimum(p_to, q_to) - torch.maximum(p_from, q_from)).clamp(min=0)
    product = p[:, None] * q
    r = 1 - phi + phi * bound / (product + 1e-12)
    information = (product * r * (r.abs() + _TINY).log()).sum((0, 1))  # r < 0: the published code
    entropies = -sum((x * (x + _TINY).log()).sum(0) for x in (p, q))
    return 2 * information / entropies


def _variance(shares: Tensor) -> Tensor:
    """Of the places."""
    places = torch.arange(len(shares), device=shares.device)[:, None]
    return ((places - (places * shares).sum(0)).square() * shares).sum(0)


_TINY = 1e-18
"""Has a logarithm, and times it is nothing."""


def meyer_bands(slices: Float[Tensor, "s h w"]) -> Float[Tensor, "s h_bands w_bands"]:
    """One level of the wavelet transform: low and high along h by low and high along w.

    Mirrored at the pixel's edge, so either band has (size + 61) // 2 values.
    """
    along_h, along_w = (torch.from_numpy(_analysis(size)).to(slices) for size in slices.shape[-2:])
    return along_h @ slices @ along_w.T


@lru_cache(maxsize=16)
def _analysis(size: int) -> np.ndarray:
    """Rows that take a line of pixels to its low band, then its high band."""
    low = _meyer_low_pass()
    high = -low[::-1] * (-1.0) ** np.arange(len(low))
    bands = (size + len(low) - 1) // 2
    source = (2 * np.arange(bands)[:, None] + 1 - np.arange(len(low))) % (2 * size)
    mirrored = np.where(source < size, source, 2 * size - 1 - source)
    matrix = np.zeros((2, bands, size))
    for band, taps in zip(matrix, (low, high), strict=True):
        np.add.at(band, (np.arange(bands)[:, None], mirrored), taps)
    return matrix.reshape(2 * bands, size)


def _meyer_low_pass(taps: int = 62) -> np.ndarray:
    """sqrt(2) times Meyer's scaling function at twice the frequency, cut to ``taps`` in time.

    Daubechies (1992), Eq. 4.2.2 and 4.2.3, with nu(x) = x^4 (35 - 84 x + 70 x^2 - 20 x^3).
    """
    samples = 4096
    frequency = 2 * np.abs(np.fft.fftfreq(samples))  # of the scaling function's argument, in 2 pi
    x = np.clip(3 * frequency - 1, 0, 1)
    nu = x**4 * (35 - 84 * x + 70 * x**2 - 20 * x**3)
    response = np.sqrt(2) * np.cos(np.pi / 2 * nu)
    filtered = np.fft.ifft(response).real
    return filtered[np.arange(taps) - taps // 2]
