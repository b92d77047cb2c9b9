"""Mixed precision that can be trusted on a CPU."""

import torch
from torch import Tensor, nn


class SmallSafeConv3d(nn.Conv3d):
    """A 3-D convolution that leaves bfloat16 where the CPU's kernels are wrong: on tiny outputs.

    With PyTorch 2.13 and oneDNN, the weight gradient of a bfloat16 convolution whose output has one
    or two voxels along an axis contains uninitialised memory (values of 1e30 and NaN), as
    ``tests/networks/test_precision.py`` shows. Those are the deepest levels of a U-Net on thick
    slices; in single precision they are right, and cost next to nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self, input, self.weight, self.bias)


class SmallSafeConv2d(nn.Conv2d):
    """The same of slices: there a stride of two over one pixel gives such a gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return convolved(self, input, self.weight, self.bias)


def convolved(
    convolution: nn.Conv2d | nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The input convolved as the convolution would, by a weight that may be a part of its own."""
    if not _leaves_bfloat16(convolution, input):
        return convolution._conv_forward(input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return convolution._conv_forward(input.float(), weight, bias)


def with_safe_convolutions(network: nn.Module) -> nn.Module:
    """The network itself, every convolution in it made a safe one, weights kept."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = SmallSafeConv3d
        elif type(module) is nn.Conv2d:
            module.__class__ = SmallSafeConv2d
    return network


def _leaves_bfloat16(convolution: nn.Conv2d | nn.Conv3d, input: Tensor) -> bool:
    sizes = zip(input.shape[2:], convolution.stride, strict=True)
    is_tiny = min(-(-n // s) for n, s in sizes) <= 2
    return is_tiny and input.device.type == "cpu" and torch.is_autocast_enabled("cpu")
