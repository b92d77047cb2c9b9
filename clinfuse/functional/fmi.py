"""FMI: mutual information of local features between a fused image and its sources."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices

WINDOW = 3
"""Pixels a side of the windows whose features are compared."""

CHUNK = 16384
"""Windows compared at a time: of more, what lies in memory leaves a processor's cache."""


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
    return case_sums(scores.mean(0), cases) * (cases / scores[0].numel())


@dataclass
class Windows:
    """The 3 x 3 windows of pictures, by their first pixels in the row of all pixels.

    Those that begin near a right or lower edge run on into what follows; their scores are dropped.

    Attributes:
        feature: of every pixel.
        excess: the sum of what a window's features are above their least, less the largest of it:
            above 0 where more than one is above the least.
    """

    feature: Float[Tensor, "s h w"]
    excess: Float[Tensor, " n"]

    def look_up(self, some: Int[Tensor, " m"], out: Float[Tensor, "l m"]) -> None:
        """The features of some windows, column after column of the window."""
        pixels, width = self.feature.flatten(), self.feature.shape[-1]
        offsets = (y * width + x for x in range(WINDOW) for y in range(WINDOW))
        for row, offset in zip(out, offsets, strict=True):
            torch.index_select(pixels[offset:], 0, some, out=row)


def windows(feature: Float[Tensor, "s h w"]) -> Windows:
    """All windows of pictures."""
    least = _over_windows(torch.minimum, feature)
    span = _over_windows(torch.maximum, feature).sub_(least)
    above = _over_windows(torch.add, feature).sub_(least, alpha=WINDOW**2)
    return Windows(feature, above.sub_(span, alpha=1.00001))


def window_scores(a: Windows, b: Windows) -> Float[Tensor, "s h_inside w_inside"]:
    """Normalised mutual information of each window of ``a`` with that of ``b``.

    1 where they are equal, else 0 where one is flat, or has no more than one feature above its
    least.
    """
    difference = _over_windows(torch.maximum, (a.feature - b.feature).abs_())
    is_compared = torch.minimum(torch.minimum(a.excess, b.excess), difference).clamp_(min=0).bool()
    scores = torch.zeros_like(a.feature).flatten()
    torch.sub(1, difference.sign_(), out=scores[: len(difference)])
    compared = is_compared.nonzero()[:, 0]
    for some in compared.chunk(len(compared) // CHUNK + 1):
        room = scores.new_empty(2, WINDOW**2, 2, len(some))
        a.look_up(some, out=room[0, :, 0])
        b.look_up(some, out=room[0, :, 1])
        scores.index_copy_(0, some, _information(room))
    return scores.view_as(a.feature)[:, : 1 - WINDOW, : 1 - WINDOW]


def _over_windows(of_two: Callable[[Tensor, Tensor], Tensor], feature: Tensor) -> Tensor:
    x = feature.flatten()
    for step in (feature.shape[-1], 1):
        x = of_two(of_two(x[: -2 * step], x[step:-step]), x[2 * step :])
    return x


def _information(room: Tensor) -> Tensor:
    """2 I(p, q) / (H(p) + H(q)) of distributions over the l places of two windows.

    Reading and writing take longer than arithmetic, so few tensors are made and all used again.

    Args:
        room: features (l, 2, n) of both windows, and memory for as many, of which none is kept.
    """
    shares, spare = room
    known = _known(len(shares), room.device)
    shares.sub_(shares.amin(0))
    torch.addcmul(known.tiny, shares, shares.sum(0).reciprocal_(), out=shares)
    negative_entropy = torch.log(shares, out=spare).mul_(shares).sum((0, 1))
    even = 1 / len(shares)
    spread = (torch.square(shares, out=spare).sum(0) - even).prod(0)
    p, q = shares.unbind(1)
    covariance = torch.mul(p, q, out=spare[:, 0]).sum(0) - even
    # The lower Fréchet bound is the upper one of places counted backwards.
    q.lerp_(q.flip(0), (covariance < 0).to(q.dtype))
    mean, square = (known.moments @ shares.flatten(1)).unflatten(1, (2, -1))
    cuts, product = _upper_bound(p, q, room)
    # Of places, E(ij) = (E(i^2) + E(j^2) - E((i - j)^2)) / 2. Distances of all pairs of cuts add up
    # to E((i - j)^2) and twice those of p's own and of q's own, which are (l // 2)^2 - E(i^2).
    distances = known.distances @ cuts[1:-2]
    shared = 2 * (len(p) // 2) ** 2 - (square.sum(0) + distances) / 2 - mean.prod(0)
    scale = ((square - mean.square()).prod(0) / spread).sqrt()
    phi = covariance.abs() * scale / shared.clamp(min=_ROUNDING)
    # The joint distribution is r p q, with r = 1 - phi off the bound's path.
    r, twice_log = room.view(2, 2 * len(p), -1)
    torch.sub(cuts[1:], cuts[:-1], out=r).div_(product.clamp_(min=_ROUNDING**2))
    torch.addcmul(1 - phi, phi, r, out=r)
    torch.addcmul(known.tiny, r, r, out=twice_log).log_()  # of r below 0 as the published code
    return r.mul_(product).mul_(twice_log).sum(0) / -negative_entropy


_ROUNDING = 1e-6


def _upper_bound(p: Tensor, q: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The cells where the joint distribution of greatest correlation has mass, 2 l - 1 of them.

    It pairs the two in order: both distribution functions cut [0, 1] into pieces, and a piece is
    the mass of the one cell (i, j) whose steps of p and of q it lies in.

    Args:
        room: memory for 4 l rows, which p and q may be in: they are no longer needed after.

    Returns:
        The cuts from 0 to 1, a piece between each two, and 1 again: cells off the path have no
        mass. Then p_i q_j of each piece's cell, and that of all cells off the path.
    """
    known = _known(len(p), p.device)
    cuts = p.new_empty(2 * len(p) + 1, p.shape[1])
    cuts[0], cuts[-2:] = 0, 1
    rising, falling = cuts[1:-2].chunk(2)
    torch.mm(known.sums, p, out=rising)
    torch.mm(known.sums.flip(0), q, out=falling)
    is_p = _merge(cuts[1:-2], room[1].flatten(0, 1)[: 2 * len(p) - 2])
    # A piece lies between the last cut of p before it and the next one after it, p_i apart, and so
    # for q. Where p's cuts are 1 higher, the least one after is q's and the largest one before p's;
    # where they are 1 lower, the least one after is p's and the largest one before q's.
    after = p.new_empty(2 * len(p), 2, p.shape[1])
    torch.add(cuts[1:-2], is_p, out=after[:-2, 0])
    torch.sub(cuts[1:-2], is_p, out=after[:-2, 1])
    before = room.view(2 * len(p), 2, -1)[:-1]
    before[0] = after[-2] = known.ends
    lasts, nexts = before.unbind(0), after[:-1].unbind(0)
    for cut, last, then in zip(nexts, lasts, lasts[1:], strict=False):
        torch.maximum(last, cut, out=then)
    for then, cut in pairwise(reversed(nexts)):
        torch.minimum(then, cut, out=cut)
    q_j, p_i = after[:-1].unbind(1)
    q_j.sub_(before[:, 1])
    p_i.sub_(before[:, 0]).add_(2)
    torch.sub(1, p_i.mul_(q_j).sum(0), out=after[-1, 1])
    return cuts, after[:, 1]


def _merge(rows: Tensor, spare: Tensor) -> Tensor:
    """Rows put in rising order, and 1 where they are of the first half, else 0.

    The first half rises, the second falls, 2, 8 or 32 rows each, and none is negative. Batcher
    (1968): a bitonic merge, every column at once. Floating-point numbers that are not negative rise
    as their bits read as integers do; the last bit says whose a row is.

    Args:
        spare: memory for as many rows, which those returned are in.
    """
    bits, other = rows.view(torch.int32), spare.view(torch.int32)
    stride = len(rows) // 2
    bits[:stride].bitwise_or_(1)
    bits[stride:].bitwise_and_(~1)
    while stride:
        pairs = len(rows) // (2 * stride), 2, stride, *rows.shape[1:]
        low, high = bits.view(pairs).unbind(1)
        first, second = other.view(pairs).unbind(1)
        torch.minimum(low, high, out=first)
        torch.maximum(low, high, out=second)
        bits, other, stride = other, bits, stride // 2
    return torch.bitwise_and(bits, 1, out=other).mul_(_ONE).view(torch.float32)


_ONE = 0x3F800000
"""1.0 in bits."""


@dataclass
class _Known:
    """What the distributions are multiplied by.

    Attributes:
        sums: taken of shares, the distribution function but for its end, which is 1.
        moments: the mean place and the mean square, counted from the middle one.
        distances: taken of cuts in rising order, the sum of the distances of all pairs.
        ends: 0 and 1 as cuts of p and of q, a cut of p where p's are 1 higher and 1 lower.
        tiny: has a logarithm, and so has its square.
    """

    sums: Tensor
    moments: Tensor
    distances: Tensor
    ends: Tensor
    tiny: Tensor


@lru_cache
def _known(length: int, device: torch.device) -> _Known:
    places = torch.arange(length, dtype=torch.float32, device=device) - length // 2
    ranks = torch.arange(2 * length - 2, dtype=torch.float32, device=device)
    return _Known(
        sums=torch.ones(length - 1, length, device=device).tril(),
        moments=torch.stack([places, places.square()]),
        distances=2 * ranks - (2 * length - 3),
        ends=torch.tensor([[1.0], [0.0]], device=device),
        tiny=torch.tensor(1e-18, device=device),
    )


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
