"""FMI: mutual information of local features between a fused image and its sources."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices

WINDOW = 3
"""Pixels a side of the windows whose features are compared."""

CHUNK = 8192
"""Windows compared at a time: what then lies in memory fits into a processor's cache."""


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

    As ``fmi_pixel``; the published code takes the one derivative too.
    """
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
    cases = len(images[0])
    ours, *sources = (windows(feature(eight_bit_slices(image))) for image in images)
    scores = torch.stack([window_scores(source, ours) for source in sources])
    return case_sums(scores.mean(0), cases) * (cases / scores.shape[1])


@dataclass
class Windows:
    """Every 3 x 3 window as a column of nine features, column after column of the window.

    Attributes:
        features: as they are.
        least: of a window's features.
        total: of what they are above the least.
        is_varied: more than one feature is above the least.
    """

    features: Float[Tensor, "l n"]
    least: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    is_varied: Bool[Tensor, " n"]

    def shares(self, some: Int[Tensor, " m"]) -> Float[Tensor, "l m"]:
        """The features of some windows from the least up, as shares of a whole."""
        above = self.features.index_select(1, some).sub_(self.least.index_select(0, some))
        return above.div_(self.total.index_select(0, some))


def windows(feature: Float[Tensor, "s h w"]) -> Windows:
    """All windows that lie wholly inside."""
    seen = feature.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1)
    features = rearrange(seen, "s h w y x -> (x y) (s h w)")
    least = features.amin(0)
    total = features.sum(0) - WINDOW**2 * least
    return Windows(features, least, total, total > 1.00001 * (features.amax(0) - least))


def window_scores(a: Windows, b: Windows) -> Float[Tensor, " n"]:
    """Normalised mutual information of each window of ``a`` with that of ``b``.

    1 where they are equal, else 0 where one is flat, or has no more than one feature above its
    least.
    """
    equal = (a.features - b.features).abs_().amax(0) == 0
    scores = equal.to(a.features.dtype)
    (others,) = (a.is_varied & b.is_varied & ~equal).nonzero(as_tuple=True)
    for some in others.split(CHUNK):
        scores.index_copy_(0, some, _information(a.shares(some), b.shares(some)))
    return scores


def _information(p: Tensor, q: Tensor) -> Tensor:
    """2 I(p, q) / (H(p) + H(q)) of distributions (l, n) over l places."""
    entropy = -(_sum_of(p, _log(p)) + _sum_of(q, _log(q)))
    even = 1 / len(p)
    spread = (_sum_of(p, p) - even) * (_sum_of(q, q) - even)
    correlation = (_sum_of(p, q) - even) / spread.sqrt()
    # The lower Fréchet bound is the upper one of places counted backwards.
    q = torch.lerp(q, q.flip(0), (correlation < 0).to(q.dtype))
    places = torch.arange(len(p), dtype=p.dtype, device=p.device) - len(p) // 2
    powers = torch.stack([places, places.square()])
    (mean_p, square_p), (mean_q, square_q) = powers @ p, powers @ q
    mass, product, distance = _upper_bound(p, q)
    # Of places, E(ij) = (E(i^2) + E(j^2) - E((i - j)^2)) / 2.
    shared = (square_p + square_q - _sum_of(mass, distance.square_())) / 2 - mean_p * mean_q
    scale = ((square_p - mean_p.square()) * (square_q - mean_q.square())).sqrt()
    phi = correlation.abs() * scale / shared.clamp(min=_ROUNDING)
    # The joint distribution is (1 - phi) p q off the bound's path, and r times p q on it.
    rest = 1 - phi
    r = torch.addcmul(rest, phi, mass.div_(product.clamp_(min=1e-30)))
    information = (1 - product.sum(0)) * rest * _log(rest) + _sum_of(product.mul_(r), _log(r))
    return 2 * information / entropy


def _upper_bound(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cells where the joint distribution of greatest correlation has mass, 2 l - 1 of them.

    It pairs the two in order: both distribution functions cut [0, 1] into pieces, and a piece is
    the mass of the one cell (i, j) whose steps of p and of q it lies in.

    Returns:
        Mass of each cell, p_i q_j, and i - j.
    """
    length = len(p)
    sums = torch.ones(length - 1, length, dtype=p.dtype, device=p.device).tril()
    cuts, is_p = _merge(sums @ p, sums @ q)
    mass = torch.empty(len(cuts) + 1, *cuts.shape[1:], dtype=p.dtype, device=p.device)
    mass[0] = cuts[0]
    torch.sub(cuts[1:], cuts[:-1], out=mass[1:-1])
    torch.sub(1, cuts[-1], out=mass[-1])
    before = torch.ones(len(mass), len(cuts), dtype=p.dtype, device=p.device).tril(-1)
    i = before @ is_p
    j = torch.arange(len(mass), dtype=p.dtype, device=p.device)[:, None] - i
    product = p.gather(0, i.long()).mul_(q.gather(0, j.long()))
    return mass.clamp_(min=0), product, i.sub_(j)


def _merge(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of both in rising order, and 1 where they are of ``a``.

    Each has as many rows, a power of two, which rise; none is negative. Batcher (1968): a bitonic
    merge, every column at once. Floating-point numbers that are not negative rise as their bits
    read as integers do; the last bit says whose a row is.
    """
    rows = torch.cat([a, b.flip(0)]).view(torch.int32).bitwise_and_(~1)
    rows[: len(a)] += 1
    buffer, stride = torch.empty_like(rows), len(a)
    while stride:
        pairs = len(a) // stride, 2, stride, *rows.shape[1:]
        low, high = rows.view(pairs).unbind(1)
        first, second = buffer.view(pairs).unbind(1)
        torch.minimum(low, high, out=first)
        torch.maximum(low, high, out=second)
        rows, buffer, stride = buffer, rows, stride // 2
    return rows.view(torch.float32), (rows & 1).float()


_ROUNDING = 1e-6


def _sum_of(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _log(x: Tensor) -> Tensor:
    """log |x|, finite at 0; of what is below 0 as the published code has it."""
    return x.abs().clamp_(min=1e-30).log_()


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
