"""What fused pictures are scored by, as a loss: gradients and visual information kept."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clinfuse.functional.qabf import gradients_kept
from clinfuse.functional.vif import SMALLEST, visual_fidelity


class SourceFidelity(nn.Module):
    """gradient (1 - Qabf) + information (1 - VIF / 2), for every case.

    Both are the metrics' differentiable forms (``gradients_kept``, ``visual_fidelity``), each 0 at
    best but for Qabf's own 0.975. Where a source is flat its VIF is undefined, and none is lost.
    Patches smaller than VIF's windows need an ``information`` of 0.

    Args:
        gradient: weight of the gradients' share.
        information: weight of the information's.
    """

    def __init__(self, gradient: float = 1.0, information: float = 0.0) -> None:
        super().__init__()
        if min(gradient, information) < 0:
            raise ValueError(f"expected weights of 0 or more, got {gradient} and {information}")
        self.gradient, self.information = gradient, information

    def forward(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
    ) -> Float[Tensor, " b"]:
        """The loss of every case, in full precision whatever the autocast.

        Raises:
            ValueError: if slices are too small for a weighted VIF.
        """
        if self.information > 0 and min(fused.shape[-2:]) < SMALLEST:
            raise ValueError(
                f"expected slices of at least {SMALLEST} pixels a side for VIF, got "
                f"{tuple(fused.shape[-2:])}"
            )
        with torch.autocast(fused.device.type, enabled=False):
            images = fused.float(), mri.float(), ct.float()
            loss = self.gradient * (1 - gradients_kept(*images))
            if self.information > 0:
                fidelity = visual_fidelity(*images)
                lost = torch.where(fidelity.isnan(), 0, 1 - fidelity / 2)
                loss = loss + self.information * lost
            return loss
