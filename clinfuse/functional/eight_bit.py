"""Model space as the 8-bit pictures that published fusion tables are computed from."""

from jaxtyping import Float
from torch import Tensor

LEVELS = 256
"""Of an 8-bit picture: 0 to 255."""


def eight_bit(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
    """The image in whole levels 0 to 255, as if written to a PNG and read again.

    Args:
        image: in [-1, 1]; what lies outside is clipped.
    """
    return ((image.float() + 1) * 127.5).clamp(0, LEVELS - 1).round()


def eight_bit_slices(image: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "s h w"]:
    """Every 2-D picture of a batch in levels 0 to 255; a volume is its slices along d.

    The slices of a case lie side by side, so ``case_sums`` finds them again.
    """
    return eight_bit(image).flatten(0, -3)


def case_sums(values: Float[Tensor, "s ..."], cases: int) -> Float[Tensor, " b"]:
    """What is measured on slices, summed over each case's."""
    return values.reshape(cases, -1).sum(1)
