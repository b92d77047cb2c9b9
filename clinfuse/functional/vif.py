"""Visual information fidelity of a fused image to its sources."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import eight_bit_slices
from clinfuse.functional.windows import gaussian_taps, windowed_mean

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
    pictures = torch.stack([eight_bit_slices(image) for image in (fused, mri, ct)])
    return _fidelity(pictures - 127.5, len(fused))


def visual_fidelity(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """VIF with a gradient: ``vif`` of what is not rounded to levels, in [-1, 1]."""
    return _fidelity(127.5 * torch.stack([x.flatten(0, -3) for x in (fused, mri, ct)]), len(fused))


def _fidelity(pictures: Tensor, cases: int) -> Tensor:
    """Of slices (3, s, h, w) in grey levels about their middle, which keeps squares exact."""
    if min(pictures.shape[-2:]) < SMALLEST:
        return pictures.new_full((cases,), torch.nan)
    total = pictures.new_zeros(2, 2, cases)
    for scale, size in enumerate(SIZES):
        taps = gaussian_taps(size, size / 5)
        if scale > 0:
            pictures = windowed_mean(pictures, taps)[..., ::2, ::2]
        total = total + torch.stack(_information(pictures, taps, cases))
    kept, there = total
    return torch.where(there > 0, kept / there.clamp(min=1e-30), torch.nan).sum(0)


def _information(pictures: Tensor, taps: tuple[float, ...], cases: int) -> tuple[Tensor, Tensor]:
    """What of either source (2, b) is seen through the fused image, and what in the source."""
    products = torch.cat([pictures.square(), pictures[:1] * pictures[1:]])
    means, squares = windowed_mean(torch.cat([pictures, products]), taps).split([3, 5])
    variances = F.threshold(squares[:3] - means.square(), _ROUNDING, 0.0)
    ours, theirs = variances[:1], variances[1:]
    covariance = (squares[3:] - means[:1] * means[1:]).clamp(min=0)  # inverted is not seen
    gain = covariance / theirs.clamp(min=_ROUNDING)
    rest = (ours - gain * covariance).clamp(min=0)
    kept = (gain.square() * theirs / (rest + NOISE)).log1p()
    there = (theirs / NOISE).log1p()
    return kept.reshape(2, cases, -1).sum(2), there.reshape(2, cases, -1).sum(2)


_ROUNDING = 5e-3
"""Variances that single precision cannot tell from 0."""
