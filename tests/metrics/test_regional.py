"""Streaming means: over cases, not batches, and over the cases that define the metric."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from clinfuse.functional.fsim import fsim
from clinfuse.functional.surface import dice, hd95, nsd
from clinfuse.metrics.regional import (
    LesionDice,
    LesionHD95,
    LesionNSD,
    RegionalFSIM,
    RegionalPSNR,
    RegionalSSIM,
    brightness,
)

SPACING_MM = (4.0, 2.0, 2.0)
SHAPE = (3, 1, 6, 20, 20)


def images() -> tuple[Tensor, Tensor, Tensor]:
    fused, target = torch.rand(2, *SHAPE) * 2 - 1
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[0, :, 1:3, 4:9, 5:12], mask[1, :, :, 3:15, 9:] = True, True
    return fused, target, mask


def lesions() -> tuple[Tensor, Tensor]:
    """An overlapping pair, both empty, and a lesion without a prediction."""
    lesion = torch.zeros(SHAPE, dtype=torch.bool)
    lesion[0, :, 2:4, 4:9, 4:9], lesion[2, :, 2:4, 4:9, 4:9] = True, True
    probability = torch.full(SHAPE, 0.4)
    probability[0, :, 2:4, 5:11, 4:9] = 0.7
    return probability, lesion


def test_psnr_agrees_with_scikit_image_at_the_data_range_of_model_space():
    """The range is 2 for every case, even for one whose own values span less."""
    fused, target, mask = images()
    fused[1] *= 0.1
    target[1] *= 0.1
    metric = RegionalPSNR()
    metric.update(fused, target, mask)
    theirs = [
        peak_signal_noise_ratio(t[m].numpy(), f[m].numpy(), data_range=2.0)
        for f, t, m in zip(fused[:2], target[:2], mask[:2], strict=True)
    ]
    assert metric.compute().item() == pytest.approx(np.mean(theirs), rel=1e-5)
    assert (metric.count, metric.undefined) == (2, 1)


@pytest.mark.parametrize(
    ("metric", "inputs", "counted"),
    [
        (RegionalPSNR(), images(), 2),
        (RegionalSSIM(), (*images(), SPACING_MM), 2),
        (RegionalFSIM(), images(), 2),
        (LesionDice(), lesions(), 2),
        (LesionNSD(), (*lesions(), SPACING_MM), 2),
        (LesionHD95(), (*lesions(), SPACING_MM), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_splitting_cases_into_batches_changes_nothing(metric, inputs, counted):
    metric.update(*inputs)
    together, count, undefined = metric.compute(), metric.count, metric.undefined
    metric.reset()
    for part in (slice(0, 2), slice(2, 3)):
        metric.update(*(t[part] if isinstance(t, Tensor) else t for t in inputs))
    torch.testing.assert_close(metric.compute(), together)
    assert count == metric.count == counted
    assert undefined == metric.undefined == 3 - counted


def test_two_empty_masks_are_no_perfect_dice():
    probability, lesion = lesions()
    metric = LesionDice()
    metric.update(probability[1:2], lesion[1:2])
    assert metric.compute().isnan() and metric.undefined == 1
    metric.update(probability[2:3], lesion[2:3])
    assert metric.compute() == 0 and metric.count == 1


def test_lesion_metrics_threshold_the_probability_at_one_half():
    probability, lesion = lesions()
    hard = probability[:1] > 0.5
    expected = (
        (LesionDice(), (), dice(hard, lesion[:1])),
        (LesionNSD(1.0), (SPACING_MM,), nsd(hard, lesion[:1], SPACING_MM, 1.0)),
        (LesionHD95(), (SPACING_MM,), hd95(hard, lesion[:1], SPACING_MM)),
    )
    for metric, spacing, value in expected:
        metric.update(probability[:1], lesion[:1], *spacing)
        assert metric.compute().item() == pytest.approx(value.item())
    assert 0 < expected[0][2] < 1 and 0 < expected[1][2] < 1 and expected[2][2] == 4


def test_fsim_is_the_mean_of_the_cases():
    fused, target, mask = images()
    metric = RegionalFSIM()
    metric.update(fused, target, mask)
    expected = np.nanmean(fsim(fused, target, mask).numpy())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-6)


def test_an_inverted_image_is_less_similar_than_a_flat_one():
    """On [-1, 1] as it comes, both factors of SSIM turn negative and their product positive."""
    target = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 64, 64) * 4 - 2, 5, 1, 2).clamp(-1, 1)
    everywhere = torch.ones_like(target, dtype=torch.bool)
    scores = []
    for image in (target, torch.zeros_like(target), -target):
        metric = RegionalSSIM()
        metric.update(image, target, everywhere, (1.0, 1.0))
        scores.append(metric.compute().item())
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[2] < -0.5 < scores[1] < 0.5


def test_brightness_is_not_negative():
    torch.testing.assert_close(brightness(-torch.ones(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("metric", [RegionalPSNR, LesionDice, LesionHD95])
def test_no_case_at_all_is_undefined(metric):
    with pytest.warns(UserWarning, match="before the"):
        assert metric().compute().isnan()
