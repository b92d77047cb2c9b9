"""What trains a network to take the noise out of a source."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.regional import regional_mean
from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.ssim import ssim


def denoising_loss(
    denoised: Float[Tensor, "b 1 *dhw"],
    clean: Float[Tensor, "b 1 *dhw"],
    region: Bool[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    squared_error: float = 10.0,
) -> Float[Tensor, " b"]:
    """Squared error everywhere, and once more with 1 - SSIM in the source's own region.

    Args:
        denoised: the estimate.
        clean: its noise-free twin, in model space.
        region: where the fused volume will look like this source; where it is empty, only the
            squared error over the whole volume is left.
        spacing_mm: voxel size.
        squared_error: weight of both squared errors.
    """
    with torch.autocast(denoised.device.type, enabled=False):
        denoised = denoised.float()
        error = squared_error * (denoised - clean).square()
        alike = ssim(denoised + 1, clean + 1, region, spacing_mm)  # black is 0
        local = regional_mean(error, region) + 1 - alike
        has_region = region.flatten(1).any(1)
        return error.flatten(1).mean(1) + torch.where(has_region, local, 0)
