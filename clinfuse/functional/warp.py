"""Rigid motions in millimetres, and resampling a volume along a displacement."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.interpolate import make_interp_spline
from torch import Tensor

from clinfuse.functional.spacing import SpacingMm


def rigid_matrix(
    rotation_rad: Float[Tensor, "b r"], translation_mm: Float[Tensor, "b n"]
) -> Float[Tensor, "b n_plus_1 n_plus_1"]:
    """Homogeneous matrices A of rigid motions: A p = R p + t.

    R is the exponential of the rotation vector's cross-product matrix, which Rodrigues' formula
    writes out; exact at every angle, with a gradient at zero too.

    Args:
        rotation_rad: for volumes a rotation vector in (d, h, w) components, its length the angle;
            for slices the one angle that turns axis h towards axis w.
        translation_mm: in the order of the spatial axes.

    Raises:
        ValueError: unless it is 3 rotations with 3 translations, or 1 with 2.
    """
    n = translation_mm.shape[1]
    if (n, rotation_rad.shape[1]) not in {(3, 3), (2, 1)}:
        raise ValueError(
            f"expected 3 rotations for 3 axes or 1 for 2, got {rotation_rad.shape[1]} for {n}"
        )
    rotation = torch.linalg.matrix_exp(_cross_product_matrix(rotation_rad))
    affine = torch.cat((rotation, translation_mm[..., None]), dim=2)
    last_row = torch.eye(n + 1)[-1:].to(affine).expand(len(affine), 1, n + 1)
    return torch.cat((affine, last_row), dim=1)


def _cross_product_matrix(rotation: Tensor) -> Tensor:
    zero = torch.zeros_like(rotation[:, 0])
    if rotation.shape[1] == 1:
        angle = rotation[:, 0]
        return torch.stack((zero, -angle, angle, zero), dim=1).unflatten(1, (2, 2))
    x, y, z = rotation.unbind(1)
    return torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=1).unflatten(1, (3, 3))


def rigid_displacement(
    matrix: Float[Tensor, "b n_plus_1 n_plus_1"],
    shape: Sequence[int],
    spacing_mm: SpacingMm,
) -> Float[Tensor, "b n *dhw"]:
    """The displacement u(p) = A p - p of each voxel, in mm, p measured from the grid's centre.

    Args:
        matrix: homogeneous, in mm and the order of the spatial axes.
        shape: sizes of the spatial axes.
        spacing_mm: voxel size.
    """
    n = len(shape)
    points = _points_mm(shape, _spacing_rows(spacing_mm, n, matrix))
    linear = matrix[:, :n, :n] - torch.eye(n).to(matrix)
    displacement = linear @ points.flatten(2) + matrix[:, :n, n:]
    return displacement.unflatten(2, tuple(shape))


def _points_mm(shape: Sequence[int], spacing: Tensor) -> Tensor:
    axes = [torch.arange(size).to(spacing) - (size - 1) / 2 for size in shape]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return voxels * spacing.reshape(*spacing.shape, *[1] * len(shape))


def warp(
    volume: Float[Tensor, "b c *dhw"],
    displacement_mm: Float[Tensor, "b n *dhw"],
    spacing_mm: SpacingMm,
    padding: Literal["border", "zeros"] = "border",
    refine: int = 1,
) -> Float[Tensor, "b c *dhw"]:
    """The volume resampled at p + u(p), linearly: out(p) = volume(p + u(p)).

    Differentiable in the volume and in the displacement. An axis of one voxel has no inside to
    move in, so displacement along it is ignored.

    Linear interpolation blurs; with ``refine`` it is done on the cubic spline through the voxels,
    sampled so many times as finely, and is then close to cubic interpolation at a fraction of its
    cost. Values may overshoot by what a spline does.

    Args:
        volume: volumes or slices, on the grid of the displacement.
        displacement_mm: u, in mm and the order of the spatial axes.
        spacing_mm: voxel size.
        padding: what lies beyond the grid: its border's value, or 0.
        refine: samples of the spline a voxel; 1 interpolates between the voxels themselves.
    """
    places = places_in(volume.shape[2:], displacement_mm, spacing_mm)
    return sampled(refined(volume, refine), places, padding)


def sampled(
    volume: Float[Tensor, "b c *grid"],
    places: Float[Tensor, "b *dhw n"],
    padding: Literal["border", "zeros"] = "border",
) -> Float[Tensor, "b c *dhw"]:
    """The volume at ``places_in`` it, linearly interpolated between its samples."""
    return F.grid_sample(volume, places, "bilinear", padding, align_corners=True)


def places_in(
    sizes: Sequence[int],
    displacement_mm: Float[Tensor, "b n *dhw"],
    spacing_mm: SpacingMm,
    first: Sequence[int] | None = None,
) -> Float[Tensor, "b *dhw n"]:
    """Where p + u(p) lies between the ends of a grid, -1 and 1, as ``grid_sample`` counts.

    Args:
        sizes: of the grid, in voxels.
        displacement_mm: u, on the grid, or on another of the same voxels.
        spacing_mm: voxel size.
        first: which voxel of the grid, or beyond it, u begins at; None for u on the grid itself.
    """
    spacing = _spacing_rows(spacing_mm, len(sizes), displacement_mm)
    per_mm = 2 / (spacing * torch.tensor([max(size - 1, 1) for size in sizes]).to(spacing))
    if first is None:
        voxels = _identity_grid(sizes, spacing)
    else:
        lengths = zip(first, displacement_mm.shape[2:], sizes, strict=True)
        axes = [
            torch.arange(start, start + length).to(spacing) * (2 / max(size - 1, 1)) - 1
            for start, length, size in lengths
        ]
        voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    grid = voxels + displacement_mm * per_mm.reshape(*per_mm.shape, *[1] * len(sizes))
    return grid.movedim(1, -1).flip(-1)  # grid_sample wants (x, y, z) = (w, h, d) last


def refined(
    volume: Float[Tensor, "b c *dhw"], factor: int, axes: Sequence[int] | None = None
) -> Float[Tensor, "b c *finer"]:
    """The cubic spline through the voxels, at ``factor`` samples a voxel, ends kept.

    Args:
        volume: volumes or slices.
        factor: 1 leaves it as it is.
        axes: which spatial axes become finer, 0 the first after the channels; None for all.
    """
    for axis in range(volume.ndim - 2) if axes is None else axes:
        if volume.shape[axis + 2] > 1 and factor > 1:
            volume = _refined_along(volume, factor, axis + 2)
    return volume


def _refined_along(volume: Tensor, factor: int, dim: int) -> Tensor:
    matrix = torch.from_numpy(_spline_matrix(volume.shape[dim], factor)).to(volume)
    if dim == volume.ndim - 1:
        return volume @ matrix.T
    return (matrix @ volume.flatten(dim + 1)).unflatten(dim + 1, volume.shape[dim + 1 :])


@lru_cache(maxsize=256)
def _spline_matrix(size: int, factor: int) -> np.ndarray:
    """Row i holds the weights of the voxels in sample i of the spline (de Boor 1978).

    They fall by 3.7 with every voxel of distance. Those below 1e-12 are 0: as single precision they
    would soon be subnormal, and a product of matrices with such numbers takes forty times as long.
    """
    spline = make_interp_spline(np.arange(size), np.eye(size), k=3 if size > 3 else 1)
    matrix = spline(np.linspace(0, size - 1, (size - 1) * factor + 1))
    return np.where(np.abs(matrix) < 1e-12, 0.0, matrix)


def _spacing_rows(spacing_mm: SpacingMm, n: int, like: Tensor) -> Tensor:
    """Voxel sizes ``b n``, or ``1 n`` for all cases."""
    return torch.as_tensor(spacing_mm, dtype=like.dtype, device=like.device).reshape(-1, n)


def _identity_grid(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Voxel centres from -1 to 1 along each axis; 0 along an axis of one voxel."""
    axes = [
        torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
        if size > 1
        else like.new_zeros(1)
        for size in sizes
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
