"""What a method that is trained on any kind of pair compares its output with."""

from jaxtyping import Float
from torch import Tensor

from clinfuse.types import FusionBatch


def aims_of(
    batch: FusionBatch,
) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]]:
    """The two images that ``SourceLoss`` takes for MRI and CT.

    The reference twice where there is one: every term is then the distance from it alone. Else the
    clean registered pair, which says where the CT belongs when training has moved it.
    """
    if batch.reference is not None:
        return batch.reference, batch.reference
    mri, ct, _ = batch.truth()
    return mri, ct
