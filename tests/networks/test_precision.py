import copy

import pytest
import torch
from torch import nn

from clinfuse.networks.precision import SmallSafeConv2d, SmallSafeConv3d, with_safe_convolutions

TINY = (2, 6, 6)
"""Spatial shape at the bottom of a U-Net on thick slices."""


def pair(stride=1):
    """A convolution as PyTorch has it, and ours with the same weights."""
    plain = nn.Conv3d(16, 16, 3, stride=stride, padding=1)
    safe = SmallSafeConv3d(16, 16, 3, stride=stride, padding=1)
    safe.load_state_dict(plain.state_dict())
    return plain, safe


def weight_gradient(convolution, x, autocast):
    convolution.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = convolution(x)
    out.float().square().sum().backward()
    return convolution.weight.grad.clone()


@pytest.mark.parametrize("shape", [TINY, (8, 8, 8), (1, 1, 1)], ids=str)
def test_in_single_precision_nothing_differs_from_pytorchs_convolution(shape):
    plain, safe = pair()
    x = torch.randn(2, 16, *shape)
    assert torch.equal(safe(x), plain(x))
    assert torch.equal(weight_gradient(safe, x, False), weight_gradient(plain, x, False))


@pytest.mark.parametrize("depth, stride", [(1, 1), (2, 1), (4, 2), (3, 2)])
def test_under_autocast_the_weight_gradient_of_a_tiny_output_is_that_of_single_precision(
    depth, stride
):
    _, safe = pair(stride)
    for seed in range(5):  # what is wrong in PyTorch is uninitialised memory, which may look right
        x = torch.randn(2, 16, depth, 8, 8, generator=torch.Generator().manual_seed(seed))
        exact = weight_gradient(safe, x, autocast=False)
        torch.testing.assert_close(weight_gradient(safe, x, autocast=True), exact)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_so_it_is_for_a_slice_of_one_pixel_that_is_strided_over(side):
    safe = SmallSafeConv2d(32, 64, 3, stride=2, padding=1)
    for seed in range(5):
        x = torch.randn(1, 32, side, side, generator=torch.Generator().manual_seed(seed))
        exact = weight_gradient(safe, x, autocast=False)
        torch.testing.assert_close(weight_gradient(safe, x, autocast=True), exact)


def test_pytorchs_own_gradient_is_wrong_there_which_is_why_ours_exists():
    plain, _ = pair()
    worst = 0.0
    for seed in range(20):
        x = torch.randn(2, 16, *TINY, generator=torch.Generator().manual_seed(seed))
        exact = weight_gradient(plain, x, autocast=False)
        half = weight_gradient(plain, x, autocast=True)
        error = ((half - exact).abs().max() / exact.abs().max()).nan_to_num(torch.inf)
        worst = max(worst, float(error))
    if worst < 0.1:
        pytest.skip("this PyTorch computes it right on this CPU: nothing to be safe from here")
    assert worst > 0.1


def test_large_outputs_keep_the_fast_precision_and_tiny_ones_leave_it():
    _, safe = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert safe(torch.randn(1, 16, 4, 4, 4)).dtype == torch.bfloat16
        assert safe(torch.randn(1, 16, *TINY)).dtype == torch.float32


class Inherited(nn.Conv3d):
    """Some library's own convolution, with its own forward perhaps: to be left alone."""


def network():
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.SiLU(), nn.Sequential(nn.Conv3d(4, 4, 1), Inherited(4, 4, 1)),
        nn.ConvTranspose3d(4, 4, 1), nn.Conv2d(4, 4, 1),
    )  # fmt: skip


def test_every_plain_convolution_is_made_safe_in_place_and_nothing_else():
    before = network()
    weights = [id(p) for p in before.parameters()]
    after = with_safe_convolutions(before)
    assert after is before
    assert [id(p) for p in after.parameters()] == weights
    kinds = [type(m) for m in after.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == [
        SmallSafeConv3d, nn.SiLU, SmallSafeConv3d, Inherited, nn.ConvTranspose3d, SmallSafeConv2d,
    ]  # fmt: skip


def test_safe_convolutions_survive_copies_and_keep_the_names_of_their_weights():
    plain, safe = network(), with_safe_convolutions(network())
    assert list(plain.state_dict()) == list(safe.state_dict())
    twin = copy.deepcopy(safe)
    assert [type(m) for m in twin.modules()] == [type(m) for m in safe.modules()]
    plain.load_state_dict(safe.state_dict())
    twin.load_state_dict(plain.state_dict())
    for name, weight in safe.state_dict().items():
        assert torch.equal(twin.state_dict()[name], weight)
