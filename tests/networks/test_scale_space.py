import pytest
import torch

from clinfuse.networks.scale_space import ScaleSpaceNetwork


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ScaleSpaceNetwork((4.0, 2.0, 2.0)).eval()


@pytest.fixture
def volume():
    return torch.randn(2, 1, 6, 10, 8, generator=torch.Generator().manual_seed(0)) / 2


@pytest.mark.parametrize("shape", [(6, 10, 8), (1, 9, 7), (9, 8)], ids=str)
def test_every_voxel_gets_a_logit_volumes_and_slices_alike(network, shape):
    assert network(torch.randn(2, 1, *shape)).shape == (2, 1, *shape)


def test_cases_are_read_apart(network, volume):
    torch.testing.assert_close(network(volume)[1:], network(volume[1:]))


def test_reading_some_voxels_is_reading_the_volume_there(network, volume):
    described = network.describe(volume).movedim(1, -1)[1, 2, 3]
    torch.testing.assert_close(network.read(described)[:, 0], network(volume)[1, 0, 2, 3])


def test_scales_are_millimetres(volume):
    coarse, fine = (ScaleSpaceNetwork(spacing) for spacing in ((4.0, 4.0, 4.0), (2.0, 2.0, 2.0)))
    same = ScaleSpaceNetwork((2.0, 2.0, 2.0), (0.5, 1.0, 2.0, 4.0, 8.0))
    torch.testing.assert_close(coarse.describe(volume), same.describe(volume))
    assert not torch.allclose(fine.describe(volume), same.describe(volume), atol=0.1)


def test_the_other_side_and_the_contrast_are_read_and_not_to_be_changed(network, volume):
    volume = volume.clone().requires_grad_()
    description = network.describe(volume)
    changed, *_ = torch.autograd.grad(description[:, 0].sum(), volume, retain_graph=True)
    assert (changed == 1).all()
    for unchanging in range(13, 23):
        (slope,) = torch.autograd.grad(
            description[:, unchanging].sum(), volume, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        assert (slope == 0).all()


def test_the_contrast_tells_a_dark_head_from_a_bright_one(network):
    dark, bright = (torch.full((1, 1, 4, 6, 6), value) for value in (-0.5, 0.5))
    dark[..., 0] = bright[..., 0] = -1.0  # air counts for nothing
    shares = [network.describe(head)[0, 15:, 0, 0, 0] for head in (dark, bright)]
    assert shares[0].argmax() == 1 and shares[1].argmax() == 5
    assert all(share.sum() == pytest.approx(4, rel=1e-3) for share in shares)


def test_volumes_that_are_one_value_or_not_much_bigger_than_a_voxel_have_finite_slopes(network):
    for shape in ((2, 2, 2), (1, 1, 1)):
        flat = torch.full((1, 1, *shape), -1.0, requires_grad=True)
        network(flat).sum().backward()
        assert flat.grad.isfinite().all()


def test_too_few_scales_are_refused():
    with pytest.raises(ValueError, match="three scales or more"):
        ScaleSpaceNetwork((1.0, 1.0, 1.0), (1.0, 2.0))


def test_channels_are_described_one_after_another_and_read_at_once(network, volume):
    both = ScaleSpaceNetwork((4.0, 2.0, 2.0), channels=2).eval()
    other = volume.flip(3)
    described = both.describe(torch.cat([volume, other], 1))
    torch.testing.assert_close(
        described, torch.cat([network.describe(volume), network.describe(other)], 1)
    )
    assert both(torch.cat([volume, other], 1)).shape == volume.shape


def test_a_volume_of_another_voxel_size_is_described_in_its_own_millimetres(network, volume):
    spacing_mm = (5.0, 0.9, 0.9)
    torch.testing.assert_close(
        network.describe(volume, spacing_mm), ScaleSpaceNetwork(spacing_mm).describe(volume)
    )
