"""Whether each lesion was found, and where: what counts lesions where Dice counts voxels.

A lesion is a connected component of the mask, voxels that touch by a face, an edge or a corner
being one. These are the lesion-wise scores of the ISLES'22 stroke challenge (Hernandez Petzsche et
al. (2022); de la Rosa et al. (2024)), with the sensitivity, the false positives per patient and the
centre distance of Metrics Reloaded (Maier-Hein et al. (2024)). Metrics, on CPU, without gradients.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import center_of_mass, label
from torch import Tensor

from clinfuse.functional.regional import bounding_box
from clinfuse.functional.spacing import SpacingMm, spacing_of_each


class LesionDetection(NamedTuple):
    """What was found of the lesions of each case, counted; float, so that NaN says "undefined".

    One voxel in common makes a lesion found, as in ISLES'22: finding is not outlining, which
    ``surface.dice`` and ``surface.nsd`` judge. A prediction that covers the whole brain finds all.

    Attributes:
        lesions: components of the true mask.
        found: those that the prediction overlaps.
        false_positives: components of the prediction that overlap no lesion.
        centroid_distance_mm: from a found lesion's centre of mass to that of the predicted
            component that overlaps it most, mean over the found lesions; NaN where none is.
    """

    lesions: Float[Tensor, " b"]
    found: Float[Tensor, " b"]
    false_positives: Float[Tensor, " b"]
    centroid_distance_mm: Float[Tensor, " b"]

    @property
    def sensitivity(self) -> Float[Tensor, " b"]:
        """Share of the lesions that was found; NaN without lesions."""
        return self.found / self.lesions

    @property
    def f1(self) -> Float[Tensor, " b"]:
        """2 TP / (2 TP + FN + FP) over lesions; NaN where there is neither lesion nor finding.

        ISLES'22 takes 1 there, which rewards a method for healthy patients.
        """
        return 2 * self.found / (self.found + self.lesions + self.false_positives)


def lesion_detection(
    pred: Bool[Tensor, "b 1 *dhw"], target: Bool[Tensor, "b 1 *dhw"], spacing_mm: SpacingMm
) -> LesionDetection:
    """The lesions of each case that a prediction finds, and what it finds besides."""
    rows = spacing_of_each(spacing_mm, len(pred))
    cases = []
    for ours, theirs, row in zip(pred[:, 0], target[:, 0], rows, strict=True):
        box = bounding_box(ours | theirs)
        cases.append(_detected(ours[box].cpu().numpy(), theirs[box].cpu().numpy(), row))
    columns = torch.tensor(cases, dtype=torch.float32, device=pred.device)
    return LesionDetection(*columns.unbind(1))


def _detected(
    pred: np.ndarray, target: np.ndarray, spacing_mm: tuple[float, ...]
) -> tuple[float, float, float, float]:
    touching = np.ones((3,) * pred.ndim, dtype=bool)
    found_parts, predicted = label(pred, touching)
    parts, lesions = label(target, touching)
    overlap = (parts > 0) & (found_parts > 0)
    pairs = np.int64(predicted) * (parts[overlap] - 1) + (found_parts[overlap] - 1)
    # voxels that each lesion has in common with each prediction
    shared = np.bincount(pairs, minlength=lesions * predicted).reshape(lesions, predicted)
    is_found = shared.any(axis=1)
    false_positives = predicted - int(shared.any(axis=0).sum())
    apart_mm = []
    for lesion in np.flatnonzero(is_found):
        nearest = int(shared[lesion].argmax())
        centres = (
            np.asarray(center_of_mass(components == number + 1)) * spacing_mm
            for components, number in ((parts, lesion), (found_parts, nearest))
        )
        apart_mm.append(float(np.linalg.norm(np.subtract(*centres))))
    distance_mm = float(np.mean(apart_mm)) if apart_mm else float("nan")
    return float(lesions), float(is_found.sum()), float(false_positives), distance_mm
