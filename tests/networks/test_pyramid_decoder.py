import pytest
import torch

from clinfuse.networks.pyramid_decoder import PyramidDecoder, SourceBlend, normed_convolution


def pyramid(shape, channels=(5, 6, 7)):
    sizes = [tuple(-(-n // 2**level) for n in shape) for level in range(1, len(channels) + 1)]
    return [torch.rand(2, c, *size) for c, size in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize("shape", [(16, 24), (13, 1), (3, 9, 10), (8, 8, 8)], ids=str)
def test_it_comes_back_to_the_size_of_the_sources_whatever_that_is(shape):
    decoder = PyramidDecoder(len(shape), (5, 6, 7), (4, 8, 8, 12))
    assert decoder(torch.rand(2, 2, *shape), pyramid(shape)).shape == (2, 4, *shape)


def test_every_level_of_the_pyramid_is_read():
    decoder, own = PyramidDecoder(2, (5, 6, 7), (4, 8, 8, 12)), torch.rand(2, 2, 16, 16)
    levels = [level.requires_grad_() for level in pyramid((16, 16))]
    slopes = torch.autograd.grad(decoder(own, levels).square().sum(), levels)
    assert all(slope.abs().max() > 0 for slope in slopes)


def test_the_coarsest_level_reaches_far_while_the_sources_grid_reaches_next_door():
    """Where F changes when one voxel of a level does, the norms aside."""
    decoder = PyramidDecoder(2, (5, 6, 7), (4, 8, 8, 12)).eval()
    for norm in [m for m in decoder.modules() if isinstance(m, torch.nn.GroupNorm)]:
        norm.forward = lambda x: x
    own, levels = torch.rand(1, 2, 64, 64), [level[:1] for level in pyramid((64, 64))]
    before = decoder(own, levels)
    reached = []
    for tensor in (own, levels[-1]):
        kept = tensor[..., 4, 4].clone()
        tensor[..., 4, 4] = 100.0
        reached.append(((decoder(own, levels) - before).abs().amax((0, 1)) > 0).any(0).sum())
        tensor[..., 4, 4] = kept
    assert reached[0] <= 5 and reached[1] > 16  # two convolutions of three, and many doubled


def test_widths_that_do_not_match_the_levels_are_refused():
    with pytest.raises(ValueError, match="expected widths for the sources' grid and 2 levels"):
        PyramidDecoder(2, (5, 6), (4, 8))


@pytest.mark.parametrize("width", [2, 4, 6, 8, 18])
def test_a_single_voxel_can_be_normed(width):
    out = normed_convolution(3, 3, width)(torch.rand(1, 3, 1, 1, 1))
    assert out.isfinite().all() and out.max() > 0


@pytest.mark.parametrize("shape", [(6, 7), (3, 4, 5)], ids=str)
def test_a_blend_starts_as_the_average_and_is_what_it_says_it_is(shape):
    blend = SourceBlend(len(shape), 4)
    features = torch.rand(2, 4, *shape)
    mri, ct = (2 * torch.rand(2, 2, 1, *shape) - 1).unbind(0)
    assert torch.equal(blend(features, mri, ct), 0.5 * mri + 0.5 * ct)
    with torch.no_grad():
        blend.read.bias.copy_(torch.tensor([30.0, 0.25]))
    expected = mri + 0.25
    beyond = expected > 1
    found = blend(features, mri, ct)
    torch.testing.assert_close(found[~beyond], expected[~beyond])
    torch.testing.assert_close(found[beyond], 1 + 0.01 * (expected[beyond] - 1))
