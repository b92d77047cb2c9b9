"""How much of its two sources a fused image keeps, where no reference says how it should look."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.sobel import gradient_magnitude
from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.ssim import ssim


@dataclass
class SourceLossTerms:
    """Each term of a case unweighted, and what they sum to with their weights."""

    total: Float[Tensor, " b"]
    squared_error: Float[Tensor, " b"]
    ssim: Float[Tensor, " b"]
    gradient: Float[Tensor, " b"]
    intensity: Float[Tensor, " b"]

    def means(self) -> dict[str, Float[Tensor, ""]]:
        """What to log: each part's mean over the cases."""
        return {name: value.mean() for name, value in vars(self).items()}


class SourceLoss(nn.Module):
    """Squared error, SSIM, gradient and intensity against both sources.

    The terms that trained image fusion shares: nearness to the mean of both in squared error and in
    SSIM; a gradient as steep as the steeper source's at every voxel; an intensity as bright as the
    brighter one's (Ma et al. (2022), SwinFusion, Eq. 10 to 14).

    Args:
        squared_error: weight of half the sum of the mean squared errors.
        ssim: weight of one minus the mean of both SSIM.
        gradient: weight of the mean absolute difference of gradient magnitudes, in model units a
            voxel.
        intensity: weight of the mean absolute difference from the brighter source.
        sigma_mm: standard deviation of the SSIM window, in mm in every direction.
    """

    def __init__(
        self,
        squared_error: float = 0.0,
        ssim: float = 1.0,
        gradient: float = 1.0,
        intensity: float = 0.0,
        sigma_mm: float = 1.5,
    ) -> None:
        super().__init__()
        self.squared_error, self.ssim = squared_error, ssim
        self.gradient, self.intensity, self.sigma_mm = gradient, intensity, sigma_mm

    def forward(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
    ) -> SourceLossTerms:
        """Every term for every case, in full precision whatever the autocast."""
        with torch.autocast(fused.device.type, enabled=False):
            fused, mri, ct = fused.float(), mri.float(), ct.float()
            whole, sources = torch.ones_like(mri, dtype=torch.bool), (mri, ct)
            squared_error = _mean(
                torch.stack([(fused - source).square() for source in sources]).mean(0)
            )
            likeness = torch.stack(  # black is 0, as SSIM's luminance assumes
                [ssim(fused + 1, s + 1, whole, spacing_mm, self.sigma_mm) for s in sources]
            )
            steeper = torch.maximum(*(gradient_magnitude(source) for source in sources))
            terms = {
                "squared_error": squared_error,
                "ssim": 1 - likeness.mean(0),
                "gradient": _mean((gradient_magnitude(fused) - steeper).abs()),
                "intensity": _mean((fused - torch.maximum(mri, ct)).abs()),
            }
            total = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum(0)
            return SourceLossTerms(total, **terms)


def _mean(volume: Tensor) -> Tensor:
    return volume.flatten(1).mean(1)
