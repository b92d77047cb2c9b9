import pytest
import torch

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.networks.source_denoiser import SourceDenoiser, SourceDenoisers


def denoiser(spatial_dims=3, **changes):
    return SourceDenoiser(spatial_dims, **{"features": 8, "blocks": 2} | changes)


@pytest.mark.parametrize("shape", [(5, 7, 9), (8, 4, 12), (1, 3, 2), (13, 10)], ids=str)
def test_untrained_it_changes_nothing_at_any_size_and_can_still_learn(shape):
    network, volume = denoiser(len(shape)), torch.randn(2, 1, *shape)
    out = network(volume)
    assert torch.equal(out, volume)
    (out - 1).square().mean().backward()
    assert network.linear.weight.grad.abs().sum() > 0
    assert network.last.weight.grad.abs().sum() > 0


def test_a_few_steps_take_noise_out_of_another_volume_than_they_learned_from():
    def pair(seed):
        generator = torch.Generator().manual_seed(seed)
        white = torch.randn(1, 1, 16, 32, 32, generator=generator)
        clean = gaussian_smooth(white, [2.0, 2.0, 2.0])
        clean = 0.5 * clean / clean.std()
        return clean + 0.2 * torch.randn(clean.shape, generator=generator), clean

    network = denoiser()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(40):
        noisy, clean = pair(step % 4)
        optimizer.zero_grad()
        (network(noisy) - clean).square().mean().backward()
        optimizer.step()
    noisy, clean = pair(99)
    with torch.no_grad():
        left = (network(noisy) - clean).square().mean()
    assert left < 0.4 * (noisy - clean).square().mean()


def test_under_autocast_what_is_not_noise_stays_exact():
    volume = torch.randn(1, 1, 6, 8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(denoiser()(volume), volume)


def test_each_modality_has_weights_of_its_own():
    both = SourceDenoisers(3, features=8, blocks=1)
    volume = torch.randn(1, 1, 6, 8, 10)
    with torch.no_grad():
        both.mri.linear.bias.fill_(0.1)
    assert not torch.equal(both.mri(volume), volume)
    assert torch.equal(both.ct(volume), volume)


def test_no_convolution_is_left_that_bfloat16_would_train_wrongly_on_a_few_slices():
    assert all(type(module) is not torch.nn.Conv3d for module in denoiser().modules())
