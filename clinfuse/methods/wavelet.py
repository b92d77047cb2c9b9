"""Fusion of wavelet coefficients: the stronger detail in every band, over a common base."""

from typing import Any

import ptwt
import pywt
import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.methods.base import FusionMethod
from clinfuse.methods.selection import Selection
from clinfuse.networks.fusion_unet import crop
from clinfuse.types import FusionBatch


class Wavelet(FusionMethod):
    """F with the wavelet coefficients that the rules make of both sources', within model space.

    Li, Manjunath & Mitra (1995). Slices are transformed by ptwt along two axes, volumes along
    three, mirrored beyond their border; any size will do.

    Args:
        wavelet: name of a discrete wavelet, as ``pywt.wavelist(kind="discrete")`` has them.
        levels: of detail.
        detail: what becomes of the details.
        approximation: what becomes of what is left when they are taken away.

    Raises:
        ValueError: no such wavelet, or fewer than one level.
    """

    def __init__(
        self, wavelet: str, levels: int, detail: Selection, approximation: Selection
    ) -> None:
        super().__init__()
        if wavelet not in pywt.wavelist(kind="discrete"):
            raise ValueError(
                f"expected a discrete wavelet such as haar, db2, sym4 or bior4.4, got {wavelet!r}"
            )
        if levels < 1:
            raise ValueError(f"expected at least one level of the wavelet, got {levels}")
        self.wavelet, self.levels = wavelet, levels
        self.detail, self.approximation = detail, approximation

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        flat = batch.mri.ndim == 4
        analyse, synthesise = (
            (ptwt.wavedec2, ptwt.waverec2) if flat else (ptwt.wavedec3, ptwt.waverec3)
        )
        with torch.autocast(batch.mri.device.type, enabled=False):
            mri, ct = (
                analyse(source.float(), self.wavelet, mode="symmetric", level=self.levels)
                for source in (batch.mri, batch.ct)
            )
            details = [self._details(m, c) for m, c in zip(mri[1:], ct[1:], strict=True)]
            fused = synthesise((self.approximation(mri[0], ct[0]), *details), self.wavelet)
            return crop(fused, batch.mri.shape[2:]).clamp(-1, 1)

    def _details(self, mri: Any, ct: Any) -> Any:
        """The bands of one level as ptwt has them: three in a row of a slice, seven by name."""
        if isinstance(mri, dict):
            return {name: self.detail(mri[name], ct[name]) for name in mri}
        return tuple(map(self.detail, mri, ct))
