"""Conspicuity: drawn findings whose contrast and noise are known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.functional.conspicuity import (
    NOISE_FLOOR,
    PLAIN,
    VISIBLE,
    conspicuity,
    contrast_to_noise,
    surround_of,
)
from clinfuse.functional.gaussian import gaussian_smooth

SPACING_MM = (4.0, 2.0, 2.0)
SHAPE = (9, 25, 25)


def ball(centre=(4, 12, 12), radius_mm=6.0, shape=SHAPE, spacing_mm=SPACING_MM):
    axes = [(torch.arange(n) - c) * s for n, c, s in zip(shape, centre, spacing_mm, strict=True)]
    return (sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")).sqrt() <= radius_mm)[None, None]


def checks(shape=SHAPE):
    """+1 and -1 in turn, odd about the centre: mean 0, deviation 1 around what lies there."""
    offsets = [torch.arange(n) - n // 2 for n in shape]
    index = torch.meshgrid(*offsets, indexing="ij")
    order = sum(1000**power * axis for power, axis in enumerate(index))
    return (torch.sign(order) * (1.0 - 2.0 * (sum(index) % 2)))[None, None]


def drawn(finding, contrast, noise):
    return torch.where(finding, contrast, noise * checks(finding.shape[2:]))


FINDING, BRAIN = ball(), torch.ones(1, 1, *SHAPE, dtype=torch.bool)
NOTHING = 0.2 * checks()
SOURCE = drawn(FINDING, 0.4, 0.2)


def kept(fused, mri=SOURCE, ct=NOTHING, finding=FINDING, brain=BRAIN, others=None):
    (values,) = conspicuity(fused, mri, ct, finding, brain, SPACING_MM, others)
    return values.tolist()


def test_contrast_to_noise_is_what_was_drawn():
    ring = torch.from_numpy(
        surround_of(*(m[0, 0].numpy() for m in (FINDING, BRAIN, ~BRAIN)), SPACING_MM)
    )
    pair = FINDING[0, 0], ring
    assert contrast_to_noise(SOURCE[0, 0], *pair).item() == pytest.approx(2.0)
    around = SOURCE[0, 0].numpy()[ring.numpy()]
    assert contrast_to_noise(-SOURCE[0, 0], *pair).item() == pytest.approx(
        abs(0.4 - around.mean()) / np.std(around), rel=1e-5
    )
    quiet = drawn(FINDING, 0.4, 0.0)[0, 0]
    assert contrast_to_noise(quiet, *pair).item() == pytest.approx(0.4 / NOISE_FLOOR)
    assert contrast_to_noise(quiet, *pair, 0.8).item() == pytest.approx(0.5)


@given(share=st.floats(0.0, 1.0))
def test_a_share_of_the_contrast_is_that_share_of_conspicuity(share):
    assert kept(drawn(FINDING, 0.4 * share, 0.2)) == [pytest.approx(share, abs=1e-5)]


def test_the_source_itself_keeps_all_and_so_does_its_negative():
    assert kept(SOURCE) == kept(-SOURCE) == kept(SOURCE, NOTHING, SOURCE) == [1.0]


def test_what_is_erased_has_vanished():
    assert kept(NOTHING) == [pytest.approx(0, abs=1e-5)]


def test_a_noisier_surround_costs_as_much_as_the_lost_contrast_would():
    assert kept(drawn(FINDING, 0.4, 0.6)) == [pytest.approx(1 / 3, abs=1e-5)]


def test_smoothing_the_surround_does_not_rescue_a_vanished_finding():
    flat = drawn(FINDING, 0.04, 0.0)
    assert kept(flat) == [pytest.approx(0.1, abs=1e-5)]
    mri = drawn(FINDING, 0.4, 0.4)
    (smooth,) = kept(gaussian_smooth(0.25 * mri, (1.0, 2.0, 2.0)), mri)
    assert smooth < 0.25  # its own noise alone would give it about 0.2 / 0.1 to 1


def test_the_better_source_is_the_measure_whichever_it_is():
    faint = drawn(FINDING, 0.2, 0.2)
    assert (
        kept(faint, SOURCE, faint) == kept(faint, faint, SOURCE) == [pytest.approx(0.5, abs=1e-5)]
    )


def test_shades_of_a_flat_source_under_the_floor_do_not_make_it_the_better_one():
    tinted, mri = drawn(FINDING, 0.06, 0.001), drawn(FINDING, 0.4, 0.3)
    assert kept(mri, mri, tinted) == [1.0]
    assert kept(tinted, mri, tinted)[0] < 0.2


def test_a_source_counts_up_to_what_is_plainly_visible():
    plain = drawn(FINDING, PLAIN * NOISE_FLOOR, NOISE_FLOOR)
    glaring = drawn(FINDING, 1.0, 0.0)
    assert kept(plain, NOTHING, glaring) == [pytest.approx(1.0, abs=1e-5)]
    assert kept(0.5 * plain, NOTHING, glaring) == [pytest.approx(0.5, abs=1e-5)]
    assert kept(glaring) == [1.0]


def test_what_no_source_shows_cannot_vanish():
    seen = drawn(FINDING, 1.1 * VISIBLE * 0.2, 0.2)
    unseen = drawn(FINDING, 0.9 * VISIBLE * 0.2, 0.2)
    assert kept(SOURCE, seen) == [1.0]
    assert np.isnan(kept(SOURCE, unseen))


def test_no_finding_has_no_value_and_a_speck_or_one_without_surround_has_nan():
    assert kept(SOURCE, finding=~BRAIN) == []
    speck = torch.zeros_like(FINDING)
    speck[..., 4, 12, 11:14] = True
    assert np.isnan(kept(drawn(speck, 0.4, 0.2), drawn(speck, 0.4, 0.2), finding=speck))
    speck[..., 4, 13, 11] = True
    assert kept(drawn(speck, 0.4, 0.2), drawn(speck, 0.4, 0.2), finding=speck) == [1.0]
    assert np.isnan(kept(SOURCE, brain=ball(radius_mm=9.0)))
    assert np.isnan(kept(SOURCE, others=ball(radius_mm=14.0)))


def test_other_findings_and_what_is_not_brain_are_no_surround():
    near = ball((4, 12, 18), 3.0)  # 3 mm away, of the other kind or of the same
    fused = torch.where(near, 1.0, SOURCE)
    assert kept(fused, others=near) == kept(fused, brain=BRAIN & ~near) == [1.0]
    assert kept(fused, finding=FINDING | near)[0] == 1.0
    assert kept(fused)[0] < 0.8


def test_a_voxel_of_partial_volume_is_left_out_around_all_of_them():
    near = ball((4, 12, 20), 4.0)
    cube = torch.nn.functional.max_pool3d
    halo = cube((FINDING | near).float(), 3, 1, 1).bool() & ~FINDING & ~near
    smeared = torch.where(halo, 1.0, SOURCE)
    assert kept(smeared, others=near) == [1.0]
    assert kept(smeared, brain=BRAIN & ~near) == [1.0]


def test_the_surround_is_measured_in_mm():
    finding = np.zeros(SHAPE, bool)
    finding[4, 12, 12] = True
    brain, none = np.ones(SHAPE, bool), np.zeros(SHAPE, bool)
    ring = surround_of(finding, brain, none, SPACING_MM)
    assert (
        set(np.flatnonzero(ring[:, 12, 12])) == set()
    )  # the next slice touches, its next is 8 mm off
    assert set(np.flatnonzero(ring[4, 12])) == {9, 10, 14, 15}  # 4 and 6 mm
    ring = surround_of(finding, brain, none, (2.0, 2.0, 4.0))
    assert set(np.flatnonzero(ring[:, 12, 12])) == {1, 2, 6, 7}
    assert not ring[4, 12].any()


def test_diagonal_voxels_are_one_finding_and_each_finding_has_its_own_value():
    first, second = (
        ball((4, 7, 7), 5.0),
        ball((4, 14, 14), 5.0),
    )  # one within the reach of the other
    both = first | second
    source = drawn(both, 0.4, 0.2)
    assert kept(torch.where(second, NOTHING, source), source, finding=both) == [
        pytest.approx(1.0, abs=0.1),  # off the centre the noise has a mean
        pytest.approx(0.0, abs=0.1),
    ]
    stairs = torch.zeros_like(FINDING)
    for step in range(4):
        stairs[..., 3 + step, 10 + step, 10 + step] = True
    assert len(kept(SOURCE, finding=stairs)) == 1


def test_each_case_has_its_own_findings_and_spacing():
    spacing_mm = torch.tensor([SPACING_MM, (2.0, 2.0, 8.0)])  # no ring in 8 mm of no neighbours
    two = [torch.cat(pair) for pair in ((SOURCE, NOTHING), (SOURCE, SOURCE), (NOTHING, NOTHING))]
    findings = torch.cat([FINDING, FINDING & ~ball(radius_mm=0.0)])
    brain = BRAIN.expand(2, -1, -1, -1, -1)
    first, second = conspicuity(*two, findings, brain, spacing_mm)
    assert first.tolist() == kept(SOURCE) == [1.0]
    assert second.tolist() == [pytest.approx(0.0, abs=1e-5)]
    none = torch.cat([FINDING, ~BRAIN])
    assert [len(v) for v in conspicuity(*two, none, brain, SPACING_MM)] == [1, 0]


def test_slices_are_measured_too():
    flat = [t[:, :, 4] for t in (0.5 * SOURCE, SOURCE, NOTHING, FINDING, BRAIN)]
    (values,) = conspicuity(*flat, SPACING_MM[1:])
    assert values.tolist() == [pytest.approx(0.5, abs=1e-5)]
