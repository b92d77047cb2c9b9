"""How much a fused image varies: over all its grey levels, and from pixel to pixel."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit, eight_bit_slices


def standard_deviation(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """SD: standard deviation of all voxels' grey levels, 0 to 127.5."""
    return eight_bit(image).flatten(1).double().std(1, correction=0).float()


def spatial_frequency(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """SF: root mean square difference of neighbours along h plus that along w, in grey levels.

    Eskicioglu & Fisher (1995), Eq. 4 to 6. Of a volume's slices together: across them a pixel's
    neighbour is millimetres away. NaN for slices of one row or one column.
    """
    if min(image.shape[-2:]) < 2:
        return image.new_full((len(image),), torch.nan)
    slices = eight_bit_slices(image)
    along_h, along_w = (_mean(slices.diff(dim=dim).square(), len(image)) for dim in (-2, -1))
    return (along_h + along_w).sqrt()


def average_gradient(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """AG: mean of sqrt((gradient_h^2 + gradient_w^2) / 2), in grey levels a pixel.

    Cui et al. (2015), Eq. 9, with central differences, one-sided at the border. Of a volume's
    slices together. NaN for slices of one row or one column.
    """
    if min(image.shape[-2:]) < 2:
        return image.new_full((len(image),), torch.nan)
    along_h, along_w = torch.gradient(eight_bit_slices(image), dim=(-2, -1))
    return _mean(((along_h.square() + along_w.square()) / 2).sqrt(), len(image))


def _mean(values: Tensor, cases: int) -> Tensor:
    return case_sums(values, cases) * (cases / values.numel())
