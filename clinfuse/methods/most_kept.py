"""The image that keeps the most of its two sources, climbed to for each pair by itself."""

import logging
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from clinfuse.functional.vif import SMALLEST
from clinfuse.losses.most_kept import MostKept
from clinfuse.methods.base import FusionMethod
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


class MostKeptClimb(FusionMethod):
    """``MostKept`` of the sources as they come: no weights and no training, an optimum by search.

    It climbs what Qabf and VIF measure, so it says how far those metrics can be driven, and what a
    trained method adds that climbs at sampling too (``guidance.kept_steps``). Slices smaller than
    VIF's windows climb Qabf alone, and the log says so.

    Args:
        climb: from the brighter source.
    """

    def __init__(self, climb: MostKept) -> None:
        super().__init__()
        self.climb = climb

    def fuse(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        climb = self.climb
        if climb.information > 0 and min(batch.mri.shape[-2:]) < SMALLEST:
            log.warning("slices smaller than %d pixels: climbing without VIF", SMALLEST)
            climb = replace(climb, information=0.0)
        return climb(batch.mri, batch.ct)
