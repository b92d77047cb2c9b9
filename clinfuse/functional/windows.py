"""Weighted means over windows that lie wholly inside a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def gaussian_taps(size: int, sigma: float) -> tuple[float, ...]:
    """Weights of a window of ``size`` pixels, of unit sum, as MATLAB's ``fspecial``."""
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return tuple(float(weight) for weight in weights / weights.sum())


def windowed_mean(
    pictures: Float[Tensor, "*n h w"], taps: Sequence[float]
) -> Float[Tensor, "*n h_valid w_valid"]:
    """Mean over the square window around each pixel that has all of it.

    Shifted pictures are added up: on CPU several times as fast as a convolution of one channel, and
    so is the gradient, which adds them up the other way.

    Args:
        pictures: no smaller than the window.
        taps: its weights along either axis.
    """
    for dim in (-2, -1):
        pictures = _ShiftedSum.apply(pictures, tuple(taps), dim)
    return pictures


class _ShiftedSum(torch.autograd.Function):
    """Sum of the pictures shifted along one axis, each with its weight.

    Autograd by itself would give every shifted picture a gradient of the whole size.
    """

    @staticmethod
    def forward(ctx: Any, pictures: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
        ctx.taps, ctx.dim, ctx.shape = taps, dim, pictures.shape
        size = pictures.shape[dim] - len(taps) + 1
        total = pictures.narrow(dim, 0, size) * taps[0]
        for start, weight in enumerate(taps[1:], start=1):
            total.add_(pictures.narrow(dim, start, size), alpha=weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.new_zeros(ctx.shape)
        size = gradient.shape[ctx.dim]
        for start, weight in enumerate(ctx.taps):
            total.narrow(ctx.dim, start, size).add_(gradient, alpha=weight)
        return total, None, None
