"""The six-part loss that transfer_fusion is trained with."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.spacing import SpacingMm, shared_spacing
from clinfuse.functional.ssim import sigma_voxels
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.losses.sources import SourceLoss

EPSILON = 1e-6
"""Variance below which an image is flat and correlates with nothing."""


@dataclass
class MedicalFusionLossTerms:
    """Each term of a case unweighted, and what they sum to with their weights."""

    total: Float[Tensor, " b"]
    content: Float[Tensor, " b"]
    structure: Float[Tensor, " b"]
    detail: Float[Tensor, " b"]
    consistency: Float[Tensor, " b"]
    gradient: Float[Tensor, " b"]
    medical: Float[Tensor, " b"]

    def means(self) -> dict[str, Float[Tensor, ""]]:
        """What to log: each part's mean over the cases."""
        return {name: value.mean() for name, value in vars(self).items()}


class MedicalFusionLoss(nn.Module):
    """Content, structure, detail, consistency, gradient and medical loss, weighed and summed.

    The six and their weights are method.md's (section 7, transfer_fusion), which names them alone.
    What they mean here:

    - content: mean absolute difference from the brighter source;
    - structure: one minus the mean of the SSIM with both sources;
    - detail: mean absolute difference of what a Gaussian window takes away (x - G x) from that of
      the source that has more of it, signs kept;
    - consistency: one minus the mean correlation with both sources;
    - gradient: mean absolute difference of the gradient's magnitude from the steeper source's;
    - medical: Eq. 2 without a lesion: the brain unlike the MRI and bone unlike the CT. It is 0 for
      a case without masks.

    Args:
        content: weight of the first, and so on in their order.
        sigma_mm: standard deviation of the windows of structure and detail, in mm in every
            direction.
    """

    def __init__(
        self,
        content: float = 15.0,
        structure: float = 8.0,
        detail: float = 5.0,
        consistency: float = 3.0,
        gradient: float = 2.0,
        medical: float = 10.0,
        sigma_mm: float = 1.5,
    ) -> None:
        super().__init__()
        self.weights = {
            "content": content,
            "structure": structure,
            "detail": detail,
            "consistency": consistency,
            "gradient": gradient,
            "medical": medical,
        }
        self.sources = SourceLoss(sigma_mm=sigma_mm)
        self.roi = ClinicalRoiLoss(alpha=1.0, beta=1.0, gamma=0.0)
        self.sigma_mm = sigma_mm

    def forward(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        aims: tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]],
        truth: tuple[
            Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Bool[Tensor, "b r *dhw"]
        ],
        spacing_mm: SpacingMm,
    ) -> MedicalFusionLossTerms:
        """Every term for every case, in full precision whatever the autocast.

        Args:
            fused: F.
            aims: the two images that all terms but the last compare F with.
            truth: MRI, CT and masks of the last.
            spacing_mm: voxel size, the same for all cases.
        """
        spacing_mm = shared_spacing(spacing_mm)
        mri, ct, roi = truth
        with torch.autocast(fused.device.type, enabled=False):
            fused, aims = fused.float(), (aims[0].float(), aims[1].float())
            sources = self.sources(fused, *aims, spacing_mm)
            sigma = sigma_voxels(spacing_mm, self.sigma_mm)
            detail, first, second = (x - gaussian_smooth(x, sigma) for x in (fused, *aims))
            finest = torch.where(first.abs() >= second.abs(), first, second)
            alike = torch.stack([correlation(fused, aim) for aim in aims]).mean(0)
            terms = {
                "content": sources.intensity,
                "structure": sources.ssim,
                "detail": (detail - finest).abs().flatten(1).mean(1),
                "consistency": 1 - alike,
                "gradient": sources.gradient,
                "medical": self.roi(fused, mri, ct, roi[:, 0:1], roi[:, 1:2], spacing_mm).total,
            }
            weighed = [self.weights[name] * term for name, term in terms.items()]
            return MedicalFusionLossTerms(torch.stack(weighed).sum(0), **terms)


def correlation(a: Float[Tensor, "b 1 *dhw"], b: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, " b"]:
    """Pearson's correlation of two images over all voxels; 0, and finite slopes, for a flat one."""
    a, b = (image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in (a, b))
    variances = [image.square().mean(1) + EPSILON for image in (a, b)]
    return (a * b).mean(1) / (variances[0] * variances[1]).sqrt()
