"""How well a lesion was segmented and found: the rows of the downstream study."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.localisation import lesion_detection
from clinfuse.functional.spacing import SpacingMm
from clinfuse.functional.surface import dice, surface_agreement
from clinfuse.metrics.suite import Row

THRESHOLDS = tuple(round(0.02 * i, 2) for i in range(1, 50))
"""Above which of these a probability is a lesion, validation cases say."""


def segmentation_scores(
    predicted: Bool[Tensor, "b 1 *dhw"],
    lesion: Bool[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    tau_mm: float = 2.0,
) -> list[list[Row]]:
    """One list of (roi, metric, value) for each case.

    NaN is what is undefined: Dice, NSD, and lesion-wise F1 where there is neither a lesion nor a
    prediction, HD95 where one is missing, sensitivity without lesions, and the distance of
    centroids where no lesion was found. False positives are counted in every patient.

    Args:
        predicted: where a lesion is said to be.
        lesion: where it is.
        spacing_mm: voxel size.
        tau_mm: tolerance of the surface Dice, in mm.
    """
    detected = lesion_detection(predicted, lesion, spacing_mm)
    agreement = surface_agreement(predicted, lesion, spacing_mm)
    columns = {
        "dice": agreement.dice,
        "nsd": agreement.nsd(tau_mm),
        "hd95": agreement.hd95(),
        "sensitivity": detected.sensitivity,
        "false_positives": detected.false_positives,
        "f1": detected.f1,
        "centroid_distance": detected.centroid_distance_mm,
    }
    return [
        [("lesion", metric, values[case].item()) for metric, values in columns.items()]
        for case in range(len(predicted))
    ]


def best_threshold(
    cases: Iterable[tuple[Float[Tensor, "1 1 *dhw"], Bool[Tensor, "1 1 *dhw"]]],
) -> tuple[float, float]:
    """The one of ``THRESHOLDS`` with the highest mean Dice, and that Dice; the lowest of equals.

    Args:
        cases: probability and lesion of each validation case.

    Raises:
        ValueError: no case has a lesion, so that nothing can be chosen.
    """
    scores = []
    has_lesion = False
    for probability, lesion in cases:
        has_lesion |= bool(lesion.any())
        scores.append(torch.cat([dice(probability > t, lesion) for t in THRESHOLDS]).cpu())
    if not has_lesion:
        raise ValueError("expected validation cases with a lesion to choose a threshold, got none")
    means = torch.stack(scores).nanmean(0).nan_to_num(-1)
    best = int(means.argmax())
    return THRESHOLDS[best], means[best].item()
