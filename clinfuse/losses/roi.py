"""The clinical composite ROI loss, Eq. 2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.regional import regional_mean
from clinfuse.functional.spacing import SpacingMm, shared_spacing
from clinfuse.functional.ssim import ssim
from clinfuse.losses.lesion import at_least_single, soft_dice_loss, soft_hd95_loss, soft_nsd_loss
from clinfuse.types import DATA_RANGE, ROI_NAMES


@dataclass
class RoiLossTerms:
    """Eq. 2 for each case, whole and in parts.

    ``by_region`` is what ``total`` sums, weights and fidelity included; the parts after it are
    unweighted. Where a case lacks the region a part speaks of, the part is 0 and so is its
    gradient; ``defined`` says so. Both are in ``ROI_NAMES`` order.
    """

    total: Float[Tensor, " b"]
    by_region: tuple[Float[Tensor, " b"], ...]
    brain: Float[Tensor, " b"]
    bone: Float[Tensor, " b"]
    dice: Float[Tensor, " b"]
    nsd: Float[Tensor, " b"]
    hd95: Float[Tensor, " b"]
    fidelity_brain: Float[Tensor, " b"]
    fidelity_bone: Float[Tensor, " b"]
    defined: Bool[Tensor, "b r"]

    def means(self) -> dict[str, Float[Tensor, ""]]:
        """What to log: each part's mean over the cases that define it, NaN when none does."""
        regions = {
            "brain": ("brain", "fidelity_brain"),
            "bone": ("bone", "fidelity_bone"),
            "lesion": ("dice", "nsd", "hd95"),
        }
        means = {"total": self.total.mean()}
        for region, names in regions.items():
            defined = self.defined[:, ROI_NAMES.index(region)]
            for name in names:
                means[name] = getattr(self, name).masked_fill(~defined, 0).sum() / defined.sum()
        return means


class ClinicalRoiLoss(nn.Module):
    """L_ROI of Eq. 2: brain like the MRI, bone like the CT, lesion where the expert drew it.

    L = alpha (1 - SSIM(F, mri | brain)) + beta (1 - SSIM(F, ct | bone))
    + gamma [lambda_1 L_Dice + lambda_2 L_NSD + lambda_3 L_HD95].

    SSIM has local Gaussian windows, is averaged over the region's voxels alone and may be negative,
    so the first two terms reach from 0 to 2. It sees model space moved to [0, 2]: its luminance is
    meant for brightness, and around zero it would call an inverted contrast similar.
    For the lesion terms see ``losses.lesion``; there L_HD95 is log(1 + HD95 / tau). Everything is
    computed in single precision or better, also under autocast: local variances are small
    differences of large numbers.

    Beside Eq. 2, ``fidelity`` adds each region's mean squared error: SSIM by itself pulls the
    noise of the sources back in. (0, 0) is the paper's equation.

    Args:
        alpha: weight of the brain.
        beta: weight of bone.
        gamma: weight of the lesion; off when no lesion probability is given.
        lambdas: weights of Dice, NSD and HD95 within the lesion term.
        tau_mm: tolerance of the lesion's border, in mm.
        fidelity: weights of the squared error in brain and bone.
        sigma_mm: standard deviation of the SSIM window, in mm in every direction.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 2.0,
        lambdas: Sequence[float | int] = (1.0, 1.0, 0.5),
        tau_mm: float = 2.0,
        fidelity: Sequence[float | int] = (0.0, 0.0),
        sigma_mm: float = 3.0,
    ) -> None:
        super().__init__()
        if len(lambdas) != 3:
            raise ValueError(f"expected weights of Dice, NSD and HD95, got {list(lambdas)}")
        if len(fidelity) != 2:
            raise ValueError(f"expected fidelity weights of brain and bone, got {list(fidelity)}")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.lambdas, self.fidelity = tuple(lambdas), tuple(fidelity)
        self.tau_mm, self.sigma_mm = tau_mm, sigma_mm

    @property
    def weights(self) -> tuple[float, float, float]:
        """Alpha, beta and gamma, in ``ROI_NAMES`` order."""
        return self.alpha, self.beta, self.gamma

    def forward(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        brain: Bool[Tensor, "b 1 *dhw"] | Float[Tensor, "b 1 *dhw"],
        bone: Bool[Tensor, "b 1 *dhw"] | Float[Tensor, "b 1 *dhw"],
        spacing_mm: SpacingMm,
        lesion_probability: Float[Tensor, "b 1 *dhw"] | None = None,
        lesion: Bool[Tensor, "b 1 *dhw"] | None = None,
        lesion_distance_mm: Float[Tensor, "b 1 *dhw"] | None = None,
    ) -> RoiLossTerms:
        """Every term for every case, differentiable in ``fused`` and ``lesion_probability``.

        Args:
            fused: F, the estimate of the clean volume.
            mri: what the brain should look like.
            ct: what bone should look like. Where it is known how the CT was moved, the caller
                passes it, and ``bone``, moved back.
            brain: brain mask, or the share of each voxel in the brain, by which it counts.
            bone: bone mask, or the shares in bone.
            spacing_mm: voxel size, the same for all cases. A sequence costs no device sync, a
                tensor on a GPU costs one.
            lesion_probability: the frozen lesion head's prediction from ``fused``, undetached.
            lesion: reference lesion mask.
            lesion_distance_mm: ``functional.surface.signed_distance_mm`` of it.

        Raises:
            ValueError: if there is a lesion probability but no lesion or no distance map.
        """
        with torch.autocast(fused.device.type, enabled=False):
            fused, mri, ct = (at_least_single(t) for t in (fused, mri, ct))
            spacing_mm = shared_spacing(spacing_mm)
            like_mri, fidelity_brain = self._likeness(fused, mri, brain, spacing_mm)
            like_ct, fidelity_bone = self._likeness(fused, ct, bone, spacing_mm)
            if lesion_probability is None:
                dice, nsd, hd95 = torch.zeros_like(like_mri).expand(3, -1)
            else:
                dice, nsd, hd95 = self._lesion_terms(
                    lesion_probability, lesion, lesion_distance_mm, spacing_mm
                )
        told = lesion
        if lesion_probability is None or told is None:
            told = torch.zeros_like(brain, dtype=torch.bool)
        lesion_term = sum(w * t for w, t in zip(self.lambdas, (dice, nsd, hd95), strict=True))
        by_region = (
            self.alpha * like_mri + self.fidelity[0] * fidelity_brain,
            self.beta * like_ct + self.fidelity[1] * fidelity_bone,
            self.gamma * lesion_term,
        )
        return RoiLossTerms(
            total=sum(by_region[1:], by_region[0]),
            by_region=by_region,
            brain=like_mri,
            bone=like_ct,
            dice=dice,
            nsd=nsd,
            hd95=hd95,
            fidelity_brain=fidelity_brain,
            fidelity_bone=fidelity_bone,
            defined=torch.stack([(m > 0).flatten(1).any(1) for m in (brain, bone, told)], 1),
        )

    def _likeness(
        self, fused: Tensor, source: Tensor, mask: Tensor, spacing_mm: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """1 - SSIM and the mean squared error over the mask or shares; 0 where there are none."""
        empty = ~(mask > 0).flatten(1).any(1)
        shown, aim = fused + DATA_RANGE / 2, source + DATA_RANGE / 2
        unlike = 1 - ssim(shown, aim, mask, spacing_mm, self.sigma_mm)
        error = regional_mean((fused - source).square(), mask)
        return unlike.masked_fill(empty, 0), error.masked_fill(empty, 0)

    def _lesion_terms(
        self,
        probability: Tensor,
        lesion: Tensor | None,
        distance_mm: Tensor | None,
        spacing_mm: Sequence[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        if lesion is None or distance_mm is None:
            missing = "lesion" if lesion is None else "lesion_distance_mm"
            raise ValueError(f"a lesion probability came without the reference's {missing}")
        return (
            soft_dice_loss(probability, lesion),
            soft_nsd_loss(probability, lesion, distance_mm, spacing_mm, self.tau_mm),
            soft_hd95_loss(probability, lesion, distance_mm, spacing_mm, self.tau_mm),
        )
