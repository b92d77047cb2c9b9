import math

import pytest
import torch
from scipy.ndimage import affine_transform

from clinfuse.data.jitter import fixed_misregistration
from clinfuse.data.jitter import move as moved_by_torchio
from clinfuse.data.phantoms import make_phantom
from clinfuse.functional.intensity import ct_to_model
from clinfuse.networks import rigid_registration
from clinfuse.networks.rigid_registration import (
    SynthesisRegistration,
    gauss_newton,
    move,
    registration_error_mm,
)

SPACING_MM = (6.0, 4.0, 4.5)
ODD = (25, 53, 47)


@pytest.fixture(scope="module")
def heads():
    """The noise-free CT and the brain of two phantoms, anisotropic and of odd sizes."""
    heads = [make_phantom(case, 0, ODD, SPACING_MM) for case in (0, 1)]
    ct = torch.stack([ct_to_model(torch.from_numpy(head.clean_ct_hu)[None]) for head in heads])
    return ct.float(), torch.stack([torch.from_numpy(head.brain)[None] for head in heads])


def found(moving, fixed, spacing_mm, scale=0.1):
    """The motion found at the settings that ``SynthesisRegistration`` searches with."""
    search = SynthesisRegistration(len(spacing_mm), features=(16,) * 6)
    spacing = torch.tensor([spacing_mm] * len(moving))
    settings = (search.smoothing_mm, search.iterations, search.prior_mm)
    return gauss_newton(moving, fixed, torch.full_like(fixed, scale), spacing, *settings)


def error_mm(motion, true, inside, spacing_mm=SPACING_MM):
    spacing = torch.tensor([spacing_mm] * len(motion))
    return registration_error_mm(motion, true, inside.float(), spacing)


@pytest.mark.parametrize("amplitude", [1, 4])
def test_a_known_motion_of_a_head_is_found_to_a_fifth_of_a_millimetre(heads, amplitude):
    ct, brain = heads
    true = torch.stack([fixed_misregistration(f"{i}", amplitude, amplitude) for i in (0, 1)])
    moving = torch.stack(
        [moved_by_torchio(c, a, SPACING_MM) for c, a in zip(ct, true, strict=True)]
    )
    motion = found(moving, ct, SPACING_MM)
    assert (error_mm(torch.eye(4).expand(2, 4, 4), true.float(), brain) > 0.9 * amplitude).all()
    assert (error_mm(motion, true.float(), brain) < 0.2).all()


def test_no_motion_is_found_where_there_is_none(heads):
    ct, brain = heads
    assert (error_mm(found(ct, ct, SPACING_MM), torch.eye(4).expand(2, 4, 4), brain) < 0.001).all()


def test_a_known_motion_of_a_slice_is_found_too():
    spacing_mm = (2.5, 2.7)
    head = make_phantom(0, 0, (9, 81, 77), (8.0, *spacing_mm))
    fixed = ct_to_model(torch.from_numpy(head.clean_ct_hu)).float()[4]
    angle, shift_mm = math.radians(3), torch.tensor([2.0, -1.5])
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    true = torch.eye(3)
    true[:2, :2], true[:2, 2] = turn, shift_mm
    # scipy pulls: moving(q) = fixed(A^-1 q), in voxels about the centre
    size_mm, centre = torch.tensor(spacing_mm), (torch.tensor(fixed.shape) - 1) / 2
    back = torch.linalg.inv(true)
    matrix = back[:2, :2] * size_mm / size_mm[:, None]
    offset = centre - matrix @ centre + back[:2, 2] / size_mm
    moving = affine_transform(fixed.numpy(), matrix, offset, order=1, cval=-1.0)
    motion = found(torch.from_numpy(moving)[None, None], fixed[None, None], spacing_mm)
    brain = torch.from_numpy(head.brain[4])[None, None]
    assert error_mm(torch.eye(3)[None], true[None], brain, spacing_mm) > 2
    assert error_mm(motion, true[None], brain, spacing_mm) < 0.2


def test_what_one_image_shows_and_the_other_does_not_has_little_say(heads):
    ct, brain = heads
    true = fixed_misregistration("one", 3, 3)
    moving = moved_by_torchio(ct[0], true, SPACING_MM)[None]
    guess = ct[:1].clone()
    guess[..., 5:12, 10:18, 8:20] = 1.0  # five centimetres of bone that are not there
    assert error_mm(found(moving, guess, SPACING_MM), true.float()[None], brain[:1]) < 0.4


def test_cases_of_a_batch_do_not_mix(heads):
    ct, _ = heads
    moving = torch.stack(
        [
            moved_by_torchio(c, fixed_misregistration(f"{i}", 3, 3), SPACING_MM)
            for i, c in enumerate(ct)
        ]
    )
    together = found(moving, ct, SPACING_MM)
    apart = [found(moving[i : i + 1], ct[i : i + 1], SPACING_MM) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 8, 10), (16, 16)], ids=str)
def test_images_without_structure_are_left_where_they_are(shape):
    flat = torch.full((1, 1, *shape), -1.0)
    motion = found(flat, flat, (4.0, 3.0, 2.0)[: len(shape)])
    torch.testing.assert_close(motion, torch.eye(len(shape) + 1)[None])


def test_the_motion_found_is_the_one_that_a_batch_of_ours_records(phantoms):
    batch = phantoms.batch(4.0)
    spacing_mm = batch.spacing_mm[0].tolist()
    motion = found(batch.ct, batch.clean_ct, spacing_mm)
    assert error_mm(motion, batch.misregistration, batch.brain, spacing_mm) < 0.5  # voxels of 6 mm
    realigned = move(batch.ct, motion, batch.spacing_mm)
    gained = (batch.ct - batch.clean_ct).square().mean() / (
        realigned - batch.clean_ct
    ).square().mean()
    assert gained > 4


@pytest.mark.parametrize(
    "shape, spacing_mm", [((7, 9, 11), (4.0, 3.0, 2.0)), ((13, 18), (2.0, 1.0))]
)
def test_every_size_is_registered_and_only_the_guess_has_a_gradient(shape, spacing_mm):
    registration = SynthesisRegistration(len(shape), features=(16,) * 6)
    mri, ct = (2 * torch.rand(2, 2, 1, *shape) - 1).unbind(0)
    brain = (torch.rand(2, 1, *shape) > 0.5).float()
    result = registration(mri, ct, brain, torch.tensor([spacing_mm] * 2))
    n = len(shape)
    assert result.motion.shape == (2, n + 1, n + 1) and result.motion.isfinite().all()
    turn = result.motion[:, :n, :n]
    torch.testing.assert_close(turn @ turn.mT, torch.eye(n).expand(2, n, n))
    assert result.guess.shape == result.log_scale.shape == mri.shape
    assert not result.motion.requires_grad
    (result.guess.square().sum() + result.log_scale.sum()).backward()
    assert all(p.grad is not None for p in registration.parameters())


def test_an_untrained_guess_is_air_but_for_what_random_weights_add():
    registration = SynthesisRegistration(3, features=(16,) * 6)
    torch.nn.init.zeros_(registration.network.final_conv.weight)
    guess, _ = registration.synthesise(torch.randn(1, 1, 8, 10, 12), torch.ones(1, 1, 8, 10, 12))
    torch.testing.assert_close(guess, torch.full_like(guess, -1.0))


def test_a_motion_that_is_too_far_to_be_residual_is_not_believed(heads):
    """The same pair under two limits: found and taken, or found and refused."""
    ct, brain = heads
    true = fixed_misregistration("far", 6, 0)
    moving = moved_by_torchio(ct[0], true, SPACING_MM)[None]

    class Knowing(SynthesisRegistration):
        def synthesise(self, mri, brain):
            return ct[:1], torch.full_like(ct[:1], -2.0)

    def motion(max_mm):
        search = Knowing(3, features=(16,) * 6, max_mm=max_mm)
        spacing = torch.tensor([SPACING_MM])
        return search(moving, moving, brain[:1].float(), spacing).motion

    assert error_mm(motion(12.0), true.float()[None], brain[:1]) < 0.3
    assert torch.equal(motion(5.0), torch.eye(4)[None])


def test_the_registration_error_is_what_a_ruler_says():
    spacing_mm, shape = (4.0, 3.0, 2.0), (5, 7, 9)
    still = torch.eye(4)[None]
    shifted = still.clone()
    shifted[0, :3, 3] = torch.tensor([2.0, 3.0, 6.0])
    anywhere = torch.rand(1, 1, *shape) > 0.5
    assert error_mm(shifted, still, anywhere, spacing_mm).item() == pytest.approx(7, rel=1e-5)

    angle = math.radians(
        10
    )  # about the first axis: a voxel on it stays, one r away moves by a chord
    turned = still.clone()
    turned[0, 1:3, 1:3] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    on_axis, aside = torch.zeros(2, 1, 1, *shape, dtype=torch.bool)
    on_axis[0, 0, 1, 3, 4] = aside[0, 0, 1, 5, 8] = True
    chord = 2 * math.hypot(2 * 3.0, 4 * 2.0) * math.sin(angle / 2)
    assert error_mm(turned, still, on_axis, spacing_mm).item() == pytest.approx(0, abs=1e-5)
    assert error_mm(turned, still, aside, spacing_mm).item() == pytest.approx(chord, rel=1e-5)
    both = error_mm(turned, still, on_axis | aside, spacing_mm).item()
    assert both == pytest.approx(chord / math.sqrt(2), rel=1e-5)


def test_the_error_of_any_two_motions_is_the_mean_over_the_voxels_themselves(heads):
    _, brain = heads
    one, other = (
        torch.stack([fixed_misregistration(f"{case}", mm, mm) for case in (0, 1)]).float()
        for mm in (2, 4)
    )
    spacing = torch.tensor([SPACING_MM, (5.0, 3.0, 2.0)])
    axes = [torch.arange(size) - (size - 1) / 2 for size in ODD]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    apart = torch.einsum(
        "bij,bdhwj->bdhwi", (one - other)[:, :3, :3], voxels * spacing[:, None, None, None]
    )
    square = (apart + (one - other)[:, None, None, None, :3, 3]).square().sum(-1)
    expected = [square[case][brain[case, 0]].mean().sqrt().item() for case in (0, 1)]
    with torch.autocast("cpu", torch.bfloat16):  # which is not to touch it
        found = registration_error_mm(one, other, brain.float(), spacing)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_large_volume_is_registered_in_slabs_as_in_one(heads, monkeypatch):
    ct, _ = heads
    true = torch.stack([fixed_misregistration(f"{i}", 3, 3).float() for i in (0, 1)])
    moving = move(ct, true, torch.tensor([SPACING_MM] * 2))
    whole = found(moving, ct, SPACING_MM)
    monkeypatch.setattr(rigid_registration, "LARGEST_SLAB", 7 * ODD[1] * ODD[2])
    slabs = found(moving, ct, SPACING_MM)
    assert not torch.equal(slabs, whole)  # sums are taken in another order
    torch.testing.assert_close(slabs, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("refine", [1, 3])
@pytest.mark.parametrize("far_mm", [0.0, 5.0, 500.0])
def test_a_large_volume_is_moved_in_blocks_as_in_one(heads, monkeypatch, refine, far_mm):
    ct, _ = heads
    spacing = torch.tensor([SPACING_MM] * 2)
    motion = torch.stack([fixed_misregistration(f"{i}", 6, 5).float() for i in (0, 1)])
    motion[1, :3, 3] += far_mm  # in the end nothing of the head is left in view
    whole = move(ct, motion, spacing, refine)
    monkeypatch.setattr(rigid_registration, "LARGEST_SLAB", 1)
    for side in (5, 16):
        monkeypatch.setattr(rigid_registration, "BLOCK", side)
        blocks = move(ct, motion, spacing, refine)
        torch.testing.assert_close(blocks, whole, rtol=0, atol=2e-5)


def test_a_large_volume_that_is_one_voxel_deep_is_moved_in_blocks_too(heads, monkeypatch):
    ct, spacing = heads[0][:1, :, 3:4], torch.tensor([SPACING_MM])
    motion = fixed_misregistration("0", 3, 3).float()[None]
    whole = move(ct, motion, spacing, 3)
    monkeypatch.setattr(rigid_registration, "LARGEST_SLAB", 1)
    monkeypatch.setattr(rigid_registration, "BLOCK", 16)
    torch.testing.assert_close(move(ct, motion, spacing, 3), whole, rtol=0, atol=2e-5)
