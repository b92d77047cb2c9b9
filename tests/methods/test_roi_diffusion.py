import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clinfuse.data.paired_volumes import collate_batches
from clinfuse.functional.calibration import total_variance
from clinfuse.functional.regional import shares_of_moved
from clinfuse.functional.surface import signed_distance_mm
from clinfuse.losses.fidelity_of_gradients import SourceFidelity
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods import roi_diffusion
from clinfuse.methods.objective import roi_loss
from clinfuse.methods.roi_diffusion import Guidance, guiding_sources, scale_loss, source_losses
from clinfuse.networks.registered_blend import NoAnchor
from clinfuse.networks.rigid_registration import Registration, SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoisers
from clinfuse.types import DATA_RANGE


def sampled(phantoms, *overrides, name="clinfuse", head=None, batch=None, **quick):
    """The ensemble of an untrained model: the same weights whatever the overrides."""
    method = phantoms.method(name, *overrides, **quick)
    method.lesion_head = head
    return method.eval().ensemble(phantoms.batch(2.0, case=7) if batch is None else batch)


def noise_of(method, batch):
    """x_T as the sampler gets it."""
    seen = []

    def sampler(denoise, x_T, levels, guide):
        seen.append(x_T)
        return x_T

    method.sampler = sampler
    method.ensemble(batch)
    return seen[0]


@pytest.fixture
def head(phantoms):
    return phantoms.method("lesion_head").requires_grad_(False).eval()


# Noise.


def test_a_cases_noise_does_not_depend_on_its_batch_nor_on_misregistration(phantoms):
    method = phantoms.method("clinfuse", members=3).eval()
    one, other, moved = phantoms.batch(0.0), phantoms.batch(0.0, case=1), phantoms.batch(4.0)
    alone = noise_of(method, one)
    pair = noise_of(method, collate_batches([other, one]))
    assert torch.equal(alone, pair[3:])
    assert torch.equal(alone, noise_of(method, moved))
    assert not torch.allclose(alone, pair[:3])
    method.seed += 1
    assert not torch.allclose(alone, noise_of(method, one))


def test_members_differ_and_their_noise_cancels_in_the_mean(phantoms):
    noise = noise_of(phantoms.method("clinfuse", members=3).eval(), phantoms.batch())
    assert noise.shape[:2] == (3, 1)
    torch.testing.assert_close(noise.mean(0), torch.zeros_like(noise[0]), atol=1e-6, rtol=0)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert (noise[0] - noise[1]).abs().mean() > 0.5


def test_a_case_is_fused_alike_alone_and_in_company(phantoms):
    method = phantoms.method("clinfuse").eval()
    batch = phantoms.batch(2.0)
    pair = collate_batches([phantoms.batch(2.0, case=1), batch])
    # not bit for bit: a convolution may sum a larger batch in another order
    torch.testing.assert_close(method.fuse(pair)[1:], method.fuse(batch), atol=1e-3, rtol=0)


def test_the_same_call_gives_the_same_ensemble_whatever_was_drawn_before(phantoms):
    method, batch = phantoms.method("clinfuse").eval(), phantoms.batch()
    once = method.ensemble(batch)
    torch.randn(100)
    assert torch.equal(method.ensemble(batch), once)


def test_one_member_is_an_ensemble_too(phantoms):
    assert sampled(phantoms, members=1).shape == (1, 1, 1, 16, 32, 32)


# Guidance.


def test_guidance_that_is_off_is_no_guidance(phantoms, head):
    off = sampled(phantoms, "guidance.eta=0.0", "guidance.eta_u=0.0", head=head)
    assert torch.equal(off, sampled(phantoms, "guidance=off", head=head))
    assert torch.equal(off, sampled(phantoms, "guidance=off"))
    assert (off - sampled(phantoms, head=head)).abs().max() > 1e-3


KNOBS = {
    "eta": 0.2, "eta_u": 0.1, "kappa": 5.0, "reference_std": 0.3,
    "alpha": 3.0, "beta": 3.0, "gamma": 1.0, "tau_mm": 4.0,
    "lambda_1": (3.0, 1.0, 0.5), "lambda_2": (1.0, 3.0, 0.5), "lambda_3": (1.0, 1.0, 1.5),
    "fidelity_brain": (50.0, 1.0), "fidelity_bone": (1.0, 50.0),
}  # fmt: skip
"""Each knob of guidance and a value for it other than the one in ``sample_with``."""


@pytest.fixture(scope="module")
def sample_with(phantoms):
    """Samples one model, its lesion head included, under guidance with some knobs turned."""
    method = phantoms.method("clinfuse", members=3).eval()
    # Untrained, the anchor's bone is the CT's, and by region would have nothing left to gain.
    anchors = {"full": method.anchor, "x0": Between()}
    method.lesion_head = phantoms.method("lesion_head").requires_grad_(False).eval()
    batch, known = phantoms.batch(2.0, case=7), {}

    def sample(gradient, of_mean, knob=None, value=None):
        strengths = {"eta": 0.1, "eta_u": 0.05, "kappa": 0.5, "reference_std": 1.0}
        weights = {
            "alpha": 1.0, "beta": 1.2, "gamma": 3.0, "tau_mm": 2.0,
            "lambdas": (1.0, 1.0, 0.5), "fidelity": (1.0, 1.0),
        }  # fmt: skip
        if knob is not None:
            name = {"lambda": "lambdas", "fidelity": "fidelity"}.get(knob.split("_")[0], knob)
            (strengths if name in strengths else weights)[name] = value
        key = (gradient, of_mean, knob, value)
        if key not in known:
            method.guidance = replace(
                method.guidance, gradient=gradient, of_mean=of_mean, **strengths
            )
            method.guidance_loss = ClinicalRoiLoss(**weights)
            method.anchor = anchors[gradient]
            known[key] = method.ensemble(batch)
        return known[key]

    return sample


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("gradient, of_mean", [("x0", True), ("full", False)])
def test_every_knob_of_guidance_changes_the_sample(sample_with, gradient, of_mean, knob):
    default = sample_with(gradient, of_mean)
    turned = sample_with(gradient, of_mean, knob, KNOBS[knob])
    assert (turned - default).abs().max() > 1e-3


def test_kappa_off_is_another_sample_than_kappa_zero(sample_with):
    off, zero = (sample_with("x0", True, "kappa", kappa) for kappa in (None, 0.0))
    assert (off - zero).abs().max() > 1e-3  # Eq. 4 halves eta at kappa 0


class Between(NoAnchor):
    """An anchor half way between the sources, so that both have something to gain, or elsewhere."""

    def __init__(self, mean=None, scale=None):
        super().__init__()
        self.mean, self.scale = mean, scale

    def forward(self, batch):
        plain = super().forward(batch)
        mean = (batch.mri + batch.ct) / 2 if self.mean is None else self.mean
        scale = torch.full_like(mean, 0.1) if self.scale is None else self.scale
        return replace(plain, mean=mean, scale=scale)


class BrightIsLesion(torch.nn.Module):
    """A lesion head without weights."""

    def forward(self, fused):
        return torch.sigmoid(8 * (fused - 0.3))


def distances(phantoms, knob, weight):
    """How far F is from what brain, bone and lesion are guided to, as L_ROI and otherwise."""
    method = phantoms.method("clinfuse", members=2).eval()
    method.anchor, method.lesion_head = Between(), BrightIsLesion()
    settings = {"eta_u": 0.0, "kappa": None, "of_mean": True, "gradient": "x0"}
    method.guidance = replace(method.guidance, **settings)
    weights = {"gamma": 1.0, knob: weight}
    method.guidance_loss = ClinicalRoiLoss(**weights, fidelity=method.guidance_loss.fidelity)
    batch = phantoms.batch(0.0, case=7)
    with torch.no_grad():
        fused, anchor = method.ensemble(batch).mean(0), method.anchor(batch)
        mri, ct, roi = guiding_sources(batch, anchor, method.guidance.tolerance_mm)
        brain, bone, lesion = roi.split(1, 1)
        terms = ClinicalRoiLoss()(
            fused, mri, ct, brain, bone, batch.spacing_mm,
            BrightIsLesion()(fused), lesion > 0, batch.lesion_distance_mm,
        )  # fmt: skip
    lesion_loss = terms.dice + terms.nsd + 0.5 * terms.hd95
    return {
        "alpha": (terms.brain, (fused - mri)[brain > 0].square().mean()),
        "beta": (terms.bone, (fused - ct)[bone > 0].square().mean()),
        "gamma": (lesion_loss, lesion_loss),
    }


@pytest.mark.parametrize("knob", ["alpha", "beta", "gamma"])
def test_more_weight_on_a_region_brings_it_nearer_to_what_it_is_guided_to(phantoms, knob):
    """The clinician's control (method, Eq. 2): monotone, with the default strengths."""
    found = [distances(phantoms, knob, weight) for weight in (0.0, 0.5, 1.0, 2.0, 4.0)]
    for measure in range(2):
        own = [float(of[knob][measure]) for of in found]
        assert all(more < less - 1e-6 for less, more in pairwise(own)), own
    elsewhere = [float(of["alpha" if knob == "beta" else "beta"][0]) for of in found]
    assert elsewhere == pytest.approx(elsewhere[:1] * 5)  # each region steps by itself


def test_guided_members_keep_the_spread_between_them_where_their_mean_is_guided(phantoms, head):
    def apart(**settings):
        method = phantoms.method("clinfuse", "guidance.eta_u=0.0", members=3).eval()
        method.lesion_head = head
        method.guidance = replace(method.guidance, kappa=None, gradient="x0", **settings)
        members = method.ensemble(phantoms.batch(2.0, case=7))
        return members - members.mean(0)

    unguided = apart(eta=0.0)
    # an untrained denoiser is linear, and so has no other way to tell members apart
    torch.testing.assert_close(apart(eta=0.2, of_mean=True), unguided, atol=1e-5, rtol=0)
    assert (apart(eta=0.2, of_mean=False) - unguided).abs().max() > 1e-2


def test_the_full_gradient_of_a_centred_mean_needs_no_walk_back_and_is_what_a_walk_finds(
    phantoms, head, monkeypatch
):
    batch = phantoms.batch(2.0, case=7)
    settings = ("guidance.gradient=full", "guidance.eta=0.3", "guidance.eta_u=0.0")
    method = phantoms.method("clinfuse", *settings, members=3).eval()
    method.lesion_head = head
    own, needs_graph = roi_diffusion.roi_guide, []

    def sample(**changes):
        def guide(*arguments, **keywords):
            made = own(*arguments, **(keywords | changes))
            needs_graph.append(made.needs_graph)
            return made

        monkeypatch.setattr(roi_diffusion, "roi_guide", guide)
        return method.ensemble(batch)

    torch.testing.assert_close(sample(), sample(centred=False), atol=1e-4, rtol=0)
    assert needs_graph == [False, True]


@pytest.mark.parametrize("gradient", ["x0", "full"])
def test_guidance_lowers_the_loss_that_it_descends(phantoms, gradient):
    batch = phantoms.batch(0.0)
    method = phantoms.method(
        "clinfuse", f"guidance.gradient={gradient}", "guidance.eta_u=0.0", steps=8
    )
    method.eval().anchor = Between()
    anchor = method.anchor(batch)

    def loss(eta):
        method.guidance = replace(method.guidance, eta=eta)
        sources = guiding_sources(batch, anchor, method.guidance.tolerance_mm)
        mean = method.ensemble(batch).mean(0)
        return roi_loss(method.guidance_loss, mean, *sources, batch.spacing_mm).total

    assert loss(0.2) < 0.95 * loss(0.0)


def test_guidance_pulls_towards_the_ct_where_the_anchor_puts_it(phantoms):
    class Remembering(ClinicalRoiLoss):
        def forward(self, fused, mri, ct, brain, bone, *rest):
            self.saw = (mri, ct, brain, bone)
            return super().forward(fused, mri, ct, brain, bone, *rest)

    method = phantoms.method("clinfuse").eval()
    method.guidance_loss, batch = Remembering(), phantoms.batch(4.0)
    method.ensemble(batch)
    anchor = method.anchor(batch)
    assert not torch.allclose(anchor.ct, batch.ct, atol=0.1)  # an untrained guess has moved it
    mri, ct, brain, bone = (t[:1] for t in method.guidance_loss.saw)
    assert torch.equal(mri, anchor.mri) and torch.equal(brain, batch.brain)
    assert torch.equal(ct, anchor.ct)
    assert torch.equal(bone, shares_of_moved(anchor.roi[:, 1:2]) * ~batch.brain)


# What F is guided to.


def test_a_motions_fourth_digit_takes_no_voxel_from_one_side_to_the_other(phantoms, monkeypatch):
    """At half a voxel, where a moved mask cut at one half would change in every border voxel."""
    method, batch = phantoms.method("clinfuse", members=2).eval(), phantoms.batch(0.0)
    method.guidance = replace(method.guidance, tolerance_mm=0.0)
    own, half_mm = SynthesisRegistration.forward, float(batch.spacing_mm[0, 2]) / 2

    def fused(shift_mm):
        def registered(self, *sources):
            found = own(self, *sources)
            motion = torch.eye(4).expand_as(found.motion).clone()
            motion[:, 2, 3] = shift_mm
            return replace(found, motion=motion)

        monkeypatch.setattr(SynthesisRegistration, "forward", registered)
        assert method.registered_roi(batch)[:, 1].any()
        return method.ensemble(batch), method.registered_roi(batch)

    (short, before), (long, after) = fused(half_mm - 5e-4), fused(half_mm + 5e-4)
    assert (before != after).sum() > 100  # so many voxels cross one half
    assert (short - long).abs().max() < 0.002 * DATA_RANGE


def with_motions(batch, *shifts_mm):
    """An anchor unlike its batch, that wants to shift each case's CT along the last axis."""
    motion = torch.eye(4).repeat(len(batch), 1, 1)
    motion[:, 2, 3] = torch.tensor(shifts_mm)
    found = Registration(motion, torch.zeros_like(batch.ct), torch.zeros_like(batch.ct))
    moved = torch.cat([batch.brain, batch.bone.roll(2, -1), batch.lesion], 1).to(batch.ct.dtype)
    return replace(
        NoAnchor()(batch), mean=batch.ct.roll(2, -1), mri=0.9 * batch.mri,
        ct=batch.ct.roll(2, -1), roi=moved, registration=found,
    )  # fmt: skip


def is_guided_to(given, case, batch, anchor, sources):
    """Whether a case's sources are the given CT's, or the anchor's."""
    mri, ct, roi = (volume[case] for volume in sources)
    ct_wanted, bone = (
        (batch.ct[case], batch.bone[case, 0])
        if given
        else (anchor.ct[case], anchor.roi[case, 1] > 0.5)
    )
    expected = torch.stack(
        [batch.brain[case, 0], bone & ~batch.brain[case, 0], batch.lesion[case, 0]]
    )
    return (
        torch.equal(mri, anchor.mri[case])
        and torch.equal(ct, ct_wanted)
        and torch.equal(roi, expected)
    )


@pytest.fixture
def pair(phantoms):
    """Two cases whose bone masks reach into the brain, as they must not."""
    batch = collate_batches([phantoms.batch(2.0, case=7), phantoms.batch(2.0, case=2)])
    reaching = batch.bone | (batch.brain & batch.brain.roll(3, -2) & (batch.mri > 0))
    assert (reaching & batch.brain).flatten(1).any(1).all()
    return replace(batch, roi=torch.cat([batch.brain, reaching, batch.lesion], 1))


@pytest.mark.parametrize(
    "tolerance_mm, given",
    [(0.0, [False, False]), (0.9, [False, False]), (1.1, [True, False]), (2.9, [True, False]),
     (3.1, [True, True]), (float("inf"), [True, True])],
)  # fmt: skip
def test_a_ct_is_guided_to_as_given_where_its_motion_is_within_the_tolerance(
    pair, tolerance_mm, given
):
    anchor = with_motions(pair, 1.0, -3.0)  # a shift moves every voxel by its length
    sources = guiding_sources(pair, anchor, tolerance_mm)
    for case in range(2):
        assert is_guided_to(given[case], case, pair, anchor, sources)
        assert not is_guided_to(not given[case], case, pair, anchor, sources)


def test_a_ct_is_guided_to_as_given_where_the_anchors_mean_is_like_it_and_not_like_the_moved_one(
    pair,
):
    anchor = with_motions(pair, 5.0, 5.0)
    mean = torch.stack([pair.ct[0], anchor.ct[1]])
    sources = guiding_sources(pair, replace(anchor, mean=mean), 0.6)
    assert is_guided_to(True, 0, pair, anchor, sources)
    assert is_guided_to(False, 1, pair, anchor, sources)
    believed = guiding_sources(pair, replace(anchor, mean=mean), 0.0)
    assert all(is_guided_to(False, case, pair, anchor, believed) for case in range(2))


def test_the_motion_of_a_turn_is_its_root_mean_square_over_the_brain(pair):
    anchor, angle = with_motions(pair, 0.0, 0.0), 0.05
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    anchor.registration.motion[:, 1:3, 1:3] = turn
    _, _, height, width = pair.mri.shape[1:]
    up = (torch.arange(height) - (height - 1) / 2) * pair.spacing_mm[0, 1]
    left = (torch.arange(width) - (width - 1) / 2) * pair.spacing_mm[0, 2]
    square = 2 * (1 - math.cos(angle)) * (up[:, None].square() + left.square())
    wanted_mm = [square.expand_as(brain)[brain].mean().sqrt().item() for brain in pair.brain[:, 0]]
    assert wanted_mm[0] != pytest.approx(wanted_mm[1], rel=1e-3)
    for case in range(2):
        for factor, given in ((0.999, False), (1.001, True)):
            sources = guiding_sources(pair, anchor, factor * wanted_mm[case])
            assert is_guided_to(given, case, pair, anchor, sources)


def test_without_an_anchor_guidance_is_to_the_sources_as_given(pair):
    anchor = NoAnchor()(pair)
    for tolerance_mm in (0.0, float("inf")):
        sources = guiding_sources(pair, anchor, tolerance_mm)
        assert all(is_guided_to(True, case, pair, anchor, sources) for case in range(2))


@pytest.mark.parametrize("by_region", [True, False])
def test_what_brain_has_to_go_lengthens_the_steps_of_bone_only_where_their_sum_is_followed(
    phantoms, by_region
):
    """Bone has nearly arrived, and the brain has far to go."""
    method = phantoms.method("clinfuse", f"guidance.by_region={by_region}", members=2).eval()
    batch = phantoms.batch(0.0, case=7)
    nearly = torch.where(batch.bone, batch.ct + 0.01, -batch.mri)
    method.anchor = Between(nearly)
    method.guidance = replace(method.guidance, eta=0.5, eta_u=0.0, kappa=None, gradient="x0")
    method.guidance_loss = ClinicalRoiLoss(0.0, 1.0, 0.0, fidelity=(0.0, 50.0))
    alone = method.ensemble(batch).mean(0)
    method.guidance_loss = ClinicalRoiLoss(1.0, 1.0, 0.0, fidelity=(50.0, 50.0))
    together = method.ensemble(batch).mean(0)
    further = (together - alone)[batch.bone].abs().mean()
    assert further < 1e-6 if by_region else further > 1e-4


@pytest.mark.parametrize("in_image", [True, False])
def test_steps_in_the_image_move_bone_where_the_model_is_sure_of_it_too(phantoms, in_image):
    steps = f"guidance.image_steps=[true,{str(in_image).lower()},false]"
    method = phantoms.method("clinfuse", steps, members=2).eval()
    batch = phantoms.batch(0.0, case=7)
    sure = torch.zeros_like(batch.bone)
    sure[..., ::2] = True
    scale = torch.where(sure, 0.01, 0.5)
    method.anchor = Between(torch.where(batch.bone, batch.ct + 0.2, batch.mri), scale)
    method.guidance = replace(method.guidance, eta=0.5, eta_u=0.0, kappa=None, gradient="x0")
    method.guidance_loss = ClinicalRoiLoss(0.0, 1.0, 0.0, fidelity=(0.0, 50.0))
    error = (method.ensemble(batch).mean(0) - batch.ct).abs()
    where_sure, where_not = (error[batch.bone & where].mean() for where in (sure, ~sure))
    assert where_not < 0.15
    assert where_sure < 0.15 if in_image else where_sure > 0.19


def test_image_steps_must_speak_of_every_region():
    with pytest.raises(ValueError, match=r"brain.*bone.*lesion.*got \[True, False\]"):
        Guidance(0.1, 0.0, None, image_steps=(True, False))


@pytest.mark.parametrize("tolerance_mm", [0.0, 8.0, float("inf")])
def test_the_tolerance_of_the_configuration_decides_what_is_guided_to(phantoms, tolerance_mm):
    method = phantoms.method("clinfuse", f"guidance.tolerance_mm={tolerance_mm}").eval()
    batch, seen = phantoms.batch(4.0), []
    anchor = method.anchor(batch)
    method.guidance_loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    method.ensemble(batch)
    assert (anchor.ct - batch.ct).abs().max() > 0.1  # untrained, it wants some 10 mm
    expected = batch.ct if tolerance_mm > 100 else anchor.ct
    assert len(seen) == 2 and all(torch.equal(ct, expected) for ct in seen)


def test_gamma_guides_with_a_lesion_head_and_has_nothing_to_guide_by_without_one(phantoms, head):
    def with_gamma(gamma, head):
        overrides = (f"guidance.gamma={gamma}", "guidance.eta=0.2")
        return sampled(phantoms, *overrides, head=head)

    assert torch.equal(with_gamma(0.0, None), with_gamma(3.0, None))
    assert (with_gamma(0.0, head) - with_gamma(3.0, head)).abs().max() > 1e-3


@pytest.mark.parametrize("lesion_start, calls", [(1.0, 4), (0.6, 2), (0.0, 0)])
def test_the_lesion_head_reads_every_step_or_those_from_a_level_on(
    phantoms, head, lesion_start, calls
):
    seen = []
    head.network.reader.register_forward_hook(lambda *_: seen.append(1))
    overrides = (f"guidance.lesion_start={lesion_start}", "guidance.gamma=3.0")
    method = phantoms.method("clinfuse", *overrides, steps=4).eval()
    method.lesion_head = head
    method.ensemble(phantoms.batch(case=7))
    assert len(seen) == calls


# What must not happen.


def one_voxel(batch, index):
    lesion = torch.zeros_like(batch.lesion)
    lesion[(0, 0, *index)] = True
    return lesion


HARD_MASKS = {
    "no_lesion": lambda b: (b.brain, b.bone, torch.zeros_like(b.lesion)),
    "one_voxel": lambda b: (b.brain, b.bone, one_voxel(b, b.brain[0, 0].nonzero()[40])),
    "outside_the_head": lambda b: (b.brain, b.bone, one_voxel(b, (0, 0, 0))),
    "lesion_everywhere": lambda b: (b.brain, b.bone, torch.ones_like(b.lesion)),
    "no_brain": lambda b: (torch.zeros_like(b.brain), b.bone, b.lesion),
    "no_bone": lambda b: (b.brain, torch.zeros_like(b.bone), b.lesion),
    "nothing": lambda b: (torch.zeros_like(b.brain),) * 3,
}


@pytest.mark.parametrize("masks", HARD_MASKS)
@pytest.mark.parametrize("of_mean", [True, False])
@pytest.mark.parametrize("gradient", ["x0", "full"])
def test_hard_masks_and_any_strength_end_in_finite_numbers(
    phantoms, head, gradient, of_mean, masks
):
    batch = phantoms.batch(4.0, case=7)
    roi = torch.cat(HARD_MASKS[masks](batch), 1)
    distance_mm = signed_distance_mm(roi[:, 2:3], batch.spacing_mm).to(batch.mri)
    batch = replace(batch, roi=roi, lesion_distance_mm=distance_mm)
    method = phantoms.method("clinfuse", "guidance.gamma=3.0", members=3).eval()
    method.lesion_head = head
    for strength in (0.1, 1e6):
        method.guidance = replace(
            method.guidance, eta=strength, eta_u=strength, gradient=gradient, of_mean=of_mean
        )
        assert method.ensemble(batch).isfinite().all()
        assert method.fuse(batch).abs().max() <= 1


@pytest.mark.parametrize("gradient", ["x0", "full"])
def test_a_head_whose_gradient_is_no_number_leaves_its_part_out_and_a_warning_says_so(
    phantoms, gradient
):
    class Steep(torch.nn.Module):
        def forward(self, fused):
            return (0 * fused).sqrt()  # 0 everywhere, with a slope of 0 times infinity

    overrides = ("guidance.eta_u=0.0", f"guidance.gradient={gradient}", "guidance.gamma=3.0")
    with pytest.warns(RuntimeWarning, match="gradient was not finite") as told:
        refused = sampled(phantoms, *overrides, "guidance.eta=0.2", head=Steep())
    assert len(told) == 1  # of a whole walk, not of each step
    without = ("guidance=off",)  # the sum of the regions' losses is no number either
    if gradient == "x0":
        without = (*overrides, "guidance.eta=0.2", "guidance.gamma=0.0")
    assert torch.equal(refused, sampled(phantoms, *without))


class Waits(TorchDispatchMode):
    """Counts what a GPU's host would have to wait for: values read, and shapes that depend on them.

    ``_to_copy`` counts where it changes the device, which it never may in a walk. Beside operators,
    in the backward pass too, the calls that need none on a CPU are counted.
    """

    OPERATORS = (
        torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
        torch.ops.aten.equal, torch.ops.aten.masked_select, torch.ops.aten._unique2,
    )  # fmt: skip
    CALLS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__)

    def __init__(self):
        super().__init__()
        self.counted, self.operators = [], 0
        counted, calls = self.counted, self.CALLS

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in calls:
                    counted.append(func.__name__)
                return func(*args, **(kwargs or {}))

        self.calls = Calls()

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        self.operators += 1
        moved = packet is torch.ops.aten._to_copy and (
            kwargs.get("device") not in (None, args[0].device)
        )
        by_mask = packet in (torch.ops.aten.index, torch.ops.aten.index_put) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if packet in self.OPERATORS or moved or by_mask:
            self.counted.append(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]),
        lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x + 0),
        lambda x: x.tolist(), lambda x: x.numpy(), lambda x: np.asarray(x), lambda x: x.cpu(),
        lambda x: x.to("meta"), lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_what_would_be_waited_for_is_counted_and_plain_arithmetic_is_not(wait):
    x = torch.ones(3)
    with Waits() as waits:
        x.double().where(x > 0, 0.0).clamp(max=2)
    assert not waits.counted and waits.operators >= 3
    with waits:
        wait(x)
    assert waits.counted


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("gradient, of_mean", [("x0", True), ("full", False)])
def test_no_step_of_a_guided_walk_waits_for_the_device(
    phantoms, head, monkeypatch, sampler, gradient, of_mean
):
    def edt(*_, **__):
        raise AssertionError("a distance map was made on the way")

    batch = phantoms.batch(4.0, case=7)
    for module in ("clinfuse.functional.distances", "clinfuse.roi.masks", "scipy.ndimage"):
        monkeypatch.setattr(f"{module}.distance_transform_edt", edt)

    def waits(steps):
        method = phantoms.method("clinfuse", f"sampler={sampler}", steps=steps, members=3).eval()
        method.lesion_head = head
        method.guidance = replace(
            method.guidance, eta=0.1, eta_u=0.05, kappa=0.5, gradient=gradient, of_mean=of_mean
        )
        method.guidance_loss = ClinicalRoiLoss(gamma=3.0, fidelity=(1.0, 1.0))
        walk, seen = method.sampler, Waits()

        def watched(*arguments, **settings):
            with seen:
                return walk(*arguments, **settings)

        method.sampler = watched
        assert method.ensemble(batch).isfinite().all()
        return seen

    two, four = waits(2), waits(4)
    assert four.operators > 1.5 * two.operators  # they do see the steps
    assert set(two.counted) == {"tolist"}  # of the levels, before the first step
    assert four.counted == two.counted


def test_sampling_leaves_no_gradient_anywhere(phantoms, head):
    method = phantoms.method("clinfuse", "guidance.gradient=full")
    method.lesion_head = head
    members = method.ensemble(phantoms.batch(case=7))
    assert not members.requires_grad
    assert all(parameter.grad is None for parameter in method.parameters())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver"])
def test_any_sampler_can_be_asked_for(phantoms, sampler):
    members = sampled(phantoms, f"sampler={sampler}", steps=3)
    assert members.isfinite().all() and members.std(0).mean() > 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "zero_terminal_snr"])
def test_any_schedule_can_be_asked_for(phantoms, schedule):
    assert sampled(phantoms, f"schedule={schedule}").isfinite().all()


# Model draws.


def weights_of_another_point(method, seed):
    """The anchor's last bias as of another point of the training."""
    name = "anchor.network.past.bias"
    now = method.state_dict()[name]
    generator = torch.Generator().manual_seed(seed)
    return {name: now + 0.3 * torch.randn(now.shape, generator=generator)}


def test_one_model_has_one_draw_which_is_its_ensemble(phantoms):
    method, batch = phantoms.method("clinfuse", members=3).eval(), phantoms.batch()
    draws = method.model_draws(batch)
    assert draws.shape == (1, 3, *batch.mri.shape)
    assert torch.equal(draws[0], method.ensemble(batch))
    for step in (method.test_step(batch, 0), method.validation_step(batch, 0)):
        assert torch.equal(step, draws)


def test_each_draw_is_what_a_model_with_that_anchor_would_sample(phantoms, head):
    def model():
        method = phantoms.method("clinfuse", "guidance.gamma=3.0").eval()
        method.lesion_head = head
        return method

    batch, method, other = phantoms.batch(), model(), model()
    alone = method.ensemble(batch)
    weights = weights_of_another_point(method, seed=1)
    method.add_draw({})
    method.add_draw(weights | {"network.past.bias": torch.full((1,), 9.0)})
    other.load_state_dict(weights, strict=False)
    same, again, drawn = method.model_draws(batch)
    assert torch.equal(same, alone) and torch.equal(method.ensemble(batch), alone)
    assert torch.equal(again, alone)  # the same noise, and what is missing is as it was
    assert torch.equal(drawn, other.ensemble(batch))
    assert (drawn - alone).abs().max() > 1e-2


def test_draws_of_other_anchors_are_epistemic_and_draws_of_noise_are_not(phantoms):
    method, batch = phantoms.method("clinfuse", "guidance=off", members=3).eval(), phantoms.batch()
    for _ in range(2):
        method.add_draw({})
    _, epistemic, aleatoric = total_variance(method.model_draws(batch))
    assert (epistemic == 0).all() and (aleatoric > 0).any()

    method = phantoms.method("clinfuse", "guidance=off", members=3).eval()
    points = [weights_of_another_point(method, seed) for seed in (1, 2)]
    for weights in points:
        method.add_draw(weights)
    means = [method.anchor(batch).mean]
    for weights in points:
        other = phantoms.method("clinfuse").eval()
        other.load_state_dict(weights, strict=False)
        means.append(other.anchor(batch).mean)
    _, epistemic, _ = total_variance(method.model_draws(batch))
    # unguided and centred, a model's ensemble has its anchor's mean
    torch.testing.assert_close(epistemic, torch.stack(means).var(0), rtol=1e-3, atol=1e-6)
    assert epistemic.sqrt().mean() > 0.01


def test_an_added_draw_does_not_change_with_the_model_it_was_taken_from(phantoms):
    method, batch = phantoms.method("clinfuse").eval(), phantoms.batch()
    method.add_draw({})
    _, before = method.model_draws(batch)
    method.load_state_dict(method.state_dict() | weights_of_another_point(method, seed=1))
    now, after = method.model_draws(batch)
    assert torch.equal(before, after) and not torch.allclose(now, after, atol=1e-2)


# Training.


class Watch(Callback):
    """Which parts of a method each training step changed."""

    def __init__(self, parts):
        self.parts, self.changed, self.logged = parts, [], []

    def weights(self):
        return {
            name: [p.detach().clone() for p in module.parameters()]
            for name, module in self.parts.items()
        }

    def on_train_batch_start(self, *_):
        self.before = self.weights()

    def on_train_batch_end(self, trainer, *_):
        now = self.weights()
        self.changed.append(
            {
                name
                for name in now
                if any(
                    not torch.equal(a, b) for a, b in zip(self.before[name], now[name], strict=True)
                )
            }
        )
        self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})


def trained(phantoms, method, parts, steps, *overrides):
    cfg = phantoms.config("experiment=smoke", "data.prepare.workers=1", *overrides)
    watch = Watch(parts)
    trainer = instantiate(
        cfg.trainer, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[watch], _convert_="all",
    )  # fmt: skip
    trainer.fit(method, datamodule=instantiate(cfg.data, _convert_="all"))
    return watch


def test_each_stage_trains_its_own_part_and_no_other(phantoms):
    method = phantoms.method("clinfuse", "method.shares=[0.34,0.33,0.33]")
    parts = {
        "registration": method.anchor.registration,
        "anchor": method.anchor.network,
        "denoiser": method.network,
    }
    watch = trained(phantoms, method, parts, 6)
    assert watch.changed == [{"registration"}] * 2 + [{"anchor"}] * 2 + [{"denoiser"}] * 2
    assert {"train/reference", "train/roi", "train/scale"} <= set(watch.logged[2])
    assert {"train/diffusion", "train/roi"} <= set(watch.logged[4])


def test_model_draws_are_of_what_prepares_the_sources_and_of_the_anchor_each_in_its_stage(phantoms):
    class Asking(Callback):
        def on_train_start(self, trainer, method):
            self.stages, self.names = method.draw_stages, list(method.state_dict())

    method = phantoms.method("clinfuse", "method.shares=[0.5,0.25,0.25]")
    cfg = phantoms.config("experiment=smoke", "data.prepare.workers=1")
    asking = Asking()
    trainer = instantiate(
        cfg.trainer, max_steps=8, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[asking], _convert_="all",
    )  # fmt: skip
    trainer.fit(method, datamodule=instantiate(cfg.data, _convert_="all"))
    (sources, anchor), names = asking.stages, asking.names
    assert sources[:2] == (0, 4) and anchor[:2] == (4, 6)
    of_sources, of_anchor = ({n for n in names if n.startswith(s[2])} for s in (sources, anchor))
    assert of_sources and of_anchor and not of_sources & of_anchor
    assert of_sources | of_anchor == {n for n in names if n.startswith("anchor.")}


def test_plain_diffusion_has_nothing_but_a_denoiser_to_train(phantoms):
    method = phantoms.method("plain_diffusion")
    watch = trained(phantoms, method, {"denoiser": method.network, "anchor": method.anchor}, 2)
    assert watch.changed == [{"denoiser"}] * 2


@pytest.mark.parametrize("parameterisation", ["v", "eps", "x_0"])
def test_every_parameterisation_trains_and_samples(phantoms, parameterisation):
    overrides = (f"method.parameterisation={parameterisation}", "method.shares=[0.0,0.0,1.0]")
    method = phantoms.method("clinfuse", *overrides)
    watch = trained(phantoms, method, {"denoiser": method.network}, 1)
    # an untrained network predicts 0, so the loss is the target's mean square: of order 1
    assert 0.1 < watch.logged[0]["train/diffusion"] < 30
    assert method.eval().ensemble(phantoms.batch()).isfinite().all()


def test_the_same_training_twice_gives_the_same_weights_bit_for_bit(phantoms):
    def weights():
        method = phantoms.method("clinfuse")
        trained(phantoms, method, {}, 5)
        return list(method.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


def test_unguided_diffusion_has_neither_guidance_nor_the_roi_loss(phantoms):
    method = phantoms.method("diffusion_unguided", "method.shares=[0.0,0.0,1.0]")
    assert method.guidance.eta == 0 and method.guidance.eta_u == 0
    watch = trained(phantoms, method, {}, 1)
    assert "train/roi" not in watch.logged[0]
    assert watch.logged[0]["train/loss"] == watch.logged[0]["train/diffusion"]


@pytest.mark.parametrize("shares", ["[0.5,0.5]", "[0.5,0.4,0.2]", "[-0.5,1.0,0.5]"])
def test_shares_that_are_not_a_division_of_training_are_refused(phantoms, shares):
    with pytest.raises(InstantiationException, match="three shares of training that sum to 1"):
        phantoms.method("clinfuse", f"method.shares={shares}")


class Knowing(SynthesisRegistration):
    """A registration whose guess is given."""

    def __init__(self, guess, scale):
        super().__init__(3, features=(8,) * 6)
        self.guess, self.log_scale = guess, torch.full_like(guess, scale).log()

    def synthesise(self, mri, brain):
        return self.guess, self.log_scale


class Saying(torch.nn.Module):
    """A denoiser whose answer is given, and that remembers what it saw."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, volume):
        self.saw = volume
        return self.answer


def saying(mri, ct):
    denoisers = SourceDenoisers(3)
    denoisers.mri, denoisers.ct = Saying(mri), Saying(ct)
    return denoisers


def test_the_guess_of_the_ct_pays_for_its_error_and_for_a_wrong_scale_of_it(phantoms):
    batch = phantoms.batch(2.0)

    def cost(offset, scale):
        return source_losses(Knowing(batch.clean_ct + offset, scale), None, batch)["guess"].item()

    assert cost(0.5, 0.5) > cost(0.1, 0.1) + 10 * (0.25 - 0.01) - 1e-4
    assert cost(0.1, 1.0) > cost(0.1, 0.1) and cost(0.1, 0.02) > cost(0.1, 0.1)


def test_the_sources_are_compared_with_their_clean_twins_where_they_belong(phantoms):
    batch = phantoms.batch(4.0)
    right = saying(batch.clean_mri, batch.clean_ct)
    losses = source_losses(None, right, batch)
    assert losses["denoised_mri"] < 1e-4 and losses["denoised_ct"] < 1e-4
    as_scanned = source_losses(None, saying(batch.clean_mri, batch.ct), batch)
    assert as_scanned["denoised_ct"] > 0.5
    where_it_belongs = (right.ct.saw - batch.clean_ct).square().mean()
    assert where_it_belongs < 0.3 * (batch.ct - batch.clean_ct).square().mean()


def test_a_few_steps_on_one_case_teach_what_prepares_the_sources(phantoms):
    anchor, batch = phantoms.method("clinfuse").anchor, phantoms.batch(0.0, case=2)
    prepared = [*anchor.registration.parameters(), *anchor.denoisers.parameters()]
    optimizer = torch.optim.AdamW(prepared, lr=2e-3)
    history = []
    for _ in range(24):
        optimizer.zero_grad()
        losses = source_losses(anchor.registration, anchor.denoisers, batch)
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[-1]["guess"] < 0.7 * history[0]["guess"]
    assert history[-1]["denoised_mri"] < 0.9 * history[0]["denoised_mri"]
    assert history[-1]["denoised_ct"] < 0.9 * history[0]["denoised_ct"]


def test_a_share_of_training_for_sources_that_nothing_prepares_is_refused(phantoms):
    with pytest.raises(InstantiationException, match=r"prepares none, got 0\.4"):
        phantoms.method("plain_diffusion", "method.shares=[0.4,0.0,0.6]")


def test_without_guidance_the_centred_mean_is_the_anchors_and_guidance_moves_it(phantoms, head):
    batch = phantoms.batch(2.0, case=7)

    def mean(*overrides):
        method = phantoms.method("clinfuse", *overrides, members=3).eval()
        method.lesion_head = head
        with torch.no_grad():
            method.network.past.bias.fill_(0.2)  # a denoiser with an error that all members share
            return method.fuse(batch), method.anchor(batch).mean.clamp(-1, 1)

    off = ("guidance.eta=0.0", "guidance.eta_u=0.0")
    torch.testing.assert_close(*mean(*off), atol=1e-5, rtol=0)
    astray, anchored = mean(*off, "method.centred=false")
    assert (astray - anchored).abs().max() > 1e-3
    guided, anchored = mean("guidance.eta=0.2", "guidance.gamma=3.0")
    assert (guided - anchored).abs().max() > 1e-3


def test_the_error_scale_is_learned_as_a_standard_deviation_and_few_stray_voxels_do_not_rule_it():
    """Errors of two sizes, one voxel in a hundred astray; the scale found by descent."""
    true = torch.where(torch.rand(1, 1, 20, 40, 40) > 0.5, 0.1, 0.4)
    error = true * torch.randn_like(true)
    astray = torch.rand_like(true) < 0.01

    def found(error):
        logs = torch.full((2,), -1.5, requires_grad=True)
        optimizer = torch.optim.Adam([logs], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            scale_loss(error, torch.where(true == 0.1, logs[0], logs[1]).exp()).backward()
            optimizer.step()
        return logs.detach().exp()

    torch.testing.assert_close(found(error), torch.tensor([0.1, 0.4]), rtol=0.05, atol=0)
    # their squares alone are 0.01 x 1.5^2, which would make a standard deviation of 0.18 of 0.1
    assert found(torch.where(astray, 1.5, error))[0] < 0.13


def test_guidance_to_keep_both_sources_raises_what_it_is_paid_by(phantoms):
    """By itself, and beside the guidance by Eq. 2; the members move alike and keep their spread."""
    lost = SourceFidelity(1.0, 0.0)
    batch = phantoms.batch(0.0, case=7)

    def sampled(steps, *other):
        keep = (f"guidance.kept_steps={steps}", "guidance.information=0.0")  # too small for VIF
        method = phantoms.method("clinfuse", *keep, *other, members=2, steps=3).eval()
        method.anchor = Between()
        ensemble = method.ensemble(batch)
        return float(lost(ensemble.mean(0).clamp(-1, 1), batch.mri, batch.ct)), ensemble

    alone = ("guidance.eta=0.0", "guidance.eta_u=0.0")
    (without, free), (little, _), (more, led) = (sampled(steps, *alone) for steps in (0, 2, 10))
    assert without - 0.01 > little > more + 0.01
    torch.testing.assert_close(free[0] - free[1], led[0] - led[1], atol=1e-3, rtol=0)
    assert sampled(10, "guidance.eta=0.05")[0] < sampled(0, "guidance.eta=0.05")[0] - 0.01


def test_the_unguided_method_and_guidance_off_climb_nowhere(phantoms):
    for name, *settings in (
        ("diffusion_unguided", "guidance.kept_steps=9"),
        ("clinfuse", "guidance=off"),
    ):
        method, batch = phantoms.method(name, *settings), phantoms.batch(0.0)
        assert method._guide(batch, method.anchor(batch)) is None
