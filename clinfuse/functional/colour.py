"""Luma and chroma: colour pictures are fused in their luma and get their hue back afterwards.

YCbCr as JPEG has it (ITU-T T.871, 2011; the weights of ITU-R BT.601 over the full range), with
R, G, B and Y in [0, 1] and Cb and Cr in [-0.5, 0.5].
"""

import torch
from jaxtyping import Float
from torch import Tensor

RED, GREEN, BLUE = 0.299, 0.587, 0.114
"""Weights of the luma (ITU-R BT.601-7, section 2.5.1)."""


def rgb_to_ycbcr(rgb: Float[Tensor, "b 3 *dhw"]) -> Float[Tensor, "b 3 *dhw"]:
    """Y, Cb and Cr of colours in [0, 1]: Cb = (B - Y) / 1.772, Cr = (R - Y) / 1.402."""
    red, green, blue = rgb.unbind(1)
    luma = RED * red + GREEN * green + BLUE * blue
    return torch.stack((luma, (blue - luma) / (2 - 2 * BLUE), (red - luma) / (2 - 2 * RED)), 1)


def ycbcr_to_rgb(ycbcr: Float[Tensor, "b 3 *dhw"]) -> Float[Tensor, "b 3 *dhw"]:
    """The inverse of ``rgb_to_ycbcr``. Colours that RGB does not have lie outside [0, 1]."""
    return ycbcr[:, :1] + _above_luma(ycbcr[:, 1:])


def into_gamut(
    luma: Float[Tensor, "b 1 *dhw"], chroma: Float[Tensor, "b 2 *dhw"]
) -> Float[Tensor, "b 2 *dhw"]:
    """The chroma, scaled towards grey just so far that RGB has the colour at this luma.

    Cb and Cr shrink by one factor, so that hue, the direction of (Cb, Cr), stays; clipping R, G and
    B on their own would turn it, and change the luma. What RGB has is left as it is.

    Args:
        luma: in [0, 1].
        chroma: Cb and Cr.
    """
    above = _above_luma(chroma)
    room = torch.where(above > 0, 1 - luma, luma)
    share = room / above.abs().clamp(min=torch.finfo(above.dtype).tiny)
    return chroma * share.amin(1, keepdim=True).clamp(max=1)


def coloured(
    luma: Float[Tensor, "b 1 *dhw"], chroma: Float[Tensor, "b 2 *dhw"]
) -> Float[Tensor, "b 3 *dhw"]:
    """RGB in [0, 1] of this luma, in the hue of the chroma and as saturated as RGB allows.

    Args:
        luma: clipped to [0, 1].
        chroma: Cb and Cr.
    """
    luma = luma.clamp(0, 1)
    return ycbcr_to_rgb(torch.cat((luma, into_gamut(luma, chroma)), 1)).clamp(0, 1)


def _above_luma(chroma: Tensor) -> Tensor:
    """R, G and B less the luma. Green follows from the luma's weights."""
    blue, red = (2 - 2 * BLUE) * chroma[:, 0], (2 - 2 * RED) * chroma[:, 1]
    return torch.stack((red, -(RED * red + BLUE * blue) / GREEN, blue), 1)
