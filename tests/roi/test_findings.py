import numpy as np
import pytest

from clinfuse.roi import findings
from clinfuse.roi.findings import SMOOTHING_MM, ct_dense_findings, noise_left

SPACING_MM = (5.0, 0.9, 0.9)


def brain_ct(noise_hu=5.0, seed=0):
    """A ball-shaped brain of 35 HU in a skull whose partial volume reaches inwards."""
    sizes = zip((26, 170, 170), SPACING_MM, strict=True)
    d, h, w = np.meshgrid(*[(np.arange(n) - n / 2) * mm for n, mm in sizes], indexing="ij")
    radius = np.sqrt(d**2 + h**2 + w**2)
    ct_hu = np.where(radius < 60, 35.0, 1000.0)
    ct_hu[(radius > 58) & (radius < 60)] = 90
    ct_hu += np.random.default_rng(seed).normal(0, noise_hu, ct_hu.shape)
    return ct_hu.astype(np.float32), radius < 60


def box(shape, size):
    mask = np.zeros(shape, bool)
    mask[12:14, 80 : 80 + size, 90 : 90 + size] = True
    return mask


def test_blood_and_calcium_are_found_where_they_are():
    for hu in (65, 250):
        ct_hu, brain = brain_ct()
        finding = box(ct_hu.shape, 16)
        ct_hu[finding] += hu - 35
        found = ct_dense_findings(ct_hu, brain, SPACING_MM)
        assert 2 * (found & finding).sum() / (found.sum() + finding.sum()) > 0.8


def test_noise_and_the_skulls_partial_volume_are_not_findings():
    for seed in range(3):
        ct_hu, brain = brain_ct(noise_hu=8.0, seed=seed)
        assert not ct_dense_findings(ct_hu, brain, SPACING_MM).any()


def test_a_few_dense_voxels_are_too_few():
    ct_hu, brain = brain_ct(noise_hu=0.0)
    ct_hu[12, 80:82, 90:92] = 120
    assert not ct_dense_findings(ct_hu, brain, SPACING_MM).any()


def test_nothing_outside_the_brain_is_a_finding():
    ct_hu, brain = brain_ct()
    assert not ct_dense_findings(ct_hu, np.zeros_like(brain), SPACING_MM).any()
    left = brain.copy()
    left[..., 85:] = False
    ct_hu[box(ct_hu.shape, 16)] = 70
    assert not ct_dense_findings(ct_hu, left, SPACING_MM).any()


def test_a_noisy_scan_has_no_more_findings_than_it_shows():
    for noise_hu in (20.0, 40.0):
        ct_hu, brain = brain_ct(noise_hu=noise_hu)
        assert not ct_dense_findings(ct_hu, brain, SPACING_MM).any()
        calcium = box(ct_hu.shape, 16)
        ct_hu[calcium] += 250 - 35
        found = ct_dense_findings(ct_hu, brain, SPACING_MM)
        assert 2 * (found & calcium).sum() / (found.sum() + calcium.sum()) > 0.8


@pytest.mark.parametrize(("sizes", "gain"), [((5.0, 4.0, 4.0), 1.0), ((5.0, 1.5, 1.5), 0.282)])
def test_the_noise_that_is_left_is_what_was_added_but_for_smoothing(sizes, gain):
    """A Gaussian of one voxel leaves 1 / (2 sqrt(pi)) = 0.282 of white noise in a slice."""
    ramp = 35 + 0.5 * np.arange(64)[:, None] + np.zeros((12, 64, 64))
    ramp += np.random.default_rng(0).normal(0, 12.0, ramp.shape)
    sigmas = [SMOOTHING_MM / size if size < 2 * SMOOTHING_MM else 0.0 for size in sizes]
    found = noise_left(ramp, np.ones(ramp.shape, bool), sigmas)
    assert found == pytest.approx(12.0 * gain, rel=0.03)


def test_a_large_scan_is_looked_at_slab_by_slab_and_around_the_brain_alone(monkeypatch):
    rng = np.random.default_rng(0)
    for case, spacing_mm in enumerate([SPACING_MM, (2.0, 0.9, 0.9)]):
        ct_hu, brain = brain_ct(noise_hu=8.0, seed=case)
        for _ in range(6):
            d, h, w = rng.integers(0, 24), *rng.integers(30, 130, 2)
            ct_hu[d : d + 3, h : h + 12, w : w + 12] += rng.uniform(20, 200)
        monkeypatch.setattr(findings, "LARGEST_SLAB", 2**30)
        whole = ct_dense_findings(ct_hu, brain, spacing_mm)
        assert whole.sum() > 200
        for slices in (1, 3):
            monkeypatch.setattr(findings, "LARGEST_SLAB", slices * brain[0].size)
            assert np.array_equal(ct_dense_findings(ct_hu, brain, spacing_mm), whole)
        padding = [(0, 0), (20, 9), (5, 30)]  # air
        wide = np.pad(ct_hu, padding, constant_values=-1000), np.pad(brain, padding)
        assert np.array_equal(ct_dense_findings(*wide, spacing_mm), np.pad(whole, padding))


def test_a_scan_within_the_brain_has_no_rim_to_leave_out():
    ct_hu = np.full((12, 40, 40), 35.0, np.float32)
    ct_hu[4:6, 2:12, 2:12] = 70
    found = ct_dense_findings(ct_hu, np.ones(ct_hu.shape, bool), SPACING_MM)
    assert 2 * (found & (ct_hu > 50)).sum() / (found.sum() + (ct_hu > 50).sum()) > 0.8
