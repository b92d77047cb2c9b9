"""Calibration scores of one region's voxels that all come from one sorting.

``functional.calibration`` defines them, each for itself; at millions of voxels sorting is nearly
all that they cost.
"""

from dataclasses import dataclass
from typing import no_type_check  # numba reads types itself, and no checker may come before it

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clinfuse.functional.calibration import BINS
from clinfuse.functional.compiled import compiled

FRACTIONS = 100
"""Points of a sparsification curve."""


@dataclass(frozen=True)
class RankedErrors:
    """Errors in the order of the standard deviations, or other uncertainties, stated of them.

    Attributes:
        stated: from the smallest.
        error: prediction - truth where that was stated.
    """

    stated: Float[Tensor, " n"]
    error: Float[Tensor, " n"]

    def ence(self, bins: int = BINS) -> Float[Tensor, ""]:
        """``calibration.ence``."""
        parts = zip(self.stated.tensor_split(bins), self.error.tensor_split(bins), strict=True)
        gaps = [_relative_gap(*part) for part in parts if len(part[0])]
        return torch.stack(gaps).mean()

    def uce(self, bins: int = BINS) -> Float[Tensor, ""]:
        """``calibration.uce``: in this order, bins of equal width are stretches too."""
        variance = self.stated.square()
        low, high = variance[0], variance[-1]
        where = ((variance - low) / (high - low).clamp(min=1e-30) * bins).long().clamp(max=bins - 1)
        ends = torch.searchsorted(where, torch.arange(1, bins, device=where.device))
        gap = self.error.square().double() - variance.double()
        parts = gap.tensor_split(ends.cpu())
        return (torch.stack([part.sum().abs() for part in parts]).sum() / len(gap)).float()

    def sparsification_curve(self) -> Float[Tensor, " fractions"]:
        """Mean |error| of what is left when the most uncertain are taken away, relative to all.

        Its mean less that of ``least_curve`` is ``calibration.ause``; NaN where there is no error.
        """
        size = self.error.abs().double()
        before = torch.nn.functional.pad(size.cumsum(0), (1, 0))
        kept = _kept(len(size)).to(size.device)
        # Voxels of equal uncertainty count as their mean, as many of them as are kept.
        edge = self.stated[kept - 1]
        start = torch.searchsorted(self.stated, edge)
        end = torch.searchsorted(self.stated, edge, right=True)
        share = (kept - start) / (end - start).double()
        return _relative(before[start] + share * (before[end] - before[start]), before[-1], kept)


def ranked(stated: Float[Tensor, " n"], error: Float[Tensor, " n"]) -> RankedErrors:
    """Errors in the order of what was stated; equal ones in the order they are stored in."""
    if not (_is_packed(stated) and error.dtype == torch.float32):
        order = rising_order(stated)
        return RankedErrors(stated[order], error[order])
    rising, errors = np.empty((2, len(stated)), np.float32)
    _unpack(_sorted_pairs(stated), error.numpy(), rising.view(np.uint32), errors)
    return RankedErrors(torch.from_numpy(rising), torch.from_numpy(errors))


def rising_order(keys: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Places of the keys from the smallest, equal ones as they are stored.

    In single precision on a CPU the bits of a key and its place become one whole number, whose
    sorting numpy does with vector instructions: a tenth of the time of torch's.
    """
    if not _is_packed(keys):
        return keys.sort(stable=True).indices
    return torch.from_numpy((_sorted_pairs(keys) & _ALL).astype(np.int64))


def _is_packed(keys: Tensor) -> bool:
    return keys.device.type == "cpu" and keys.dtype == torch.float32 and len(keys) < 1 << 32


def _sorted_pairs(keys: Tensor) -> np.ndarray:
    pairs = np.empty(len(keys), np.uint64)
    _pack((keys + 0.0).numpy().view(np.uint32), pairs)  # + 0: zero has one sign
    pairs.sort()
    return pairs


_ALL, _SIGN, _HALF = np.uint64(0xFFFFFFFF), np.uint64(1 << 31), np.uint64(32)


@compiled
@no_type_check
def _pack(bits, pairs):
    """Bits of single precision, turned into the order of the numbers, above their places."""
    for i in range(len(bits)):
        key = np.uint64(bits[i])
        key ^= _ALL if key & _SIGN else _SIGN
        pairs[i] = (key << _HALF) | np.uint64(i)


@compiled
@no_type_check
def _unpack(pairs, values, bits, ordered):
    """Bits of the keys of pairs, and the values at their places."""
    for i in range(len(pairs)):
        key = pairs[i] >> _HALF
        bits[i] = key ^ (_SIGN if key & _SIGN else _ALL)
        ordered[i] = values[pairs[i] & _ALL]


def least_curve(error: Float[Tensor, " n"]) -> Float[Tensor, " fractions"]:
    """The sparsification curve of the error's own size: none is lower."""
    size = error.abs()
    on_cpu = size.device.type == "cpu"
    rising = torch.from_numpy(np.sort(size.numpy())) if on_cpu else size.sort().values
    total, kept = rising.double().cumsum(0), _kept(len(size)).to(size.device)
    return _relative(total[kept - 1], total[-1], kept)


def correlation(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Pearson's correlation; NaN of nothing, or where either is constant."""
    a, b = (t.double() - t.mean(dtype=torch.double) for t in (a, b))
    scale = (a.square().mean() * b.square().mean()).sqrt()
    return ((a * b).mean() / torch.where(scale > 1e-12, scale, torch.nan)).float()


def _kept(size: int) -> Tensor:
    """How many voxels are left at each point of a curve."""
    return torch.tensor([max(size - size * f // FRACTIONS, 1) for f in range(FRACTIONS)])


def _relative(of_kept: Tensor, of_all: Tensor, kept: Tensor) -> Tensor:
    """Means of what is kept over that of all, from the sums; all are kept at the first point."""
    return of_kept / kept / torch.where(of_all > 0, of_all / kept[0], torch.nan)


def _relative_gap(stated: Tensor, error: Tensor) -> Tensor:
    variance, found = (part.square().mean().sqrt() for part in (stated, error))
    return (variance - found).abs() / variance.clamp(min=1e-30)
