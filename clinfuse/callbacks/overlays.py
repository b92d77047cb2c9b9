"""A case's slices with its regions laid over them, as W&B shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from clinfuse.reporting.views import LESION_LEVEL, PLANES, CaseView, chosen_slices, levels
from clinfuse.types import ROI_NAMES, FusionBatch

REGIONS = (*ROI_NAMES, "lesion found")
"""What may lie over a picture. A region's class is its place in this order, from 1."""


@dataclass(frozen=True)
class Overlays:
    """One slice of a case.

    Attributes:
        pictures: by name, in grey.
        masks: by region.
    """

    pictures: Mapping[str, UInt8[np.ndarray, "rows columns"]]
    masks: Mapping[str, Bool[np.ndarray, "rows columns"]]

    def wandb_masks(self) -> dict[str, dict[str, Any]]:
        """As ``wandb.Image`` takes them, each region to be switched by itself: they may overlap."""
        return {
            name: {
                "mask_data": mask.astype(np.uint8) * number,
                "class_labels": {number: name},
            }
            for number, name in enumerate(REGIONS, 1)
            if (mask := self.masks.get(name)) is not None
        }


def of_view(view: CaseView) -> Overlays:
    """The axial slice that the report begins with, as it shows it."""
    axial, index = PLANES[0], chosen_slices(view)[0]
    volumes = {"MRI": view.mri, "CT as given": view.ct, "Fused": view.fused}
    masks = {"brain": view.brain, "bone": view.bone, "lesion": view.lesion}
    if view.lesion_probability is not None:
        masks["lesion found"] = view.lesion_probability > LESION_LEVEL
    return Overlays(
        {name: levels(axial.picture(v, index), -1.0, 1.0) for name, v in volumes.items()},
        {name: axial.picture(m, index) for name, m in masks.items() if m is not None},
    )


def of_pair(batch: FusionBatch, index: int, fused: Float[Tensor, "b 1 h w"]) -> Overlays:
    """A 2-D pair of a batch."""
    sources = {"MRI": batch.mri, "CT": batch.ct, "Fused": fused}
    masks = batch.truth()[2][index].cpu().numpy()
    return Overlays(
        {name: levels(v[index, 0].float().cpu().numpy(), -1.0, 1.0) for name, v in sources.items()},
        {name: mask for name, mask in zip(ROI_NAMES, masks, strict=True) if mask.any()},
    )


def log_overlays(logger: WandbLogger, name: str, shown: Mapping[str, Overlays], step: int) -> None:
    """Every picture of several cases, by their names, under one heading."""
    pictures = {
        f"{case}: {of}": (picture, overlays.wandb_masks())
        for case, overlays in shown.items()
        for of, picture in overlays.pictures.items()
    }
    logger.log_image(
        name,
        [picture for picture, _ in pictures.values()],
        step=step,
        caption=list(pictures),
        masks=[masks for _, masks in pictures.values()],
    )
