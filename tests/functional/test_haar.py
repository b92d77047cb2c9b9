import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.functional.haar import haar_dwt, haar_idwt

SHAPES = st.lists(st.integers(1, 4).map(lambda half: 2 * half), min_size=2, max_size=3)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(shape=SHAPES, channels=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_inverse_restores_every_volume_and_slice(shape, channels):
    x = random(2, channels, *shape)
    bands = haar_dwt(x)
    assert bands.shape == (2, channels * 2 ** len(shape), *(size // 2 for size in shape))
    torch.testing.assert_close(haar_idwt(bands), x)
    torch.testing.assert_close(haar_dwt(haar_idwt(bands)), bands)


def test_energy_is_kept():
    x = random(1, 2, 4, 6, 8)
    torch.testing.assert_close(haar_dwt(x).square().sum(), x.square().sum())


def test_bands_are_products_of_one_dimensional_haar_vectors():
    x = random(1, 1, 2, 2, 2)
    low, high = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    for band, value in enumerate(haar_dwt(x).flatten()):
        d, h, w = (high if band & bit else low for bit in (4, 2, 1))
        torch.testing.assert_close(value, torch.einsum("dhw,d,h,w->", x[0, 0], d, h, w))


def test_bands_of_one_channel_stay_together():
    x = random(1, 3, 4, 4)
    each = [haar_dwt(channel) for channel in x.split(1, dim=1)]
    torch.testing.assert_close(haar_dwt(x), torch.cat(each, dim=1))


def test_chosen_axes_alone_are_halved():
    x = random(1, 2, 5, 6, 8)
    bands = haar_dwt(x, axes=(1, 2))
    assert bands.shape == (1, 8, 5, 3, 4)
    torch.testing.assert_close(haar_idwt(bands, axes=(1, 2)), x)
    torch.testing.assert_close(haar_dwt(x, axes=(-1, -2)), bands)


def test_gradients_match_finite_differences():
    x = random(1, 1, 2, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(haar_dwt, x)
    assert torch.autograd.gradcheck(haar_idwt, random(1, 8, 1, 2, 1).requires_grad_())


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match=r"even sizes.*\[1\]"):
        haar_dwt(torch.zeros(1, 1, 4, 5, 6))
    with pytest.raises(ValueError, match="multiple of 8"):
        haar_idwt(torch.zeros(1, 6, 4, 4, 4))
