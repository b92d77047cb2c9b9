"""The U-Net of Diff-FCCF: noise, a deformation field and fusion masks from one trunk."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.ssim import sigma_voxels
from clinfuse.networks.chebyshev_graph import ChebyshevBlock
from clinfuse.networks.fusion_unet import Condition, FusionUNet
from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.source_denoiser import SourceDenoiser

IMAGE_CHANNELS = 3
"""Y, Cb and Cr of a picture, each scaled to [-1, 1]."""

SOURCES = 2
"""Anatomy and function, in this order."""

MASKS = 4
"""Logits: the luma's three shares, and the share of the denoised picture in the chroma."""

SOURCE_NOISE = 0.1
"""Size of the noise in a source, in model space: what the head gives is in units of it."""

DENOISED_PRIOR = -3.0
"""Logit of the denoised picture's share before training, at a signal-to-noise ratio of 1."""


@dataclass(frozen=True)
class Sight:
    """What a stage of the hierarchy is conditioned on.

    Attributes:
        name: of the stage.
        anatomy: whether the anatomical source is seen.
        function: whether the functional one is.
    """

    name: str
    anatomy: bool
    function: bool

    @property
    def registers(self) -> bool:
        """Whether the stage can know where the functional source belongs."""
        return self.anatomy and self.function


FUNCTION = Sight("functional", anatomy=False, function=True)
BOTH = Sight("both", anatomy=True, function=True)
ANATOMY = Sight("anatomical", anatomy=True, function=False)


@dataclass
class Seen:
    """What a stage knows beside the noisy picture.

    Attributes:
        condition: of the U-Net.
        noise: in the lumas of anatomy and function, as far as each shows its own.
    """

    condition: Condition
    noise: Float[Tensor, "b 2 *dhw"]


@dataclass
class Heads:
    """What the trunk says of a noisy picture.

    Attributes:
        eps_hat: the noise that diffusion has put in Y, Cb and Cr.
        source_noise: that in the lumas of anatomy and function as they came, in model space; 0
            where a source is not seen.
        displacement_mm: u, with registered(p) = functional(p + u(p)); 0 where a source is not
            seen.
        luma_logits: of the shares of anatomy, function and the denoised picture in Y; -inf for
            an anatomy that is not seen.
        chroma_logit: of the denoised picture's share in Cb and Cr, one for both, so that a mixture
            of two colours of one hue has that hue; the rest is the function's.
    """

    eps_hat: Float[Tensor, "b 3 *dhw"]
    source_noise: Float[Tensor, "b 2 *dhw"]
    displacement_mm: Float[Tensor, "b n *dhw"]
    luma_logits: Float[Tensor, "b 3 *dhw"]
    chroma_logit: Float[Tensor, "b 1 *dhw"]

    def blend(
        self,
        anatomical: Float[Tensor, "b 1 *dhw"],
        functional: Float[Tensor, "b 3 *dhw"],
        denoised: Float[Tensor, "b 3 *dhw"],
    ) -> Float[Tensor, "b 3 *dhw"]:
        """The fused picture: a convex mixture at every voxel, in Y of three and in colour of two.

        Args:
            anatomical: luma of the anatomical source.
            functional: Y, Cb and Cr of the functional source, registered.
            denoised: Y, Cb and Cr of the diffusion's own estimate.
        """
        lumas = torch.cat([anatomical, functional[:, :1], denoised[:, :1]], 1)
        luma = (self.luma_logits.softmax(1) * lumas).sum(1, keepdim=True)
        share = self.chroma_logit.sigmoid()
        return torch.cat([luma, torch.lerp(functional[:, 1:], denoised[:, 1:], share)], 1)


class DiffFccfNetwork(nn.Module):
    """``FusionUNet`` over a colour picture, with a Chebyshev-graph bottleneck and three heads.

    The heads are groups of filters of the last convolution. The deformation is smoothed and
    bounded. The noise of the diffusion starts as sqrt(1 - alpha_bar_t) x_t, what x_t says of it
    alone, and the head adds to that the velocity of Salimans & Ho (2022). The noise of a source
    starts as what a few convolutions of that source alone make of it (``SourceDenoiser``), which
    the U-Net sees too and corrects: by itself it learns that long after where things belong. In the
    masks the denoised picture starts with the odds of its signal-to-noise ratio, so that noise is
    not taken for a picture.

    Args:
        network: builds the U-Net, given its channels of state, knowledge and output.
        spatial_dims: 2 or 3, as the U-Net's.
        order: K of the graph convolutions.
        max_mm: the farthest that a voxel is moved along an axis.
        smoothing_mm: standard deviation of the window that the deformation is smoothed with.
    """

    def __init__(
        self,
        network: Callable[..., FusionUNet],
        spatial_dims: int,
        order: int = 3,
        max_mm: float = 8.0,
        smoothing_mm: float = 6.0,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.max_mm, self.smoothing_mm = spatial_dims, max_mm, smoothing_mm
        self.trunk = network(
            state_channels=IMAGE_CHANNELS,
            known_channels=IMAGE_CHANNELS - 1 + 2 * SOURCES,  # chroma, noise, which source is seen
            out_channels=IMAGE_CHANNELS + SOURCES + spatial_dims + MASKS,
        )
        if self.trunk.spatial_dims != spatial_dims:
            raise ValueError(
                f"expected a network of spatial_dims {spatial_dims}, got {self.trunk.spatial_dims}"
            )
        self.filters = nn.ModuleList(SourceDenoiser(spatial_dims) for _ in range(SOURCES))
        unet: Any = self.trunk.unet
        norm = unet.middle_block.resnet_1.norm1
        unet.middle_block = ChebyshevBlock(
            spatial_dims,
            norm.num_channels,
            unet.time_embed[-1].out_features,
            order,
            norm.num_groups,
        )
        with_safe_convolutions(self)

    def encode(
        self,
        anatomical: Float[Tensor, "b 1 *dhw"],
        functional: Float[Tensor, "b 3 *dhw"],
        roi: Bool[Tensor, "b r *dhw"],
        sight: Sight,
    ) -> Seen:
        """The condition of a stage.

        Args:
            anatomical: luma of the anatomical source; not looked at unless it is seen.
            functional: Y, Cb and Cr of the functional source, or the picture so far, which stands
                in its place where it is not seen.
            roi: masks; bone is the function's, the others are the anatomy's.
            sight: what of it is seen.
        """
        seen = functional.new_tensor([sight.anatomy, sight.function, sight.anatomy])
        shape = [1, -1, *[1] * self.spatial_dims]
        masks = roi.to(functional.dtype) * seen.reshape(shape)
        flags = torch.ones_like(functional[:, :2]) * seen[:2].reshape(shape)
        anatomical, luma = anatomical * sight.anatomy, functional[:, :1]
        sources = zip(self.filters, (anatomical, luma), strict=True)
        noise = torch.cat([source - without(source) for without, source in sources], 1)
        known = torch.cat([functional[:, 1:], noise.detach() / SOURCE_NOISE, flags], 1)
        return Seen(self.trunk.encode(anatomical, luma, masks, known), noise)

    def forward(
        self,
        x_t: Float[Tensor, "b 3 *dhw"],
        seen: Seen,
        alpha_bar_t: Float[Tensor, " b"],
        spacing_mm: SpacingMm,
        sight: Sight,
    ) -> Heads:
        """The three heads, in full precision."""
        out = self.trunk(x_t, seen.condition, alpha_bar_t).float()
        parts = [IMAGE_CHANNELS, SOURCES, self.spatial_dims, MASKS]
        eps_hat, source_noise, field, logits = out.split(parts, 1)
        shown = source_noise.new_tensor([sight.anatomy, sight.function])
        source_noise = seen.noise + SOURCE_NOISE * source_noise
        source_noise = source_noise * shown.reshape(-1, *[1] * self.spatial_dims)
        with torch.autocast(out.device.type, enabled=False):
            displacement_mm = torch.zeros_like(field)
            if sight.registers:
                smooth = gaussian_smooth(field, sigma_voxels(spacing_mm, self.smoothing_mm))
                displacement_mm = self.max_mm * torch.tanh(smooth)
        power = alpha_bar_t.float().clamp(1e-6, 1 - 1e-6)
        power = power.reshape(-1, *[1] * (x_t.ndim - 1))
        eps_hat = (1 - power).sqrt() * x_t + power.sqrt() * eps_hat
        prior = (power / (1 - power)).log() + DENOISED_PRIOR
        anatomy, function, denoised, chroma = logits.split(1, 1)
        if not sight.anatomy:
            anatomy = torch.full_like(anatomy, -torch.inf)
        luma_logits = torch.cat([anatomy, function, denoised + prior], 1)
        return Heads(eps_hat, source_noise, displacement_mm, luma_logits, chroma + prior)
