"""What a deformation field should not do: fold, and change from voxel to voxel."""

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.spacing import SpacingMm


def folding(
    displacement_mm: Float[Tensor, "b n *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, " b"]:
    """Mean over the voxels of max(0, -det J), J the Jacobian of p -> p + u(p).

    Where det J is negative space is turned inside out (Kuang & Schmah 2019, Eq. 4). 0 for every
    rigid motion.
    """
    determinant = torch.linalg.det(_jacobian(displacement_mm, spacing_mm))
    return (-determinant).clamp(min=0).flatten(1).mean(1)


def roughness(
    displacement_mm: Float[Tensor, "b n *dhw"], spacing_mm: SpacingMm
) -> Float[Tensor, " b"]:
    """Mean over the voxels of the squared slopes of u, which have no unit: mm a mm.

    The diffusion regulariser of Balakrishnan et al. (2019), Eq. 7. 0 for a shift; 2 (1 - cos a)
    an axis of the plane for a turn by a.
    """
    return _slopes(displacement_mm, spacing_mm).square().sum((-1, -2)).flatten(1).mean(1)


def _jacobian(displacement_mm: Tensor, spacing_mm: SpacingMm) -> Tensor:
    slopes = _slopes(displacement_mm, spacing_mm)
    return slopes + torch.eye(slopes.shape[-1]).to(slopes)


def _slopes(displacement_mm: Tensor, spacing_mm: SpacingMm) -> Tensor:
    """du_i / dx_j at every voxel, ``b *dhw i j``; 0 along an axis of one voxel."""
    n = displacement_mm.shape[1]
    size_mm = torch.as_tensor(spacing_mm).to(displacement_mm).reshape(-1, n)
    slopes = []
    for axis in range(n):
        if displacement_mm.shape[axis + 2] == 1:
            slopes.append(torch.zeros_like(displacement_mm))
            continue
        (per_voxel,) = torch.gradient(displacement_mm, dim=axis + 2)
        slopes.append(per_voxel / size_mm[:, axis].reshape(-1, *[1] * (n + 1)))
    return torch.stack(slopes, -1).movedim(1, -2)
