"""The pseudo-reference: one image from a registered, clean pair, blended without a seam."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.intensity import CtMap, ct_from_model, piecewise_linear
from clinfuse.functional.spacing import SpacingMm, shared_spacing

FINDING_DISPLAY = ((20.0, -1.0), (50.0, 0.5), (100.0, 0.85), (300.0, 1.0))
"""(HU, model value): brightness of CT-dense findings on the MRI. Blood is above grey and white
matter in most contrasts, calcium is the brightest, and brain beside them is not shown at all."""


def composite(
    ct: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    bone: Bool[Tensor, "b 1 *dhw"],
    findings: Bool[Tensor, "b 1 *dhw"] | None = None,
    *,
    brain: Bool[Tensor, "b 1 *dhw"] | None = None,
    spacing_mm: SpacingMm,
    feather_mm: float = 2.0,
    ct_map: CtMap = "piecewise",
) -> Float[Tensor, "b 1 *dhw"]:
    """CT where bone, MRI elsewhere, and CT-dense findings of the brain shown bright on the MRI.

    The pseudo-reference x_0 where a study has none of its own. Bone of any thickness is the CT
    exactly; around it the CT's weight falls smoothly to the MRI, but not into the brain, which is
    the MRI's: between inner table and brain there is an edge in truth, and no seam to hide.

    Args:
        ct: registered, in model space.
        mri: in model space.
        bone: voxels that are the CT's.
        findings: haemorrhage and calcification, where F = max(MRI, display of the CT's density),
            as dense things are bright to a reader of CT; None for none.
        brain: voxels that bone's feathering leaves alone; None for none.
        spacing_mm: voxel size, the same for all cases.
        feather_mm: distance at which the weight of a neighbouring bone has fallen below 0.05.
        ct_map: how the CT got into model space; its inverse gives the density of findings.
    """
    fused = mri
    if findings is not None:
        shown = torch.maximum(mri, finding_display(ct, ct_map))
        fused = torch.lerp(mri, shown, feathered(findings, spacing_mm, feather_mm).to(mri))
    weight = feathered(bone, spacing_mm, feather_mm).to(mri)
    if brain is not None:
        weight = torch.where(brain, bone.to(mri), weight)
    return torch.lerp(fused, ct, weight)


def feathered(
    mask: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm, feather_mm: float = 2.0
) -> Float[Tensor, "b 1 *dhw"]:
    """Blending weights: 1 on the mask, falling outwards to under 0.05 within ``feather_mm``.

    Twice the mask smoothed by a Gaussian of half that width is 1 at a straight border, so the
    weight is continuous there; the maximum with the mask keeps bone thinner than the Gaussian.
    """
    sigma = [feather_mm / 2 / size for size in shared_spacing(spacing_mm)]
    hard = mask.float()
    return torch.maximum(hard, 2 * gaussian_smooth(hard, sigma)).clamp(max=1)


def finding_display(
    ct: Float[Tensor, "b 1 *dhw"], ct_map: CtMap = "piecewise"
) -> Float[Tensor, "b 1 *dhw"]:
    """Brightness in model space at which a finding of this density is shown on the MRI.

    For CT in an 8-bit window, whose width nobody recorded, it is the CT as it is.
    """
    if ct_map == "window_8bit":
        return ct
    hu, shown = torch.tensor(FINDING_DISPLAY).to(ct).unbind(1)
    return piecewise_linear(ct_from_model(ct, ct_map), hu, shown)
