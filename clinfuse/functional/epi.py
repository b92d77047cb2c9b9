"""Edge preservation index: how far the high-pass of the fused image follows its sources'."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import eight_bit_slices
from clinfuse.functional.scd import correlation


def epi(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """EPI: mean over the sources of the correlation of Laplacians, in [-1, 1].

    Sattar et al. (1997), Eq. 15, the Laplacian being a pixel's eight neighbours less eight times
    itself, at pixels that have all eight. Of a volume's slices together. NaN where one of the
    images has no edges, or no pixel has all eight.
    """
    cases = len(fused)
    if min(fused.shape[-2:]) < 3:
        return fused.new_full((cases,), torch.nan)
    ours, *theirs = (
        laplacian(eight_bit_slices(image)).reshape(cases, -1).double() for image in (fused, mri, ct)
    )
    return ((correlation(ours, theirs[0]) + correlation(ours, theirs[1])) / 2).float()


def laplacian(slices: Float[Tensor, "s h w"]) -> Float[Tensor, "s h-2 w-2"]:
    """Eight neighbours less eight times the pixel, where it has all of them."""
    return 9 * (F.avg_pool2d(slices[:, None], 3, stride=1)[:, 0] - slices[:, 1:-1, 1:-1])
