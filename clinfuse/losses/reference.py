"""How far a fused volume is from the reference: error everywhere, structure everywhere."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.ssim import ssim


class ReferenceLoss(nn.Module):
    """Squared error plus one minus SSIM against the reference, over the whole volume.

    Air counts as it does in the metric: SSIM of images that are black outside the head sees even
    faint noise there.

    Args:
        squared_error: weight of the mean squared error.
        ssim: weight of one minus the mean SSIM.
        sigma_mm: standard deviation of the SSIM window, in mm in every direction.
    """

    def __init__(self, squared_error: float, ssim: float, sigma_mm: float = 3.0) -> None:
        super().__init__()
        self.squared_error, self.ssim, self.sigma_mm = squared_error, ssim, sigma_mm

    def forward(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        reference: Float[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
    ) -> Float[Tensor, " b"]:
        """One value a case, in full precision whatever the autocast."""
        with torch.autocast(fused.device.type, enabled=False):
            fused, reference = fused.float(), reference.float()
            total = self.squared_error * (fused - reference).square().flatten(1).mean(1)
            if self.ssim:
                whole = torch.ones_like(reference, dtype=torch.bool)
                shown, aim = fused + 1, reference + 1  # black is 0, as SSIM's luminance assumes
                total = total + self.ssim * (1 - ssim(shown, aim, whole, spacing_mm, self.sigma_mm))
            return total
