"""Qabf: how much of its sources' gradients a fused image keeps."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.eight_bit import case_sums, eight_bit_slices

STRENGTH = (0.9994, 15.0, 0.5)
"""Gamma, kappa and sigma of the strength's sigmoid (Xydeas & Petrovic (2000))."""

ORIENTATION = (0.9879, 22.0, 0.8)
"""Of the orientation's. An identical gradient scores 0.9749, the product of both at 1."""


def qabf(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Qabf: gradients kept in strength and orientation, weighted by the sources', in [0, 0.975].

    Xydeas & Petrovic (2000), Eq. 1 to 8, with Sobel's operator, zero beyond the border, and weights
    |gradient|. Of a volume's slices together. NaN where neither source has a gradient.

    As in the evaluators behind published tables, orientations are arctan(gradient_h / gradient_w)
    and their likeness is 1 - |difference| / (pi / 2). Xydeas' own folds the difference at pi / 2,
    for a gradient that turns past the vertical changes arctan by nearly pi and itself by little;
    see ``gradients_kept``.
    """
    gradients = [_sobel(eight_bit_slices(image)) for image in (fused, mri, ct)]
    polar = [(torch.hypot(h, w), _orientation(h, w)) for h, w in gradients]
    (ours, angle), *sources = polar
    kept, weight = torch.zeros_like(ours), torch.zeros_like(ours)
    for strength, other in sources:
        likeness = 1 - (other - angle).abs() / (math.pi / 2)
        larger = torch.maximum(strength, ours).clamp(min=1e-6)
        kept += strength * _preserved(torch.minimum(strength, ours) / larger, likeness)
        weight += strength
    return case_sums(kept, len(fused)) / case_sums(weight, len(fused))


def gradients_kept(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Qabf with a gradient: not rounded to levels, and orientations folded as in Xydeas' Eq. 3.

    Differentiable in all three almost everywhere, and finite with its gradient everywhere. Border
    and weights as ``qabf``.

    Args:
        fused: in [-1, 1], as are ``mri`` and ``ct``.
    """
    ours, *sources = (_sobel(127.5 * (image.flatten(0, -3) + 1)) for image in (fused, mri, ct))
    kept = weight = torch.zeros_like(ours[0])
    for source in sources:
        a, b = _length(*source), _length(*ours)
        dot = source[0] * ours[0] + source[1] * ours[1]
        cross = source[0] * ours[1] - source[1] * ours[0]
        angle = torch.atan2(_length(cross), _length(dot))
        strength = torch.minimum(a, b) / torch.maximum(a, b)
        kept = kept + a * _preserved(strength, 1 - angle / (math.pi / 2))
        weight = weight + a
    return case_sums(kept, len(fused)) / case_sums(weight, len(fused))


def _preserved(strength: Tensor, orientation: Tensor) -> Tensor:
    parts = zip((strength, orientation), (STRENGTH, ORIENTATION), strict=True)
    by_strength, by_orientation = (
        gamma * torch.sigmoid(kappa * (ratio - sigma)) for ratio, (gamma, kappa, sigma) in parts
    )
    return by_strength * by_orientation


def _sobel(slices: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives along h and w, times 8; beyond the border is 0."""
    x = F.pad(slices, (1, 1, 1, 1))
    lines = x[:, :-2].add(x[:, 1:-1], alpha=2).add_(x[:, 2:])
    columns = x[..., :-2].add(x[..., 1:-1], alpha=2).add_(x[..., 2:])
    return columns[:, 2:] - columns[:, :-2], lines[..., 2:] - lines[..., :-2]


def _orientation(along_h: Tensor, along_w: Tensor) -> Tensor:
    """In (-pi / 2, pi / 2]; pi / 2 where the gradient is vertical, or none."""
    slope = along_h / along_w
    return torch.atan(slope.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf))


def _length(*parts: Tensor) -> Tensor:
    """Its own gradient is finite where it is 0."""
    return (torch.stack(parts).square().sum(0) + 1e-12).sqrt()
