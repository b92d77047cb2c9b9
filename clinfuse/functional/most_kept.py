"""The image that keeps the most of two pictures: an aim where none is known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.qabf import gradients_kept
from clinfuse.functional.vif import SMALLEST, visual_fidelity


@dataclass(frozen=True)
class MostKept:
    """Climbs from the brighter source's voxels to where more of both is kept.

    What is climbed is Qabf, the share of the sources' gradients that are kept, plus ``visual``
    times VIF, the information of both that is still to be seen, by Adam. By itself either rises at
    the other's cost. A slow fusion method of its own, and the pseudo-reference x_0 of 2-D pairs,
    which have neither HU nor masks enough for ``functional.composite``.

    Attributes:
        visual: weight of VIF; 0 climbs Qabf alone.
        steps: of Adam.
        learning_rate: of Adam, in model space.
    """

    visual: float = 0.15
    steps: int = 60
    learning_rate: float = 0.02

    @torch.enable_grad()
    def __call__(
        self, mri: Float[Tensor, "b 1 *dhw"], ct: Float[Tensor, "b 1 *dhw"]
    ) -> Float[Tensor, "b 1 *dhw"]:
        """The image, in [-1, 1], of registered clean sources; a case does not see the others."""
        mri, ct = mri.detach(), ct.detach()
        fused = torch.maximum(mri, ct).requires_grad_()
        optimizer = torch.optim.Adam([fused], self.learning_rate)
        for _ in range(self.steps):
            optimizer.zero_grad()
            (-kept_of_sources(fused, mri, ct, self.visual).sum()).backward()
            assert fused.grad is not None
            fused.grad.nan_to_num_(0.0)  # of sources without any edge, which stay as they are
            optimizer.step()
            with torch.no_grad():
                fused.clamp_(-1, 1)
        return fused.detach()


def kept_of_sources(
    fused: Float[Tensor, "b 1 *dhw"],
    mri: Float[Tensor, "b 1 *dhw"],
    ct: Float[Tensor, "b 1 *dhw"],
    visual: float,
) -> Float[Tensor, " b"]:
    """Qabf plus ``visual`` times VIF, with a gradient; NaN for sources without any edge.

    VIF needs pictures of ``vif.SMALLEST`` pixels a side and is left out of smaller ones.
    """
    kept = gradients_kept(fused, mri, ct)
    if visual and min(fused.shape[-2:]) >= SMALLEST:
        kept = kept + visual * visual_fidelity(fused, mri, ct)
    return kept
