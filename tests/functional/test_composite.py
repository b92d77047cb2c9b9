import torch

from clinfuse.functional.composite import composite, feathered, finding_display
from clinfuse.functional.intensity import ct_to_model

SPACING_MM = (4.0, 1.0, 1.0)


def head(thickness):
    """CT of 1 in a plate of bone that is ``thickness`` voxels wide, MRI of -0.5 elsewhere."""
    ct, mri = torch.full((1, 1, 4, 8, 40), 0.0), torch.full((1, 1, 4, 8, 40), -0.5)
    bone = torch.zeros(ct.shape, dtype=torch.bool)
    bone[..., 20 : 20 + thickness] = True
    return torch.where(bone, 1.0, ct), mri, bone


def test_bone_of_any_thickness_is_the_ct_exactly():
    for thickness in (1, 2, 8):
        ct, mri, bone = head(thickness)
        fused = composite(ct, mri, bone, spacing_mm=SPACING_MM)
        torch.testing.assert_close(fused[bone], ct[bone])


def test_far_from_bone_it_is_the_mri_exactly():
    ct, mri, bone = head(8)
    fused = composite(ct, mri, bone, spacing_mm=SPACING_MM, feather_mm=2.0)
    torch.testing.assert_close(fused[..., :15], mri[..., :15])
    torch.testing.assert_close(fused[..., 33:], mri[..., 33:])


def test_the_weight_falls_without_a_step_and_is_small_at_the_feather():
    _, _, bone = head(20)
    for feather_mm in (4.0, 8.0):
        weight = feathered(bone, SPACING_MM, feather_mm)[0, 0, 0, 0]
        steps = weight[20 - int(feather_mm) - 2 : 21].diff()
        assert (steps >= 0).all()
        assert steps.max() < 2 / feather_mm  # a Gaussian of half that width rises at most so
        # Border at 19.5: voxel 19 - feather lies feather + 0.5 mm outside.
        assert weight[19 - int(feather_mm)] < 0.05 < weight[21 - int(feather_mm)]


def test_no_feather_is_a_hard_choice():
    ct, mri, bone = head(3)
    fused = composite(ct, mri, bone, spacing_mm=SPACING_MM, feather_mm=0.0)
    torch.testing.assert_close(fused, torch.where(bone, ct, mri))


def test_the_feather_is_in_mm():
    _, _, bone = head(10)
    weight = feathered(bone.movedim(-1, 2), (4.0, 1.0, 1.0), 2.0)  # 4 mm voxels across the plate
    torch.testing.assert_close(weight, bone.movedim(-1, 2).float(), atol=0.01, rtol=0)


def test_blood_and_calcium_stay_visible_and_brain_beside_them_is_unchanged():
    mri = torch.full((1, 1, 4, 32, 32), -0.2)
    ct_hu = torch.full(mri.shape, 35.0)
    findings = torch.zeros(mri.shape, dtype=torch.bool)
    findings[..., 8:14, 8:14] = findings[..., 20:24, 20:24] = True
    ct_hu[..., 8:14, 8:14], ct_hu[..., 20:24, 20:24] = 65.0, 250.0
    no_bone = torch.zeros_like(findings)
    fused = composite(ct_to_model(ct_hu), mri, no_bone, findings, spacing_mm=SPACING_MM)
    assert (fused[..., 8:14, 8:14] > mri[0, 0, 0, 0, 0] + 0.5).all()
    assert (fused[..., 20:24, 20:24] > fused[..., 8:14, 8:14].max()).all()
    torch.testing.assert_close(fused[~findings], mri[~findings], atol=0.06, rtol=0)
    without = composite(ct_to_model(ct_hu), mri, no_bone, spacing_mm=SPACING_MM)
    torch.testing.assert_close(without, mri)


def test_a_finding_never_darkens_a_bright_mri():
    mri = torch.full((1, 1, 2, 8, 8), 0.95)
    findings = torch.ones(mri.shape, dtype=torch.bool)
    ct = ct_to_model(torch.full(mri.shape, 60.0))
    torch.testing.assert_close(composite(ct, mri, ~findings, findings, spacing_mm=SPACING_MM), mri)


def test_among_bright_tissue_findings_are_dark_each_by_its_own_surroundings():
    mri = torch.full((1, 1, 2, 48, 96), -0.4)  # the left half is like white matter in T1,
    mri[..., 48:] = 0.6  # the right one like CSF in T2
    ct_hu = torch.full(mri.shape, 35.0)
    findings = torch.zeros(mri.shape, dtype=torch.bool)
    left, right = (..., slice(20, 28), slice(20, 28)), (..., slice(20, 28), slice(72, 80))
    calcium = (..., slice(36, 40), slice(72, 80))
    for place, hu in ((left, 70.0), (right, 70.0), (calcium, 300.0)):
        findings[place], ct_hu[place] = True, hu
    none = torch.zeros_like(findings)
    fused = composite(ct_to_model(ct_hu), mri, none, findings, spacing_mm=SPACING_MM)
    assert (fused[left] > 0.5).all()
    assert (fused[right] < -0.5).all()
    assert (fused[calcium] < fused[right].min()).all()  # denser is further from what is around it


def test_denser_findings_are_brighter():
    ct_hu = torch.tensor([30.0, 50.0, 75.0, 100.0, 200.0, 300.0]).reshape(1, 1, 1, 1, 6)
    shown = finding_display(ct_to_model(ct_hu)).flatten()
    assert (shown.diff() > 0).all()
    assert shown[0] >= -1 and shown[-1] <= 1 and shown[1] >= 0.3
