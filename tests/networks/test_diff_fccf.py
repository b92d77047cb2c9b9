from functools import partial

import pytest
import torch

from clinfuse.networks.chebyshev_graph import ChebyshevBlock
from clinfuse.networks.diff_fccf import ANATOMY, BOTH, FUNCTION, DiffFccfNetwork, Heads
from clinfuse.networks.fusion_unet import FusionUNet

LEVEL = torch.full((2,), 0.5)


def network(dims, **arguments):
    unet = partial(FusionUNet, spatial_dims=dims, channels=[8, 16], encoder_channels=4)
    built = DiffFccfNetwork(unet, dims, **arguments)
    for layer in (built.trunk.unet.out[-1].conv, built.trunk.past):  # both start at zero
        torch.nn.init.normal_(layer.weight, std=0.1)
    return built


def pictures(shape):
    anatomical, functional = torch.rand(2, 1, *shape), torch.rand(2, 3, *shape)
    return anatomical, functional, torch.randn(2, 3, *shape), torch.rand(2, 3, *shape) > 0.5


def heads(net, sight, anatomical, functional, x_t, roi, level=LEVEL):
    condition = net.encode(anatomical, functional, roi, sight)
    return net(x_t, condition, level, [1.0] * net.spatial_dims, sight)


@pytest.mark.parametrize("shape", [(19, 26), (9, 14, 11)])
def test_heads_have_the_size_of_the_picture_whatever_it_is(shape):
    out = heads(network(len(shape)), BOTH, *pictures(shape))
    assert out.eps_hat.shape == out.luma_logits.shape == (2, 3, *shape)
    assert out.source_noise.shape == (2, 2, *shape)
    assert out.displacement_mm.shape == (2, len(shape), *shape)
    assert out.chroma_logit.shape == (2, 1, *shape)


def test_the_bottleneck_is_a_chebyshev_graph_that_works_on_the_coarsest_grid():
    net, seen = network(2, order=4), []
    block = net.trunk.unet.middle_block
    assert isinstance(block, ChebyshevBlock) and block.first.order == 4
    block.register_forward_hook(
        lambda module, inputs, kwargs, out: seen.append(out), with_kwargs=True
    )
    heads(net, BOTH, *pictures((19, 26)))
    assert seen[0].shape == (2, 16, 5, 7)  # padded to 20 x 28, halved by Haar and by the U-Net


@pytest.mark.parametrize("sight", [FUNCTION, BOTH, ANATOMY])
def test_a_stage_sees_what_its_condition_names_and_nothing_else(sight):
    net = network(2)
    anatomical, functional, x_t, roi = pictures((16, 16))
    here = heads(net, sight, anatomical, functional, x_t, roi)
    other = heads(net, sight, anatomical.flip(2), functional, x_t, roi)
    assert torch.equal(here.eps_hat, other.eps_hat) != sight.anatomy
    masked = roi.clone()
    masked[:, 0] = ~masked[:, 0]  # the brain is the anatomy's to know, bone the function's
    assert torch.equal(
        here.eps_hat, heads(net, sight, anatomical, functional, x_t, masked).eps_hat
    ) != (sight.anatomy)
    masked = roi.clone()
    masked[:, 1] = ~masked[:, 1]
    assert torch.equal(
        here.eps_hat, heads(net, sight, anatomical, functional, x_t, masked).eps_hat
    ) != (sight.function)


def test_only_a_stage_that_sees_both_sources_moves_one_and_never_too_far():
    net = network(2, max_mm=3.0, smoothing_mm=0.0)
    torch.nn.init.normal_(net.trunk.past.weight, std=10.0)
    for sight in (FUNCTION, ANATOMY):
        assert (heads(net, sight, *pictures((16, 16))).displacement_mm == 0).all()
    u = heads(net, BOTH, *pictures((16, 16))).displacement_mm
    assert 2.9 < u.abs().max() <= 3.0


def test_the_deformation_is_smooth_in_millimetres():
    def roughness(smoothing_mm):
        torch.manual_seed(0)
        net = network(2, smoothing_mm=smoothing_mm)
        u = heads(net, BOTH, *pictures((32, 32))).displacement_mm
        return u.diff(dim=2).abs().mean() / u.abs().mean()

    assert roughness(4.0) < 0.2 * roughness(0.0)


def test_untrained_heads_know_the_noise_level_and_no_more():
    net = network(2)
    for layer in (net.trunk.unet.out[-1].conv, net.trunk.past):
        torch.nn.init.zeros_(layer.weight)
    anatomical, functional, x_t, roi = pictures((16, 16))
    for level, expected in ((0.5, -3.0), (0.9, torch.tensor(9.0).log().item() - 3)):
        out = heads(net, BOTH, anatomical, functional, x_t, roi, torch.full((2,), level))
        torch.testing.assert_close(out.eps_hat, (1 - level) ** 0.5 * x_t)
        assert not out.source_noise.any()
        assert out.chroma_logit[0, 0, 0, 0].item() == pytest.approx(expected, abs=1e-4)
        assert out.luma_logits[0, :, 3, 3].tolist() == pytest.approx([0, 0, expected], abs=1e-4)


def shares(luma, chroma, anatomical, functional, denoised):
    """The blend of one voxel with these logits."""
    logits = torch.tensor(luma).reshape(1, 3, 1, 1)
    zeros = [torch.zeros(1, channels, 1, 1) for channels in (3, 2, 2)]
    made = Heads(*zeros, logits, torch.full((1, 1, 1, 1), chroma))
    voxels = (torch.tensor(v).reshape(1, -1, 1, 1) for v in ([anatomical], functional, denoised))
    return made.blend(*voxels).flatten()


def test_the_blend_is_a_convex_mixture_of_three_lumas_and_of_two_colours():
    functional, denoised = [0.5, 0.2, -0.4], [0.9, 0.0, 0.6]
    mixed = shares([0.0, 0.0, 0.0], 0.0, -1.0, functional, denoised)
    torch.testing.assert_close(mixed, torch.tensor([0.4 / 3, 0.1, 0.1]))
    anatomy_hidden = shares([-torch.inf, 0.0, 0.0], 9e9, -1.0, functional, denoised)
    torch.testing.assert_close(anatomy_hidden, torch.tensor([0.7, 0.0, 0.6]))
    unmoved = shares([-9e9, 0.0, -9e9], -9e9, -1.0, functional, denoised)
    torch.testing.assert_close(unmoved, torch.tensor(functional))


def test_a_network_of_other_dimensions_is_refused():
    unet = partial(FusionUNet, spatial_dims=3, channels=[8, 16], encoder_channels=4)
    with pytest.raises(ValueError, match="network of spatial_dims 2, got 3"):
        DiffFccfNetwork(unet, 2)
