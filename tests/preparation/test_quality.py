import json
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation import registration_quality
from clinfuse.preparation.quality import Quality, quality
from clinfuse.preparation.registration import Registration
from clinfuse.preparation.scan import Scan

SHAPE, SPACING_MM = (30, 72, 64), (5.0, 3.0, 3.0)
STILL = sitk.Transform(3, sitk.sitkIdentity)


def image(array, spacing_mm=SPACING_MM):
    """An array of canonical order on a grid whose axes point to right, anterior and superior."""
    made = sitk.GetImageFromArray(np.asarray(array, np.float32))
    made.SetSpacing(spacing_mm[::-1])
    made.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    return made


@pytest.fixture(scope="module")
def phantom():
    return make_phantom(2, seed=1, shape=SHAPE, spacing_mm=SPACING_MM)


def judged(phantom, scans=None, spacing_mm=SPACING_MM, **given):
    """The quality of a phantom, some of its arrays replaced; scans are as the study has them."""
    arrays = {name: getattr(phantom, name) for name in ("mri", "ct_hu", "brain", "bone", "lesion")}
    arrays |= {name: given.pop(name) for name in list(given) if name in arrays}
    mri, ct = (image(arrays[name], spacing_mm) for name in ("mri", "ct_hu"))
    masks = {
        f"{name}_mask": sitk.Cast(image(arrays[name], spacing_mm), sitk.sitkUInt8)
        for name in ("brain", "bone", "lesion")
    }
    scans = {"mri": mri, "ct": ct} | (scans or {})
    return quality(
        mri, ct, masks, {name: Scan(scan, Path(name)) for name, scan in scans.items()}, **given
    )


def registered(**changes):
    """A registration that nothing is wrong with, but for ``changes``."""
    good = {f.name: 0.0 for f in fields(registration_quality.Quality)}
    good |= {"mutual_information": 1.0, "sharpness": 0.5, "head_overlap": 0.98, "covered": 1.0}
    good |= {"smallest_jacobian": 1.0, "is_given": False}
    measured = registration_quality.Quality(**(good | changes))
    return Registration(STILL, "rigid", "simpleitk", measured, 1.0, 0)


def test_a_phantom_as_it_is_passes_without_a_reason(phantom):
    found = judged(phantom, registration=registered())
    assert (found.verdict, found.reasons) == ("pass", ())


def test_volumes_are_the_masks_voxels_in_ml(phantom):
    facts = judged(phantom, sources={"brain_mask": "files"}).facts
    for name in ("brain", "bone", "lesion"):
        ml = getattr(phantom, name).sum() * np.prod(SPACING_MM) / 1000
        assert facts[name] == f"{ml:.4g} ml"
    assert facts["brain mask from"] == "files"


def test_grids_are_told_in_the_order_and_orientation_they_are_stored_in(phantom):
    mri = sitk.DICOMOrient(image(phantom.mri), "LSP")
    facts = judged(phantom, scans={"mri": mri}).facts
    assert facts["MRI"] == "64 × 30 × 72 voxels of 3 × 5 × 3 mm, axes LSP"
    assert facts["study"] == "64 × 72 × 30 voxels of 3 × 3 × 5 mm, axes RAS"


@pytest.mark.parametrize(
    ("changes", "verdict", "sentence"),
    [
        ({"disagreement_mm": 2.4}, "warn", "another search ended 2.4 mm away"),
        ({"disagreement_mm": 9.0}, "fail", "another search ended 9.0 mm away"),
    ],
)
def test_what_registration_says_counts(phantom, changes, verdict, sentence):
    found = judged(phantom, registration=registered(**changes))
    assert found.verdict == verdict and found.reasons == (sentence,)
    assert found.facts["disagreement"] == f"{changes['disagreement_mm']:.3g} mm"
    assert found.facts["registration"] == "rigid"


def test_plausibility_warns_and_notes_do_not(phantom):
    noted = judged(phantom, notes=["ct: a gantry tilt of 12.0 degrees was taken out"])
    assert noted.verdict == "pass" and noted.notes == (
        "ct: a gantry tilt of 12.0 degrees was taken out",
    )
    doubted = judged(phantom, plausibility=["a brain of 300 ml"])
    assert (doubted.verdict, doubted.reasons) == ("warn", ("a brain of 300 ml",))


def only_reason(found, verdict):
    assert found.verdict == verdict, found.reasons
    assert len(found.reasons) == 1, found.reasons
    return found.reasons[0]


def test_the_worst_reason_comes_first(phantom):
    found = judged(phantom, ct_hu=phantom.ct_hu + 1024, plausibility=["a brain of 300 ml"])
    assert found.verdict == "fail"
    assert found.reasons[0].startswith("expected CT in HU (air below -200)")
    assert found.reasons[-1] == "a brain of 300 ml"


def test_a_window_instead_of_hu_is_a_warning(phantom):
    window = np.round(np.clip((phantom.ct_hu + 60) / 200, 0, 1) * 255)
    found = judged(phantom, ct_hu=window)
    assert "8-bit window (0 to 255)" in only_reason(found, "warn")
    assert "CT (8-bit window)" in found.histograms


def test_a_wrong_rescale_intercept_shows_in_the_brain(phantom):
    reason = only_reason(judged(phantom, ct_hu=phantom.ct_hu + 100), "warn")
    median = np.median(phantom.ct_hu[phantom.brain]) + 100
    assert reason.startswith(f"the median of the CT in the brain mask is {median:.0f} HU")


@pytest.mark.parametrize(("empty", "verdict"), [(5, "warn"), (20, "fail")])
@pytest.mark.parametrize("which", ["mri", "ct_hu"])
def test_empty_slices_are_counted_where_the_other_image_shows_the_head(
    phantom, which, empty, verdict
):
    array = getattr(phantom, which).copy()
    array[4 : 4 + empty] = array.min()
    found = judged(phantom, **{which: array})
    name = "MRI" if which == "mri" else "CT"
    assert found.verdict == verdict
    assert any(f"the {name} is empty in {empty} of the" in reason for reason in found.reasons)


def test_air_above_the_head_is_no_empty_slice(phantom):
    ct = phantom.ct_hu.copy()
    above = ~(phantom.ct_hu > -300).any(axis=(1, 2))
    assert above.any()
    ct[above] = -1000
    assert judged(phantom, ct_hu=ct).verdict == "pass"


def test_a_field_of_view_that_cuts_the_skull_is_named_with_its_border(phantom):
    cut = image(phantom.ct_hu[:20])
    reasons = judged(phantom, scans={"ct": cut}).reasons
    assert any("of the CT cuts the head at the top" in reason for reason in reasons)
    area_cm2 = float(next(r for r in reasons if "at the top" in r).split("over ")[1].split()[0])
    truth_cm2 = (phantom.ct_hu[19] > -300).sum() * 9 / 100
    assert area_cm2 == pytest.approx(truth_cm2, rel=0.1)  # the nose and sinuses are not the same
    right = image(phantom.mri[:, :, :40])
    found = judged(phantom, scans={"mri": right})
    assert "the field of view of the MRI cuts the head at the patient's right" in str(found.reasons)


def test_coverage_is_the_share_of_one_head_outside_the_view_of_the_other(phantom):
    in_head = phantom.ct_hu > -300
    half = judged(phantom, scans={"ct": image(phantom.ct_hu[:20])})
    share = float(half.facts["MRI's head unseen by CT"].rstrip("%")) / 100
    assert share == pytest.approx(in_head[20:].sum() / in_head.sum(), abs=0.03)
    assert half.facts["CT's head unseen by MRI"] == "0.0%"
    assert any("of the MRI's head lies outside" in reason for reason in half.reasons)


def test_a_ct_that_reaches_further_than_the_mri_is_a_fact_and_no_fault(phantom):
    lower = slice(8, None)
    arrays = {name: getattr(phantom, name)[lower] for name in ("mri", "ct_hu", "brain", "bone")}
    full = image(phantom.ct_hu)
    full.SetOrigin((0, 0, -8 * SPACING_MM[0]))
    found = judged(phantom, scans={"ct": full}, lesion=phantom.lesion[lower], **arrays)
    in_head = phantom.ct_hu > -300
    share = float(found.facts["CT's head unseen by MRI"].rstrip("%")) / 100
    assert share == pytest.approx(in_head[:8].sum() / in_head.sum(), abs=0.04)
    assert not any("view of the CT" in reason for reason in found.reasons)


def test_the_view_is_looked_for_where_the_registration_puts_it(phantom):
    moved = image(phantom.ct_hu)
    moved.SetOrigin((300.0, -200.0, 1000.0))
    lost = judged(phantom, scans={"ct": moved})
    assert lost.facts["MRI's head unseen by CT"] == "100.0%"
    way = sitk.TranslationTransform(3, (300.0, -200.0, 1000.0))
    back = judged(phantom, scans={"ct": moved}, registration=replace(registered(), transform=way))
    assert back.facts["MRI's head unseen by CT"] == "0.0%"
    assert back.facts["CT's head unseen by MRI"] == "0.0%"


def test_a_brain_beside_the_head_is_found(phantom):
    found = judged(phantom, brain=np.roll(phantom.brain, 18, axis=2))
    assert found.verdict == "fail"
    assert any("of the brain mask lies outside the head" in reason for reason in found.reasons)


def test_masks_that_do_not_register_overlap(phantom):
    found = judged(phantom, bone=np.roll(phantom.bone, 5, axis=1))
    assert any("of the bone mask lies inside the brain mask" in r for r in found.reasons)


def test_a_bone_mask_in_soft_tissue_is_found(phantom):
    reasons = judged(phantom, bone=phantom.brain).reasons
    assert any("the bone mask is not bright on the CT" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("spacing_mm", "sentence"),
    [
        ((12.0, 3.0, 3.0), "voxels of the MRI are 3 × 3 × 12 mm, expected 0.2 to 8 mm"),
        ((5.0, 3.0, 0.1), "voxels of the CT are 0.1 × 3 × 5 mm, expected 0.2 to 8 mm"),
        ((5.0, 3.0, 0.25), "voxels of the CT are 20 times as long as wide, expected up to 15"),
    ],
)
def test_odd_voxels_are_told(phantom, spacing_mm, sentence):
    assert sentence in judged(phantom, spacing_mm=spacing_mm).reasons


def test_an_mri_without_a_head_fails(phantom):
    found = judged(phantom, mri=np.zeros(SHAPE))
    assert found.verdict == "fail" and "no head was found in the MRI" in found.reasons


def test_a_study_without_ct_and_masks_is_judged_by_its_mri(phantom):
    mri = image(phantom.mri)
    found = quality(mri, None, {}, {"mri": Scan(mri, Path("mri"))})
    assert found.verdict == "pass" and found.facts["brain"] == "no mask"
    assert list(found.histograms) == ["MRI (scanner units)"]


def test_histograms_count_every_voxel_of_the_head_once(phantom):
    found = judged(phantom).histograms
    counts = {name: histogram.counts.sum() for name, histogram in found.items()}
    assert len(set(counts.values())) == 1
    ct = found["CT (HU)"]
    middles = (ct.edges[1:] + ct.edges[:-1]) / 2
    fullest = middles[ct.counts.argmax()]
    assert abs(fullest - np.median(phantom.ct_hu[phantom.brain])) < 25


def test_bins_of_whole_numbers_hold_as_many_numbers_each(phantom):
    whole = np.round(phantom.mri * 300 / phantom.mri.max())
    edges = judged(phantom, mri=whole).histograms["MRI (scanner units)"].edges
    held = [np.sum((np.arange(400) >= a) & (np.arange(400) < b)) for a, b in pairwise(edges)]
    assert len(set(held[1:-1])) == 1


def test_json_has_no_nan_and_comes_back_the_same(phantom):
    odd = registered(sharpness=float("nan"))
    for found in (judged(phantom, registration=odd), judged(phantom, mri=np.zeros(SHAPE))):
        text = json.dumps(found.as_json(), allow_nan=False)
        assert "nan" not in text.lower()
        back = Quality.from_json(json.loads(text))
        assert back.as_json() == found.as_json()
        assert replace(back, histograms={}) == replace(found, histograms={})


def test_images_on_other_grids_and_of_nan_are_refused(phantom):
    mri, other = image(phantom.mri), image(phantom.ct_hu)
    other.SetOrigin((5, 0, 0))
    scans = {"mri": Scan(mri, Path("mri")), "ct": Scan(other, Path("ct"))}
    with pytest.raises(ValueError, match="expected ct on the grid of the MRI"):
        quality(mri, other, {}, scans)
    with pytest.raises(ValueError, match="expected finite voxels in ct, got 30"):
        broken = phantom.ct_hu.copy()
        broken[:, 0, 0] = np.nan
        quality(mri, image(broken), {}, scans)


def test_real_scans_in_an_8_bit_window_warn_and_do_not_fail(shared_data):
    folder = shared_data / "harvard_studies" / "case_20"
    mri, ct = (
        sitk.ReadImage(str(folder / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("mri", "ct")
    )
    scans = {"mri": Scan(mri, folder / "mri.nii.gz"), "ct": Scan(ct, folder / "ct.nii.gz")}
    found = quality(mri, ct, {}, scans)
    assert found.verdict == "warn"
    assert any("8-bit window" in reason for reason in found.reasons)
