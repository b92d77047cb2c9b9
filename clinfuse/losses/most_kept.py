"""The image that keeps the most of two pictures: an aim where none is known."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.vif import SMALLEST
from clinfuse.losses.fidelity_of_gradients import SourceFidelity

BLACK = -1 + 2 / 127.5
"""Two grey levels above black: what neither source exceeds is not part of a picture."""

MARGIN = 16
"""Pixels of black around it that are climbed too: the reach of most of VIF's windows."""

REACH = 2
"""Pixels of black around it that may end up brighter: an edge's own width."""


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
    learning_rate: float = 0.05

    def __call__(
        self, mri: Float[Tensor, "b 1 *dhw"], ct: Float[Tensor, "b 1 *dhw"]
    ) -> Float[Tensor, "b 1 *dhw"]:
        """The image, in [-1, 1], of registered clean sources; a case does not see the others.

        Raises:
            ValueError: if slices are too small for VIF, where that counts.
        """
        return self.climbed(torch.maximum(mri, ct), mri, ct)

    def climbed(
        self,
        start: Float[Tensor, "b 1 *dhw"],
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
    ) -> Float[Tensor, "b 1 *dhw"]:
        """Where the climb from another image than the brighter source ends, in [-1, 1].

        What both sources show black is black: Adam's steps are as long where next to nothing is to
        be gained, and would fill the air with a noise that no window of Qabf or VIF minds.

        Raises:
            ValueError: if slices are too small for VIF, where that counts.
        """
        fused = start.detach().clamp(-1, 1).clone()
        for case in range(len(fused)):
            pair = mri[case : case + 1].detach(), ct[case : case + 1].detach()
            rows, columns = content(torch.maximum(*pair))
            mri_there, ct_there = (source[..., rows, columns] for source in pair)
            there = fused[case : case + 1, ..., rows, columns]
            there.copy_(self._climb(there.clone(), mri_there, ct_there))
        return torch.where(is_shown(torch.maximum(mri, ct)), fused, -1.0)

    @torch.enable_grad()
    def _climb(self, fused: Tensor, mri: Tensor, ct: Tensor) -> Tensor:
        lost = SourceFidelity(1.0, self.information)
        fused.requires_grad_()
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


def content(brighter: Float[Tensor, "b 1 *dhw"]) -> tuple[slice, slice]:
    """Rows and columns of a case's pictures that are not black, with a margin around them.

    The window is large enough for VIF where the pictures are; of black pictures it is all.
    """
    is_there = (brighter > BLACK).flatten(0, -3).any(0)
    return _extent(is_there.any(1)), _extent(is_there.any(0))


def is_shown(brighter: Float[Tensor, "b 1 *dhw"]) -> Bool[Tensor, "b 1 *dhw"]:
    """Where a picture has something other than black within ``REACH`` pixels."""
    is_there = (brighter > BLACK).to(brighter.dtype)
    side = 2 * REACH + 1
    near = F.max_pool2d(is_there.flatten(0, -3)[:, None], side, stride=1, padding=REACH)
    return near.reshape(brighter.shape) > 0


def _extent(is_there: Tensor) -> slice:
    (where,) = is_there.nonzero(as_tuple=True)
    if len(where) == 0:
        return slice(None)
    first, last = int(where[0]) - MARGIN, int(where[-1]) + 1 + MARGIN
    first = max(min(first, len(is_there) - SMALLEST), 0)
    return slice(first, max(last, first + SMALLEST))
