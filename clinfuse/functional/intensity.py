"""From scanner units to model space [-1, 1] and back, for CT and for MRI."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.types import CtMap

CT_KNOTS_PIECEWISE = (
    (-1000.0, -1.0),  # air
    (-150.0, -0.85),
    (0.0, -0.5),  # fat below, water
    (100.0, 0.1),  # grey and white matter, blood
    (300.0, 0.35),  # calcium, spongy bone
    (2000.0, 0.9),  # cortical bone
    (3000.0, 1.0),  # enamel, the upper end of most scanners' range
)
"""(HU, model value): 6 per mille a HU in soft tissue, and 0.55 of the range for bone."""

_KNOTS: dict[str, tuple[tuple[float, float], ...]] = {
    "piecewise": CT_KNOTS_PIECEWISE,
    "window_40_400": ((-160.0, -1.0), (240.0, 1.0)),
    "window_8bit": ((0.0, -1.0), (255.0, 1.0)),
}


def ct_to_model(ct: Float[Tensor, "*dhw"], ct_map: CtMap = "piecewise") -> Float[Tensor, "*dhw"]:
    """CT in model space [-1, 1]: monotone, linear between knots, clipped beyond the last ones.

    Args:
        ct: in HU, or in 0..255 for ``window_8bit``.
        ct_map: ``piecewise`` (default) resolves soft tissue and bone alike, ``window_40_400`` is
            the 400 HU window at 40 HU (all bone is 1), ``window_8bit`` takes CT that was
            windowed before.
    """
    units, model = _knots(ct_map, ct)
    return piecewise_linear(ct, units, model)


def ct_from_model(ct: Float[Tensor, "*dhw"], ct_map: CtMap = "piecewise") -> Float[Tensor, "*dhw"]:
    """CT in its own units again: the inverse of ``ct_to_model`` within the range of its knots."""
    units, model = _knots(ct_map, ct)
    return piecewise_linear(ct, model, units)


def _knots(ct_map: str, like: Tensor) -> tuple[Tensor, Tensor]:
    if ct_map not in _KNOTS:
        raise ValueError(f"expected a CT map of {get_args(CtMap)}, got {ct_map!r}")
    units, model = torch.tensor(_KNOTS[ct_map], dtype=torch.float64).to(like).unbind(1)
    return units, model


def piecewise_linear(
    x: Float[Tensor, "*dhw"], at: Float[Tensor, " n"], values: Float[Tensor, " n"]
) -> Float[Tensor, "*dhw"]:
    """The polyline through (at, values) at each x, constant beyond its ends; ``at`` increases."""
    x = x.clamp(at[0], at[-1])
    left = torch.bucketize(x, at[1:-1].contiguous())
    slope = values.diff() / at.diff()
    return values[left] + slope[left] * (x - at[left])


def looks_like_hu(ct: Float[Tensor, "*dhw"]) -> bool:
    """Whether the values can be Hounsfield units: air below -200, which no 8-bit window holds."""
    return bool(ct.min() < -200)


def mri_to_model(
    mri: Float[Tensor, "*dhw"],
    mask: Bool[Tensor, "*dhw"],
    percentiles: Sequence[float | int] = (0.5, 99.5),
) -> tuple[Float[Tensor, "*dhw"], tuple[float, float]]:
    """MRI in model space [-1, 1], and the (low, high) intensities that became -1 and 1.

    Nyúl & Udupa (1999) without their inner landmarks. Intensities beyond are clipped.

    Args:
        mri: in the scanner's arbitrary units.
        mask: head or brain, the voxels whose percentiles count.
        percentiles: the two that become -1 and 1.

    Raises:
        ValueError: if the mask is empty or the MRI inside it is uniform.
    """
    if not mask.any():
        raise ValueError("expected a mask with voxels to scale the MRI by, got an empty one")
    inside = mri[mask].detach().cpu().numpy()
    low, high = (float(value) for value in np.percentile(inside, percentiles))
    if not low < high:
        raise ValueError(f"expected an MRI with contrast inside the mask, got {low} throughout")
    return (2 * (mri - low) / (high - low) - 1).clamp(-1, 1), (low, high)


def mri_from_model(
    mri: Float[Tensor, "*dhw"], limits: tuple[float, float]
) -> Float[Tensor, "*dhw"]:
    """MRI in its own units again, from the (low, high) that ``mri_to_model`` gave."""
    low, high = limits
    return (mri + 1) / 2 * (high - low) + low


def leaky_clamp(x: Float[Tensor, "*shape"], slope: float = 0.01) -> Float[Tensor, "*shape"]:
    """x within model space [-1, 1], and next to it beyond: air is -1 however noisy the scan of it.

    A hard clamp would have no gradient left for a voxel on its wrong side.
    """
    inside = x.clamp(-1, 1)
    return inside + slope * (x - inside)
