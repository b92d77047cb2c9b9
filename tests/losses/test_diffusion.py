"""The denoising loss and how the noise level weighs its companion."""

import torch
from einops import rearrange

from clinfuse.losses.diffusion import diffusion_loss, noise_level_weight


def test_the_loss_is_each_cases_own_mean_squared_error():
    prediction, target = torch.randn(2, 3, 2, 4, 4, 4)
    expected = [torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(diffusion_loss(prediction, target), torch.stack(expected))


def test_weights_of_mean_one_leave_an_even_error_as_it_is_and_turn_to_where_they_are_heavy():
    target = torch.zeros(2, 2, 4, 4)
    weight = torch.cat([torch.full((2, 1, 4, 2), 0.5), torch.full((2, 1, 4, 2), 1.5)], -1)
    even = torch.ones_like(target)
    torch.testing.assert_close(diffusion_loss(even, target, weight), torch.ones(2))
    right = even.clone()
    right[..., :2] = 0
    torch.testing.assert_close(diffusion_loss(right, target, weight), torch.full((2,), 0.75))


def test_the_roi_loss_counts_by_the_share_of_variance_that_x_t_explains():
    """The best linear estimate of unit white x_0 from x_t explains just that much of it."""
    alpha_bar_t = torch.tensor([0.02, 0.5, 0.97])
    x_0, eps = torch.randn(2, 3, 200_000)
    level = rearrange(alpha_bar_t, "b -> b 1")
    x_t = level.sqrt() * x_0 + (1 - level).sqrt() * eps
    explained = (
        torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(x_0, x_t, strict=True)]) ** 2
    )
    torch.testing.assert_close(noise_level_weight(alpha_bar_t), explained, rtol=0, atol=0.01)
