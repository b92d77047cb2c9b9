from functools import partial

import pytest
import torch

from clinfuse.functional.intensity import ct_to_model
from clinfuse.networks.resnet_encoder import ResNetEncoder
from clinfuse.networks.transfer_fusion import (
    AttentionFusion,
    AttentionRefinement,
    TransferFusionNetwork,
    three_windows,
)


def network(spatial_dims=2):
    encoder = partial(ResNetEncoder, spatial_dims, block="basic", layers=[1, 1, 1, 1], width=4)
    return TransferFusionNetwork(spatial_dims, encoder, (4, 4, 8, 8, 12, 12))


def sources(*shape):
    return (2 * torch.rand(2, 2, 1, *shape) - 1).unbind(0)


@pytest.mark.parametrize("shape", [(32, 40), (17, 9), (5, 12, 11), (1, 9, 7)], ids=str)
def test_untrained_it_is_the_average_at_any_size(shape):
    mri, ct = sources(*shape)
    fused = network(len(shape))(mri, ct, ["piecewise", "window_8bit"])
    assert torch.equal(fused, 0.5 * mri + 0.5 * ct)


def test_one_step_reaches_every_weight_but_those_that_wait_for_another_to_leave_zero():
    net = network()
    torch.nn.init.normal_(net.blend.read.weight)
    for fusion in net.fusion:
        torch.nn.init.normal_(fusion.of_channels[-1].weight)
        torch.nn.init.normal_(fusion.of_places.weight)
    net(*sources(64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    for encoder in net.encoders:
        assert encoder.resnet.conv1.weight.grad.abs().max() > 0
        assert encoder.resnet.layer4[0].conv1.weight.grad.abs().max() > 0


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 5)], ids=str)
def test_attention_shares_add_up_to_one_and_start_equal(shape):
    fusion, (mri, ct) = AttentionFusion(len(shape), 4), torch.rand(2, 2, 4, *shape).unbind(0)
    assert (fusion.shares(mri, ct) == 0.5).all()
    torch.nn.init.normal_(fusion.of_channels[-1].weight)
    torch.nn.init.normal_(fusion.of_places.weight)
    shares = fusion.shares(mri, ct)
    assert shares.shape == (2, 2, 4, *shape)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, *shape))
    assert shares.std() > 0.01


def test_channel_attention_differs_by_feature_alone_and_spatial_attention_by_place_alone():
    mri, ct = torch.rand(2, 1, 4, 9, 9).unbind(0)
    by_channel, by_place = AttentionFusion(2, 4, reduction=1), AttentionFusion(2, 4)
    torch.nn.init.normal_(by_channel.of_channels[-1].weight)
    torch.nn.init.normal_(by_place.of_places.weight)
    of_channel, of_place = by_channel.shares(mri, ct), by_place.shares(mri, ct)
    assert of_channel.std((3, 4)).max() < 1e-6 < of_channel.std(2).max()
    assert of_place.std(2).max() < 1e-6 < of_place.std((3, 4)).max()


def test_a_refinement_whose_gate_is_shut_changes_nothing():
    refine, features = AttentionRefinement(2, 4), torch.rand(1, 4, 8, 8)
    mri, ct = torch.rand(2, 1, 1, 8, 8).unbind(0)
    assert not torch.equal(refine(features, mri, ct), features)
    with torch.no_grad():
        refine.at_places.bias.fill_(-1000.0)
    torch.testing.assert_close(refine(features, mri, ct), features)


def test_windows_of_a_ct_in_hounsfield_units_are_brain_blood_and_bone():
    hu = torch.tensor([-1000.0, 0.0, 40.0, 80.0, 180.0, 600.0, 2000.0]).reshape(1, 1, 1, 7)
    brain, blood, bone = three_windows(ct_to_model(hu), ["piecewise"])[0, :, 0]
    at = lambda low, high: (2 * (hu[0, 0, 0] - low) / (high - low) - 1).clamp(-1, 1)  # noqa: E731
    for shown, limits in ((brain, (0, 80)), (blood, (-20, 180)), (bone, (-800, 2000))):
        torch.testing.assert_close(shown, at(*limits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ct_map", [(), ["window_8bit"]])
def test_windows_of_what_has_no_hounsfield_units_are_whole_dark_and_bright(ct_map):
    ct = torch.linspace(-1.2, 1.2, 25).reshape(1, 1, 5, 5)
    whole, dark, bright = three_windows(ct, ct_map).split(1, 1)
    torch.testing.assert_close(whole, ct.clamp(-1, 1))
    torch.testing.assert_close(dark, (2 * ct + 1).clamp(-1, 1))
    torch.testing.assert_close(bright, (2 * ct - 1).clamp(-1, 1))


def test_each_case_of_a_batch_is_shown_by_its_own_map():
    ct = 2 * torch.rand(2, 1, 4, 4) - 1
    both = three_windows(ct, ["window_8bit", "piecewise"])
    assert torch.equal(both[:1], three_windows(ct[:1]))
    assert torch.equal(both[1:], three_windows(ct[1:], ["piecewise"]))
