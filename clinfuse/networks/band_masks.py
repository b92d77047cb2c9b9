"""The CNN that says, band by band, how much of a wavelet coefficient is the MRI's."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.networks.fusion_unet import DETAIL_GAIN
from clinfuse.networks.precision import with_safe_convolutions

FAINT = 1e-3
"""Size of a coefficient, in model space, below which it matters little whose it is."""


class BandMasks(nn.Module):
    """Spatial fusion masks in [0, 1], one for each band of the one-level Haar transform.

    A mask is the logistic function of what the rule says and what the network adds to it. The rule
    is max-abs, made soft: ``sharpness`` times the contrast (|M| - |C|) / (|M| + |C|) of the
    coefficients, and indifferent about the approximation. The network, dilated convolutions with
    skips, starts at zero, so that untrained it is the rule.

    Args:
        spatial_dims: 2 or 3.
        features: of every layer.
        dilations: one a layer of two convolutions, in coefficients; each widens the view.
        sharpness: of the rule; 8 leaves 1 % of a coefficient beside one four times as large.

    Raises:
        ValueError: neither 2 nor 3 dimensions; in ``forward``, bands of another number of them.
    """

    def __init__(
        self,
        spatial_dims: int,
        features: int = 32,
        dilations: Sequence[int] = (1, 2, 4, 8),
        sharpness: float = 8.0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"expected spatial_dims 2 or 3, got {spatial_dims}")
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.spatial_dims, bands = spatial_dims, 2**spatial_dims
        self.sharpness = sharpness
        self.first = conv(2 * bands, features, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                conv(features, features, 3, padding=dilation, dilation=dilation),
                nn.SiLU(),
                conv(features, features, 3, padding=1),
            )
            for dilation in dilations
        )
        self.last = conv(features, bands, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(cast(Tensor, self.last.bias))
        with_safe_convolutions(self)

    def forward(
        self, mri: Float[Tensor, "b bands *half"], ct: Float[Tensor, "b bands *half"]
    ) -> Float[Tensor, "b bands *half"]:
        """The MRI's share of each coefficient, from both sources' ``haar_dwt``."""
        if mri.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"expected images of {self.spatial_dims} axes (spatial_dims), got {mri.ndim - 2}"
            )
        features = self.first(torch.cat([self._levelled(bands) for bands in (mri, ct)], 1))
        for layer in self.layers:
            features = features + layer(features)
        return (self._rule(mri, ct) + self.last(features).float()).sigmoid()

    def _rule(self, mri: Tensor, ct: Tensor) -> Tensor:
        m, c = mri[:, 1:].abs(), ct[:, 1:].abs()
        detail = self.sharpness * (m - c) / (m + c + FAINT)
        return torch.cat((torch.zeros_like(mri[:, :1]), detail), 1)

    def _levelled(self, bands: Tensor) -> Tensor:
        """Bands of one size: the approximation as a local mean, the details DETAIL_GAIN up."""
        mean = bands[:, :1] * 2 ** (-self.spatial_dims / 2)
        return torch.cat((mean, bands[:, 1:] * DETAIL_GAIN), 1)
