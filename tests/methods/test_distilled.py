from dataclasses import replace

import pytest
import torch

from clinfuse.diffusion.process import q_sample
from clinfuse.methods.distilled import DistilledFusion
from clinfuse.methods.roi_diffusion import member_noise, members_of


def taught(phantoms, steps=2, teacher_steps=4, **changes):
    """An untrained teacher, its weights random where they start at zero, and its student."""
    teacher = phantoms.method("clinfuse", members=3).eval()
    for parameter in teacher.network.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    settings = {"members": 3, "teacher_members": 3, "optimizer": torch.optim.Adam} | changes
    student = DistilledFusion(teacher, steps, teacher_steps=teacher_steps, **settings)
    student.learn_from(teacher)
    return teacher, student.eval()


def test_a_student_begins_as_its_teacher_without_guidance(phantoms):
    teacher, student = taught(phantoms)
    batch = phantoms.batch(2.0)
    ensemble = student.ensemble(batch)
    teacher.guidance = replace(teacher.guidance, eta=0.0, eta_u=0.0)
    teacher.steps = student.steps
    torch.testing.assert_close(ensemble, teacher.ensemble(batch), atol=1e-4, rtol=0)
    assert ensemble.std(0).mean() > 1e-3


def test_what_is_fused_is_the_mean_of_the_ensemble(phantoms):
    _, student = taught(phantoms)
    torch.nn.init.normal_(student.mean_network.past.weight, std=0.05)
    batch = phantoms.batch(2.0)
    mean = student.ensemble(batch).mean(0).clamp(-1, 1)
    torch.testing.assert_close(student.fuse(batch), mean, atol=1e-4, rtol=0)
    assert torch.equal(student.model_draws(batch)[0], student.ensemble(batch))


def test_a_student_asks_for_no_gradient(phantoms):
    teacher, student = taught(phantoms)
    batch = phantoms.batch(2.0, case=7)
    with torch.inference_mode():
        student.ensemble(batch)
        with pytest.raises(RuntimeError, match="guidance needs gradients"):
            teacher.ensemble(batch)


def test_the_mean_is_moved_in_its_regions_towards_their_sources(phantoms):
    _, student = taught(phantoms)
    batch = phantoms.batch(0.0)
    anchor = student.teacher.anchor(batch)
    assert not student.shift(batch, anchor).any()
    with torch.no_grad():
        student.mean_network.past.bias[:8] = 0
        student.mean_network.past.bias[0] = 0.5  # the approximation of the gate towards the MRI
    shift = student.shift(batch, anchor)
    brain = anchor.roi[:, :1] > 0.5
    torch.testing.assert_close(
        shift[brain], 0.5 * (anchor.mri - anchor.mean)[brain], atol=1e-4, rtol=1e-3
    )
    assert not shift[~brain].any()


def test_a_student_learns_where_its_teacher_arrives(phantoms):
    teacher, student = taught(phantoms, spread_weight=1.0)
    student.train()
    batch = phantoms.batch(0.0)
    with torch.no_grad():
        anchor = teacher.anchor(batch)
    anchor.mean.mul_(0.8)  # so that the guidance has somewhere to go
    states, r_0 = student._taught(batch, anchor, range(len(batch)))
    assert len(states) == student.steps + 1 and torch.equal(states[-1], r_0)
    aim = r_0.mean(0, keepdim=True)
    assert (anchor.scale * aim).abs().max() > 0.01
    parameters = [*student.network.parameters(), *student.mean_network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    losses = []
    for _ in range(20):
        parts = student._mean_loss(batch, anchor, aim), student._spread_loss(anchor, states)
        losses.append([part.item() for part in parts])
        optimizer.zero_grad()
        sum(parts).backward()
        optimizer.step()
    assert losses[-1][0] < 0.3 * losses[0][0]
    assert losses[-1][1] < 0.8 * losses[0][1]


def test_the_right_answer_of_every_step_has_no_loss(phantoms):
    """A student that predicts each stretch's x_0 walks through the teacher's own states."""
    teacher, student = taught(phantoms)
    batch = phantoms.batch(2.0)
    with torch.no_grad():
        anchor = teacher.anchor(batch)
    levels = student._levels(student.steps)
    x_0 = torch.randn(3, *anchor.mean.shape[1:])
    x_0 -= x_0.mean(0)
    noise = member_noise(batch, anchor, 3, 0)
    states = [q_sample(x_0, noise, level.expand(3)) for level in levels]
    student._denoiser = lambda anchor, members: lambda x_t, level: x_0
    assert student._spread_loss(anchor, [*states, x_0]).item() == pytest.approx(0, abs=1e-6)
    assert student._spread_loss(anchor, [*states, 2 * x_0]).item() > 0.1


def test_a_step_of_training_moves_the_student_and_leaves_the_teacher(phantoms):
    _, student = taught(phantoms)
    student.train()
    student.log_dict = lambda *_, **__: None
    facts = {"global_step": 0, "estimated_stepping_batches": 10, "accumulate_grad_batches": 1}
    student.trainer = type("Trainer", (), facts | {"global_rank": 0, "world_size": 1})()
    before = {name: p.clone() for name, p in student.named_parameters()}
    loss = student.training_step(phantoms.batch(2.0, case=7), 0)
    loss.backward()
    configured = student.configure_optimizers()
    configured["optimizer"].step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(not name.startswith("teacher.") for name in moved)
    assert any(name.startswith("network.") for name in moved)
    assert any(name.startswith("mean_network.") for name in moved)


def test_further_anchors_of_the_teacher_are_the_students_model_draws(phantoms):
    teacher, student = taught(phantoms)
    weights = {name: w + 0.01 for name, w in teacher.state_dict().items() if "anchor" in name}
    student.add_draw(weights)
    draws = student.model_draws(phantoms.batch(2.0))
    assert draws.shape[:2] == (2, 3)
    assert (draws[0] - draws[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"steps": 3}, "expected teacher_steps as a multiple of steps, got 4 and 3"),
        ({"steps": 0}, "expected teacher_steps as a multiple of steps, got 4 and 0"),
        ({"members": 1}, "expected at least 2 members, got 1"),
        ({"teacher_members": 1}, "of the teacher 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(phantoms, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        taught(phantoms, **changes)


@pytest.mark.parametrize("ablation", ["paper_guidance", "not_centred", "full_gradient"])
def test_a_teacher_whose_mean_hangs_on_its_noise_is_refused(phantoms, ablation):
    teacher = phantoms.method("clinfuse", f"ablation={ablation}", members=3)
    with pytest.raises(ValueError, match="expected a teacher whose ensemble is centred"):
        DistilledFusion(teacher, 2, 3, 4, 3, torch.optim.Adam)


def test_members_of_an_anchor_are_its_mean_and_scale_apart(phantoms):
    teacher, _ = taught(phantoms)
    with torch.no_grad():
        anchor = teacher.anchor(phantoms.batch(2.0))
    fused = members_of(anchor, torch.ones(3, *anchor.mean.shape[1:]), 3)
    torch.testing.assert_close(fused[1], anchor.mean + anchor.scale)
