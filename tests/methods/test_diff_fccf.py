from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback
from torch.nn.functional import mse_loss

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
    mistaken_noise,
)
from clinfuse.networks.diff_fccf import ANATOMY, BOTH, FUNCTION, SOURCE_NOISE, Heads
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


# The noise of the sources.


def noised(batch, std, seed=0):
    """The batch with noise on both sources, within [-1, 1], and what that noise is."""
    generator, clean = torch.Generator().manual_seed(seed), torch.cat((batch.mri, batch.ct), 1)
    noisy = (clean + std * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)
    return replace(batch, mri=noisy[:, :1], ct=noisy[:, 1:]), noisy - clean


@pytest.mark.parametrize("sight", [FUNCTION, BOTH, ANATOMY])
def test_what_is_blended_are_the_sources_without_the_noise_that_was_found_in_them(sight):
    model, clean = method(), heads_of(2, 0)
    noisy, noise = noised(clean, 0.2)
    x_t, level = torch.randn(2, 3, 48, 48), torch.full((2,), 0.5)
    seen = torch.tensor([sight.anatomy, sight.function]).reshape(2, 1, 1)

    def look(batch, source_noise):
        heads = Heads(
            torch.zeros(2, 3, 48, 48), source_noise * seen, torch.full((2, 2, 48, 48), 1.5),
            torch.zeros(2, 3, 48, 48), torch.zeros(2, 1, 48, 48),
        )  # fmt: skip
        model.network.forward = lambda *_: heads
        anatomical = batch.mri if sight.anatomy else clean.mri
        shown = functional_of(batch if sight.function else clean)
        return model.look(x_t, level, anatomical, shown, batch, sight)

    expected, without = look(clean, 0 * noise), look(noisy, noise)
    torch.testing.assert_close(without.fused, expected.fused)
    torch.testing.assert_close(without.registered, expected.registered)
    assert (look(noisy, 0 * noise).fused - expected.fused).abs().max() > 0.05


def test_no_noise_is_found_in_a_source_that_is_not_seen():
    model, batch = method(), heads_of(1, 0)
    for without in model.network.filters:
        torch.nn.init.normal_(without.last.weight)
    x_t, level = torch.randn(1, 3, 48, 48), torch.full((1,), 0.5)
    for sight in (FUNCTION, BOTH, ANATOMY):
        heads = model.look(x_t, level, batch.mri, functional_of(batch), batch, sight).heads
        found = [bool(noise.any()) for noise in heads.source_noise[0]]
        assert found == [sight.anatomy, sight.function]


def test_the_noise_term_holds_the_noise_found_against_the_noise_of_the_sources_seen():
    zeros = [torch.zeros(2, channels, 4, 4) for channels in (3, 2, 3, 1)]
    found, noise = torch.randn(2, 2, 2, 4, 4)
    heads = Heads(zeros[0], found, *zeros[1:])
    both = mistaken_noise(heads, noise, BOTH)
    each = [mistaken_noise(heads, noise, sight) for sight in (ANATOMY, FUNCTION)]
    for source, term in enumerate(each):
        torch.testing.assert_close(term, mse_loss(found[:, source] * 10, noise[:, source] * 10))
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def test_a_training_draw_has_noise_in_the_sources_and_none_in_what_it_is_compared_with():
    terms = {}
    for noise_std in (0.0, 0.4):
        model, batch = method(noise_std=noise_std), heads_of(4, 0)
        terms[noise_std] = model.terms(batch, torch.Generator().manual_seed(0))
    # untrained no noise is found; std is uniform in 0 to 0.4 a case, and black clips half of it
    assert 0.3 < terms[0.4]["noise"] - terms[0.0]["noise"] < 0.4**2 / 3 / SOURCE_NOISE**2
    # noise is copied into the fused picture, and does not lie in what that is held against
    assert terms[0.4]["fusion"] > 1.1 * terms[0.0]["fusion"]


def test_what_an_anatomical_source_came_with_is_noise_to_find_too():
    model, batch = method(noise_std=0.0), heads_of(2, 0)
    noisy, noise = noised(batch, 0.2)
    anatomical, functional, found = model._noisy(noisy, batch.mri, torch.Generator())
    assert torch.equal(anatomical, noisy.mri) and torch.equal(functional[:, :1], noisy.ct)
    torch.testing.assert_close(found[:, :1], noise[:, :1])
    assert not found[:, 1:].any()


def test_the_noise_term_alone_teaches_it_to_leave_less_noise_than_the_sources_average_has():
    model = method(noise_std=0.2)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    still = {"shape": (32, 32), "shift_mm": 0.0, "turn_rad": 0.0}
    for step in range(25):
        term = model.terms(heads_of(4, step, **still), generator)["noise"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    batch = heads_of(4, 1000, **still)
    noisy, noise = noised(batch, 0.1)
    inside = batch.mri > AIR
    left = (model.fuse(noisy) - model.fuse(batch))[inside].square().mean()
    assert left < 0.6 * noise.mean(1, keepdim=True)[inside].square().mean()


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
    zeros = [torch.zeros(1, channels, 4, 4) for channels in (3, 2, 2, 1)]
    heads = Heads(*zeros[:3], logits, zeros[3])
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
