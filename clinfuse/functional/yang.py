"""Q_Y: Yang's similarity of a fused image to its sources, window by window."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices
from clinfuse.functional.windows import gaussian_taps, windowed_mean

TAPS = gaussian_taps(7, 1.5)

ALIKE = 0.75
"""Sources this similar in a window are both kept; of others the fused image may choose."""


def q_y(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Q_Y: mean similarity, in [-1, 1], 1 for three identical images.

    Yang et al. (2008), Eq. 6 and 7: where the sources' similarity is at least 0.75 that of the
    fused image to both, weighted by their variances (alike where both are flat); elsewhere that
    to the nearer source. Similarity is SSIM without its stabilising constants, as in the widely
    used evaluators, in 7 x 7 Gaussian windows of 1.5 pixels that lie wholly inside. Of a volume's
    slices together. NaN for slices smaller than a window.
    """
    if min(fused.shape[-2:]) < len(TAPS):
        return fused.new_full((len(fused),), torch.nan, dtype=torch.float32)
    f, m, c = (eight_bit_slices(image) for image in (fused, mri, ct))
    pictures = torch.stack([f, m, c]) - 127.5
    products = torch.stack([pictures[0] * pictures[1], pictures[0] * pictures[2]])
    crossed = pictures[1:2] * pictures[2:]
    stack = torch.cat([pictures, pictures.square(), products, crossed])
    means, squares, product = windowed_mean(stack, TAPS).split([3, 3, 3])
    pairs = ((0, 1), (0, 2), (1, 2))
    variances = squares - means.square()
    variances = torch.where(variances > _ROUNDING, variances, 0)
    covariances = [p - means[i] * means[j] for p, (i, j) in zip(product, pairs, strict=True)]
    levels = (means + 127.5).clamp(min=0)
    to_mri, to_ct, sources = (
        _similarity(levels[i], levels[j], variances[i], variances[j], covariance)
        for covariance, (i, j) in zip(covariances, pairs, strict=True)
    )
    both = variances[1] + variances[2]
    share = torch.where(both > 0, variances[1] / torch.where(both > 0, both, 1), 0.5)
    weighted = share * to_mri + (1 - share) * to_ct
    chosen = torch.where(sources >= ALIKE, weighted, torch.maximum(to_mri, to_ct))
    return case_sums(chosen, len(fused)) * (len(fused) / chosen.numel())


def _similarity(
    mean_a: Tensor, mean_b: Tensor, variance_a: Tensor, variance_b: Tensor, covariance: Tensor
) -> Tensor:
    """Wang & Bovik's (2002) index; a ratio of nothing to nothing is 1."""
    return _ratio(2 * mean_a * mean_b, mean_a.square() + mean_b.square(), 1e-6) * _ratio(
        2 * torch.where((variance_a > 0) & (variance_b > 0), covariance, 0),
        variance_a + variance_b,
        0.0,
    )


def _ratio(part: Tensor, whole: Tensor, nothing: float) -> Tensor:
    is_something = whole > nothing
    return torch.where(is_something, part / torch.where(is_something, whole, 1), 1)


_ROUNDING = 5e-3
"""Variances in squared grey levels that single precision cannot tell from 0."""
