import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from clinfuse.methods.selection import larger, larger_energy, larger_magnitude, mean


@pytest.mark.parametrize(
    "rule, expected",
    [
        (mean, [0.25, -0.5, 0.0, -0.75]),
        (larger, [1.0, 2.0, 1.0, -0.5]),
        (larger_magnitude, [1.0, -3.0, -1.0, -1.0]),
    ],
)
def test_a_rule_gives_what_one_works_out_by_hand(rule, expected):
    a, b = torch.tensor([[1.0, -3.0, -1.0, -0.5], [-0.5, 2.0, 1.0, -1.0]])
    got = rule(a.reshape(1, 1, 2, 2), b.reshape(1, 1, 2, 2))
    torch.testing.assert_close(got.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(13, 18), (7, 9, 10)])
def test_energy_is_that_of_the_neighbourhood(shape):
    a, b = torch.randn(2, 3, 1, *shape, dtype=torch.float64)
    got = larger_energy(a, b).numpy()
    for one, other, fused in zip(a[:, 0].numpy(), b[:, 0].numpy(), got[:, 0], strict=True):
        energies = [gaussian_filter(x**2, 1.0, mode="reflect", truncate=3.5) for x in (one, other)]
        np.testing.assert_array_equal(fused, np.where(energies[0] >= energies[1], one, other))


def test_by_energy_a_speck_of_noise_does_not_win_against_an_edge():
    edge, speck = torch.zeros(2, 1, 1, 9, 9)
    edge[..., 4] = 0.5
    speck[..., 4, 4] = 0.7
    assert torch.equal(larger_energy(edge, speck), edge)
    assert larger_magnitude(edge, speck)[0, 0, 4, 4] == speck[0, 0, 4, 4]
