"""Dual ResNet encoders, fused by attention at four scales, with a decoder and a refinement."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.intensity import ct_from_model
from clinfuse.functional.sobel import gradient_magnitude
from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.pyramid_decoder import PyramidDecoder, SourceBlend, normed_convolution
from clinfuse.networks.resnet_encoder import ResNetEncoder
from clinfuse.types import CtMap

HU_WINDOWS = ((0.0, 80.0), (-20.0, 180.0), (-800.0, 2000.0))
"""Brain, blood beside bone, and bone: lower and upper end in Hounsfield units."""

MODEL_WINDOWS = ((-1.0, 1.0), (-1.0, 0.0), (0.0, 1.0))
"""All of model space, its dark half and its bright half."""

HU_MAPS: tuple[CtMap, ...] = ("piecewise", "window_40_400")
"""Maps whose inverse gives Hounsfield units."""


class TransferFusionNetwork(nn.Module):
    """F from a CT in three windows and an MRI, each through a ResNet of its own.

    At 1/4 to 1/32 of the sources' size (64 to 512 features of a ResNet-34) attention weighs the two
    encoders' features against one another, by feature and by place; both stems' features enter
    the decoder as they are. A refinement attends to edges of either source before the sources are
    blended. Untrained, F is their average.

    Args:
        spatial_dims: 2 or 3.
        encoder: builds an encoder from ``in_channels``; one with three for the CT, one with one for
            the MRI.
        widths: features of the decoder on the sources' own grid, then at 1/2, 1/4, ... of it.
    """

    def __init__(
        self,
        spatial_dims: int,
        encoder: Callable[..., ResNetEncoder],
        widths: Sequence[int] = (16, 32, 64, 64, 128, 256),
    ) -> None:
        super().__init__()
        self.encode_mri = encoder(in_channels=1)
        self.encode_ct = encoder(in_channels=len(HU_WINDOWS))
        stem, *stages = self.encode_mri.channels
        self.fusion = nn.ModuleList(AttentionFusion(spatial_dims, channels) for channels in stages)
        self.decoder = PyramidDecoder(spatial_dims, (2 * stem, *stages), widths)
        self.refine = AttentionRefinement(spatial_dims, widths[0])
        self.blend = SourceBlend(spatial_dims, widths[0])
        with_safe_convolutions(self)

    def forward(
        self,
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        ct_map: Sequence[CtMap] = (),
    ) -> Float[Tensor, "b 1 *dhw"]:
        """F, in model space or next to it.

        Args:
            mri: the anatomical source.
            ct: CT, or what stands in its place.
            ct_map: how each case's CT became model space; empty where it is not known.
        """
        mri_stem, *mri_stages = self.encode_mri(mri)
        ct_stem, *ct_stages = self.encode_ct(three_windows(ct, ct_map))
        fused = [fuse(m, c) for fuse, m, c in zip(self.fusion, mri_stages, ct_stages, strict=True)]
        pyramid = [torch.cat([mri_stem, ct_stem], 1), *fused]
        features = self.decoder(torch.cat([mri, ct], 1), pyramid)
        return self.blend(self.refine(features, mri, ct), mri, ct)

    @property
    def encoders(self) -> tuple[ResNetEncoder, ResNetEncoder]:
        """The MRI's and the CT's."""
        return self.encode_mri, self.encode_ct


class AttentionFusion(nn.Module):
    """Features of both sources, weighed by feature and by place, then mixed by a convolution.

    The weights of the two sources add up to one. Their logits are the sum of a channel attention
    (Hu et al. 2018), read from the means of all features, and a spatial one (Woo et al. 2018), read
    from mean and maximum over the features; both start at zero, so that the sources count alike.

    Args:
        spatial_dims: 2 or 3.
        channels: of each source.
        reduction: of the channel attention's hidden layer.
    """

    def __init__(self, spatial_dims: int, channels: int, reduction: int = 8) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        hidden = max(2 * channels // reduction, 1)
        self.of_channels = nn.Sequential(
            nn.Linear(2 * channels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels)
        )
        self.of_places = conv(4, 2, 7, padding=3)
        for last in (cast(nn.Linear, self.of_channels[-1]), self.of_places):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(cast(Tensor, last.bias))
        self.mix = normed_convolution(spatial_dims, channels, channels)

    def forward(
        self, mri: Float[Tensor, "b c *dhw"], ct: Float[Tensor, "b c *dhw"]
    ) -> Float[Tensor, "b c *dhw"]:
        """The fused features."""
        weights = self.shares(mri, ct)
        return self.mix(weights[:, 0] * mri + weights[:, 1] * ct)

    def shares(
        self, mri: Float[Tensor, "b c *dhw"], ct: Float[Tensor, "b c *dhw"]
    ) -> Float[Tensor, "b 2 c *dhw"]:
        """How much of a feature at a place is the MRI's, and how much the CT's."""
        pooled = torch.cat([reduce(source, "b c ... -> b c", "mean") for source in (mri, ct)], 1)
        channels = rearrange(self.of_channels(pooled), "b (s c) -> b s c", s=2)
        channels = channels.reshape(*channels.shape, *[1] * (mri.ndim - 2))
        seen = [
            reduce(source, "b c ... -> b 1 ...", how)
            for source in (mri, ct)
            for how in ("mean", "max")
        ]
        places = rearrange(self.of_places(torch.cat(seen, 1)), "b s ... -> b s 1 ...")
        return (channels + places).softmax(1)


class AttentionRefinement(nn.Module):
    """Features with a residual where anatomy asks for one.

    A gate in [0, 1] at every place is read from the features, both sources and the steepness of
    each: borders of tissue in the MRI and of bone in the CT are where fused images lose. A second
    gate, one a feature, is read from the features' means.

    Args:
        spatial_dims: 2 or 3.
        features: how many.
    """

    def __init__(self, spatial_dims: int, features: int) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        self.at_places = conv(features + 4, 1, 3, padding=1)
        self.of_features = nn.Linear(features, features)
        self.residual = nn.Sequential(
            normed_convolution(spatial_dims, features, features),
            conv(features, features, 3, padding=1),
        )

    def forward(
        self,
        features: Float[Tensor, "b w *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
    ) -> Float[Tensor, "b w *dhw"]:
        """The features refined."""
        edges = [gradient_magnitude(source) for source in (mri, ct)]
        place = self.at_places(torch.cat([features, mri, ct, *edges], 1)).sigmoid()
        gate = self.of_features(reduce(features, "b w ... -> b w", "mean")).sigmoid()
        gate = gate.reshape(*gate.shape, *[1] * (features.ndim - 2))
        return features + place * gate * self.residual(features)


def three_windows(
    ct: Float[Tensor, "b 1 *dhw"], ct_map: Sequence[CtMap] = ()
) -> Float[Tensor, "b 3 *dhw"]:
    """A CT as three windows of its intensities, each brought to [-1, 1].

    Where the map's inverse gives Hounsfield units these are a brain window (0 to 80), one for blood
    beside bone (-20 to 180) and a bone window (-800 to 2000); an 8-bit window of a CT, or another
    modality in its place, has none of these, and is shown whole, in its dark and in its bright
    half.

    Args:
        ct: in model space.
        ct_map: how each case's CT became model space; empty where it is not known.
    """
    shown = []
    for index, case in enumerate(ct.split(1)):
        name = ct_map[index] if ct_map else None
        if name in HU_MAPS:
            shown.append(_windows(ct_from_model(case, name), HU_WINDOWS))
        else:
            shown.append(_windows(case, MODEL_WINDOWS))
    return torch.cat(shown)


def _windows(case: Tensor, limits: Sequence[tuple[float, float]]) -> Tensor:
    shown = [(2 * (case - low) / (high - low) - 1).clamp(-1, 1) for low, high in limits]
    return torch.cat(shown, 1)
