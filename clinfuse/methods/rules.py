"""Voxel rules: fusion without weights, the floor and the oracle that every table contains."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.methods.base import FusionMethod
from clinfuse.types import FusionBatch


class Weighted(FusionMethod):
    """F = w I_M + (1 - w) I_C.

    Args:
        mri_weight: w; 0.5 is ``average``, 0.7 is method.md's ``weighted``.
    """

    def __init__(self, mri_weight: float) -> None:
        super().__init__()
        if not 0 <= mri_weight <= 1:
            raise ValueError(f"expected mri_weight in [0, 1], got {mri_weight}")
        self.mri_weight = mri_weight

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return self.mri_weight * batch.mri + (1 - self.mri_weight) * batch.ct


class Maximum(FusionMethod):
    """The brighter source at every voxel."""

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return torch.maximum(batch.mri, batch.ct)


class MaskComposite(FusionMethod):
    """CT where the bone mask is, MRI elsewhere.

    With perfect masks and registration this is unbeatable on brain SSIM and bone PSNR, which is
    why it stands in every table (method.md section 3); it cannot know that the CT has moved.
    """

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        return torch.where(batch.bone, batch.ct, batch.mri)
