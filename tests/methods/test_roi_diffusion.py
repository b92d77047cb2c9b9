from dataclasses import replace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback

from clinfuse.data.paired_volumes import collate_batches
from clinfuse.losses.roi import ClinicalRoiLoss
from clinfuse.methods.objective import roi_loss
from clinfuse.methods.roi_diffusion import scale_loss, source_losses
from clinfuse.networks.rigid_registration import SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoisers


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


def test_eta_and_eta_u_and_kappa_change_the_sample(phantoms):
    off = sampled(phantoms, "guidance.eta=0.0", "guidance.eta_u=0.0")
    assert torch.equal(off, sampled(phantoms, "guidance.eta=0.0", "guidance.eta_u=0.0"))
    assert torch.equal(off, sampled(phantoms, "guidance=off"))
    guided = sampled(phantoms, "guidance.eta=0.2", "guidance.eta_u=0.0")
    for other in (
        guided,
        sampled(phantoms, "guidance.eta=0.0", "guidance.eta_u=0.2"),
        sampled(phantoms, "guidance.eta=0.2", "guidance.eta_u=0.0", "guidance.kappa=5.0"),
        sampled(phantoms, "guidance.eta=0.2", "guidance.eta_u=0.0", "guidance.kappa=null"),
    ):
        assert (other - off).abs().max() > 1e-3
    strong = sampled(phantoms, "guidance.eta=0.2", "guidance.eta_u=0.0", "guidance.kappa=5.0")
    assert (strong - guided).abs().max() > 1e-4


@pytest.mark.parametrize("gradient", ["x0", "full"])
def test_guidance_lowers_the_loss_that_it_descends(phantoms, gradient):
    batch = phantoms.batch(0.0)
    method = phantoms.method(
        "clinfuse", f"guidance.gradient={gradient}", "guidance.eta_u=0.0", steps=8
    )
    method.eval()
    anchor = method.anchor(batch)

    def loss(eta):
        method.guidance = replace(method.guidance, eta=eta)
        sources = (batch.mri, anchor.ct, anchor.roi > 0.5)
        return sum(
            roi_loss(method.guidance_loss, f, batch, *sources) for f in method.ensemble(batch)
        )

    assert loss(0.2) < 0.95 * loss(0.0)


def test_guidance_pulls_towards_the_ct_where_the_anchor_puts_it(phantoms):
    class Remembering(ClinicalRoiLoss):
        def forward(self, fused, mri, ct, brain, bone, *rest):
            self.saw = (mri, ct, brain, bone)
            return super().forward(fused, mri, ct, brain, bone, *rest)

    method, batch = phantoms.method("clinfuse").eval(), phantoms.batch(4.0)
    method.guidance_loss = Remembering()
    method.ensemble(batch)
    anchor = method.anchor(batch)
    assert not torch.allclose(anchor.ct, batch.ct, atol=0.1)  # an untrained guess has moved it
    mri, ct, brain, bone = (t[:1] for t in method.guidance_loss.saw)
    assert torch.equal(mri, batch.mri) and torch.equal(brain, batch.brain)
    assert torch.equal(ct, anchor.ct) and torch.equal(bone, anchor.roi[:, 1:2] > 0.5)


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
    head.register_forward_hook(lambda *_: seen.append(1))
    overrides = (f"guidance.lesion_start={lesion_start}", "guidance.gamma=3.0")
    method = phantoms.method("clinfuse", *overrides, steps=4).eval()
    method.lesion_head = head
    method.ensemble(phantoms.batch(case=7))
    assert len(seen) == calls


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


def test_without_guidance_the_centred_mean_is_the_anchors_and_guidance_moves_it(phantoms):
    batch = phantoms.batch(2.0, case=7)

    def mean(*overrides):
        method = phantoms.method("clinfuse", *overrides, members=3).eval()
        with torch.no_grad():
            method.network.past.bias.fill_(0.2)  # a denoiser with an error that all members share
            return method.fuse(batch), method.anchor(batch).mean.clamp(-1, 1)

    off = ("guidance.eta=0.0", "guidance.eta_u=0.0")
    torch.testing.assert_close(*mean(*off), atol=1e-5, rtol=0)
    astray, anchored = mean(*off, "method.centred=false")
    assert (astray - anchored).abs().max() > 1e-3
    guided, anchored = mean("guidance.eta=0.2")
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
