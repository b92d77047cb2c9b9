"""What trained methods compare their output with: the reference and the clean registered pair."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clinfuse.functional.spacing import SpacingMm
from clinfuse.losses.roi import ClinicalRoiLoss, RoiLossTerms
from clinfuse.types import FusionBatch


def roi_loss(
    loss: ClinicalRoiLoss,
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
    roi: Bool[Tensor, "b r *dhw"] | Float[Tensor, "b r *dhw"],
    spacing_mm: SpacingMm,
    lesion_distance_mm: Float[Tensor, "b 1 *dhw"] | None = None,
    lesion_head: Callable[[Tensor], Tensor] | None = None,
) -> RoiLossTerms:
    """L_ROI of Eq. 2 for each case, against the sources and masks given, in full precision.

    For masks there may be the share of each voxel in each region; a lesion is where it is not 0.
    The lesion terms need a lesion head; without one gamma has nothing to weigh and they are 0. With
    gamma 0 the head is not asked. It is asked about the brain and the lesion alone, and may change
    F there alone: what it takes for a lesion in the skull is no reason to change the skull.
    """
    brain, bone, lesion = roi.split(1, 1)
    probability = None
    if lesion_head is not None and loss.gamma != 0:
        asked = asked_of(roi)
        probability = lesion_head(torch.where(asked, fused, fused.detach())) * asked
    with torch.autocast(fused.device.type, enabled=False):
        terms: RoiLossTerms = loss(
            fused.float(),
            mri,
            ct,
            brain,
            bone,
            spacing_mm,
            None if probability is None else probability.float(),
            lesion > 0,
            lesion_distance_mm,
        )
    return terms


def lesion_probability(
    lesion_head: nn.Module,
    fused: Float[Tensor, "b 1 *dhw"],
    brain: Bool[Tensor, "b 1 *dhw"],
) -> Float[Tensor, "b 1 *dhw"]:
    """What a lesion head sees in F; 0 outside the brain if the head knows nothing of elsewhere."""
    probability: Tensor = within(lesion_head, brain)(fused)
    return probability.float()


def asked_of(
    roi: Bool[Tensor, "b r *dhw"] | Float[Tensor, "b r *dhw"],
) -> Bool[Tensor, "b 1 *dhw"]:
    """The voxels about which a loss asks a lesion head: the brain and the lesion."""
    return (roi[:, 0:1] > 0) | (roi[:, 2:3] > 0)


def within(lesion_head: nn.Module, asked: Bool[Tensor, "b 1 *dhw"]) -> Callable[[Tensor], Tensor]:
    """The head as it is, or as one that reads only the voxels asked for, if it can."""
    narrow: Callable[[Tensor], Callable[[Tensor], Tensor]] | None
    narrow = getattr(lesion_head, "within", None)
    return lesion_head if narrow is None else narrow(asked)


def clean_roi_loss(
    loss: ClinicalRoiLoss,
    fused: Float[Tensor, "b 1 *dhw"],
    batch: FusionBatch,
    lesion_head: nn.Module | None = None,
) -> Float[Tensor, " b"]:
    """L_ROI against the clean registered pair and the true masks: the term of Eq. 3.

    The paper writes I_M and I_C; in training the CT is moved on purpose, and comparing with the
    moved one would teach the network to leave bone where it does not belong.
    """
    mri, ct, roi = clean_pair_of(batch)
    head = None
    if lesion_head is not None and loss.gamma != 0:
        head = within(lesion_head, asked_of(roi))
    known = (mri, ct, roi, batch.spacing_mm, batch.lesion_distance_mm)
    return roi_loss(loss, fused, *known, head).total


def reference_of(batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
    """The fused volume to aim at.

    Raises:
        ValueError: if the batch came without one.
    """
    return _known(batch.reference, "reference", batch)


def clean_pair_of(
    batch: FusionBatch,
) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Bool[Tensor, "b r *dhw"]]:
    """The registered noise-free MRI and CT, and their masks.

    Raises:
        ValueError: if the batch came without them.
    """
    return (
        _known(batch.clean_mri, "clean_mri", batch),
        _known(batch.clean_ct, "clean_ct", batch),
        _known(batch.clean_roi, "clean_roi", batch),
    )


def _known(tensor: Tensor | None, name: str, batch: FusionBatch) -> Tensor:
    if tensor is None:
        raise ValueError(f"training needs {name}, and case {batch.case_id[0]} came without")
    return tensor
