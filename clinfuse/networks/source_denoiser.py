"""The sources without their noise: a small residual network in Haar space for each."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.functional.haar import haar_dwt, haar_idwt
from clinfuse.networks.fusion_unet import DETAIL_GAIN, crop, pad_to_multiple
from clinfuse.networks.lean_unet import is_sampling, laid_out
from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.windows import Windowed, part_of

NOISE_SCALE = 0.3
"""Size of the noise's coefficients, which the last layer gives in units of it."""


class SourceDenoiser(Windowed):
    """One modality without its noise: x + linear(x) + residual(x) on levelled Haar coefficients.

    Learns the noise rather than the image (Zhang et al. 2017, DnCNN), by shrinking wavelet
    coefficients as Donoho (1995) does by rule. The linear convolution finds the Wiener filter
    within tens of steps, the residual blocks what depends on the place. Both start at zero, so an
    untrained denoiser changes nothing.

    Args:
        spatial_dims: 2 or 3.
        features: of the residual blocks.
        blocks: how many.
    """

    def __init__(self, spatial_dims: int, features: int = 16, blocks: int = 2) -> None:
        super().__init__()
        conv = nn.Conv3d if spatial_dims == 3 else nn.Conv2d
        bands = 2**spatial_dims
        self.linear = conv(bands, bands, 3, padding=1)
        self.first = conv(bands, features, 3, padding=1)
        self.blocks = nn.ModuleList(conv(features, features, 3, padding=1) for _ in range(blocks))
        self.last = conv(features, bands, 3, padding=1)
        for layer in (self.linear, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))
        gain = torch.full((bands, *[1] * spatial_dims), DETAIL_GAIN)
        gain[0] = bands**-0.5
        self.register_buffer("gain", gain, persistent=False)
        self.bytes_per_voxel = 128.0 * features
        with_safe_convolutions(self)

    gain: Tensor

    def forward(self, volume: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """The volume without noise, in full precision whatever the autocast of the convolutions."""
        padded = pad_to_multiple(volume, 2)
        grid = [size // 2 for size in padded.shape[2:]]
        reach = len(self.blocks) + 2

        def noise(window: tuple[slice, ...]) -> Tensor:
            place = tuple(slice(2 * part.start, 2 * part.stop) for part in window)
            bands = haar_dwt(part_of(padded, place)) * self.gain
            if is_sampling(self, volume):
                bands = laid_out(bands)
            features = self.first(bands)
            for block in self.blocks:
                features = features + block(F.silu(features))
            return (self.linear(bands) + NOISE_SCALE * self.last(F.silu(features))).float()

        bands = self.answer(noise, grid, 1, len(volume), silent=reach)
        return volume + crop(haar_idwt(bands), volume.shape[2:])


class SourceDenoisers(nn.Module):
    """A denoiser for the MRI and one for the CT once it is moved, which mends that blur as well."""

    def __init__(self, spatial_dims: int, features: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.mri = SourceDenoiser(spatial_dims, features, blocks)
        self.ct = SourceDenoiser(spatial_dims, features, blocks)
