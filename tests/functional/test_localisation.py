import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import label
from skimage.measure import label as skimage_label
from skimage.measure import regionprops

from clinfuse.functional.localisation import lesion_detection


def drawn(*rows):
    """A mask of one case and one slice, drawn in characters."""
    return torch.tensor([[[[character == "#" for character in row] for row in rows]]])


TWO_LESIONS = drawn(
    "##......",
    "##......",
    "........",
    "......#.",
    ".....#..",  # touches by a corner: still one lesion
)


def detection(pred, target=TWO_LESIONS, spacing_mm=(1.0, 1.0)):
    return lesion_detection(pred, target, spacing_mm)


def test_one_voxel_in_common_finds_a_lesion_and_what_overlaps_none_is_false():
    pred = drawn(
        "........",
        ".#......",
        ".#......",
        "....#...",  # beside a lesion, and so no finding of it
        "........",
    )
    found = detection(pred)
    assert found.lesions.item() == 2 and found.found.item() == 1
    assert found.false_positives.item() == 1
    assert found.sensitivity.item() == 0.5
    assert found.f1.item() == pytest.approx(2 / (2 + 1 + 1))  # TP 1, FN 1, FP 1


def test_one_finding_that_covers_both_lesions_finds_both():
    found = detection(torch.ones_like(TWO_LESIONS))
    assert found.sensitivity.item() == 1 and found.false_positives.item() == 0


def test_centroids_are_apart_in_mm_along_each_axis():
    pred = drawn(
        "........",
        ".#......",
        "........",
        "........",
        "........",
    )
    centre, found_at = np.array([0.5, 0.5]), np.array([1.0, 1.0])
    for spacing_mm in ((1.0, 1.0), (5.0, 0.9)):
        expected = np.linalg.norm((found_at - centre) * spacing_mm)
        found = detection(pred, spacing_mm=spacing_mm)
        assert found.centroid_distance_mm.item() == pytest.approx(expected)


def test_a_lesion_found_in_two_pieces_is_compared_with_the_larger():
    target = drawn("########")
    found = detection(drawn("#...####"), target)
    assert found.found.item() == 1 and found.false_positives.item() == 0
    assert found.centroid_distance_mm.item() == pytest.approx(5.5 - 3.5)


def test_what_is_undefined_is_nan_and_never_perfect():
    nothing = torch.zeros_like(TWO_LESIONS)
    missed, healthy = detection(nothing), detection(nothing, nothing)
    assert missed.sensitivity.item() == 0 and missed.f1.item() == 0
    assert missed.centroid_distance_mm.isnan()
    assert healthy.sensitivity.isnan() and healthy.f1.isnan()
    assert healthy.false_positives.item() == 0
    alarmed = detection(TWO_LESIONS, nothing)
    assert alarmed.sensitivity.isnan() and alarmed.f1.item() == 0
    assert alarmed.false_positives.item() == 2


@given(seed=st.integers(0, 1000), density=st.floats(0.02, 0.4))
def test_counts_are_those_of_scipy_components_laid_over_one_another(seed, density):
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.rand(2, 2, 1, 4, 6, 7, generator=generator) < density).unbind()
    found = lesion_detection(pred, target, (1.0, 1.0, 1.0))
    for case in range(2):
        p, t = pred[case, 0].numpy(), target[case, 0].numpy()
        touching = np.ones((3, 3, 3))
        (ours, n), (theirs, m) = label(p, touching), label(t, touching)
        assert found.lesions[case] == m
        assert found.found[case] == sum(p[theirs == i].any() for i in range(1, m + 1))
        assert found.false_positives[case] == sum(not t[ours == i].any() for i in range(1, n + 1))


def test_components_and_centroids_agree_with_scikit_image():
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(1, 1, 6, 9, 9, generator=generator) < 0.05
    grown = torch.nn.functional.max_pool3d(target.float(), 3, 1, 1) > 0
    pred = grown & (torch.rand(grown.shape, generator=generator) < 0.7)
    spacing_mm = (4.0, 2.0, 1.5)
    theirs = skimage_label(target[0, 0].numpy(), connectivity=3)
    findings = skimage_label(pred[0, 0].numpy(), connectivity=3)
    apart = []
    for lesion in regionprops(theirs, spacing=spacing_mm):
        overlaps = np.bincount(findings[theirs == lesion.label], minlength=findings.max() + 1)[1:]
        if overlaps.any():
            finding = regionprops(findings, spacing=spacing_mm)[int(overlaps.argmax())]
            apart.append(np.linalg.norm(np.subtract(lesion.centroid, finding.centroid)))
    found = lesion_detection(pred, target, spacing_mm)
    assert len(apart) == found.found.item() > 1
    assert found.centroid_distance_mm.item() == pytest.approx(np.mean(apart), rel=1e-5)


def test_cases_of_a_batch_are_scored_apart():
    nothing = torch.zeros_like(TWO_LESIONS)
    both = detection(torch.cat([TWO_LESIONS, nothing]), torch.cat([TWO_LESIONS, TWO_LESIONS]))
    assert both.sensitivity.tolist() == [1, 0]
    assert both.centroid_distance_mm[0] == 0 and both.centroid_distance_mm[1].isnan()
