import numpy as np
import pytest
import torch

from clinfuse.functional.contrast import average_gradient, spatial_frequency, standard_deviation
from clinfuse.functional.eight_bit import eight_bit


def image(*shape):
    return torch.rand(shape) * 2 - 1


@pytest.mark.parametrize("shape", [(3, 1, 12, 13), (2, 1, 4, 9, 10)])
def test_the_standard_deviation_is_numpys(shape):
    volume = image(*shape)
    expected = [case.std() for case in eight_bit(volume).numpy()]
    np.testing.assert_allclose(standard_deviation(volume), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1, 12, 13), (2, 1, 4, 9, 10)])
def test_gradients_and_differences_are_of_the_slices(shape):
    volume = image(*shape)
    for case, sf, ag in zip(
        eight_bit(volume).numpy().astype(np.float64),
        spatial_frequency(volume),
        average_gradient(volume),
        strict=True,
    ):
        squares = [np.diff(case, axis=axis) ** 2 for axis in (-2, -1)]
        assert sf.item() == pytest.approx(np.sqrt(sum(s.mean() for s in squares)), rel=1e-5)
        along_h, along_w = np.gradient(case, axis=(-2, -1))
        expected = np.sqrt((along_h**2 + along_w**2) / 2).mean()
        assert ag.item() == pytest.approx(expected, rel=1e-5)


def test_stripes_of_one_pixel_have_the_spatial_frequency_of_their_step():
    stripes = torch.ones(1, 1, 6, 8)
    stripes[..., ::2] = -1
    assert spatial_frequency(stripes).item() == pytest.approx(255)


def test_a_ramp_has_its_slope_over_root_two_for_an_average_gradient():
    ramp = (torch.arange(0, 40, 4.0) / 127.5 - 1).expand(1, 1, 6, 10)
    assert average_gradient(ramp).item() == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (2, 1, 3, 9, 1)])
def test_slices_of_one_row_or_column_have_neither(shape):
    for score in (spatial_frequency, average_gradient):
        assert score(image(*shape)).isnan().tolist() == [True, True]
