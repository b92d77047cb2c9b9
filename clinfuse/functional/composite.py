"""The pseudo-reference: one image from a registered, clean pair, blended without a seam."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import label
from torch import Tensor

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.intensity import CtMap, ct_from_model, piecewise_linear
from clinfuse.functional.regional import bounding_box
from clinfuse.functional.spacing import SpacingMm, shared_spacing

FINDING_DISPLAY = ((30.0, -1.0), (45.0, 0.5), (60.0, 0.8), (100.0, 0.95), (300.0, 1.0))
"""(HU, model value): brightness of CT-dense findings on the MRI, blood under calcium; brain beside
them is not shown at all. Where the surroundings are bright themselves the sign is turned."""

AROUND_MM = 6.0
"""Width of the Gaussian window within which a finding's surroundings are averaged."""


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
        findings: haemorrhage and calcification, as ``shown_findings`` shows them; None for none.
        brain: voxels that bone's feathering leaves alone; None for none.
        spacing_mm: voxel size, the same for all cases.
        feather_mm: distance at which the weight of a neighbouring bone has fallen below 0.05.
        ct_map: how the CT got into model space; its inverse gives the density of findings.
    """
    fused = mri
    if findings is not None:
        fused = shown_findings(mri, ct, findings, brain, spacing_mm, feather_mm, ct_map)
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


def shown_findings(
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
    findings: Bool[Tensor, "b 1 *dhw"],
    brain: Bool[Tensor, "b 1 *dhw"] | None,
    spacing_mm: SpacingMm,
    feather_mm: float = 2.0,
    ct_map: CtMap = "piecewise",
) -> Float[Tensor, "b 1 *dhw"]:
    """The MRI with each CT-dense finding shown by its density, so that it stands out.

    Bright, as dense things are to a reader of CT: max(MRI, ``finding_display``). But where the MRI
    around a finding is bright itself (T2 and ADC beside CSF), bright would hide it: there it is
    dark, as calcium and fresh blood are on those contrasts, in the same order on half of the range:
    min(MRI, -(1 + ``finding_display``) / 2). Whichever lies farther from the mean of the brain
    around it; each connected finding by itself.

    Args:
        mri: to show them on, in model space.
        ct: registered; its density decides how bright.
        findings: where.
        brain: where the surroundings are; None for everywhere.
        spacing_mm: voxel size, the same for all cases.
        feather_mm: as in ``composite``.
        ct_map: how the CT got into model space.
    """
    display = finding_display(ct, ct_map)
    others = (~findings if brain is None else brain & ~findings).to(mri)
    sigma = [AROUND_MM / 2 / size for size in shared_spacing(spacing_mm)]
    seen, total = (gaussian_smooth(v, sigma) for v in (others, others * mri))
    around = torch.where(seen > 1e-3, total / seen.clamp(min=1e-3), -1.0)  # nothing around: bright
    dark = torch.zeros_like(findings)
    for case, is_found in enumerate(findings[:, 0]):
        if not is_found.any():
            continue
        box = bounding_box(is_found)
        parts, count = label(is_found[box].cpu().numpy(), np.ones((3,) * is_found.ndim))
        for number in range(1, count + 1):
            inside = torch.from_numpy(parts == number).to(mri.device)
            level, bright = (v[case, 0][box][inside].mean() for v in (around, display))
            dark[case, 0][box] |= inside & (level + (1 + bright) / 2 > (bright - level).abs())
    near_dark = feathered(dark, spacing_mm, feather_mm) > 0
    in_dark, in_bright = torch.minimum(mri, -(1 + display) / 2), torch.maximum(mri, display)
    shown = torch.where(near_dark, in_dark, in_bright)
    return torch.lerp(mri, shown, feathered(findings, spacing_mm, feather_mm).to(mri))


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
