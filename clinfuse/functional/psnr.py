"""Peak signal-to-noise ratio over a region."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.cores import on_every_core
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
    has_gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.device.type == "cpu" and not has_gradient:
        return 10 * torch.log10(data_range**2 / _mean_square(a, b, mask))
    return 10 * torch.log10(data_range**2 / regional_mean((a - b) ** 2, mask))


def _mean_square(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """``regional_mean`` of (a - b)^2, a slice at a time."""

    def sums(index: int) -> Tensor:
        inside = mask[:, 0, index]
        square = torch.where(inside, (a[:, 0, index] - b[:, 0, index]) ** 2, 0)
        return square.flatten(1).sum(1).double()

    total = torch.stack(on_every_core(sums, range(mask.shape[2]))).sum(0)
    count = torch.tensor([np.count_nonzero(of_case.numpy()) for of_case in mask])
    return (total / count).to(a.dtype)  # NaN where there is no voxel
