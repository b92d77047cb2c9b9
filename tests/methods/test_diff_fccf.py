from functools import partial

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback

from clinfuse.data.paired_slices import collate_slices
from clinfuse.diffusion.process import q_sample
from clinfuse.diffusion.samplers.ddim import ddim
from clinfuse.diffusion.schedule import cosine, levels_for
from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.warp import rigid_displacement, rigid_matrix, warp
from clinfuse.losses.sources import SourceLoss
from clinfuse.losses.weight_policy import WeightPolicy
from clinfuse.methods.base import case_generator
from clinfuse.methods.diff_fccf import (
    AIR,
    DiffFccf,
    clean_pair,
    composed,
    functional_of,
    fused_target,
    misplaced,
)
from clinfuse.networks.diff_fccf import ANATOMY, BOTH, FUNCTION, Heads
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.types import FusionBatch, SliceBatch

BASE = {"noise": 10.0, "folding": 1.0, "smoothness": 1.0, "fusion": 1.0, "quality": 10.0}
SPACING_MM = (1.0, 1.0)


def method(**arguments):
    torch.manual_seed(0)
    return DiffFccf(
        **{
            "network": partial(
                FusionUNet, spatial_dims=2, channels=[16, 24, 32], encoder_channels=4
            ),
            "spatial_dims": 2,
            "alpha_bars": cosine(2000),
            "levels": levels_for,
            "sampler": ddim,
            "steps_per_stage": 2,
            "fusion": SourceLoss(ssim=1.0, gradient=5.0, intensity=1.0),
            "policy": WeightPolicy(BASE),
            "optimizer": partial(torch.optim.AdamW, lr=3e-3),
            **arguments,
        }
    )


def heads_of(cases, seed, shape=(48, 48), shift_mm=4.0, turn_rad=0.05, direction=None):
    """Random heads: anatomy shows the brain's texture, function skull and brain, in one hue.

    The functional source is moved by up to ``shift_mm`` along each axis, or by that much along
    ``direction``.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = [torch.arange(size) - (size - 1) / 2 for size in shape]
    h, w = torch.meshgrid(*axes, indexing="ij")
    place = torch.rand(4, cases, 1, 1, generator=generator)
    radii, centre = torch.stack((14 + 4 * place[0], 11 + 4 * place[1])), 4 * (place[2:] - 0.5)
    r = (((h - centre[0]) / radii[0]) ** 2 + ((w - centre[1]) / radii[1]) ** 2).sqrt()[:, None]
    brain = torch.sigmoid((0.8 - r) * 25)
    skull = torch.sigmoid((1 - r) * 25) - brain
    texture = 6 * gaussian_smooth(torch.randn(cases, 1, *shape, generator=generator), (2.0, 2.0))
    mri = (2 * (brain * (0.6 + 0.3 * texture.tanh()) + 0.1 * skull) - 1).clamp(-1, 1)
    ct = (2 * (0.3 * brain + skull) - 1).clamp(-1, 1)
    uniform = 2 * torch.rand(cases, 3, generator=generator) - 1
    shift = uniform[:, :2] if direction is None else torch.tensor(direction).expand(cases, 2)
    motion = rigid_matrix(turn_rad * uniform[:, 2:], shift_mm * shift)
    back = rigid_displacement(torch.linalg.inv(motion), shape, SPACING_MM)
    chroma = torch.cat((-0.3 * brain, 0.2 * brain), 1)
    roi = torch.cat((brain > 0.5, skull > 0.5, skull > 2), 1)
    return SliceBatch(
        mri=mri,
        ct=warp(ct, back, SPACING_MM),
        roi=roi,
        spacing_mm=torch.ones(cases, 2),
        case_id=[f"{seed}_{case}" for case in range(cases)],
        clean_mri=mri,
        clean_ct=ct,
        clean_roi=roi,
        misregistration=motion,
        chroma=warp(chroma, back, SPACING_MM),
    )


# Inference.


def test_the_condition_is_functional_then_both_then_anatomical_each_in_its_third():
    walked = []

    def sampler(denoise, x_T, levels):
        walked.append(levels)
        return ddim(denoise, x_T, levels)

    model = method(sampler=sampler, steps_per_stage=3)
    results = model.stages(heads_of(1, 0))
    assert [result.sight for result in results] == [FUNCTION, BOTH, ANATOMY]
    schedule = cosine(2000)
    for levels, last in zip(walked, (2000, 1333, 666), strict=True):
        assert len(levels) == 3 and levels[0] == schedule[last - 1]
    assert walked[0][-1] < walked[1][0] and walked[1][-1] < walked[2][0]
    assert model.steps == 9


def test_each_stage_begins_where_the_last_ended_under_the_noise_of_its_case():
    model, batch = method(), heads_of(1, 0)
    results, generator = model.stages(batch), case_generator("0_0", seed=0)
    picture = torch.zeros(1, 3, 48, 48)
    for result, last in zip(results, (2000, 1333, 666), strict=True):
        noise = torch.randn(picture.shape, generator=generator)
        level = cosine(2000)[last - 1].expand(1)
        torch.testing.assert_close(result.start, q_sample(picture, noise, level))
        picture = result.picture
    assert torch.equal(model.fuse_colour(batch)[:, :1], picture[:, :1].clamp(-1, 1))


def test_a_stage_cannot_show_what_it_does_not_see():
    model, batch = method(), heads_of(1, 0)
    other = heads_of(1, 0)
    other.mri = other.mri.flip(2)
    first, second, third = zip(model.stages(batch), model.stages(other), strict=True)
    assert torch.equal(first[0].picture, first[1].picture)
    assert not torch.allclose(second[0].picture, second[1].picture, atol=0.05)
    recoloured = heads_of(1, 0)
    recoloured.chroma = -recoloured.chroma
    picture = model.stages(recoloured)[2].picture
    # the last stage has the colour from the picture so far alone
    torch.testing.assert_close(picture[:, :1], third[0].picture[:, :1], atol=1e-4, rtol=0)
    assert (picture[:, 1:] - third[0].picture[:, 1:]).abs().max() > 0.1


def test_a_case_is_fused_alike_alone_and_in_company_and_each_time():
    model, one, two = method(members=2), heads_of(1, 0), heads_of(1, 1)
    alone = model.ensemble(one)
    assert alone.shape == (2, 1, 1, 48, 48) and not torch.equal(alone[0], alone[1])
    assert torch.equal(alone, model.ensemble(one))
    pair = model.ensemble(collate_slices([two, one]))
    torch.testing.assert_close(pair[:, 1:], alone, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.fuse(one), alone.mean(0).clamp(-1, 1))


@pytest.mark.parametrize("shape", [(45, 39), (33, 48)])
def test_pictures_of_odd_sizes_are_fused_in_colour_and_in_grey(shape):
    model, batch = method(), heads_of(2, 0, shape)
    fused = model.fuse_colour(batch)
    assert fused.shape == (2, 3, *shape) and fused.isfinite().all()
    assert fused[:, :1].abs().max() <= 1 and fused[:, 1:].abs().max() <= 0.5
    batch.chroma = None
    assert model.fuse(batch).shape == (2, 1, *shape)


def test_warping_by_the_composed_field_is_warping_by_one_and_then_by_the_other():
    picture = gaussian_smooth(torch.randn(1, 1, 40, 40, dtype=torch.float64), (3.0, 3.0))
    fields = [
        rigid_displacement(rigid_matrix(torch.tensor([[a]]), torch.tensor([t])), (40, 40), (0.9, 2))
        for a, t in ((0.05, [1.0, -2.0]), (-0.08, [0.7, 1.5]))
    ]
    first, second = (field.double() for field in fields)
    spacing_mm = torch.tensor([[0.9, 2.0]], dtype=torch.float64)
    once = warp(picture, composed(first, second, spacing_mm), spacing_mm)
    twice = warp(warp(picture, first, spacing_mm), second, spacing_mm)
    inside = (..., slice(6, -6), slice(6, -6))
    torch.testing.assert_close(once[inside], twice[inside], atol=0.02, rtol=0)
    assert (once - picture)[inside].abs().max() > 0.1


def test_masks_of_the_functional_source_move_with_it():
    model, batch = method(), heads_of(1, 0)
    field = 3.0 * torch.ones(1, 2, 48, 48) * torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    model.displacement_mm = lambda batch: field
    moved = model.registered_roi(batch)
    assert torch.equal(moved[:, 1, :-3], batch.roi[:, 1, 3:])
    assert torch.equal(moved[:, ::2], batch.roi[:, ::2])


# The loss.


def test_untrained_its_terms_are_those_of_nothing_known_and_nothing_moved():
    model, batch = method(), heads_of(4, 0)
    terms = model.terms(batch, torch.Generator().manual_seed(0))
    assert list(terms) == list(BASE)
    assert 0 < terms["noise"] < 1  # x_t alone says something of its noise
    assert terms["folding"] == 0 and terms["smoothness"] == 0
    assert terms["quality"] > 1  # what the jitter has moved lies millimetres off


def test_the_loss_is_the_terms_weighed_by_the_policy_which_learns_of_them():
    model, batch, logged = method(policy=WeightPolicy(BASE, period=1)), heads_of(2, 0), {}
    model.log_dict = lambda values, **_: logged.update(values)
    model._progress = lambda: 0.0
    model.policy.act(0.0)
    weights = model.policy.weights()
    total = model.training_step(batch, 0)
    expected = sum(weights[name] * logged[f"train/{name}"] for name in BASE)
    torch.testing.assert_close(total, expected)
    assert {name: logged[f"weight/{name}"] for name in BASE} == weights
    assert model.policy.weights() != weights
    base = sum(BASE[name] * logged[f"train/{name}"] for name in BASE)
    torch.testing.assert_close(model.policy.previous, base.log())


def test_the_true_field_is_not_misplaced_and_none_at_all_by_as_much_as_the_shift():
    batch = heads_of(2, 0, shift_mm=3.0, turn_rad=0.0, direction=(0.6, 0.8))
    where = batch.clean_ct > AIR
    true = rigid_displacement(batch.misregistration, (48, 48), SPACING_MM)
    assert misplaced(true, batch, where) == 0
    assert misplaced(0 * true, batch, where).item() == pytest.approx(9, rel=1e-5)


def test_the_clean_pair_is_registered_in_colour_too():
    batch, still = heads_of(2, 0), heads_of(2, 0, shift_mm=0.0, turn_rad=0.0)
    anatomical, functional = clean_pair(batch)
    assert torch.equal(anatomical, batch.clean_mri)
    assert torch.equal(functional[:, :1], batch.clean_ct)
    inside = functional_of(still)[:, 1:]
    assert (functional[:, 1:] - inside).abs().mean() < 0.2 * (
        functional_of(batch)[:, 1:] - inside
    ).abs().mean()


def test_the_target_is_the_reference_or_else_the_clean_pair_by_the_masks():
    anatomical, functional = torch.rand(1, 1, 4, 4), torch.rand(1, 3, 4, 4)
    logits = torch.tensor([0.0, 2.0, 9.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    heads = Heads(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4), logits, torch.zeros(1, 1, 4, 4))
    share = torch.tensor(2.0).sigmoid()
    target = fused_target(heads, anatomical, functional, None)
    mixed = share * functional[:, :1] + (1 - share) * anatomical
    torch.testing.assert_close(target, torch.cat((mixed, functional[:, 1:]), 1))
    reference = torch.rand(1, 1, 4, 4)
    given = fused_target(heads, anatomical, functional, reference)
    assert torch.equal(given, torch.cat((reference, functional[:, 1:]), 1))


# Training.


class Weights(Callback):
    """The weights of the terms after each training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, method, *_):
        self.seen.append(torch.stack(list(method.policy.weights().values())).detach())


def test_it_trains_on_volumes_and_the_weights_it_is_trained_with_change_and_settle(phantoms):
    policy = ("method.policy.period=1", "method.policy.stable_from=0.6")
    model, weights = phantoms.method("diff_fccf", *policy), Weights()
    before = [parameter.clone() for parameter in model.network.parameters()]
    cfg = phantoms.config("experiment=smoke", "data.prepare.workers=1")
    trainer = instantiate(
        cfg.trainer, max_steps=8, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, callbacks=[weights], _convert_="all",
    )  # fmt: skip
    trainer.fit(model, datamodule=instantiate(cfg.data, _convert_="all"))
    assert any(
        not torch.equal(a, b) for a, b in zip(model.network.parameters(), before, strict=True)
    )
    seen = torch.stack(weights.seen)
    assert len(seen) == 8 and len(seen[:5].unique(dim=0)) == 5
    assert (seen[5:] == seen[5]).all()  # from 0.6 of eight steps on
    batch = phantoms.batch(2.0)
    fused = model.eval().fuse(batch)
    assert fused.shape == batch.mri.shape and fused.isfinite().all()


def test_it_takes_a_volume_of_odd_size_that_came_without_truth(phantoms):
    whole = phantoms.batch()
    volumes = (v[..., 1:, :-3, :-1] for v in (whole.mri, whole.ct, whole.roi))
    batch = FusionBatch(*volumes, whole.spacing_mm, whole.case_id)
    model = phantoms.method("diff_fccf")
    terms = model.terms(batch, torch.Generator().manual_seed(0))
    assert all(term.isfinite() for term in terms.values())
    assert model.eval().fuse(batch).shape == batch.mri.shape


@pytest.mark.parametrize(
    "override, expected",
    [
        ("method.alpha_bars.n=2", "schedule of at least 3 levels"),
        ("method.steps_per_stage=0", "steps and members of at least 1"),
        ("~method.policy.base.folding", "weight for each of"),
    ],
)
def test_settings_that_leave_a_stage_or_a_term_out_are_refused(phantoms, override, expected):
    with pytest.raises(InstantiationException, match=expected):
        phantoms.method("diff_fccf", override)
