"""How far a fused image is from its sources in what a network sees in them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6
"""Length of a voxel's features below which they have no direction."""


def perceptual_distance(
    fused: Sequence[Float[Tensor, "b _ ..."]],
    mri: Sequence[Float[Tensor, "b _ ..."]],
    ct: Sequence[Float[Tensor, "b _ ..."]],
) -> Float[Tensor, " b"]:
    """Squared distance of F's features from the stronger source's, mean over voxels and scales.

    Features have unit length at every voxel (Zhang et al. 2018, Eq. 1, without learned weights), so
    that scales count alike and a network of any weights may be asked; the distance is 0 to 4. The
    stronger source at a voxel is the one with longer features there: F cannot look like both, and
    has to where there is more to see.

    Args:
        fused: features of F at each scale, with gradients.
        mri: those of the MRI.
        ct: those of the CT.
    """
    distances = []
    with torch.autocast(fused[0].device.type, enabled=False):
        for seen, *sources in zip(fused, mri, ct, strict=True):
            m, c = (source.float() for source in sources)
            is_mri = m.square().sum(1, keepdim=True) >= c.square().sum(1, keepdim=True)
            aim = F.normalize(torch.where(is_mri, m, c), dim=1, eps=EPSILON)
            error = (F.normalize(seen.float(), dim=1, eps=EPSILON) - aim).square()
            distances.append(error.sum(1).flatten(1).mean(1))
    return torch.stack(distances).mean(0)
