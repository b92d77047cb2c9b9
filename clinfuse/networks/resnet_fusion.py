"""Fusion on the features of a ResNet that stays as it is."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter

from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.pyramid_decoder import PyramidDecoder, SourceBlend, normed_convolution
from clinfuse.networks.resnet_encoder import ResNetEncoder


class ResNetFusionNetwork(nn.Module):
    """F from both sources' frozen features: fused by convolutions at each scale, then decoded.

    A decoder with skips leads the fused features back to the sources' own grid, where they say how
    the sources blend. Untrained, F is their average.

    Args:
        spatial_dims: 2 or 3.
        encoder: of images with one channel; frozen here.
        widths: features on the sources' own grid, then at each of the encoder's scales.
    """

    def __init__(
        self,
        spatial_dims: int,
        encoder: ResNetEncoder,
        widths: Sequence[int] = (16, 32, 48, 64, 96, 128),
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = PyramidDecoder(spatial_dims, widths[1:], widths)
        self.fusion = nn.ModuleList(
            nn.Sequential(
                normed_convolution(spatial_dims, 2 * channels, width, size=1),
                normed_convolution(spatial_dims, width, width),
            )
            for channels, width in zip(encoder.channels, widths[1:], strict=True)
        )
        self.blend = SourceBlend(spatial_dims, widths[0])
        with_safe_convolutions(self)

    def forward(
        self, mri: Float[Tensor, "b 1 *dhw"], ct: Float[Tensor, "b 1 *dhw"]
    ) -> Float[Tensor, "b 1 *dhw"]:
        """F, in model space or next to it."""
        with torch.no_grad():
            features = [self.encoder(source) for source in (mri, ct)]
        fused = [
            fuse(torch.cat(pair, 1))
            for fuse, pair in zip(self.fusion, zip(*features, strict=True), strict=True)
        ]
        return self.blend(self.decoder(torch.cat([mri, ct], 1), fused), mri, ct)

    def layers(self) -> list[list[Parameter]]:
        """The weights that are trained, from those next to F to the coarsest scale's."""
        levels = [list(level.parameters()) for level in self.decoder.levels]
        for level, fuse in zip(levels[1:], self.fusion, strict=True):
            level += fuse.parameters()
        return [list(self.blend.parameters()), *levels]
