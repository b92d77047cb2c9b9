"""Structural similarity to both sources: as it is meant, and as published tables compute it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices
from clinfuse.functional.ssim import ssim_map

PUBLISHED_RANGE = 2.0
"""Of pixel values 0 to 255: what a library assumes of floating-point images left to itself."""


def ssim_sources(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """SSIM to the MRI plus SSIM to the CT, the range being that of the images; 2 is the most.

    Wang et al. (2004) with a Gaussian window of 1.5 pixels (``functional.ssim``) on grey levels 0
    to 255. This is the right one; ``ssim_published`` is for comparison with tables. Of a volume's
    slices together.
    """
    ours, *sources = (eight_bit_slices(image)[:, None] for image in (fused, mri, ct))
    total = torch.stack([ssim_map(ours, source, (1.5, 1.5), 255.0) for source in sources]).sum(0)
    return case_sums(total, len(fused)) * (len(fused) / total.numel())


def ssim_published(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """The sum over both sources as in published tables, where it is near 1.3 for CT and MRI.

    The same formula on grey levels 0 to 255 with the constants of a range of 2, which is wrong:
    they no longer hide noise, so that every window nearly black in both counts for 1 or for
    nothing. Uniform windows of 7 x 7 pixels that lie wholly inside and sample covariances, the
    defaults of ``skimage.metrics.structural_similarity``. Of a volume's slices together. NaN for
    slices smaller than a window.
    """
    if min(fused.shape[-2:]) < _SIZE:
        return fused.new_full((len(fused),), torch.nan, dtype=torch.float32)
    ours, *sources = (eight_bit_slices(image).double()[:, None] for image in (fused, mri, ct))
    total = torch.stack([_uniform_ssim(ours, source) for source in sources]).sum(0)
    return (case_sums(total, len(fused)) * (len(fused) / total.numel())).float()


_SIZE = 7


def _uniform_ssim(a: Tensor, b: Tensor) -> Tensor:
    c_1, c_2 = (0.01 * PUBLISHED_RANGE) ** 2, (0.03 * PUBLISHED_RANGE) ** 2
    moments = torch.cat([a, b, a * a + b * b, a * b], dim=1)
    mean_a, mean_b, squares, product = F.avg_pool2d(moments, _SIZE, stride=1).split(1, dim=1)
    sample = _SIZE**2 / (_SIZE**2 - 1)
    both, crossed = mean_a**2 + mean_b**2, mean_a * mean_b
    contrast = (2 * sample * (product - crossed) + c_2) / (sample * (squares - both) + c_2)
    return (2 * crossed + c_1) / (both + c_1) * contrast
