"""Entropy of grey levels and the mutual information of two images, from their histograms."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import LEVELS, eight_bit


def entropy(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """EN: Shannon entropy of the 256 grey levels, in bits, 0 to 8.

    Roberts et al. (2008), Eq. 1. Of all voxels of a volume. NaN where one is.
    """
    levels = _levels(image)
    bits = _entropy(_histogram(levels, LEVELS)) / torch.tensor(2.0).log().item()
    return bits.masked_fill(_has_nan(image), torch.nan)


def mutual_information(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """MI: what the fused image tells of its sources' grey levels, summed over both, in nats.

    Qu et al. (2002), Eq. 3, from joint histograms of 256 x 256 levels over all voxels. Published
    tables take the natural logarithm here, though that of the entropy is to base 2: divide by
    ln 2 for bits. NaN where a voxel is.
    """
    ours, *sources = (_levels(image) for image in (fused, mri, ct))
    own = _entropy(_histogram(ours, LEVELS))
    total = torch.zeros_like(own)
    for source in sources:
        joint = _entropy(_histogram(ours * LEVELS + source, LEVELS**2))
        total = total + own + _entropy(_histogram(source, LEVELS)) - joint
    return total.masked_fill(_has_nan(fused) | _has_nan(mri) | _has_nan(ct), torch.nan)


def _levels(image: Tensor) -> Tensor:
    """Levels of the voxels of each case; what is NaN has any."""
    return eight_bit(image).nan_to_num().long().flatten(1)


def _has_nan(image: Tensor) -> Tensor:
    return image.isnan().flatten(1).any(1)


def _histogram(labels: Tensor, count: int) -> Tensor:
    """Share of each label in each row."""
    rows = torch.arange(len(labels), device=labels.device)[:, None] * count
    counts = torch.bincount((labels + rows).flatten(), minlength=len(labels) * count)
    return counts.reshape(len(labels), count) / labels.shape[1]


def _entropy(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(1)
