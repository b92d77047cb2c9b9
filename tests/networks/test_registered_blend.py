from dataclasses import replace
from functools import partial

import pytest
import torch

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.intensity import ct_to_model
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.networks.registered_blend import (
    NoAnchor,
    RegisteredBlend,
    dense_findings,
    lost_in_moving,
)
from clinfuse.networks.rigid_registration import Registration, SynthesisRegistration, move
from clinfuse.networks.source_denoiser import SourceDenoisers

NETWORK = partial(FusionUNet, spatial_dims=3, channels=(8, 16), encoder_channels=4)


def registration():
    return SynthesisRegistration(3, features=(16,) * 6)


def knowing(motion):
    """A registration that finds this motion, whatever it is shown."""
    network = registration()
    network.forward = lambda mri, ct, *_: Registration(motion, ct, torch.zeros_like(ct))
    return network


@pytest.mark.parametrize("registration", [None, registration()], ids=["as_it_lies", "registered"])
def test_an_untrained_blend_is_the_mask_composite_of_the_registered_sources(phantoms, registration):
    batch = replace(phantoms.batch(2.0), ct_map=())  # in no known units: no findings
    with torch.no_grad():
        anchor = RegisteredBlend(NETWORK, registration)(batch)
    bone = anchor.roi[:, 1:2]
    sure = (bone == 0) | (bone == 1)  # elsewhere the moved mask is between the two, and so is w
    expected = torch.where((bone == 1) & ~batch.brain, anchor.ct, batch.mri)  # the brain is MRI
    # w is sigmoid(8) in bone: it leaves 3e-4 of at most 2 to the other source
    assert (anchor.mean - expected)[sure].abs().max() < 1e-3
    assert sure.float().mean() > 0.5 and (bone == 1).any()
    if registration is None:
        assert torch.equal(anchor.ct, batch.ct) and torch.equal(bone.bool(), batch.bone)


def test_brain_and_lesion_stay_with_the_mri_whatever_the_registration_finds(phantoms):
    batch = phantoms.batch(4.0)
    anchor = RegisteredBlend(NETWORK, registration())(batch)
    assert torch.equal(anchor.roi[:, 0:1].bool(), batch.brain)
    assert torch.equal(anchor.roi[:, 2:3].bool(), batch.lesion)


def test_the_scale_stays_above_its_floor_and_starts_larger_at_edges_than_in_air(phantoms):
    batch = phantoms.batch(0.0)
    blend = RegisteredBlend(NETWORK, None, min_scale=0.02)
    scale = blend(batch).scale
    air, bone = batch.reference < -0.99, batch.bone
    assert scale[bone].median() > 1.1 * scale[air].median() > 0.02
    with torch.no_grad():
        blend.network.unet.out[-1].conv.bias.fill_(-100.0)  # as sure as it can be
    assert (blend(batch).scale > 0.02).all()
    assert blend(batch).scale.max() < 0.1


def test_the_registered_masks_are_those_of_the_anchor(phantoms):
    batch = phantoms.batch(4.0)
    blend = RegisteredBlend(NETWORK, knowing(torch.linalg.inv(batch.misregistration))).eval()
    assert torch.equal(blend.registered_roi(batch), blend(batch).roi > 0.5)
    assert not torch.equal(blend.registered_roi(batch), batch.roi)
    for still in (RegisteredBlend(NETWORK), NoAnchor()):
        assert torch.equal(still.registered_roi(batch), batch.roi)


def shift(voxels, spacing_mm):
    motion = torch.eye(4)[None]
    motion[0, 1, 3] = voxels * spacing_mm
    return motion


def test_moving_takes_most_from_fine_detail_at_half_a_voxel_and_nothing_at_a_whole_one():
    spacing_mm = torch.tensor([[4.0, 2.0, 2.0]])
    fine = torch.zeros(1, 1, 8, 24, 24)
    fine[..., 12, 6:18] = 1
    coarse = gaussian_smooth(fine, [0.0, 2.0, 2.0])
    coarse = coarse / coarse.max()

    def lost(volume, voxels):
        motion = shift(voxels, 2.0)
        moved = move(volume, motion, spacing_mm, refine=3)
        return lost_in_moving(volume, moved, motion, spacing_mm)[..., 4:20, 9:15].mean()

    assert lost(fine, 1.0) < 1e-5
    assert lost(fine, 0.5) > 1.5 * lost(fine, 0.2) > 0.01
    assert lost(fine, 0.5) > 5 * lost(coarse, 0.5)


def test_the_loss_is_told_where_the_volume_is_moved_to():
    spacing_mm, motion = torch.tensor([[4.0, 2.0, 2.0]]), shift(5.5, 2.0)
    fine = torch.zeros(1, 1, 8, 24, 24)
    fine[..., 12, 6:18] = 1
    moved = move(fine, motion, spacing_mm, refine=3)
    lost = lost_in_moving(fine, moved, motion, spacing_mm)
    assert lost[..., 6:8, 6:18].mean() > 10 * lost[..., 12, 6:18].mean()


def test_the_scale_starts_larger_where_moving_took_from_the_bone(phantoms):
    batch = phantoms.batch(2.0)
    network = knowing(torch.linalg.inv(batch.misregistration))
    with torch.no_grad():
        none, some = (RegisteredBlend(NETWORK, network, lost_gain=g)(batch) for g in (0.0, 2.0))
    more = some.scale - none.scale
    assert (more >= 0).all() and more[batch.brain].max() < 0.01
    assert more[batch.truth()[2][:, 1:2]].mean() > 0.005


def test_the_blend_is_of_the_denoised_sources_where_they_belong(phantoms):
    batch, denoisers = phantoms.batch(2.0), SourceDenoisers(3, features=8, blocks=1)
    batch = replace(batch, ct_map=())  # in no known units: no findings
    as_given = RegisteredBlend(NETWORK, None, denoisers)(batch)
    assert torch.equal(as_given.mri, batch.mri) and torch.equal(as_given.ct, batch.ct)  # untrained
    with torch.no_grad():
        denoisers.mri.linear.bias[0] = 0.3
        denoisers.ct.linear.bias[0] = -0.3
    anchor = RegisteredBlend(NETWORK, None, denoisers)(batch)
    inside = (batch.mri < 0.5) & (batch.ct > -0.5)
    assert (anchor.mri > batch.mri)[inside].all() and (anchor.ct < batch.ct)[inside].all()
    assert anchor.mri.abs().max() <= 1 and anchor.ct.abs().max() <= 1
    sure = (batch.brain & ~batch.bone) & inside
    torch.testing.assert_close(anchor.mean[sure], anchor.mri[sure], atol=1e-3, rtol=0)


def test_the_scale_starts_large_where_the_mean_shows_the_ct_beside_the_bone_mask(phantoms):
    """However sure the weight is there: the reference would show the MRI."""
    batch = phantoms.batch(0.0)
    blend = RegisteredBlend(NETWORK, None, noise_scale=0.0, misplaced_mm=0.0, min_scale=0.0)
    outside = ~batch.roi[:, :2].any(1, keepdim=True)
    apart = (batch.ct - batch.mri).abs()
    with torch.no_grad():
        assert blend(batch).scale[outside].median() < 1e-3  # shows the MRI
        blend.network.unet.out[-1].conv.bias[0] = 20.0
        shown = blend(batch)
    torch.testing.assert_close(shown.mean[outside], batch.ct[outside], atol=1e-3, rtol=0)
    torch.testing.assert_close(shown.scale[outside], apart[outside], atol=1e-3, rtol=1e-3)
    assert shown.scale[batch.bone & ~batch.brain].median() < 1e-3


def test_training_reaches_weight_correction_and_scale_but_not_what_prepares_sources(phantoms):
    blend = RegisteredBlend(NETWORK, registration(), SourceDenoisers(3, features=8, blocks=1))
    anchor = blend(phantoms.batch())
    (anchor.mean.sum() + anchor.scale.log().sum()).backward()
    last = blend.network.unet.out[-1].conv.weight.grad
    per_volume = last.flatten(1).abs().amax(1).reshape(3, -1)  # w, d and log s in Haar space
    assert (per_volume.amax(1) > 0).all()
    for prepared in (blend.registration, blend.denoisers):
        assert all(p.grad is None for p in prepared.parameters())


def test_a_repeated_anchor_lies_case_by_case(phantoms):
    anchor = RegisteredBlend(NETWORK, registration())(phantoms.batch())
    two = anchor.repeat(2)
    for name in ("mean", "scale", "mri", "ct", "roi", "ct_weight"):
        one, both = getattr(anchor, name), getattr(two, name)
        assert torch.equal(both, torch.cat([one, one]))


def test_without_an_anchor_the_mean_is_zero_and_the_scale_one(phantoms):
    batch = phantoms.batch(2.0)
    anchor = NoAnchor()(batch)
    assert (anchor.mean == 0).all() and (anchor.scale == 1).all()
    assert torch.equal(anchor.mri, batch.mri) and torch.equal(anchor.ct, batch.ct)
    assert torch.equal(anchor.roi.bool(), batch.roi)
    assert not list(NoAnchor().parameters())


def headful(hu_inside, like):
    """A CT of soft tissue with a block of another density deep in it, and a brain around that."""
    ct_hu, brain = torch.full(like.shape, 35.0), torch.zeros(like.shape, dtype=torch.bool)
    block = torch.zeros_like(brain)
    brain[..., 2:-2, 2:-2, 2:-2] = True
    block[..., 6:10, 13:19, 13:19] = True
    ct_hu[block] = hu_inside
    return ct_to_model(ct_hu), brain, block


def test_what_only_the_ct_shows_in_the_brain_is_shown_on_the_mean(phantoms):
    batch = phantoms.batch(0.0)
    ct, brain, block = headful(70.0, batch.ct)
    roi = torch.cat([brain, torch.zeros_like(brain), torch.zeros_like(brain)], 1)
    mri = torch.full_like(ct, -0.3)
    batch = replace(batch, mri=mri, ct=ct, roi=roi, ct_map=["piecewise"])
    with torch.no_grad():
        shown = RegisteredBlend(NETWORK, None)(batch)
        in_a_window = RegisteredBlend(NETWORK, None)(replace(batch, ct_map=["window_8bit"]))
    inner = block & (dense_findings(ct, roi[:, 1:2], batch))
    assert inner.sum() > 0.5 * block.sum()
    assert (shown.mean[inner] > 0.5).all() and (shown.mri[inner] > 0.5).all()
    far = brain & ~torch.nn.functional.max_pool3d(block.float(), 5, 1, 2).bool()
    torch.testing.assert_close(shown.mean[far], mri[far], atol=1e-3, rtol=0)
    torch.testing.assert_close(in_a_window.mean[brain], mri[brain], atol=1e-3, rtol=0)


def test_a_skull_that_lies_in_the_brain_is_no_finding(phantoms):
    batch = phantoms.batch(0.0)
    ct, brain, block = headful(900.0, batch.ct)
    batch = replace(batch, roi=torch.cat([brain, block, block], 1), ct_map=["piecewise"])
    assert dense_findings(ct, block, batch) is None
    assert dense_findings(ct, torch.zeros_like(block), batch).any()
