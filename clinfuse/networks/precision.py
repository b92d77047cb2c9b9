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
        is_tiny = min(-(-n // s) for n, s in zip(input.shape[2:], self.stride, strict=True)) <= 2
        if not (is_tiny and input.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def with_safe_convolutions(network: nn.Module) -> nn.Module:
    """The network itself, every 3-D convolution in it made a ``SmallSafeConv3d``, weights kept."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = SmallSafeConv3d
    return network
