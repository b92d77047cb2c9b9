"""Orthonormal Haar wavelets: a lossless factor of 2 in each axis, moved into channels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def haar_dwt(
    x: Float[Tensor, "b c *dhw"], axes: Sequence[int] | None = None
) -> Float[Tensor, "b c_bands *half"]:
    """One level of the orthonormal Haar transform, its sub-bands as channels.

    Haar (1910). Each axis is split into (even + odd)/sqrt(2) and (even - odd)/sqrt(2), so squared
    norms and white noise are kept: N(0, I) maps to N(0, I).

    Args:
        x: volumes or slices; transformed axes have even sizes.
        axes: which spatial axes to transform, 0 the first after the channels; None for all.

    Returns:
        2^k bands for each channel of x, ``c`` outermost: band i of channel j is channel
        j 2^k + i. Bit m of i, most significant first, says whether the m-th transformed axis is
        high-pass, so i = 0 is the approximation.

    Raises:
        ValueError: if a transformed axis has an odd size.
    """
    dims = _tensor_dims(x, axes)
    if odd := [dim - 2 for dim in dims if x.shape[dim] % 2]:
        raise ValueError(f"expected even sizes, got {tuple(x.shape[2:])}, odd along axes {odd}")
    x = x * 0.5 ** (len(dims) / 2)
    for dim in dims:
        even, odd_voxels = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
        x = torch.stack((even + odd_voxels, even - odd_voxels), dim=2).flatten(1, 2)
    return x


def haar_idwt(
    bands: Float[Tensor, "b c_bands *half"], axes: Sequence[int] | None = None
) -> Float[Tensor, "b c *dhw"]:
    """The volumes whose ``haar_dwt`` over the same axes is ``bands``.

    Raises:
        ValueError: if the channels are not a multiple of the number of bands.
    """
    dims = _tensor_dims(bands, axes)
    if bands.shape[1] % 2 ** len(dims):
        raise ValueError(f"expected a multiple of {2 ** len(dims)} channels, got {bands.shape[1]}")
    x = bands * 0.5 ** (len(dims) / 2)
    for dim in reversed(dims):
        low, high = x.unflatten(1, (-1, 2)).unbind(2)
        x = torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)
    return x


def _tensor_dims(x: Tensor, axes: Sequence[int] | None) -> list[int]:
    spatial = x.ndim - 2
    chosen = range(spatial) if axes is None else axes
    return sorted({axis % spatial + 2 for axis in chosen})
