"""Phantom patients: deterministic, physically ordered, and like the stroke cohort they imitate."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, binary_fill_holes, label

from clinfuse.data.phantom_anatomy import Lattice, SmoothNoise, Tissue, draw_head, lattice_for
from clinfuse.data.phantom_lesions import draw_pathology, lesion_volume_ml, split_volume
from clinfuse.data.phantom_signals import (
    CONTRASTS,
    Scanner,
    ct_pair,
    mri_pair,
    rician,
    spin_echo,
    tissue_table,
)
from clinfuse.data.phantoms import cohort_splits, make_phantom, write_cohort

COARSE = {"shape": (16, 32, 32), "spacing_mm": (8.0, 6.0, 6.0)}
ARRAYS = (
    "mri", "clean_mri", "ct_hu", "clean_ct_hu", "brain", "bone", "lesion", "findings",
)  # fmt: skip


@cache
def ordinary(case, contrast="t2"):
    """A phantom on a grid like that of the experiments, a little coarser."""
    return make_phantom(case, 0, (24, 64, 64), (5.0, 3.0, 3.0), contrast)


VOXEL_ML = 0.045


def case_with_volume(low_ml, high_ml):
    return next(i for i in range(60) if low_ml <= lesion_volume_ml(i) <= high_ml)


def test_the_same_seed_and_case_give_the_same_voxels():
    first, second = (make_phantom(3, seed=5, **COARSE) for _ in range(2))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.facts == second.facts


@pytest.mark.parametrize("case, seed", [(4, 5), (3, 6)])
def test_another_case_and_another_seed_are_other_heads(case, seed):
    here, there = make_phantom(3, seed=5, **COARSE), make_phantom(case, seed=seed, **COARSE)
    for name in ("brain", "bone", "clean_mri", "clean_ct_hu"):
        assert not np.array_equal(getattr(here, name), getattr(there, name))


def test_contrasts_of_one_case_share_the_anatomy_and_the_ct():
    phantoms = [make_phantom(2, contrast=c, **COARSE) for c in CONTRASTS]
    for other in phantoms[1:]:
        for name in ("ct_hu", "brain", "bone", "lesion", "findings"):
            np.testing.assert_array_equal(getattr(other, name), getattr(phantoms[0], name))


def test_arrays_are_finite_and_of_the_promised_types():
    p = ordinary(1, "adc")
    for name in ARRAYS:
        array = getattr(p, name)
        assert array.shape == (24, 64, 64) and np.isfinite(array).all()
        assert array.dtype == (np.float32 if array.dtype != bool else bool)
    assert (p.case_id, p.spacing_mm, p.contrast) == ("case_001", (5.0, 3.0, 3.0), "adc")


def test_an_unknown_contrast_and_a_flat_grid_are_refused():
    with pytest.raises(ValueError, match="swi"):
        make_phantom(0, contrast="swi")
    with pytest.raises(ValueError, match="shape"):
        make_phantom(0, shape=(32, 32), spacing_mm=(2.0, 2.0))


# --- physics -------------------------------------------------------------------------------------

SLABS = (Tissue.WHITE_MATTER, Tissue.GREY_MATTER, Tissue.CSF, Tissue.INFARCT, Tissue.AIR)


def imaged_slabs(contrast, field_t=1.5, snr=20.0):
    """Noisy and clean mean signal of one homogeneous slab a tissue, far from its borders."""
    lattice = Lattice((len(SLABS) * 8, 24, 24), (1.0, 1.0, 1.0), (1, 1, 1))
    labels = np.repeat(np.array(SLABS, np.uint8), 8)[:, None, None] * np.ones((1, 24, 24), np.uint8)
    scanner = Scanner(field_t, snr, ct_noise_hu=5.0, bias=0.0, infarct_severity=1.0)
    rng = np.random.default_rng(0)
    noise = SmoothNoise(rng, lattice.axes_mm())
    if contrast == "ct":
        pair = ct_pair(rng, labels, [], lattice, scanner, noise)
    else:
        pair = mri_pair(rng, labels, lattice, contrast, scanner, noise)
    return [
        {t: image[8 * i + 2 : 8 * i + 6] for i, t in enumerate(SLABS)} for image in pair
    ]  # noisy, clean


@pytest.mark.parametrize("field_t", [1.5, 3.0])
@pytest.mark.parametrize(
    "contrast, brightest_first",
    [
        ("t1", (Tissue.WHITE_MATTER, Tissue.GREY_MATTER, Tissue.CSF)),
        ("t2", (Tissue.CSF, Tissue.INFARCT, Tissue.GREY_MATTER, Tissue.WHITE_MATTER)),
        ("pd", (Tissue.GREY_MATTER, Tissue.WHITE_MATTER)),
        ("flair", (Tissue.INFARCT, Tissue.GREY_MATTER, Tissue.WHITE_MATTER, Tissue.CSF)),
        ("adc", (Tissue.CSF, Tissue.GREY_MATTER, Tissue.WHITE_MATTER, Tissue.INFARCT)),
        ("ct", (Tissue.GREY_MATTER, Tissue.WHITE_MATTER, Tissue.INFARCT, Tissue.CSF)),
    ],
)
def test_tissues_are_as_bright_as_physics_says(contrast, brightest_first, field_t):
    _, clean = imaged_slabs(contrast, field_t)
    means = [clean[tissue].mean() for tissue in brightest_first]
    assert means == sorted(means, reverse=True)
    assert np.diff(means).max() < -0.03 * max(means)


def test_a_spin_echo_forgets_t1_at_long_tr_and_decays_by_e_in_t2():
    table = tissue_table(Scanner(1.5, 20.0, 5.0, 0.0, 1.0))
    long_tr = 1e6
    early, late = (spin_echo(table, long_tr, te)[Tissue.WHITE_MATTER] for te in (0.0, 78.0))
    assert early == pytest.approx(table["proton_density"][Tissue.WHITE_MATTER])
    assert early / late == pytest.approx(np.e, rel=1e-4)


def test_adc_of_pure_tissue_is_the_one_that_went_in():
    noisy, clean = imaged_slabs("adc", snr=60.0)
    assert clean[Tissue.WHITE_MATTER] == pytest.approx(740, rel=1e-3)
    assert clean[Tissue.CSF] == pytest.approx(3000, rel=1e-3)
    assert noisy[Tissue.WHITE_MATTER].mean() == pytest.approx(740, rel=0.02)


def test_air_has_no_adc():
    noisy, clean = imaged_slabs("adc")
    assert not noisy[Tissue.AIR].any() and not clean[Tissue.AIR].any()


def test_white_matter_has_the_signal_to_noise_ratio_of_its_protocol():
    noisy, clean = imaged_slabs("t2", snr=15.0)
    residual = (noisy[Tissue.WHITE_MATTER] - clean[Tissue.WHITE_MATTER]).std()
    assert clean[Tissue.WHITE_MATTER].mean() / residual == pytest.approx(15, rel=0.05)


def test_magnitude_noise_in_air_is_rayleigh():
    noise = rician(np.random.default_rng(0), np.zeros((40, 50, 50), np.float32), 3.0)
    assert noise.mean() == pytest.approx(3 * np.sqrt(np.pi / 2), rel=0.01)
    assert noise.std() == pytest.approx(3 * np.sqrt(2 - np.pi / 2), rel=0.01)


def test_noise_fields_have_unit_variance_and_do_not_depend_on_the_grid():
    axes = [np.arange(-60, 61, step, dtype=np.float32) for step in (4, 2, 3)]
    coarse, fine = (
        SmoothNoise(np.random.default_rng(1), a)(8.0) for a in (axes, [axes[0], *[axes[1]] * 2])
    )
    np.testing.assert_allclose(coarse[:, ::3, ::2], fine[:, ::3, ::3], atol=1e-5)
    assert fine.std() == pytest.approx(1, abs=0.1)


def test_ct_tissues_lie_in_their_hounsfield_ranges():
    p = ordinary(0)
    assert np.percentile(p.clean_ct_hu, 2) == pytest.approx(-1000, abs=1)
    assert 25 < np.median(p.clean_ct_hu[p.brain]) < 40
    low, high = np.percentile(p.clean_ct_hu[p.bone], [5, 99])
    assert low > 300 and 900 < high < 2000
    assert p.clean_ct_hu.max() < 3000


def test_ct_noise_is_a_few_hu_in_the_brain_and_more_in_bone():
    p = ordinary(0)
    error = p.ct_hu - p.clean_ct_hu
    soft = p.brain & (p.clean_ct_hu > 20) & (p.clean_ct_hu < 45)
    assert 3.5 < error[soft].std() < 9
    assert error[p.bone].std() > 3 * error[soft].std()
    assert abs(error[soft].mean()) < 0.5


# --- anatomy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(4))
def test_a_head_has_the_size_of_a_head_and_air_around_it(case):
    p = ordinary(case)
    assert 900 < p.brain.sum() * VOXEL_ML < 1700
    assert 200 < p.bone.sum() * VOXEL_ML < 600
    head = p.clean_ct_hu > -500
    sides = [np.flatnonzero(head.any(axis=other)) for other in ((0, 2), (0, 1))]
    for occupied, shortest_mm in zip(sides, (155, 125), strict=True):
        margin_mm = 3.0 * min(occupied[0], 63 - occupied[-1])
        assert margin_mm >= 6.0  # a 4 mm and 4 degree jitter moves the nose by less than this
        assert shortest_mm < 3.0 * len(occupied) < shortest_mm + 50


def test_a_narrow_grid_gets_a_smaller_head_with_air_around_it():
    p = make_phantom(0, shape=(16, 32, 32), spacing_mm=(5.0, 4.0, 4.0))
    head = p.clean_ct_hu > -500
    assert head[:, 16, 16].any()
    assert not head[:, 0].any() and not head[:, -1].any()
    assert not head[:, :, 0].any() and not head[:, :, -1].any()


@pytest.mark.parametrize("case", range(3))
def test_the_skull_encloses_the_brain_above_the_base(case):
    p = ordinary(case)
    for d in range(11, 18):
        assert p.brain[d].sum() * 0.09 > 30  # cm^2
        assert not (p.brain[d] & ~binary_fill_holes(p.bone[d])).any()
    assert not (p.brain & p.bone).any()


def test_the_eyes_look_forward_below_the_middle_of_the_grid():
    lattice = lattice_for((24, 48, 48), (5.0, 4.0, 4.0))
    anatomy = draw_head(np.random.default_rng(0), lattice)
    d, h, _ = np.nonzero(anatomy.labels == Tissue.LENS)
    centre = np.array(lattice.fine_shape) / 2
    assert d.max() < centre[0] and h.min() > centre[1]


def test_tissue_volumes_do_not_depend_on_the_grid():
    coarse = make_phantom(case_with_volume(5, 30), shape=(32, 96, 96), spacing_mm=(4.0, 2.0, 2.0))
    fine = make_phantom(case_with_volume(5, 30), shape=(26, 64, 64), spacing_mm=(5.0, 3.0, 3.0))
    for name, tolerance in (("brain", 0.04), ("bone", 0.08), ("lesion", 0.03)):
        volumes = [getattr(p, name).sum() * np.prod(p.spacing_mm) for p in (coarse, fine)]
        assert volumes[0] == pytest.approx(volumes[1], rel=tolerance)


def test_the_clean_mri_is_what_the_scan_averages_to():
    p = ordinary(0, "t2")
    difference = (p.mri - p.clean_mri)[p.brain]
    assert abs(difference.mean()) < 0.1 * p.clean_mri[p.brain].mean()
    assert 0.01 < difference.std() / p.clean_mri[p.brain].mean() < 0.2
    assert np.corrcoef(p.mri[p.brain], p.clean_mri[p.brain])[0, 1] > 0.9


# --- lesions and findings ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sixty_cases_have_the_lesions_of_the_stroke_cohort(seed):
    volumes = np.array([lesion_volume_ml(case, seed) for case in range(60)])
    lesions = volumes[volumes > 0]
    assert len(lesions) == 54
    assert np.median(lesions) == pytest.approx(2.2, rel=0.15)
    assert lesions.mean() == pytest.approx(10.3, rel=0.15)  # method.md, section 8
    assert lesions.std() == pytest.approx(15.2, rel=0.10)
    assert lesions.min() >= 0.01 and lesions.max() <= 57.8


def test_lesion_volumes_come_in_another_order_for_another_seed_and_block():
    first, second = ([lesion_volume_ml(i, s) for i in range(60)] for s in (0, 1))
    third = [lesion_volume_ml(i, 0) for i in range(60, 120)]
    assert first != second and first != third


@given(total=st.floats(0.01, 57.8), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_split_lesions_sum_to_the_total(total, seed):
    parts = split_volume(np.random.default_rng(seed), total)
    assert sum(parts) == pytest.approx(total) and min(parts) > 0


@pytest.mark.parametrize("low, high", [(0.01, 0.2), (1, 4), (20, 58)])
def test_a_lesion_lies_in_the_brain_with_the_volume_that_was_drawn(low, high):
    case = case_with_volume(low, high)
    p = ordinary(case)
    assert p.lesion.any() and not (p.lesion & ~p.brain).any()
    assert p.lesion.sum() * VOXEL_ML == pytest.approx(lesion_volume_ml(case), rel=0.1, abs=VOXEL_ML)
    assert p.facts["lesion_volume_ml"] == pytest.approx(lesion_volume_ml(case), abs=1e-4)


def test_one_case_in_ten_has_no_lesion():
    case = case_with_volume(0, 0)
    assert not make_phantom(case, **COARSE).lesion.any()


def test_a_large_infarct_is_dark_on_adc_and_hypodense_on_ct():
    p = ordinary(case_with_volume(20, 58), "adc")
    brain_tissue = p.brain & (p.clean_mri > 600) & (p.clean_mri < 1000) & ~p.lesion
    assert np.median(p.clean_mri[p.lesion]) < 0.85 * np.median(
        p.clean_mri[brain_tissue]
    )  # half in pure tissue; sulci share the voxels
    difference = p.clean_ct_hu[brain_tissue].mean() - p.clean_ct_hu[p.lesion].mean()
    assert 2 < difference < 20


def test_an_irregular_lesion_holds_together():
    p = ordinary(case_with_volume(20, 58))
    pieces, _ = label(binary_dilation(p.lesion))
    largest = np.sort(np.bincount(pieces[p.lesion])[1:])[::-1]
    drawn = len(p.facts["lesion_volumes_ml"])
    assert largest[:drawn].sum() > 0.9 * p.lesion.sum()
    compact_mm2 = 4.84 * (p.lesion.sum() * 45) ** (2 / 3)  # a sphere's surface
    assert surface_mm2(p.lesion, p.spacing_mm) > 1.5 * 1.3 * compact_mm2  # 1.5: voxel staircase


def surface_mm2(mask, spacing_mm):
    faces = [np.diff(mask.astype(int), axis=a) != 0 for a in range(3)]
    areas = [np.prod(spacing_mm) / s for s in spacing_mm]
    return sum(f.sum() * a for f, a in zip(faces, areas, strict=True))


def findings_by_kind(kind):
    """A coarse-gridded phantom whose facts hold a finding of this kind."""
    for case in range(40):
        p = make_phantom(case, **COARSE)
        if any(f["kind"] == kind for f in p.facts["findings"]):
            return case
    raise AssertionError(f"no {kind} in 40 cases")


def test_a_haemorrhage_is_dense_on_ct_and_absent_from_the_mri(monkeypatch):
    case = findings_by_kind("haemorrhage")
    with_blood = ordinary(case)
    monkeypatch.setattr("clinfuse.data.phantom_lesions._add_pathology", lambda *_: None)
    without = ordinary.__wrapped__(case)
    blood = with_blood.findings & ~without.findings
    core = blood & (with_blood.clean_ct_hu > without.clean_ct_hu + 15)
    assert core.sum() * VOXEL_ML > 0.2
    assert 45 < np.median(with_blood.clean_ct_hu[core]) < 100
    np.testing.assert_array_equal(with_blood.clean_mri, without.clean_mri)
    assert not (with_blood.findings & ~with_blood.brain).any()


def test_about_a_third_of_heads_have_pathology_that_only_the_ct_shows():
    rng = np.random.default_rng(0)
    kinds = [draw_pathology(rng) for _ in range(2000)]
    assert np.mean([k != "none" for k in kinds]) == pytest.approx(0.35, abs=0.035)
    assert set(kinds) == {"none", "haemorrhage", "calcification"}


# --- cohorts on disk -----------------------------------------------------------------------------

SMALL = {"shape": (8, 16, 16), "spacing_mm": (16.0, 12.0, 12.0), "workers": 1}


def test_a_cohort_can_be_read_back_in_ras(tmp_path):
    folder = write_cohort(tmp_path / "cohort", 3, seed=1, **SMALL)
    p = make_phantom(1, 1, SMALL["shape"], SMALL["spacing_mm"], contrast="t2")
    stored = {
        "mri": p.mri, "clean_mri": p.clean_mri, "ct": p.ct_hu, "clean_ct": p.clean_ct_hu,
        "brain_mask": p.brain, "bone_mask": p.bone, "lesion_mask": p.lesion,
    }  # fmt: skip
    for name, volume in stored.items():
        image = nib.load(folder / "case_001" / f"{name}.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_zooms() == (12.0, 12.0, 16.0)
        np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), volume)
        middle = image.affine @ [7.5, 7.5, 3.5, 1]
        np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-5)
    study = json.loads((folder / "case_001" / "study.json").read_text())
    assert study["mri_contrast"] == "t2" and study["seed"] == 1
    splits = json.loads((folder / "splits.json").read_text())
    assert sorted(chain(*splits.values())) == ["case_000", "case_001", "case_002"]


def test_a_complete_cohort_is_left_alone_and_an_interrupted_one_continued(tmp_path):
    folder = write_cohort(tmp_path, 3, **SMALL)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    write_cohort(tmp_path, 3, **SMALL)
    assert before == {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}
    lost = (folder / "case_002" / "ct.nii.gz").read_bytes()
    for file in (folder / "case_002").iterdir():
        file.unlink()
    (folder / "case_002").rmdir()
    (folder / "splits.json").unlink()
    write_cohort(tmp_path, 3, **SMALL)
    again = nib.load(folder / "case_002" / "ct.nii.gz").get_fdata()
    (tmp_path / "lost.nii.gz").write_bytes(lost)
    np.testing.assert_array_equal(again, nib.load(tmp_path / "lost.nii.gz").get_fdata())
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_a_cohort_that_several_processes_want_at_once_is_made_once(tmp_path):
    want = partial(write_cohort, tmp_path / "cohort", 4, **SMALL)
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        folders = [job.result() for job in [pool.submit(want) for _ in range(3)]]
    assert folders == 3 * [tmp_path / "cohort"]
    cases = {f"case_{i:03d}" for i in range(4)}
    assert {path.name for path in folders[0].iterdir()} == cases | {"cohort.json", "splits.json"}


def test_a_cohort_of_other_parameters_is_refused_with_both(tmp_path):
    write_cohort(tmp_path, 1, seed=1, **SMALL)
    with pytest.raises(ValueError, match=r"'seed': 1.*'seed': 2"):
        write_cohort(tmp_path, 1, seed=2, **SMALL)


def test_workers_write_what_one_process_writes(tmp_path):
    alone = write_cohort(tmp_path / "alone", 2, **SMALL)
    together = write_cohort(tmp_path / "together", 2, **{**SMALL, "workers": 2})
    for name in ("mri", "ct", "lesion_mask"):
        images = [nib.load(f / "case_001" / f"{name}.nii.gz") for f in (alone, together)]
        np.testing.assert_array_equal(*(i.get_fdata() for i in images))


@given(cases=st.integers(1, 200))
@settings(deadline=None)
def test_splits_are_disjoint_complete_and_70_15_15(cases):
    splits = cohort_splits(cases)
    names = list(chain(*splits.values()))
    assert len(set(names)) == len(names) == cases
    assert abs(len(splits["train"]) - 0.7 * cases) <= 1
    assert abs(len(splits["test"]) - 0.15 * cases) <= 0.5


def test_sixty_cases_split_into_42_9_and_9():
    assert [len(names) for names in cohort_splits(60).values()] == [42, 9, 9]
