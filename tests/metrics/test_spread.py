import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from clinfuse.functional.calibration import ause, coverage, ence, uce
from clinfuse.functional.regional import regional_mean
from clinfuse.metrics import spread as module
from clinfuse.metrics.calibration import REGIONS, Calibration
from clinfuse.metrics.spread import CALIBRATED, STATED, spread_scores

CALIBRATION = Calibration(
    level=0.9,
    curve={name: [[0.01, 0.2], [0.02 + n / 50, 0.1 + n / 10]] for n, name in enumerate(REGIONS)},
    quantile={name: 1.0 + n / 3 for n, name in enumerate(REGIONS)},
    temperature=None,
    case_ids=["other"],
    misregistration_mm=0.0,
)


def cases(count=2, shape=(5, 16, 17)):
    """Fused, spread and reference, two overlapping regions and one that a case has nothing of."""
    generator = torch.Generator().manual_seed(0)
    reference, spread, noise = torch.rand(3, count, 1, *shape, generator=generator)
    fused = (2 * reference - 1 + 0.3 * spread * (noise - 0.5)).clamp(-1, 1)
    masks = {
        "whole": reference > 0.1,
        "brain": reference > 0.6,
        "bone": noise > 0.8,
    }
    masks["bone"][0] = False
    placed = torch.cat([noise > 0.3, noise < 0.2, noise < 0], 1)
    return fused, 0.2 * spread, 2 * reference - 1, masks, placed


@pytest.mark.parametrize("voxels", [100, 1 << 17])
def test_every_score_is_that_of_calibration_in_its_region(monkeypatch, voxels):
    monkeypatch.setattr(module, "VOXELS_A_PART", voxels)
    fused, spread, reference, masks, placed = cases()
    found = spread_scores(fused, spread, reference, masks, CALIBRATION, placed)
    error = fused - reference
    std = CALIBRATION.std(fused, spread, placed)
    low, high = CALIBRATION.interval(fused, spread, placed)
    random = torch.rand(fused.shape, generator=torch.Generator().manual_seed(0))
    for region, mask in masks.items():
        expected = {
            "ause": ause(spread, error, mask),
            "ause_constant": ause(torch.ones_like(spread), error, mask),
            "ause_random": ause(random, error, mask),
            "uce_raw": uce(spread, error, mask),
            "ence_raw": ence(spread, error, mask),
            "uce": uce(std, error, mask),
            "ence": ence(std, error, mask),
            "coverage": coverage(reference, low, high, mask),
            "width": regional_mean(high - low, mask),
        }
        for name, stated in (("", spread), ("_calibrated", std)):
            expected["spread_error_correlation" + name] = torch.tensor([
                pearsonr(s[m], e[m]).statistic if m.any() else torch.nan
                for s, e, m in zip(stated, error.abs(), mask, strict=True)
            ])  # fmt: skip
        assert expected.keys() == set(STATED + CALIBRATED)
        for name, values in expected.items():
            np.testing.assert_allclose(
                found[region, name], values, rtol=1e-4, atol=1e-5, err_msg=f"{region} {name}"
            )
    assert np.isnan([found["bone", name][0] for name in STATED + CALIBRATED]).all()


def test_without_a_calibration_what_is_stated_is_judged_alone():
    fused, spread, reference, masks, placed = cases()
    found = spread_scores(fused, spread, reference, masks, None, placed)
    assert list(found) == [(region, name) for region in masks for name in STATED]
    both = spread_scores(fused, spread, reference, masks, CALIBRATION, placed)
    for name, values in found.items():
        np.testing.assert_array_equal(values, both[name])


def test_a_case_without_any_region_is_undefined():
    fused, spread, reference, masks, placed = cases(1)
    nothing = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    found = spread_scores(fused, spread, reference, nothing, CALIBRATION, placed)
    assert all(np.isnan(values).all() for values in found.values())
