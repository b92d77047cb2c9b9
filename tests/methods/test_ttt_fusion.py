import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from hydra.errors import InstantiationException

from clinfuse.data.paired_volumes import collate_batches
from clinfuse.losses.sources import SourceLoss
from clinfuse.methods.ttt_fusion import TttFusion
from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.types import FusionBatch


def method(dims=2, **arguments):
    torch.manual_seed(0)
    return TttFusion(
        partial(FusionUNet, spatial_dims=dims, channels=[8, 16], encoder_channels=4),
        SourceLoss(ssim=1.0, gradient=5.0, intensity=1.0),
        partial(torch.optim.AdamW, lr=1e-3),
        **{
            "adaptation": partial(torch.optim.Adam, lr=3e-3),
            "adaptation_steps": 6,
            **arguments,
        },
    )


def pair(seed=0, shape=(21, 26), case_id=None):
    generator = torch.Generator().manual_seed(seed)
    mri, ct = 2 * torch.rand((2, 1, 1, *shape), generator=generator) - 1
    roi = torch.zeros(1, 3, *shape, dtype=torch.bool)
    return FusionBatch(mri, ct, roi, torch.ones(1, len(shape)), [case_id or f"case_{seed}"])


def cost(model, fused, batch):
    return model.loss(fused, batch.mri, batch.ct, batch.spacing_mm).total


@pytest.mark.parametrize("shape", [(21, 26), (9, 11, 14)])
def test_adapting_to_a_pair_lowers_its_loss_below_that_of_the_weights_as_they_are(shape):
    batch, adapted = pair(shape=shape), method(len(shape), adaptation_steps=15)
    as_it_is = method(len(shape), adaptation_steps=0)
    average = (batch.mri + batch.ct) / 2
    torch.testing.assert_close(as_it_is.fuse(batch), average, atol=1e-6, rtol=0)
    assert cost(adapted, adapted.fuse(batch), batch) < 0.97 * cost(adapted, average, batch)


def test_no_case_leaves_a_trace_in_the_weights_or_in_what_is_fused_after_it():
    model, one, other = method(), pair(0), pair(1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first = model.fuse(one)
    model.fuse(other)
    again = model.fuse(one)
    assert torch.equal(first, again) and torch.equal(first, method().fuse(one))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not first.requires_grad


def test_a_case_is_fused_alike_alone_and_in_company():
    model, one, other = method(), pair(0), pair(1)
    together = model.fuse(collate_batches([other, one]))
    assert torch.equal(together[1:], model.fuse(one))
    assert torch.equal(together[:1], model.fuse(other))


def test_the_mirroring_belongs_to_the_case_and_the_seed():
    fused = method().fuse(pair(0))
    assert not torch.equal(fused, method().fuse(replace(pair(0), case_id=["another"])))
    assert not torch.equal(fused, method(seed=1).fuse(pair(0)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_adapts_whatever_mode_its_caller_is_in(mode):
    expected = method().fuse(pair(0))
    with mode():
        batch = pair(0)  # in inference mode its tensors are inference tensors
        fused = method().fuse(batch)
    assert torch.equal(fused, expected)


def test_a_method_that_was_built_in_inference_mode_adapts_too():
    with torch.inference_mode():
        fused = method().fuse(pair(0))
    assert torch.equal(fused, method().fuse(pair(0)))


def test_a_descent_that_fails_leaves_the_weights_as_they_were():
    class Failing(torch.optim.Adam):
        def step(self):
            super().step()
            raise RuntimeError("out of memory")

    model = method(adaptation=partial(Failing, lr=3e-3))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        model.fuse(pair(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_it_starts_from_what_training_left():
    model, batch = method(), pair(0)
    model.log_dict = lambda *_, **__: None  # there is no trainer to log to
    untrained = model.fuse(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    trained = model.fuse(batch)
    assert cost(model, trained, batch) < cost(model, untrained, batch)


def test_the_seconds_that_each_case_cost_are_kept_and_logged(caplog):
    model = method()
    with caplog.at_level(logging.INFO):
        model.fuse(collate_batches([pair(0), pair(1)]))
    assert set(model.adaptation_seconds) == {"case_0", "case_1"}
    assert all(0 < seconds < 60 for seconds in model.adaptation_seconds.values())
    assert "case_1: 6 adaptation steps in" in caplog.text
    assert model.steps == 7


@pytest.mark.parametrize("overrides", [(), ("spatial_dims=2",)])
def test_its_configuration_builds_it_for_volumes_and_for_slices(phantoms, overrides):
    model = phantoms.method("ttt_fusion", *overrides)
    batch = phantoms.batch()
    if overrides:
        batch = FusionBatch(
            batch.mri[:, :, 8, :-1], batch.ct[:, :, 8, :-1], batch.roi[:, :, 8, :-1],
            batch.spacing_mm[:, 1:], batch.case_id,
        )  # fmt: skip
    model.adaptation_steps = 2
    fused = model.eval().fuse(batch)
    assert fused.shape == batch.mri.shape and fused.isfinite().all()


def test_a_negative_number_of_steps_is_refused(phantoms):
    with pytest.raises(InstantiationException, match="at least 0 adaptation steps, got -1"):
        phantoms.method("ttt_fusion", "method.adaptation_steps=-1")
