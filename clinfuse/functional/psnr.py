"""Peak signal-to-noise ratio over a region."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.regional import regional_mean


def psnr(
    a: Float[Tensor, "b 1 *dhw"],
    b: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    data_range: float = 2.0,
) -> Float[Tensor, " b"]:
    """10 log10(data_range^2 / mean squared error over the mask), in dB.

    Infinite where the images agree on the mask, NaN where the mask is empty.

    Args:
        a: one image.
        b: the other.
        mask: voxels to average over.
        data_range: width of the range of values, 2 in model space; the same for all methods.
    """
    return 10 * torch.log10(data_range**2 / regional_mean((a - b) ** 2, mask))
