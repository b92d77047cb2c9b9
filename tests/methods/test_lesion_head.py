from dataclasses import replace

import lightning
import pytest
import torch

from clinfuse.functional.surface import dice


@pytest.fixture
def head(phantoms):
    return phantoms.method("lesion_head")


@pytest.mark.parametrize("shape", [(16, 32, 32), (13, 9, 17), (1, 9, 8)], ids=str)
def test_every_size_gets_a_probability_at_every_voxel(head, shape):
    probability = head(torch.randn(2, 1, *shape))
    assert probability.shape == (2, 1, *shape)
    assert probability.min() > 0 and probability.max() < 1


def test_frozen_it_passes_gradients_on_and_keeps_none(head):
    head.requires_grad_(False)
    fused = torch.randn(1, 1, 16, 16, 16, requires_grad=True)
    head(fused).sum().backward()
    assert fused.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in head.parameters())


def test_asked_about_some_voxels_it_says_the_same_of_them_with_the_same_slopes(head):
    fused = torch.randn(2, 1, 6, 8, 10)
    asked = torch.rand_like(fused) > 0.7
    found = []
    for probability in (head.eval(), head.within(asked)):
        leaf = fused.clone().requires_grad_()
        says = probability(leaf) * asked
        found.append((says, *torch.autograd.grad(says.square().sum(), leaf)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    nothing = head.within(torch.zeros_like(asked))(fused)
    assert (nothing == 0).all() and nothing.shape == fused.shape


def test_it_learns_to_see_the_lesion_it_is_shown(head, phantoms):
    batch = phantoms.batch(0.0, case=7)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    head.log = lambda *_, **__: None  # there is no trainer to log to
    head.max_blur_mm = head.max_noise = 0.0
    for _ in range(60):
        optimizer.zero_grad()
        head.training_step(batch, 0).backward()
        optimizer.step()
    assert dice(head.eval()(batch.reference) > 0.5, batch.lesion) > 0.5


def test_validation_and_test_log_the_dice_of_cases_that_have_a_lesion(head, phantoms):
    data = phantoms.data()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=3,
    )  # fmt: skip
    (logged,) = trainer.validate(head, datamodule=data, verbose=False)
    expected = [
        dice(head(item.reference) > 0.5, item.lesion).item() for item in data.val_dataloader()
    ]
    defined = [value for value in expected if value == value]
    assert logged["val/lesion_dice"] == pytest.approx(sum(defined) / len(defined))
    trainer.test(head, datamodule=data, verbose=False)
    assert "test/lesion_dice" in trainer.callback_metrics


def test_a_step_draws_the_same_noise_whenever_it_is_taken(head, phantoms):
    batch = phantoms.batch(case=7)
    head.log = lambda *_, **__: None
    once = head.training_step(batch, 0)
    torch.randn(100)  # whatever else has been drawn
    assert torch.equal(head.training_step(batch, 0), once)


def test_another_voxel_size_than_the_scales_are_of_is_refused_by_case(head, phantoms):
    batch = phantoms.batch(0.0, case=7)
    head.log = lambda *_, **__: None
    other = replace(batch, spacing_mm=2 * batch.spacing_mm)
    for step in (head.training_step, head.validation_step):
        with pytest.raises(ValueError, match=r"expected voxels of .* got .* mm in case_007"):
            step(other, 0)


def test_a_step_learns_from_the_newest_volumes_and_from_their_brains_alone(head, phantoms):
    batch = phantoms.batch(0.0, case=7)
    head.log = lambda *_, **__: None
    head.pool, head.max_blur_mm, head.max_noise = 2, 0.0, 0.0
    flat = replace(batch, reference=torch.zeros_like(batch.reference))
    for seen in (flat, batch, batch):
        head.training_step(seen, 0)
    assert len(head.seen) == 2  # and the flat one is not among them
    asked = (batch.brain | batch.lesion)[0, 0]
    values = set(batch.reference[0, 0][asked].tolist())  # a voxel's description begins with it
    for described, lesion in head.seen:
        assert lesion.sum() >= min(head.lesion_voxels, int(batch.lesion.sum()))
        assert set(described[:, 0].tolist()) <= values


def test_a_frozen_head_stays_as_it_is_evaluated_whatever_it_is_part_of(head):
    head.train()
    assert head.training
    torch.nn.ModuleList([head.requires_grad_(False)]).train()
    assert not head.training


def test_it_learns_from_references_and_from_what_estimates_are_like(head, phantoms):
    batch, shown = phantoms.batch(case=7), []
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        shown.append(head._like_an_estimate(batch.reference, batch.spacing_mm, draw))
    clean = [torch.equal(fused, batch.reference) for fused in shown]
    assert 1 <= sum(clean) <= 10  # a quarter of them
    apart = torch.stack([(fused - batch.reference).std() for fused in shown])
    assert apart.max() > 5 * apart[apart > 0].min()  # a little and a lot
    assert all(fused.abs().max() <= 1 for fused in shown)
