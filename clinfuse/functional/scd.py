"""Sum of the correlations of differences."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import eight_bit


def scd(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """SCD: r(fused - ct, mri) + r(fused - mri, ct), over all voxels, in [-2, 2].

    Aslantas & Bendes (2015), Eq. 2: what the fused image has beyond one source should be the other.
    NaN where a source is flat, or the fused image is one of them throughout.
    """
    f, m, c = (eight_bit(image).flatten(1).double() for image in (fused, mri, ct))
    return (correlation(f - c, m) + correlation(f - m, c)).float()


def correlation(a: Float[Tensor, "b n"], b: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """Pearson's correlation of each row; NaN where either is constant."""
    a, b = (row - row.mean(1, keepdim=True) for row in (a, b))
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    constant = (a.abs().amax(1) < _FLAT) | (b.abs().amax(1) < _FLAT)
    return torch.where(constant, torch.nan, (a * b).sum(1) / scale)


_FLAT = 1e-6
"""Grey levels about the mean that are rounding error."""
