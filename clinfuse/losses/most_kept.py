"""The image that keeps the most of two pictures: an aim where none is known."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.losses.fidelity_of_gradients import SourceFidelity


@dataclass(frozen=True)
class MostKept:
    """Climbs from the brighter source's voxels to where more of both is kept.

    What falls on the way is ``SourceFidelity``: the share of the sources' gradients that is lost
    (Qabf), and of their information (VIF). By itself either is kept at the other's cost. A slow
    fusion method of its own, and the pseudo-reference x_0 of 2-D pairs, which have neither HU nor
    masks enough for ``functional.composite``.

    Attributes:
        information: weight of VIF beside Qabf; 0 climbs Qabf alone.
        steps: of Adam.
        learning_rate: of Adam, in model space.
    """

    information: float = 0.3
    steps: int = 60
    learning_rate: float = 0.02

    @torch.enable_grad()
    def __call__(
        self, mri: Float[Tensor, "b 1 *dhw"], ct: Float[Tensor, "b 1 *dhw"]
    ) -> Float[Tensor, "b 1 *dhw"]:
        """The image, in [-1, 1], of registered clean sources; a case does not see the others.

        Raises:
            ValueError: if slices are too small for VIF, where that counts.
        """
        mri, ct = mri.detach(), ct.detach()
        lost = SourceFidelity(1.0, self.information)
        fused = torch.maximum(mri, ct).requires_grad_()
        optimizer = torch.optim.Adam([fused], self.learning_rate)
        for _ in range(self.steps):
            optimizer.zero_grad()
            lost(fused, mri, ct).sum().backward()
            assert fused.grad is not None
            fused.grad.nan_to_num_(0.0)  # of sources without any edge, which stay as they are
            optimizer.step()
            with torch.no_grad():
                fused.clamp_(-1, 1)
        return fused.detach()
