import numpy as np
import pytest
import torch

from clinfuse.functional import fmi_cpu
from clinfuse.functional.fmi import scores_by_definition


def features(*shape):
    """Whole levels with flat regions, as pictures have, and windows with one level above them."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 4, (2, *shape)) * rng.integers(0, 2, (2, *shape)) * 60
    levels[:, :, :5] = 0
    levels[:, :, 2, ::5] = 255
    return levels.astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 3, 40), (1, 7, 4), (3, 20, 21)])
def test_scores_are_those_of_the_definition_in_double_precision(shape):
    a, b = features(*shape)
    expected = scores_by_definition(*(torch.from_numpy(x).double() for x in (a, b))).numpy()
    np.testing.assert_allclose(fmi_cpu.window_scores(a, b), expected, rtol=0, atol=1e-3)
    assert fmi_cpu.window_scores(a, b).mean() == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize("count", [1, fmi_cpu.LANES - 1, fmi_cpu.LANES, fmi_cpu.LANES + 1])
def test_neither_the_number_of_windows_nor_their_neighbours_change_a_score(count):
    a, b = np.random.default_rng(0).random((2, 1, 3, count + 2), dtype=np.float32)
    together = fmi_cpu.window_scores(a, b)[0, 0]
    alone = [fmi_cpu.window_scores(a[..., x : x + 3], b[..., x : x + 3]) for x in range(count)]
    np.testing.assert_array_equal(together, np.ravel(alone))


def test_features_may_lie_in_memory_in_any_order():
    a, b = features(2, 15, 14)
    expected = fmi_cpu.window_scores(a, b)
    turned = [np.asfortranarray(x) for x in (a, b)]
    np.testing.assert_array_equal(fmi_cpu.window_scores(*turned), expected)


def test_the_logarithm_is_good_to_the_last_place():
    numbers = np.geomspace(1e-18, 1e3, 1001, dtype=np.float32)
    ours = [fmi_cpu._log(x) for x in numbers]
    np.testing.assert_allclose(ours, np.log(numbers.astype(float)), rtol=2.4e-7)  # two units
