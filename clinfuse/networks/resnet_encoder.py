"""MONAI's ResNet as an encoder of five scales, for slices and volumes, read or random."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import Tensor, nn
from torch.nn import functional as F

from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.pretrained import load_weights, read_weights

GREY_MEAN, GREY_STD = 0.449, 0.226
"""Of ImageNet's photographs in [0, 1], averaged over their three channels."""

TRAINED_CHANNELS = {2: 3, 3: 1}
"""Input channels of public weights by dimensions: ImageNet's are in colour, MedicalNet's grey."""

HEADS = ("fc.", "conv_seg.")
"""Parts of public files that classify or segment, which an encoder does not have."""

SCALES = 5


class ResNetEncoder(nn.Module):
    """Features at 1/2, 1/4, 1/8, 1/16 and 1/32 of an image, from its stem and its four stages.

    He et al. (2016): ``bottleneck`` with layers [3, 4, 6, 3] is ResNet-50, ``basic`` with the same
    ResNet-34. Every size is half the one before, rounded up, so images of any size may come in.

    Batch norms use the statistics they were loaded with, also in training: the batches of fusion
    are a few patches. A network without loaded weights has none, so each residual branch starts
    scaled by one over the square root of how many there are, which keeps the activations of a
    random network of one size (as in De & Smith 2020).

    Images come in model space and are given to the network as its weights are used to: as
    photographs on a slice (ImageNet), z-scored over what is not black in a volume (MedicalNet).

    Args:
        spatial_dims: 2 or 3.
        in_channels: of an image.
        block: of two convolutions, or the bottleneck of three.
        layers: blocks in each of the four stages.
        width: features of the stem; 64 in all published networks.
        shortcut: between stages: a convolution, or as in MedicalNet's 18 and 34 every second voxel
            with zeros for the features that are new.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        block: Literal["basic", "bottleneck"],
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        shortcut: Literal["convolution", "padding"] = "convolution",
    ) -> None:
        super().__init__()
        if spatial_dims not in TRAINED_CHANNELS:
            raise ValueError(f"expected spatial_dims 2 or 3, got {spatial_dims}")
        if block not in ("basic", "bottleneck") or shortcut not in ("convolution", "padding"):
            raise ValueError(
                "expected blocks that are basic or bottleneck, and a shortcut of convolution or "
                f"padding, got {block!r} and {shortcut!r}"
            )
        if len(layers) != SCALES - 1:
            raise ValueError(f"expected blocks for each of four stages, got {list(layers)}")
        planes = [width * 2**stage for stage in range(SCALES - 1)]
        self.resnet = ResNet(
            block,
            list(layers),
            planes,
            spatial_dims=spatial_dims,
            n_input_channels=in_channels,
            conv1_t_stride=2,
            shortcut_type="B" if shortcut == "convolution" else "A",
            feed_forward=False,
            bias_downsample=False,
        )
        self.gain = TRAINED_CHANNELS[spatial_dims] / in_channels
        expansion = ResNetBottleneck.expansion if block == "bottleneck" else 1
        self.channels = (width, *(expansion * plane for plane in planes))
        self.described = (
            f"a {spatial_dims}-D ResNet of {block} blocks {list(layers)}, width {width} and "
            f"shortcuts by {shortcut}"
        )
        last = "bn3" if block == "bottleneck" else "bn2"
        for one in self._blocks():
            if isinstance(one.downsample, partial):
                stride, features = one.stride, one.downsample.keywords["planes"]
                one.downsample = _PaddedShortcut(cast(int, stride), features)
            nn.init.constant_(getattr(one, last).weight, sum(layers) ** -0.5)
        with_safe_convolutions(self)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNetEncoder":
        """Training mode for all but the batch norms, whose statistics stay as they are."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                module.eval()
        return self

    def load(self, path: Path | str) -> None:
        """Take weights in torchvision's or MedicalNet's layout, which MONAI's ResNet shares.

        A stem for another number of input channels is averaged over its own; the image is scaled
        so that equal channels get the response that the weights were trained to give.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it cannot be read, or is of another architecture.
        """
        weights = {n: w for n, w in read_weights(path).items() if not n.startswith(HEADS)}
        wanted = self.resnet.conv1.weight.shape
        if (stem := weights.get("conv1.weight")) is not None:
            fits = (stem.shape[:1], stem.shape[2:]) == (wanted[:1], wanted[2:])
            if fits and stem.shape[1] != wanted[1]:
                averaged = stem.mean(1, keepdim=True)
                weights["conv1.weight"] = averaged.expand(-1, wanted[1], *wanted[2:])
        load_weights(self.resnet, weights, self.described, path)

    def forward(
        self, image: Float[Tensor, "b c *dhw"], scales: int = SCALES
    ) -> list[Float[Tensor, "b _ ..."]]:
        """The features of the first ``scales`` scales, finest first.

        Args:
            image: in [-1, 1]; sources may go beyond by their noise.

        Raises:
            ValueError: a slice for a network of volumes, or a volume for one of slices.
        """
        if image.ndim != self.resnet.conv1.weight.ndim:
            expected = self.resnet.conv1.weight.ndim - 2
            raise ValueError(
                f"expected images of {expected} axes (spatial_dims), got {image.ndim - 2}"
            )
        resnet = self.resnet
        x = resnet.act(resnet.bn1(resnet.conv1(self._normalised(image))))
        features = [x]
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)[: scales - 1]:
            x = stage(_max_pool(x) if len(features) == 1 else x)
            features.append(x)
        return features

    def _normalised(self, image: Tensor) -> Tensor:
        if image.ndim == 4:
            return self.gain * ((image + 1) / 2 - GREY_MEAN) / GREY_STD
        shown = image > -1
        dims = tuple(range(1, image.ndim))
        count = shown.sum(dims, keepdim=True).clamp(min=1)
        mean = torch.where(shown, image, 0).sum(dims, keepdim=True) / count
        square = torch.where(shown, image - mean, 0).square().sum(dims, keepdim=True) / count
        return self.gain * (image - mean) / square.sqrt().clamp(min=0.05)

    def _blocks(self) -> list[nn.Module]:
        resnet = self.resnet
        stages = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        return [block for stage in stages for block in stage]


class _PaddedShortcut(nn.Module):
    """Every second voxel, with zeros for new features: MONAI's own keeps no gradient."""

    def __init__(self, stride: int, features: int) -> None:
        super().__init__()
        self.stride, self.features = stride, features

    def forward(self, x: Tensor) -> Tensor:
        every = slice(None, None, self.stride)
        kept = x[(slice(None), slice(None), *[every] * (x.ndim - 2))]
        return F.pad(kept, (0, 0) * (x.ndim - 2) + (0, self.features - x.shape[1]))


def _max_pool(x: Tensor) -> Tensor:
    """Maximum over three voxels along each axis, every second kept.

    Of volumes first in the plane, then across: the 3-D kernel's gradient is not deterministic on
    CUDA.
    """
    if x.ndim == 4:
        return F.max_pool2d(x, 3, 2, 1)
    features, slices = x.shape[1:3]
    in_plane = F.max_pool2d(x.flatten(1, 2), 3, 2, 1).unflatten(1, (features, slices))
    across = F.max_pool2d(in_plane.flatten(3), (3, 1), (2, 1), (1, 0))
    return across.unflatten(3, in_plane.shape[3:])
