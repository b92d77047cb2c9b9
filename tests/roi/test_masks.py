"""Classical masks, checked on a head drawn from ellipsoids, whose masks are known."""

import os
from pathlib import Path

import numpy as np
import pytest

from clinfuse.data.phantoms import make_phantom
from clinfuse.roi.masks import bone_mask, brain_mask, enclosed, head_mask

SPACINGS_MM = [(5.0, 0.9, 0.9), (2.0, 2.0, 2.0), (4.0, 2.0, 2.0)]
SHARED = Path(os.environ.get("CLINFUSE_DATA", Path(__file__).parents[3] / "shared/data"))


def head_ct(spacing_mm, noise_hu=6.0, opening_mm=0.0, seed=0):
    """CT in HU with the true brain and skull: scalp, skull with an optic canal, globe, table.

    ``opening_mm`` is the width of a craniotomy on the left.
    """
    shape = tuple(
        round(extent / size) for extent, size in zip((130, 210, 190), spacing_mm, strict=True)
    )
    d, h, w = np.meshgrid(
        *[np.arange(n) * s - e / 2 for n, s, e in
          zip(shape, spacing_mm, (100, 210, 190), strict=True)], indexing="ij"
    )  # fmt: skip

    def ellipsoid(radii, centre=(0, 0, 0)):
        return (
            sum(((x - c) / r) ** 2 for x, c, r in zip((d, h, w), centre, radii, strict=True)) <= 1
        )

    head, outer, inner = (ellipsoid((75 + t, 80 + t, 65 + t)) for t in (13, 7, 0))
    canal = (np.hypot(d + 20, w - 20) < 2.5) & (h > 0)  # through the bone, along the optic nerve
    globe = ellipsoid((12, 12, 12), (-20, 88, 20))
    skull = outer & ~inner & ~canal & ~globe
    skull &= ~((np.abs(h) < opening_mm / 2) & (np.abs(d) < opening_mm / 2) & (w < 0))
    table = (np.abs(h + 99) < 2) & (np.abs(w) < 60)
    ct_hu = np.full(shape, -1000.0)
    for where, hu in ((head, -80), (head & (np.abs(w) < 40), 40), (inner | canal | globe, 32),
                      (ellipsoid((10, 20, 8)), 5), (skull, 900), (table, 400)):  # fmt: skip
        ct_hu[where] = hu
    ct_hu += np.random.default_rng(seed).normal(0, noise_hu, shape)
    return (
        ct_hu.astype(np.float32),
        inner,
        skull,
        {"globe": globe & ~inner, "head": head, "table": table},
    )


def eight_bit(ct_hu):
    return np.clip((ct_hu + 40) / 160 * 255, 0, 255).astype(np.uint8)  # a window of -40..120 HU


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("spacing_mm", SPACINGS_MM)
@pytest.mark.parametrize("window", ["hu", "8-bit"])
def test_brain_and_skull_are_found_at_every_spacing_in_hu_and_in_eight_bits(spacing_mm, window):
    ct_hu, true_brain, true_skull, others = head_ct(spacing_mm)
    ct = ct_hu if window == "hu" else eight_bit(ct_hu)
    bone = bone_mask(ct, spacing_mm, is_hu=window == "hu")
    brain = brain_mask(ct, bone, spacing_mm)
    assert dice(bone, true_skull) > 0.98
    assert dice(brain, true_brain) > 0.97
    assert not (brain & bone).any()
    assert (brain & others["globe"]).sum() < 0.02 * others["globe"].sum()
    assert (brain & ~true_brain).sum() < 0.01 * true_brain.sum()
    assert not (bone & others["table"]).any()


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [
        ((30, 256, 256), (5.0, 0.9, 0.9)),
        pytest.param((160, 240, 208), (1.0, 1.0, 1.0), marks=pytest.mark.slow),
    ],
)
def test_phantoms_with_noise_and_partial_volume_have_their_true_brain_and_bone(shape, spacing_mm):
    phantom = make_phantom(0, 11, shape, spacing_mm)
    bone = bone_mask(phantom.ct_hu, spacing_mm, is_hu=True)
    assert dice(bone, phantom.bone) > 0.90
    assert dice(brain_mask(phantom.ct_hu, bone, spacing_mm), phantom.brain) > 0.95


def test_a_voxel_that_is_mostly_tissue_is_no_bone_and_spongy_bone_between_tables_is():
    ct = np.full((9, 60, 60), 40.0, np.float32)
    ct[:, 5:55, 5:55] = 1000
    ct[:, 8:52, 8:52] = 400  # spongy bone between the tables
    ct[:, 11:49, 11:49] = 1000
    ct[:, 14:46, 14:46] = 350  # one third bone: partial volume
    ct[:, 16:44, 16:44] = 40
    ct[:, :3] = ct[:, -3:] = -1000
    bone = bone_mask(ct, (5.0, 1.0, 1.0), is_hu=True)
    assert bone[4, 9, 20:40].all() and bone[4, 12, 20:40].all() and bone[4, 6, 20:40].all()
    assert not bone[4, 14:46, 24:36].any()  # corners, which heads have none of, are rounded


def test_enclosed_is_what_sees_bone_on_nearly_all_sides():
    ring = np.zeros((1, 40, 40), bool)
    ring[0, 10:30, 10:30] = True
    ring[0, 12:28, 12:28] = False
    assert enclosed(ring)[0, 14:26, 14:26].all()
    assert not enclosed(ring)[0, :9].any() and not enclosed(ring)[0, :, 31:].any()


def test_a_craniotomy_lets_neither_the_brain_out_nor_the_scalp_in():
    spacing_mm = (5.0, 0.9, 0.9)
    ct, true_brain, *_ = head_ct(spacing_mm, opening_mm=40)
    brain = brain_mask(ct, bone_mask(ct, spacing_mm, is_hu=True), spacing_mm)
    assert dice(brain, true_brain) > 0.97
    assert (brain & ~true_brain).sum() < 0.02 * true_brain.sum()


@pytest.mark.parametrize("hu", [400, 75])
def test_calcium_and_blood_inside_belong_to_the_brain_and_not_to_bone(hu):
    spacing_mm = (5.0, 0.9, 0.9)
    ct, true_brain, _, _ = head_ct(spacing_mm)
    middle = tuple(n // 2 for n in ct.shape)
    dense = np.zeros(ct.shape, bool)
    dense[
        middle[0] - 1 : middle[0] + 2, middle[1] + 25 : middle[1] + 50, middle[2] : middle[2] + 25
    ] = True
    assert (dense <= true_brain).all()
    ct[dense] = hu
    for image, is_hu in ((ct, True), (eight_bit(ct), False)):
        bone = bone_mask(image, spacing_mm, is_hu)
        assert not (bone & dense).any()
        assert (brain_mask(image, bone, spacing_mm) >= dense).all()


def test_the_head_is_found_in_ct_and_in_mri_without_the_table():
    ct, true_brain, skull, others = head_ct((5.0, 0.9, 0.9))
    mri = np.random.default_rng(1).rayleigh(8, ct.shape)
    for where, value in ((others["head"], 300), (skull, 10), (true_brain, 200)):
        mri[where] += value
    windowed = eight_bit(ct)
    for volume in (ct, windowed, mri.astype(np.float32)):
        head = head_mask(volume)
        assert head[true_brain].mean() > 0.999
        assert not (head & others["table"]).any()
        if volume is not windowed:  # a narrow window has no subcutaneous fat
            assert dice(head, others["head"]) > 0.97


def test_without_any_bone_both_masks_are_empty():
    ct = np.full((6, 40, 40), 30.0, np.float32)
    bone = bone_mask(ct, (5.0, 1.0, 1.0), is_hu=True)
    assert not bone.any() and not brain_mask(ct, bone, (5.0, 1.0, 1.0)).any()


@pytest.mark.skipif(not (SHARED / "harvard_studies").exists(), reason=f"no real data at {SHARED}")
def test_real_heads_have_a_brain_of_real_size_inside_their_skull():
    import nibabel

    for case in ("case_02", "case_34"):
        image = nibabel.load(SHARED / "harvard_studies" / case / "ct.nii.gz")
        ct, spacing_mm = np.asarray(image.dataobj).transpose(2, 1, 0), (5.0, 0.9, 0.9)
        bone = bone_mask(ct, spacing_mm, is_hu=False)
        brain = brain_mask(ct, bone, spacing_mm)
        volume_ml = brain.sum() * np.prod(spacing_mm) / 1000
        assert 900 < volume_ml < 1700, case
        assert (ct[bone] >= 240).all(), case
