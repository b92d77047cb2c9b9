import math
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from clinfuse.configuration import CONFIG_PATH, build_method
from clinfuse.methods.base import (
    FusionMethod,
    Stage,
    case_generator,
    case_places,
    staged_optimizer,
    step_generator,
    warmup_cosine,
)

OPTIONS = sorted(path.stem for path in (Path(CONFIG_PATH) / "method").glob("*.yaml"))
NOT_FUSING = {"lesion_head", "distill"}  # a student needs a teacher: test_distilled.py


def fitted(method, phantoms, steps, *overrides):
    """The method after so many training steps, in the smoke experiment's precision."""
    cfg = phantoms.config("experiment=smoke", "data.prepare.workers=1", *overrides)
    trainer = instantiate(
        cfg.trainer, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, _convert_="all",
    )  # fmt: skip
    trainer.fit(method, datamodule=instantiate(cfg.data, _convert_="all"))
    return method


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in NOT_FUSING])
def test_every_method_trains_a_step_and_fuses(option, phantoms):
    method = phantoms.method(option)
    assert isinstance(method, FusionMethod)
    if method.is_trainable:
        before = [parameter.clone() for parameter in method.parameters()]
        fitted(method, phantoms, steps=5)
        moved = [not torch.equal(a, b) for a, b in zip(before, method.parameters(), strict=True)]
        assert any(moved) and all(p.isfinite().all() for p in method.parameters())
    batch = phantoms.batch(2.0)
    fused = method.eval().fuse(batch)
    assert fused.shape == batch.mri.shape and fused.dtype == torch.float32
    assert fused.isfinite().all()
    assert fused.min() >= -1 and fused.max() <= 1
    assert fused.std() > 0


@pytest.mark.parametrize("kind", ["ct_mri", "spect_mri"])
@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in NOT_FUSING])
def test_every_method_trains_a_step_on_slices_of_odd_size_and_fuses_grey_and_colour(
    option, kind, phantoms
):
    cfg = phantoms.config(
        "experiment=smoke", f"method={option}", "data=phantom_slices",
        f"phantom_slices.kind={kind}", "phantom_slices.patients=4", "phantom_slices.slices=1",
        "phantom_slices.shape=[45,43]", "data.reference.steps=2",
    )  # fmt: skip
    data, method = instantiate(cfg.data, _convert_="all"), build_method(cfg)
    data.prepare_data()
    if method.is_trainable:
        trainer = instantiate(
            cfg.trainer, max_steps=1, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, _convert_="all",
        )  # fmt: skip
        trainer.fit(method, datamodule=data)
    batch = next(iter(data.test_dataloader()[0]))
    with torch.no_grad():
        fused = method.eval().fuse(batch)
        chroma = method.fused_chroma(batch)
    assert fused.shape == batch.mri.shape == (1, 1, 45, 43)
    assert fused.isfinite().all() and fused.abs().max() <= 1 and fused.std() > 0
    assert (chroma is None) == (kind == "ct_mri")
    if chroma is not None:
        assert chroma.shape == (1, 2, 45, 43) and chroma.abs().max() > 0.05


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in NOT_FUSING])
def test_every_method_returns_the_mean_of_its_ensemble_and_leaves_the_batch_alone(option, phantoms):
    method, batch, untouched = phantoms.method(option).eval(), phantoms.batch(), phantoms.batch()
    members, (draws,) = method.ensemble(batch), method.model_draws(batch)
    assert members.shape[1:] == batch.mri.shape and torch.equal(draws, members)
    torch.testing.assert_close(method.fuse(batch), members.mean(0).clamp(-1, 1))
    assert torch.equal(batch.mri, untouched.mri) and torch.equal(batch.ct, untouched.ct)
    assert torch.equal(batch.roi, untouched.roi)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "distill"])
def test_a_method_is_trainable_if_and_only_if_it_has_an_optimizer(option, phantoms):
    method = phantoms.method(option)
    assert method.is_trainable == hasattr(method, "optimizer")


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in NOT_FUSING])
def test_no_method_looks_at_the_truth(option, phantoms):
    method, batch = phantoms.method(option).eval(), phantoms.batch(2.0)
    honest = method.fuse(batch)
    batch.reference = batch.clean_mri = batch.clean_ct = torch.zeros_like(batch.mri)
    batch.clean_roi = torch.zeros_like(batch.roi)
    batch.misregistration = torch.eye(4)[None]
    assert torch.equal(method.fuse(batch), honest)


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine():
    factor = partial(warmup_cosine, start=10, end=30, warmup=4)
    assert [factor(step) for step in (0, 9)] == [0, 0]
    assert [factor(step) for step in (10, 11, 12, 13)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(14) == 1
    assert factor(18) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(22) == pytest.approx(0.5)
    assert factor(29) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert [factor(step) for step in (30, 1000)] == [0, 0]


def test_a_stage_without_steps_never_trains():
    assert all(warmup_cosine(step, 5, 5, 1) == 0 for step in range(10))


def test_each_group_of_weights_learns_in_its_own_stage_only():
    first, second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    built = staged_optimizer(
        partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5),
        [Stage([first], 0, 4), Stage([second], 4, 8, learning_rate=0.5)],
        warmup_steps=50,  # longer than a quarter of a stage: cut to that
    )
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert built["lr_scheduler"]["interval"] == "step"
    rates, values = [], []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        (first + second).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        values.append((first.item(), second.item()))
    cosine = [0.1 * 0.5 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert [rate for rate, _ in rates] == pytest.approx([0.1, *cosine, 0, 0, 0, 0])
    assert [rate for _, rate in rates] == pytest.approx(
        [0, 0, 0, 0, 0.05, *(0.5 * rate for rate in cosine)]
    )
    assert all(second == 0 for _, second in values[:4])
    assert len({first for first, _ in values[3:]}) == 1 and values[3][0] != 0


def test_noise_belongs_to_a_case_or_to_a_step_and_to_a_seed():
    def draw(generator):
        return torch.randn(5, generator=generator).tolist()

    assert draw(case_generator("case_001", 0)) == draw(case_generator("case_001", 0))
    assert draw(step_generator(7, 0)) == draw(step_generator(7, 0))
    draws = [draw(case_generator(case, seed)) for case in ("a", "b") for seed in (0, 1)]
    draws += [draw(step_generator(step, seed)) for step in (0, 1, 10) for seed in (0, 1, 10)]
    assert len({tuple(d) for d in draws}) == len(draws)


def test_cases_of_a_step_have_noise_of_their_own_and_the_first_that_of_the_step():
    def draw(*place):
        return torch.randn(5, generator=step_generator(3, 0, *place)).tolist()

    assert draw() == draw(0) and len({tuple(draw(place)) for place in range(20)}) == 20
    assert list(case_places(Brightest(), 3, 5)) == [0, 1, 2]  # by itself, without a trainer


@pytest.mark.slow
def test_accumulated_batches_teach_what_they_would_together(phantoms):
    def taught(*overrides):  # a step of each stage: sources, anchor and, with noise, denoiser
        method = phantoms.method("clinfuse")
        begun = [parameter.clone() for parameter in method.parameters()]
        fitted(method, phantoms, 3, *overrides, "trainer.precision=32-true")
        return [p - before for p, before in zip(method.parameters(), begun, strict=True)]

    together = taught("data.batch_size=2")
    apart = taught("data.batch_size=1", "trainer.accumulate_grad_batches=2")
    moved = torch.cat([change.flatten() for change in together]).abs().mean()
    differs = torch.cat([(a - b).flatten() for a, b in zip(together, apart, strict=True)])
    assert moved > 1e-5 and differs.abs().mean() < 0.02 * moved


def test_the_noise_of_a_step_does_not_touch_the_global_state():
    before = torch.get_rng_state()
    torch.randn(3, generator=step_generator(1, 0))
    assert torch.equal(torch.get_rng_state(), before)


class Brightest(FusionMethod):
    """The smallest method there is."""

    def fuse(self, batch):
        return torch.maximum(batch.mri, batch.ct)


def test_a_new_method_needs_nothing_but_fuse(phantoms):
    method, batch = Brightest(), phantoms.batch()
    assert not method.is_trainable and method.steps == 0
    assert torch.equal(method.ensemble(batch), method.fuse(batch)[None])
    for draws in (
        method.model_draws(batch),
        method.test_step(batch, 0),
        method.validation_step(batch, 0),
    ):
        assert torch.equal(draws, method.fuse(batch)[None, None])
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(method, datamodule=phantoms.data("data.misregistration_mm=[0]"), verbose=False)
