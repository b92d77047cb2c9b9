"""Sobel's image gradient, along every spatial axis of a slice or a volume."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def sobel(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b n *dhw"]:
    """Derivative along each spatial axis in units of intensity a voxel, smoothed across it.

    Central differences (-1, 0, 1)/2 along the axis times (1, 2, 1)/4 along each other one: Sobel's
    3 x 3 kernel (in 3-D its 3 x 3 x 3 extension) over its norm, so that a ramp of slope 1 gives 1.
    Beyond the border is its last voxel.
    """
    axes = image.ndim - 2
    conv = {2: F.conv2d, 3: F.conv3d}[axes]
    padded = F.pad(image, (1, 1) * axes, mode="replicate")
    along, across = image.new_tensor([-0.5, 0.0, 0.5]), image.new_tensor([0.25, 0.5, 0.25])
    kernels = []
    for axis in range(axes):
        kernel = image.new_ones([1] * axes)
        for other in range(axes):
            shape = [3 if i == other else 1 for i in range(axes)]
            kernel = kernel * (along if other == axis else across).reshape(shape)
        kernels.append(kernel)
    return conv(padded, torch.stack(kernels)[:, None])


def gradient_magnitude(
    image: Float[Tensor, "b 1 *dhw"], epsilon: float = 1e-6
) -> Float[Tensor, "b 1 *dhw"]:
    """Length of the Sobel gradient; ``epsilon`` keeps its own gradient finite where it is 0."""
    return (sobel(image).square().sum(1, keepdim=True) + epsilon**2).sqrt() - epsilon
