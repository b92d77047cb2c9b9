"""Visual information fidelity of a fused image to its sources."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices
from clinfuse.functional.windows import gaussian_taps

SIZES = (17, 9, 5, 3)
"""Windows of the four scales, in pixels, of a standard deviation of a fifth."""

SMALLEST = 41
"""Pixels a side below which the coarsest scale has no window."""

NOISE = 2.0
"""Variance of the visual noise, in squared grey levels."""


def vif(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """VIF: pixel-domain fidelity to the MRI plus that to the CT; 2 for identical images.

    Sheikh & Bovik (2006), Eq. 8 to 12, as the authors' ``vifp_mscale.m``, summed over both sources
    as published fusion tables do; fusion that raises contrast can score above 2. Of a volume's
    slices together. NaN for slices smaller than ``SMALLEST``, and where a source is flat.
    """
    pictures = [eight_bit_slices(image) - 127.5 for image in (fused, mri, ct)]
    return _fidelity(pictures, len(fused))


def visual_fidelity(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """VIF with a gradient: ``vif`` of what is not rounded to levels, in [-1, 1]."""
    return _fidelity([127.5 * image.flatten(0, -3) for image in (fused, mri, ct)], len(fused))


def _fidelity(pictures: list[Tensor], cases: int) -> Tensor:
    """Of slices (s, h, w) in grey levels about their middle, which keeps squares exact."""
    if min(pictures[0].shape[-2:]) < SMALLEST:
        return pictures[0].new_full((cases,), torch.nan)
    total = pictures[0].new_zeros(2, 2, cases)
    for scale, size in enumerate(SIZES):
        taps = gaussian_taps(size, size / 5)
        if scale > 0:
            pictures = _windowed_means(pictures, taps, step=2)
        total = total + _information(pictures, taps, cases)
    kept, there = total
    return torch.where(there > 0, kept / there.clamp(min=1e-30), torch.nan).sum(0)


def _information(pictures: list[Tensor], taps: tuple[float, ...], cases: int) -> Tensor:
    """What of either source is seen through the fused image, and what in the source: (2, 2, b)."""
    fused, mri, ct = pictures
    products = [fused * mri, fused * ct, *(picture.square() for picture in pictures)]
    means = _windowed_means([*pictures, *products], taps)
    (mean, *others), covariances, (square, *squares) = means[:3], means[3:5], means[5:]
    ours = _variance(mean, square)
    kept, there = [], []
    for other, product, square in zip(others, covariances, squares, strict=True):
        theirs = _variance(other, square)
        covariance = (product - mean * other).clamp(min=0)  # inverted is not seen
        gain = covariance / theirs.clamp(min=_ROUNDING)
        rest = (ours - gain * covariance).clamp(min=0)
        kept.append(case_sums((gain.square() * theirs / (rest + NOISE)).log1p(), cases))
        there.append(case_sums((theirs / NOISE).log1p(), cases))
    return torch.stack([*kept, *there]).view(2, 2, cases)


def _variance(mean: Tensor, square: Tensor) -> Tensor:
    return F.threshold(square - mean.square(), _ROUNDING, 0.0)


_ROUNDING = 5e-3
"""Variances that single precision cannot tell from 0."""


def _windowed_means(pictures: list[Tensor], taps: tuple[float, ...], step: int = 1) -> list[Tensor]:
    """``windowed_mean`` of each picture, at every ``step``-th window along h and w.

    As products with a band of the taps, a few lines at a time so that it holds few zeros: on CPU
    several times as fast as shifted pictures added up. Small pictures go through together.
    """
    if pictures[0].numel() < _SMALL:
        return list(_products(torch.stack(pictures), taps, step).unbind())
    return [_products(picture, taps, step) for picture in pictures]


_SMALL = 40_000
"""Pixels: eight pictures of as many still fit into a processor's cache."""


def _products(pictures: Tensor, taps: tuple[float, ...], step: int) -> Tensor:
    band = torch.from_numpy(_band(taps, step)).to(pictures)
    lines, size = band.shape
    for _ in range(2):  # along h, then w
        count = (pictures.shape[-2] - len(taps)) // step + 1
        below = (-(-count // lines) - 1) * lines * step + size - pictures.shape[-2]
        if below > 0:
            pictures = F.pad(pictures, (0, 0, 0, below))
        blocks = pictures.unfold(-2, size, lines * step).mT
        pictures = (band @ blocks).flatten(-3, -2)[..., :count, :].mT
    return pictures


@lru_cache
def _band(taps: tuple[float, ...], step: int, lines: int = 16) -> np.ndarray:
    """The taps once a line, ``step`` further to the right in each."""
    size = (lines - 1) * step + len(taps)
    return np.resize(np.pad(taps, (0, size + step - len(taps))), (lines, size))
