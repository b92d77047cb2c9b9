"""Weighted means over windows that lie wholly inside a picture."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor


def gaussian_taps(size: int, sigma: float) -> tuple[float, ...]:
    """Weights of a window of ``size`` pixels, of unit sum, as MATLAB's ``fspecial``."""
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return tuple(float(weight) for weight in weights / weights.sum())


def windowed_mean(
    pictures: Float[Tensor, "*n h w"], taps: Sequence[float]
) -> Float[Tensor, "*n h_valid w_valid"]:
    """Mean over the square window around each pixel that has all of it.

    Shifted pictures are added up: on CPU several times as fast as a convolution of one channel.

    Args:
        pictures: no smaller than the window.
        taps: its weights along either axis.
    """
    for dim in (-2, -1):
        size = pictures.shape[dim] - len(taps) + 1
        total = pictures.narrow(dim, 0, size) * taps[0]
        for start, weight in enumerate(taps[1:], start=1):
            total.add_(pictures.narrow(dim, start, size), alpha=weight)
        pictures = total
    return pictures
