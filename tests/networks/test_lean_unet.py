import pytest
import torch

from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.networks.lean_unet import is_lean
from clinfuse.networks.rigid_registration import SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoiser
from tests.networks.test_fusion_unet import awake, sources

SHAPES = [(6, 20, 24), (1, 3, 2), (21, 33), (1, 1)]
KINDS = {"group norms": {}, "local": {"local": True}, "pixel": {"haar": False}}


def network(spatial_dims=3, state_channels=1, **changes):
    settings = {"channels": (8, 16, 24), "encoder_channels": 4} | changes
    return awake(FusionUNet(spatial_dims, state_channels, 1, **settings)).eval()


def answer(network, shape, members=1, studies=1):
    """Of noise, always the same, to sources and masks that always are."""
    torch.manual_seed(0)
    parts, level = sources(shape, studies), torch.linspace(0.9, 0.3, members * studies)
    state = torch.randn(members * studies, 1, *shape)
    with torch.no_grad():
        if not network.state_channels:
            return network(None, network.encode(*parts)).float()
        return network(state, network.encode(*parts), level).float()


def in_bfloat16(network, *of_what, **and_how):
    with torch.autocast("cpu", torch.bfloat16):
        return answer(network, *of_what, **and_how)


def error(found, exact):
    return ((found - exact).square().mean().sqrt() / exact.std(correction=0)).item()


@pytest.mark.parametrize("state_channels", [0, 1], ids=["no state", "state"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:3], ids=str)
def test_few_passes_are_as_near_to_single_precision_as_many(shape, kind, state_channels):
    unet = network(len(shape), state_channels, **KINDS[kind])
    exact, lean = answer(unet, shape), in_bfloat16(unet, shape)
    many = in_bfloat16(unet.train(), shape)  # evaluated by MONAI's own forward
    assert not torch.equal(lean, many)
    assert error(many, exact) < 0.05
    assert error(lean, exact) < 1.5 * error(many, exact)  # which leaves it in the deepest level


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_where_a_volume_is_a_few_voxels_bfloat16_is_right_too(shape):
    unet = network(len(shape))
    exact, lean = answer(unet, shape), in_bfloat16(unet, shape)
    scale = exact.abs().max()
    torch.testing.assert_close(lean / scale, exact / scale, atol=0.03, rtol=0)


def test_a_member_says_the_same_by_itself_and_among_others():
    unet = network()
    three = in_bfloat16(unet, (6, 20, 24), members=3)
    exact = answer(unet, (6, 20, 24), members=3)
    assert all(error(one, of_it) < 0.05 for one, of_it in zip(three, exact, strict=True))
    assert (exact[0] - exact[1]).abs().max() > 0.1


def test_members_of_several_studies_know_their_own_study():
    unet = network()
    found, exact = (f(unet, (6, 20, 24), members=2, studies=2) for f in (in_bfloat16, answer))
    assert error(found, exact) < 0.05


def test_a_local_network_says_in_windows_what_it_says_of_the_whole():
    unet, shape = network(local=True), (8, 40, 400)
    whole = in_bfloat16(unet, shape, members=2)
    grid = 4 * 20 * 200
    unet.memory_gb = 0.75 * grid * unet.bytes_per_voxel / 1e9
    windowed = in_bfloat16(unet, shape, members=2)
    assert unet.used is not None
    assert error(windowed, whole) < 0.02


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_anchors_other_networks_say_the_same_in_another_layout(spatial_dims):
    volume = torch.rand(1, 1, 8, 40, 40)[(slice(None), slice(None), *[0] * (3 - spatial_dims))]
    brain = (volume > 0.3).float()
    denoiser = awake(SourceDenoiser(spatial_dims))
    registration = awake(SynthesisRegistration(spatial_dims, features=(8,) * 6))
    calls = {denoiser: (volume,), registration.synthesise: (volume, brain)}
    for call, of_what in calls.items():
        found = {}
        for is_training in (True, False):
            denoiser.train(is_training), registration.train(is_training)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                out = call(*of_what)
            found[is_training] = out if isinstance(out, torch.Tensor) else torch.cat(out, 1)
        torch.testing.assert_close(found[False], found[True], atol=0.03, rtol=0)


def test_training_single_precision_and_further_attention_are_left_to_monai():
    def asked(unet, is_enabled=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            return is_lean(unet.unet, torch.zeros(1))

    unet = network()
    assert not asked(unet)  # gradients are kept
    with torch.no_grad():
        assert asked(unet) and not asked(unet, is_enabled=False)
        assert asked(network(local=True))
        assert not asked(network(cross_attention=True))
        assert not asked(network(attention_levels=(False, True, True)))
        assert not asked(unet.train())
