import pytest
import torch

from clinfuse.networks.resnet_encoder import ResNetEncoder
from clinfuse.networks.resnet_fusion import ResNetFusionNetwork


def network(spatial_dims=2):
    encoder = ResNetEncoder(spatial_dims, 1, "bottleneck", [1, 1, 1, 1], width=4)
    return ResNetFusionNetwork(spatial_dims, encoder, (4, 4, 8, 8, 12, 12))


def sources(*shape):
    return (2 * torch.rand(2, 2, 1, *shape) - 1).unbind(0)


@pytest.mark.parametrize("shape", [(32, 40), (17, 9), (5, 12, 11), (1, 9, 7)], ids=str)
def test_untrained_it_is_the_average_at_any_size(shape):
    mri, ct = sources(*shape)
    fused = network(len(shape))(mri, ct)
    assert torch.equal(fused, 0.5 * mri + 0.5 * ct)


def test_the_encoder_is_frozen_and_everything_else_is_in_a_layer_once():
    net = network()
    layers = [p for layer in net.layers() for p in layer]
    frozen = {id(p) for p in net.encoder.parameters()}
    trained = {id(p) for p in net.parameters()} - frozen
    assert not any(p.requires_grad for p in net.encoder.parameters())
    assert sorted(map(id, layers)) == sorted(trained)
    assert len(net.layers()) == 7  # F's own, the sources' grid and five scales


def test_all_layers_learn_and_none_of_it_reaches_the_encoder():
    net = network()
    torch.nn.init.normal_(net.blend.read.weight)
    net(*sources(32, 32)).square().sum().backward()
    for layer in net.layers():
        assert any(p.grad.abs().max() > 0 for p in layer)
    assert all(p.grad is None for p in net.encoder.parameters())
