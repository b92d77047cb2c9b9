import copy

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from clinfuse.losses.weight_policy import WeightPolicy, natural_gradient

BASE = {"noise": 10.0, "fusion": 1.0, "quality": 10.0}


def losses(value):
    return dict.fromkeys(BASE, torch.tensor(value))


def test_before_it_has_learned_anything_the_weights_are_the_base():
    assert {name: w.item() for name, w in WeightPolicy(BASE).weights().items()} == BASE


def test_an_action_moves_weight_between_terms_and_leaves_their_geometric_mean():
    policy = WeightPolicy(BASE)
    policy.act(0.0)
    weights = torch.stack(list(policy.weights().values()))
    assert not torch.allclose(weights, torch.tensor([10.0, 1.0, 10.0]), rtol=0.05)
    torch.testing.assert_close(weights.prod(), torch.tensor(100.0))


def test_the_step_is_the_policy_gradient_of_torchs_normal_in_its_own_metric():
    mean = torch.randn(4, dtype=torch.float64, requires_grad=True)
    log_std = torch.randn(4, dtype=torch.float64, requires_grad=True)
    policy = Independent(Normal(mean, log_std.exp()), 1)
    action, advantage = policy.sample(), torch.tensor(0.7, dtype=torch.float64)
    plain = torch.autograd.grad(advantage * policy.log_prob(action), (mean, log_std))

    def divergence(m, s):  # Fisher's information is its curvature
        here = Independent(Normal(mean.detach(), log_std.detach().exp()), 1)
        return kl_divergence(here, Independent(Normal(m, s.exp()), 1))

    here = (mean.detach(), log_std.detach())
    hessian = torch.autograd.functional.hessian(divergence, here)
    expected = [torch.linalg.solve(hessian[i][i], plain[i]) for i in range(2)]
    steps = natural_gradient(action, here[0], here[1].exp(), advantage)
    for ours, theirs in zip(steps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_finds_the_weights_that_are_rewarded():
    """A bandit whose reward is highest where the first term weighs twice and the last half."""
    policy = WeightPolicy(BASE, learning_rate=0.1, entropy_bonus=0.05, stable_from=1.0)
    best = torch.tensor([2.0, 1.0, 0.5]).log()
    for step in range(400):
        policy.seen += 1
        policy.act(step / 400)
        factors = policy.action - policy.action.mean()
        policy.learn(-(factors - best).square().sum(), step / 400)
    torch.testing.assert_close(policy.mean, best, atol=0.15, rtol=0)


def test_without_reward_for_anything_the_bonus_widens_the_search_less_and_less():
    def growth(progress):
        policy = WeightPolicy(BASE, entropy_bonus=0.5, stable_from=0.8)
        policy.act(0.0)
        policy.learn(policy.baseline.clone(), progress)  # no better and no worse than ever
        return (policy.log_std - WeightPolicy(BASE).log_std).mean().item()

    assert growth(0.0) == pytest.approx(0.1 * 0.5 / 2, rel=1e-4)
    assert growth(0.4) == pytest.approx(growth(0.0) / 2, rel=1e-4)
    assert growth(0.9) == 0


def test_weights_change_while_it_explores_and_stay_once_it_has_settled():
    policy, noise = WeightPolicy(BASE, period=2, stable_from=0.5), torch.Generator().manual_seed(0)
    seen = []
    for step in range(200):
        policy.observe(losses(1.0 + torch.rand((), generator=noise).item()), step / 200)
        seen.append(torch.stack(list(policy.weights().values())))
    early = torch.stack(seen[:80]).log()
    assert len(early.unique(dim=0)) == 41  # the base, then one action for each two steps
    assert early.std(0).min() > 0.05
    late = torch.stack(seen[102:])
    assert (late == late[0]).all()
    factors = torch.stack([late[0, i] / w for i, w in enumerate(BASE.values())])
    torch.testing.assert_close(factors, (policy.mean - policy.mean.mean()).exp())
    assert policy.mean.abs().max() > 0.01  # it settled where it was led, not where it began


def test_the_reward_is_the_fall_of_the_loss_in_base_weights():
    policy, rewards = WeightPolicy(BASE, period=2), []
    policy.learn = lambda reward, progress: rewards.append(reward.item())
    for value in (2.0, 4.0, 1.0, 2.0):
        policy.observe(losses(value), 0.0)
    assert torch.tensor(rewards[0]).isnan()  # there was nothing before
    assert rewards[1] == pytest.approx(torch.tensor(2.0).log().item())


def test_an_interrupted_policy_goes_on_as_if_nothing_had_happened():
    policy = WeightPolicy(BASE, period=3)
    for step in range(20):
        policy.observe(losses(1.0 + step % 5), step / 100)
    other = WeightPolicy(BASE, period=3)
    other.load_state_dict(copy.deepcopy(policy.state_dict()))
    for step in range(20, 60):
        for each in (policy, other):
            each.observe(losses(1.0 + step % 7), step / 100)
        assert torch.equal(policy.action, other.action)
    assert not torch.equal(policy.mean, torch.zeros(3))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"base": {"noise": 0.0}}, "weights above 0"),
        ({"base": BASE, "period": 0}, "period of at least 1"),
        ({"base": BASE, "stable_from": 0.0}, r"stable_from in \(0, 1\]"),
    ],
)
def test_a_policy_that_cannot_act_is_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        WeightPolicy(**arguments)
