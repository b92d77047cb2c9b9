from dataclasses import replace

import pytest
import torch

from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods.objective import (
    clean_pair_of,
    clean_roi_loss,
    lesion_probability,
    reference_of,
    roi_loss,
)


class BrightIsLesion(torch.nn.Module):
    """A lesion head without weights."""

    def forward(self, fused):
        return torch.sigmoid(8 * (fused - 0.5))


@pytest.fixture
def batch(phantoms):
    return phantoms.batch(4.0, case=7)  # a large infarct


def parts(batch):
    return batch.mri, batch.ct, batch.roi, batch.spacing_mm, batch.lesion_distance_mm


def test_the_loss_of_a_case_is_equation_2_on_what_it_is_given(batch):
    fused, loss = 0.5 * batch.mri, ClinicalRoiLoss(1.0, 1.2, 3.0)
    probability = BrightIsLesion()(fused) * (batch.brain | batch.lesion)
    terms = loss(
        fused, batch.mri, batch.ct, batch.brain, batch.bone, batch.spacing_mm,
        probability, batch.lesion, batch.lesion_distance_mm,
    )  # fmt: skip
    got = roi_loss(loss, fused, *parts(batch), BrightIsLesion()).total
    torch.testing.assert_close(got, terms.total)
    lesion = terms.dice + terms.nsd + 0.5 * terms.hd95
    torch.testing.assert_close(got, terms.brain + 1.2 * terms.bone + 3 * lesion)


def test_gamma_weighs_nothing_without_a_lesion_head_and_something_with_one(batch):
    def total(gamma, head):
        return roi_loss(ClinicalRoiLoss(gamma=gamma), batch.mri, *parts(batch), head).total.item()

    assert total(0.0, None) == total(3.0, None)
    assert total(3.0, BrightIsLesion()) > total(0.0, BrightIsLesion()) + 0.1


def test_the_lesion_terms_change_the_brain_and_the_lesion_alone(batch):
    class Everywhere(torch.nn.Module):
        def forward(self, fused):  # each voxel's answer depends on all of its neighbours
            return torch.sigmoid(torch.nn.functional.avg_pool3d(8 * fused, 3, 1, 1))

    mri, ct, roi, spacing_mm, distance_mm = parts(batch)
    elsewhere = torch.zeros_like(roi)
    elsewhere[:, 2, :2] = True  # a lesion outside the brain: of the skull
    for masks in (roi, roi | elsewhere):
        fused = (0.5 * mri).requires_grad_()
        lesion_only = ClinicalRoiLoss(alpha=0.0, beta=0.0, gamma=1.0)
        roi_loss(
            lesion_only, fused, mri, ct, masks, spacing_mm, distance_mm, Everywhere()
        ).total.backward()
        asked = masks[:, 0:1] | masks[:, 2:3]
        assert (fused.grad[~asked] == 0).all()
        assert fused.grad[masks[:, 2:3]].abs().max() > 0


def test_a_head_that_gamma_does_not_weigh_is_not_asked(batch):
    class Unasked(torch.nn.Module):
        def forward(self, fused):
            raise AssertionError("the lesion head was asked")

    off, on = ClinicalRoiLoss(gamma=0.0), ClinicalRoiLoss(gamma=1.0)
    without = roi_loss(off, batch.mri, *parts(batch), None).total
    assert torch.equal(roi_loss(off, batch.mri, *parts(batch), Unasked()).total, without)
    with pytest.raises(AssertionError, match="was asked"):
        roi_loss(on, batch.mri, *parts(batch), Unasked())


def test_the_spacing_may_be_plain_numbers(batch):
    mri, ct, roi, spacing_mm, distance_mm = parts(batch)
    numbers = spacing_mm[0].tolist()
    loss = ClinicalRoiLoss()
    torch.testing.assert_close(
        roi_loss(loss, 0.5 * mri, mri, ct, roi, numbers, distance_mm, BrightIsLesion()).total,
        roi_loss(loss, 0.5 * mri, mri, ct, roi, spacing_mm, distance_mm, BrightIsLesion()).total,
    )


def test_training_compares_with_the_clean_registered_pair_and_not_with_the_moved_scan(batch):
    bone_only = ClinicalRoiLoss(alpha=0.0, beta=1.0, gamma=0.0)
    right = clean_roi_loss(bone_only, batch.clean_ct, batch)
    as_scanned = clean_roi_loss(bone_only, batch.ct, batch)
    torch.testing.assert_close(right, torch.zeros(1), atol=1e-4, rtol=0)
    assert as_scanned > 0.1
    brain_only = ClinicalRoiLoss(alpha=1.0, beta=0.0, gamma=0.0)
    torch.testing.assert_close(
        clean_roi_loss(brain_only, batch.clean_mri, batch), torch.zeros(1), atol=1e-4, rtol=0
    )


def test_the_objective_is_computed_in_single_precision_under_autocast(batch):
    loss, fused = ClinicalRoiLoss(), (0.7 * batch.clean_mri).requires_grad_()
    exact = clean_roi_loss(loss, fused, batch, BrightIsLesion())
    with torch.autocast("cpu", torch.bfloat16):
        inside = clean_roi_loss(loss, fused, batch, BrightIsLesion())
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, exact)


@pytest.mark.parametrize("missing", ["clean_mri", "clean_ct", "clean_roi"])
def test_training_without_the_truth_is_refused_by_case(batch, missing):
    with pytest.raises(ValueError, match=f"needs {missing}, and case case_007 came without"):
        clean_roi_loss(ClinicalRoiLoss(), batch.mri, replace(batch, **{missing: None}))


def test_targets_are_those_of_the_batch_or_refused(batch):
    assert reference_of(batch) is batch.reference
    for given, truth in zip(clean_pair_of(batch), batch.truth(), strict=True):
        assert given is truth
    with pytest.raises(ValueError, match="needs reference"):
        reference_of(replace(batch, reference=None))


class WithinAlone(BrightIsLesion):
    """A head that can be asked about some voxels, and counts how many."""

    def within(self, asked):
        self.asked = int(asked.sum())
        return lambda fused: self(fused) * asked


def test_a_head_that_can_is_asked_within_the_brain_and_any_other_everywhere(batch):
    narrow, plain = WithinAlone(), BrightIsLesion()
    says = plain(batch.mri)
    assert says[~batch.brain].max() > 0
    torch.testing.assert_close(lesion_probability(plain, batch.mri, batch.brain), says)
    inside = lesion_probability(narrow, batch.mri, batch.brain)
    torch.testing.assert_close(inside, says * batch.brain)


def test_in_training_too_a_head_is_asked_where_it_counts_and_the_loss_is_the_same(batch):
    narrow, loss = WithinAlone(), ClinicalRoiLoss(gamma=3.0)
    fused = 0.5 * batch.clean_mri
    got = clean_roi_loss(loss, fused, batch, narrow)
    torch.testing.assert_close(got, clean_roi_loss(loss, fused, batch, BrightIsLesion()))
    asked = batch.clean_roi[:, 0:1] | batch.clean_roi[:, 2:3]
    assert narrow.asked == int(asked.sum()) < asked.numel() / 2
