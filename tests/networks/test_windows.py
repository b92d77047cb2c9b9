import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.networks.rigid_registration import SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoiser
from clinfuse.networks.windows import (
    VoxelNorm,
    Windows,
    blended,
    windows_within,
    with_local_norms,
)
from tests.networks.test_fusion_unet import awake


@given(
    grid=st.tuples(*[st.integers(1, 60)] * 3),
    sides=st.tuples(*[st.integers(3, 8)] * 3),
    silent=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_voxel_start_in_step_and_blend_to_one(grid, sides, silent):
    windows = Windows([4 * side for side in sides], 4 * silent, silent, stride=4)
    cut = list(windows.cut(grid))
    for window in cut:
        for part, n, side in zip(window, grid, windows.shape, strict=True):
            assert part.start % 4 == 0 and part.stop <= n
            assert part.stop - part.start == min(side, n - part.start) and part.stop > part.start
    volume = torch.rand(2, 3, *grid)
    same = blended(lambda window: volume[(..., *window)], grid, windows)
    torch.testing.assert_close(same, volume)


def test_a_windows_rim_towards_a_neighbour_has_no_say_and_the_volumes_own_rim_has():
    windows = Windows([32], 16, 4)
    first, *_, last = windows.cut([80])
    weight = windows.weight(first, [80])
    assert (weight[:20] == 1).all() and (weight[-4:] == 0).all()  # 20: the next one's own rim
    assert (weight[20:-4].diff() < 0).all()
    assert (windows.weight(last, [80])[:4] == 0).all()


def test_without_windows_the_whole_is_evaluated_once():
    asked = []
    blended(lambda window: asked.append(window) or torch.zeros(1, 1, 4, 5), [4, 5], None)
    assert asked == [(slice(0, 4), slice(0, 5))]


def test_windows_fit_the_memory_and_are_as_wide_as_it_lets_them():
    grid, each = (64, 128, 128), 1000.0
    assert windows_within(None, each, grid, 8) is None
    assert windows_within(2.0, each, grid, 8) is None  # 1.05 GB
    for budget in (0.9, 0.3, 0.15):
        shape = windows_within(budget, each, grid, 8).shape
        assert math.prod(shape) * each <= budget * 1e9
        wider = [min(s + 8, n) for s, n in zip(shape, grid, strict=True)]
        assert math.prod(wider) * each > budget * 1e9
    half = windows_within(0.3, each, grid, 8, batch=2)
    assert math.prod(half.shape) * 2 * each <= 0.3e9


def test_a_memory_too_small_for_any_window_is_said_with_what_would_do():
    with pytest.raises(ValueError, match=r"at least 0\.11 for windows of 48 voxels.*got 0\.05"):
        windows_within(0.05, 1000.0, (64, 128, 128), 8)


def test_a_voxel_norm_reads_its_own_voxel_alone():
    norm = VoxelNorm(6)
    x = torch.randn(2, 6, 3, 4, 5)
    out = norm(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().mean(1), torch.ones(2, 3, 4, 5), atol=1e-2, rtol=0)
    torch.testing.assert_close(out[..., 1:2, 2:3, 3:4], norm(x[..., 1:2, 2:3, 3:4]))
    torch.testing.assert_close(norm(1000 * x), out, atol=1e-2, rtol=0)


def test_no_group_norm_is_left_in_a_local_network():
    network = FusionUNet(3, 1, 1, channels=(8, 16), encoder_channels=4, local=True)
    kinds = {type(module).__name__ for module in network.modules()}
    assert "VoxelNorm" in kinds and not kinds & {"GroupNorm", "SpatialAttentionBlock"}
    registration = with_local_norms(SynthesisRegistration(3, features=(8,) * 6))
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in registration.modules())


def test_attention_is_not_local():
    with pytest.raises(ValueError, match="attention sees the whole volume"):
        FusionUNet(3, 1, 1, channels=(8, 16), local=True, cross_attention=True)


def windowed_and_whole(local, windows):
    """A random network's answers to half a volume of noise beside half a volume of air."""
    torch.manual_seed(0)
    network = awake(FusionUNet(3, 1, 1, channels=(8, 16), encoder_channels=4, local=local)).eval()
    shape = (12, 40, 260)
    mri, ct = torch.rand(2, 1, 1, *shape) * 2 - 1
    mri[..., 130:] = -1
    roi = (torch.rand(1, 3, *shape) > 0.5).float()
    state, level = torch.randn(2, 1, *shape), torch.full((2,), 0.5)
    outs = []
    with torch.no_grad():
        for chosen in (None, windows):
            network._windows = lambda grid, batch, chosen=chosen: chosen
            outs.append(network(state, network.encode(mri, ct, roi), level))
    whole, windowed = outs
    return ((whole - windowed).abs().max() / (whole.max() - whole.min())).item()


def test_a_local_network_says_in_windows_what_it_says_of_the_whole():
    beyond_reach = Windows([6, 20, 100], 72, 34, stride=2)
    assert windowed_and_whole(True, beyond_reach) < 1e-5
    assert windowed_and_whole(False, beyond_reach) > 1e-2
    usual = Windows([6, 20, 64], 32, 8, stride=2)
    assert windowed_and_whole(True, usual) < 1e-2


def test_a_source_denoiser_says_the_same_in_windows():
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 10, 96, 200) * 2 - 1
    denoiser = awake(SourceDenoiser(3, features=4))
    with torch.no_grad():
        whole = denoiser(volume)
        denoiser.memory_gb = 5 * 30 * 30 * denoiser.bytes_per_voxel / 1e9
        torch.testing.assert_close(denoiser(volume), whole, atol=1e-5, rtol=1e-5)
    assert (whole - volume).abs().max() > 0.01
