import math

import pytest
import torch

from clinfuse.functional.surface import dice, hd95, nsd
from clinfuse.metrics.segmentation import THRESHOLDS, best_threshold, segmentation_scores

SPACING_MM = (4.0, 2.0, 2.0)


def box(*start, size=3):
    mask = torch.zeros(1, 1, 8, 16, 16, dtype=torch.bool)
    d, h, w = start
    mask[..., d : d + size, h : h + size, w : w + size] = True
    return mask


NOTHING = torch.zeros(1, 1, 8, 16, 16, dtype=torch.bool)


def scores_of(predicted, lesion):
    (scores,) = segmentation_scores(predicted, lesion, SPACING_MM)
    assert {roi for roi, *_ in scores} == {"lesion"}
    return {metric: value for _, metric, value in scores}


def test_a_lesion_found_two_voxels_off_and_a_false_one_by_hand():
    lesion, predicted = box(2, 4, 4), box(2, 4, 6) | box(0, 12, 12, size=2)
    scores = scores_of(predicted, lesion)
    assert scores["sensitivity"] == 1 and scores["false_positives"] == 1
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["centroid_distance"] == pytest.approx(2 * 2.0)
    assert scores["dice"] == pytest.approx(2 * 9 / (27 + 27 + 8))
    assert scores["dice"] == dice(predicted, lesion).item()
    assert scores["nsd"] == nsd(predicted, lesion, SPACING_MM, 2.0).item()
    assert scores["hd95"] == hd95(predicted, lesion, SPACING_MM).item()


@pytest.mark.parametrize(
    ("predicted", "lesion", "undefined", "values"),
    [
        (NOTHING, NOTHING, "dice nsd hd95 sensitivity f1 centroid_distance", {}),
        (NOTHING, box(2, 4, 4), "hd95 centroid_distance", {"dice": 0, "sensitivity": 0, "f1": 0}),
        (box(2, 4, 4), NOTHING, "hd95 sensitivity centroid_distance", {"dice": 0, "f1": 0}),
    ],
    ids=["neither", "missed", "false alarm"],
)
def test_what_is_undefined_is_nan_and_never_one(predicted, lesion, undefined, values):
    scores = scores_of(predicted, lesion)
    assert {name for name, value in scores.items() if math.isnan(value)} == set(undefined.split())
    assert {name: scores[name] for name in values} == values
    assert scores["false_positives"] == int(predicted.any())
    assert 1.0 not in {v for name, v in scores.items() if name != "false_positives"}


def test_the_threshold_is_the_one_that_outlines_the_validation_lesions():
    lesion, around = box(2, 4, 4), box(1, 3, 3, size=5)
    probability = torch.where(lesion, 0.9, torch.where(around, 0.57, 0.1))
    threshold, score = best_threshold([(probability, lesion)])
    assert threshold == 0.58 and score == 1  # the lowest that leaves out what is around
    two = [(probability, lesion), (torch.where(lesion, 0.75, 0.71), lesion)]
    assert best_threshold(two) == (0.72, 1.0)
    assert min(THRESHOLDS) > 0 and max(THRESHOLDS) < 1


def test_cases_without_a_lesion_count_by_what_is_found_in_them():
    faint, lesion = torch.where(box(2, 4, 4), 0.6, 0.0), box(2, 4, 4)
    assert best_threshold([(faint, lesion)])[0] == THRESHOLDS[0]
    alarmed = (torch.where(box(2, 4, 4), 0.5, 0.0), NOTHING)
    assert best_threshold([(faint, lesion), alarmed])[0] == 0.5


def test_without_any_lesion_no_threshold_is_made_up():
    with pytest.raises(ValueError, match="expected validation cases with a lesion"):
        best_threshold([(torch.rand(1, 1, 8, 16, 16), NOTHING)])
