"""MONAI's diffusion U-Net evaluated on a CPU without gradients: the same in fewer passes of memory.

A step of the sampler spends less time on products than on moving features to and fro. Here they lie
channels last throughout, as the CPU's convolutions want them; what is normalised is activated in
place; the noise level comes in with a convolution's bias; and every residual is added in place. So
that features stay in the cache, and freed memory is at hand for the next ones, one volume is
evaluated at a time.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import (
    AttnMidBlock,
    DiffusionUNetResnetBlock,
    DownBlock,
    UpBlock,
    get_timestep_embedding,
)
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def is_sampling(network: nn.Module, x: Tensor) -> bool:
    """Whether a network is evaluated on a CPU in bfloat16, without gradients.

    In training it is not, though some networks have no gradient there: its steps stay what they
    were to the last bit.
    """
    return (
        not (torch.is_grad_enabled() or network.training)
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def is_lean(unet: DiffusionModelUNet, x: Tensor) -> bool:
    """Whether ``evaluated`` stands for the U-Net here: when sampling, without further attention.

    The deepest level's own it has; not that of several levels, nor that to a context.
    """
    return (
        is_sampling(unet, x)
        and all(type(block) is DownBlock for block in unet.down_blocks)
        and type(unet.middle_block) is AttnMidBlock
        and all(type(block) is UpBlock for block in unet.up_blocks)
    )


def laid_out(x: Float[Tensor, "b c *dhw"]) -> Float[Tensor, "b c *dhw"]:
    """In bfloat16, channels last."""
    return x.to(torch.bfloat16, memory_format=CHANNELS_LAST[x.ndim - 2])


def convolved(
    convolution: nn.Module,
    x: Float[Tensor, "b c *dhw"],
    bias: Tensor | None = None,
) -> Float[Tensor, "b o *half"]:
    """The convolution in bfloat16, its bias or another one added.

    Small outputs too: it is only their gradients that bfloat16 gets wrong (``precision``).
    """
    conv = cast(nn.Conv2d | nn.Conv3d, convolution)
    bias = conv.bias if bias is None else bias
    weight = conv.weight.to(x.dtype)
    with torch.autocast("cpu", enabled=False):
        return conv._conv_forward(x, weight, None if bias is None else bias.to(x.dtype))


def evaluated(
    unet: DiffusionModelUNet, x: Float[Tensor, "1 c *dhw"], timesteps: Float[Tensor, " 1"]
) -> Float[Tensor, "1 o *dhw"]:
    """What the U-Net says of one volume, but for bfloat16's rounding.

    Args:
        unet: one that ``is_lean``.
        x: what its first convolution made of the input, ``laid_out``.
        timesteps: of the volume.
    """
    parts = cast(Any, unet)
    embedding = get_timestep_embedding(timesteps, parts.block_out_channels[0]).to(x.dtype)
    level = F.silu(parts.time_embed(embedding))
    passed = [x]
    for block in parts.down_blocks:
        for residual in block.resnets:
            x = _residual(residual, x, level)
            passed.append(x)
        if block.downsampler is not None:
            x = convolved(block.downsampler.op.conv, x)
            passed.append(x)
    x = _residual(parts.middle_block.resnet_1, x, level)
    x = laid_out(parts.middle_block.attention(x))
    x = _residual(parts.middle_block.resnet_2, x, level)
    for block in parts.up_blocks:
        for residual in block.resnets:
            x = _residual(residual, torch.cat([x, passed.pop()], 1), level)
        if block.upsampler is not None:
            doubled = block.upsampler.upsample_non_trainable(x)
            x = convolved(block.upsampler.postconv.conv, doubled)
    norm, _, last = parts.out
    return convolved(last.conv, _activated(norm, x))


def _residual(block: DiffusionUNetResnetBlock, x: Tensor, level: Tensor) -> Tensor:
    parts = cast(Any, block)
    first = parts.conv1.conv
    features = _activated(parts.norm1, x)
    features = convolved(first, features, first.bias + parts.time_emb_proj(level)[0])
    features = convolved(parts.conv2.conv, _activated(parts.norm2, features))
    if not isinstance(parts.skip_connection, nn.Identity):
        x = convolved(parts.skip_connection.conv, x)
    return features.add_(x)


def _activated(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(laid_out(norm(x)), inplace=True)
