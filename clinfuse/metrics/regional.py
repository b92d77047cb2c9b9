"""Streaming metrics: the functional ones, averaged over the cases that define them."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from clinfuse.functional.fsim import fsim
from clinfuse.functional.psnr import psnr
from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.ssim import ssim
from clinfuse.functional.surface import dice, hd95, nsd
from clinfuse.types import DATA_RANGE

LESION_THRESHOLD = 0.5
"""A voxel is predicted lesion above this probability."""

BLACK = -DATA_RANGE / 2
"""Value of model space without luminance, for SSIM: see ``brightness``."""


def brightness(volume: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
    """Model space [-1, 1] moved to [0, 2], as SSIM wants it.

    SSIM's luminance 2 m_a m_b / (m_a^2 + m_b^2) of Wang et al. (2004) is meant for brightness,
    which is not negative. With means of opposite sign it is negative too, and an inverted contrast,
    whose structure is negative as well, would score as similar.
    """
    return volume - BLACK


class CaseMean(Metric):
    """Mean over the cases that define the metric; NaN when none does.

    ``count`` and ``undefined`` say how many cases counted and how many did not.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor
    undefined: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("undefined", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " b"]) -> None:
        """One value a case, NaN where undefined."""
        undefined = values.isnan()
        self.total += values.masked_fill(undefined, 0).sum()
        self.count += (~undefined).sum()
        self.undefined += undefined.sum()

    def compute(self) -> Float[Tensor, ""]:
        return self.total / self.count


class RegionalPSNR(CaseMean):
    """Peak signal-to-noise ratio over a region, in dB, always for the range 2 of model space."""

    def update(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        target: Float[Tensor, "b 1 *dhw"],
        mask: Bool[Tensor, "b 1 *dhw"],
    ) -> None:
        self.add(psnr(fused, target, mask, DATA_RANGE))


class RegionalSSIM(CaseMean):
    """Structural similarity over a region, always for the range 2 of model space."""

    def __init__(self, sigma_mm: float = 3.0) -> None:
        super().__init__()
        self.sigma_mm = sigma_mm

    def update(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        target: Float[Tensor, "b 1 *dhw"],
        mask: Bool[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
    ) -> None:
        self.add(ssim(fused, target, mask, spacing_mm, self.sigma_mm, DATA_RANGE, BLACK))


class RegionalFSIM(CaseMean):
    """Feature similarity over a region."""

    def update(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        target: Float[Tensor, "b 1 *dhw"],
        mask: Bool[Tensor, "b 1 *dhw"],
    ) -> None:
        self.add(fsim(fused, target, mask))


class LesionDice(CaseMean):
    """Dice overlap of the thresholded lesion probability; undefined for empty against empty."""

    def update(
        self, probability: Float[Tensor, "b 1 *dhw"], lesion: Bool[Tensor, "b 1 *dhw"]
    ) -> None:
        self.add(dice(probability > LESION_THRESHOLD, lesion))


class LesionNSD(CaseMean):
    """Normalised surface Dice at a tolerance; undefined for empty against empty."""

    def __init__(self, tau_mm: float = 2.0) -> None:
        super().__init__()
        self.tau_mm = tau_mm

    def update(
        self,
        probability: Float[Tensor, "b 1 *dhw"],
        lesion: Bool[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
    ) -> None:
        self.add(nsd(probability > LESION_THRESHOLD, lesion, spacing_mm, self.tau_mm))


class LesionHD95(CaseMean):
    """95 % Hausdorff distance in mm; undefined where the lesion or its prediction is empty."""

    higher_is_better = False

    def update(
        self,
        probability: Float[Tensor, "b 1 *dhw"],
        lesion: Bool[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
    ) -> None:
        self.add(hd95(probability > LESION_THRESHOLD, lesion, spacing_mm))
