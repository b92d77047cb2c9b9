from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from clinfuse.data import jitter, spline
from clinfuse.data.augmentation import Augmentation
from clinfuse.data.jitter import RegistrationJitter, about_another_centre
from clinfuse.data.studies import load_study
from clinfuse.data.study_items import drawn, item_of, padded, random_window, study_item
from clinfuse.types import FusionBatch

SHAPE = (20, 64, 72)
SPACING_MM = (4.0, 3.0, 2.0)
STILL = torch.eye(4, dtype=torch.float64)
JITTER = RegistrationJitter(max_mm=4, max_deg=4, probability=1)
WINDOWS = {
    "middle": (slice(6, 14), slice(20, 36), slice(30, 46)),
    "corner": (slice(0, 5), slice(0, 20), slice(60, 72)),
    "slab": (slice(9, 12), slice(0, 64), slice(0, 72)),
}
VARIED = {
    "as it is": Augmentation(0, 0, max_log_gamma=0),
    "flipped": Augmentation(1, 0),
    "turned": Augmentation(0, 1),
    "flipped and turned": Augmentation(1, 1),
}

CUT_OFF = 1e-5
"""What a spline of a window may miss: voxels more than 12 away, 0.268^12 = 1.4e-7 of each."""


@pytest.fixture
def study(make_study, head_of):
    """Noisy, with a clean pair and a streak of blood that is wider than any window."""
    arrays = head_of(SHAPE, SPACING_MM)
    random = np.random.default_rng(5)
    blood = np.zeros(SHAPE, bool)
    blood[9:12, 14:50, 33:36] = True
    blood &= arrays["brain_mask"]
    ramp = np.where(arrays["brain_mask"], np.linspace(-300, 300, SHAPE[1])[:, None], 0)
    mri, ct = arrays["mri"] + ramp, np.where(blood, 75.0, arrays["ct"])
    arrays |= {"clean_mri": mri, "clean_ct": ct}
    arrays |= {"mri": mri + random.normal(0, 20, SHAPE), "ct": ct + random.normal(0, 9, SHAPE)}
    found = load_study(make_study("large", **arrays))
    assert found.has_clean_pair and found.has_lesion and found.finding_boxes
    return found


def draws(varied, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return JITTER.draw(generator), varied.draw(generator)


def assert_is_cut_out(part, whole, window, atol=CUT_OFF):
    for field in fields(FusionBatch):
        ours, theirs = getattr(part, field.name), getattr(whole, field.name)
        if not isinstance(theirs, torch.Tensor) or theirs.ndim != 5:
            continue
        theirs = theirs[(..., *window)]
        if theirs.dtype == torch.bool:
            assert torch.equal(ours, theirs), field.name
        else:
            assert (ours - theirs).abs().max() < atol, field.name


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("varied", VARIED.values(), ids=VARIED)
def test_an_item_of_a_window_is_cut_out_of_the_whole_item(study, varied, window):
    misregistration, varied = draws(varied)
    whole = study_item(study, misregistration, varied)
    part = study_item(study, misregistration, varied, window)
    assert_is_cut_out(part, whole, window)
    assert not torch.equal(part.ct, part.clean_ct)


@pytest.mark.parametrize("by", [jitter.move, spline.move], ids=["torchio", "spline"])
@pytest.mark.parametrize(
    "kind", ["its own reference", "no lesion", "brain found in the CT", "one pair"]
)
def test_a_window_is_cut_out_of_every_kind_of_study(study, kind, by):
    if kind == "its own reference":
        study = replace(study, has_own_reference=True, reference=study.clean_mri.flip(1))
    elif kind == "no lesion":
        far = torch.full_like(study.lesion_distance_mm, 1000.0)
        roi = torch.cat((study.roi[:2], torch.zeros_like(study.lesion)))
        study = replace(study, roi=roi, lesion_distance_mm=far, far_mm=1000.0, has_lesion=False)
    elif kind == "brain found in the CT":
        study = replace(study, brain_of_ct=True)
    else:
        study = replace(study, clean_mri=study.mri, clean_ct=study.ct)
    misregistration, varied = draws(VARIED["flipped and turned"], seed=3)
    whole = study_item(study, misregistration, varied, by=by)
    part = study_item(study, misregistration, varied, WINDOWS["middle"], by)
    assert_is_cut_out(part, whole, WINDOWS["middle"])


@pytest.mark.parametrize("varied", VARIED.values(), ids=VARIED)
def test_splines_make_the_item_that_torchio_makes(study, varied):
    misregistration, varied = draws(varied)
    theirs = study_item(study, misregistration, varied)
    ours = study_item(study, misregistration, varied, by=spline.move)
    for field in fields(FusionBatch):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if not isinstance(a, torch.Tensor):
            assert a == b
        elif a.dtype == torch.bool:  # but where a half of two voxels is rounded the other way
            assert (a != b).float().mean() < 1e-5, field.name
        else:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-6)


def test_a_window_needs_what_its_movements_reach_and_no_more(study):
    """16 voxels, 12 either side for splines, and some for a shift, a turn and 5 % of size."""
    nothing = replace(study, finding_boxes=[], findings=torch.zeros_like(study.findings))
    misregistration, varied = draws(VARIED["turned"])
    needed = drawn(nothing, misregistration, varied, WINDOWS["middle"]).study.mri.shape
    assert 40 <= needed[2] < SHAPE[1] and 40 <= needed[3] < SHAPE[2]
    # unmoved and unvaried, it is the window itself
    plain = Augmentation(0, 0, max_log_gamma=0).draw(torch.Generator())
    assert drawn(study, STILL, plain, WINDOWS["middle"]).study.mri.shape == (1, 8, 16, 16)


def test_what_is_sent_to_a_device_holds_nothing_else_of_the_study(study):
    misregistration, varied = draws(VARIED["turned"])
    needed = drawn(study, misregistration, varied, WINDOWS["middle"])
    sent = needed.apart()
    held = sent.study.mri.untyped_storage().nbytes()
    assert held == 4 * needed.study.mri.numel() < study.mri.untyped_storage().nbytes()
    assert not sent.study.has_own_reference and sent.study.clean_mri is not sent.study.mri
    ours, theirs = item_of(sent.on("cpu")), item_of(needed)
    assert torch.equal(ours.reference, theirs.reference) and torch.equal(ours.ct, theirs.ct)


def test_the_misregistration_of_a_window_is_about_its_own_centre(study):
    misregistration, varied = draws(VARIED["flipped and turned"])
    window = WINDOWS["corner"]
    part = study_item(study, misregistration, varied, window)
    starts, stops = ([getattr(s, end) for s in window] for end in ("start", "stop"))
    off = [(a + b - 1) / 2 - (n - 1) / 2 for a, b, n in zip(starts, stops, SHAPE, strict=True)]
    centre_mm = torch.tensor(off).double() * torch.tensor(SPACING_MM).double()
    expected = about_another_centre(misregistration, centre_mm)
    torch.testing.assert_close(part.misregistration[0].double(), expected, atol=1e-5, rtol=0)


def test_a_finding_is_shown_by_all_of_it_even_where_a_window_has_an_end_of_it(study):
    """Bright or dark is decided by the mean around all of it, and its ends lie in two contrasts."""
    misregistration, varied = STILL, Augmentation(0, 0).draw(torch.Generator().manual_seed(2))
    whole = study_item(study, misregistration, varied)
    for start in (12, 40):
        window = (slice(8, 13), slice(start, start + 8), slice(30, 40))
        part = study_item(study, misregistration, varied, window)
        assert part.findings.any()
        assert_is_cut_out(part, whole, window)


@pytest.mark.parametrize("varied", VARIED.values(), ids=VARIED)
def test_windows_are_drawn_around_tissue_wherever_it_has_come_to_lie(study, varied):
    generator, starts = torch.Generator().manual_seed(0), set()
    for seed in range(12):
        misregistration, drawn_variation = draws(varied, seed)
        window = random_window(study, drawn_variation, (4, 8, 8), generator)
        assert [s.stop - s.start for s in window] == [4, 8, 8]
        assert all(s.start >= 0 and s.stop <= n for s, n in zip(window, SHAPE, strict=True))
        part = study_item(study, misregistration, drawn_variation, window, spline.move)
        assert part.clean_roi[0, :2].any()
        starts.add(tuple(s.start for s in window))
    assert len(starts) == 12


def test_every_voxel_of_tissue_is_as_likely_as_any_other(study):
    """A voxel in the middle of a window of 1 x 1 x 1 is the one that was chosen."""
    generator = torch.Generator().manual_seed(0)
    plain = VARIED["as it is"].draw(generator)
    chosen = [random_window(study, plain, (1, 1, 1), generator) for _ in range(1500)]
    bone = np.mean([bool(study.roi[(1, *window)].all()) for window in chosen])
    tissue = study.roi[:2].any(0)
    share = float((study.roi[1] & tissue).sum() / tissue.sum())
    assert bone == pytest.approx(share, abs=4 * (share * (1 - share) / 1500) ** 0.5)


def test_a_study_without_tissue_says_so(study):
    empty = replace(study, roi=torch.zeros_like(study.roi))
    plain = VARIED["as it is"].draw(torch.Generator())
    with pytest.raises(ValueError, match=r"expected brain or bone .* none .*: large"):
        random_window(empty, plain, (4, 8, 8), torch.Generator())


def test_padding_is_around_the_item_and_moves_its_centre_with_it(study):
    misregistration, varied = draws(VARIED["as it is"])
    item = study_item(study, misregistration, varied, WINDOWS["middle"])
    wide = padded(item, (8, 19, 20))
    assert wide.mri.shape == (1, 1, 8, 19, 20)
    assert torch.equal(wide.ct[..., 1:17, 2:18], item.ct)
    assert (wide.ct[..., 0, :] == -1).all() and not wide.roi[..., -1].any()
    off_mm = torch.tensor([0.0, (2 - 1) / 2 * 3.0, (2 - 2) / 2 * 2.0]).double()
    expected = about_another_centre(item.misregistration[0].double(), off_mm)
    torch.testing.assert_close(wide.misregistration[0].double(), expected, atol=1e-6, rtol=0)
