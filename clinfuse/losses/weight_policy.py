"""Weights of a loss of several terms, steered by a policy that explores first and settles later."""

import math
from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

LOG_STD_RANGE = (math.log(0.05), 0.0)
"""Bounds of the policy's log standard deviation."""

LARGEST_MEAN = math.log(4.0)
"""The mean of a log factor stays within this of 0: no term is weighed more than 4 times anew."""

MEMORY = 0.9
"""Share of the old value in the running mean and spread of the reward."""


class WeightPolicy(nn.Module):
    """A Gaussian policy over log weights, trained by REINFORCE (Williams 1992) beside the network.

    An action a ~ N(m, s^2), one number a term, sets the weights to base * exp(a - mean(a)) for
    ``period`` training steps: their geometric mean is the base's, so that an action moves weight
    between the terms and is no learning rate. Its reward is by how much the loss with the *base*
    weights fell from the period before, as the logarithm of the ratio; a running mean of rewards
    is the baseline, a running spread their unit. The gradient of the expected reward and of the
    entropy bonus is followed in the distribution's own metric (Amari 1998), which for a Gaussian
    is dm = lr A (a - m) and ds/s = lr (A (z^2 - 1) + bonus) / 2 with z = (a - m) / s.

    From exploration to stability: the bonus, and the spread that actions are drawn with, fall in a
    straight line to 0 at ``stable_from`` of the training. From there on the weights are those of
    the mean, and stay.

    All that it knows is in buffers, so that an interrupted training goes on with the same weights.

    Args:
        base: weight of each term by its name.
        period: training steps with one action.
        learning_rate: of m and log s.
        std: s at the start.
        entropy_bonus: at the start.
        stable_from: share of the training, in (0, 1].
        seed: of the actions.

    Raises:
        ValueError: weights that are not positive, a period below 1 or a share outside (0, 1].
    """

    def __init__(
        self,
        base: Mapping[str, float],
        period: int = 10,
        learning_rate: float = 0.1,
        std: float = 0.3,
        entropy_bonus: float = 0.1,
        stable_from: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not base or min(base.values()) <= 0:
            raise ValueError(f"expected weights above 0, got {dict(base)}")
        if period < 1 or not 0 < stable_from <= 1:
            raise ValueError(
                "expected a period of at least 1 step and stable_from in (0, 1], "
                f"got {period} and {stable_from}"
            )
        self.base, self.period, self.seed = dict(base), period, seed
        self.learning_rate, self.entropy_bonus = learning_rate, entropy_bonus
        self.stable_from = stable_from
        n = len(self.base)
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("log_std", torch.full((n,), math.log(std)))
        self.register_buffer("action", torch.zeros(n))
        self.register_buffer("drawn_with", torch.zeros(n))  # s of the action; 0 is no draw
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("previous", torch.full((), math.nan))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    mean: Tensor
    log_std: Tensor
    action: Tensor
    drawn_with: Tensor
    baseline: Tensor
    spread: Tensor
    total: Tensor
    previous: Tensor
    seen: Tensor

    def weights(self) -> dict[str, Float[Tensor, ""]]:
        """The weight of each term under the present action."""
        factors = (self.action - self.action.mean()).exp()
        return {n: w * f for (n, w), f in zip(self.base.items(), factors.unbind(), strict=True)}

    @torch.no_grad()
    def observe(self, terms: Mapping[str, Float[Tensor, ""]], progress: float) -> None:
        """Take note of a training step; at the end of a period learn from it and act anew.

        Args:
            terms: the loss's terms, unweighted, each at least 0.
            progress: share of the training done, in [0, 1].
        """
        self.total += cast(Tensor, sum(w * terms[name].detach() for name, w in self.base.items()))
        self.seen += 1
        if int(self.seen) % self.period:
            return
        now = (self.total / self.period).log()
        self.learn(self.previous - now, progress)
        self.previous.copy_(now)
        self.total.zero_()
        self.act(progress)

    @torch.no_grad()
    def learn(self, reward: Float[Tensor, ""], progress: float) -> None:
        """One step of the policy gradient for the present action's reward; NaN is no reward."""
        if not reward.isfinite() or not self.drawn_with.all() or progress >= self.stable_from:
            return
        apart = reward - self.baseline
        self.spread.lerp_(apart.abs(), 1 - MEMORY if self.spread > 0 else 1.0)
        advantage = (apart / self.spread.clamp(min=1e-8)).clamp(-2, 2)
        self.baseline.lerp_(reward, 1 - MEMORY)
        mean_step, log_std_step = natural_gradient(
            self.action, self.mean, self.drawn_with, advantage
        )
        bonus = self.entropy_bonus * self._exploration(progress)
        self.mean += self.learning_rate * mean_step
        self.mean -= self.mean.mean()  # a shift of all changes no weight
        self.mean.clamp_(-LARGEST_MEAN, LARGEST_MEAN)
        self.log_std += self.learning_rate * (log_std_step + bonus / 2)
        self.log_std.clamp_(*LOG_STD_RANGE)

    @torch.no_grad()
    def act(self, progress: float) -> None:
        """Draw the next action; once exploration has ended it is the mean."""
        generator = torch.Generator().manual_seed(self.seed + int(self.seen))
        self.drawn_with.copy_(self._exploration(progress) * self.log_std.exp())
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        self.action.copy_(self.mean + self.drawn_with * noise)

    def _exploration(self, progress: float) -> float:
        return max(0.0, 1 - progress / self.stable_from)


def natural_gradient(
    action: Float[Tensor, " n"],
    mean: Float[Tensor, " n"],
    std: Float[Tensor, " n"],
    advantage: Float[Tensor, ""],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """advantage * grad log N(action; mean, std^2), for mean and log std, over Fisher's information.

    The gradients (a - m) / s^2 and z^2 - 1 over 1 / s^2 and 2.
    """
    z = (action - mean) / std
    return advantage * std * z, advantage * (z.square() - 1) / 2
