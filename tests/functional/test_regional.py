import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects

from clinfuse.functional.regional import bounding_box, regional_mean, shares_of_moved


def test_the_mean_is_over_the_mask_whatever_lies_outside():
    values = torch.tensor([[[1.0, 3.0, float("nan")]]])
    mask = torch.tensor([[[True, True, False]]])
    assert regional_mean(values, mask).item() == 2.0


def test_a_voxel_counts_by_its_share():
    values = torch.tensor([[[1.0, 3.0, float("nan")]], [[1.0, 3.0, 5.0]]])
    shares = torch.tensor([[[0.1, 0.3, 0.0]], [[0.0, 0.0, 0.01]]])
    torch.testing.assert_close(regional_mean(values, shares), torch.tensor([2.5, 5.0]))
    assert regional_mean(values, torch.zeros_like(shares)).isnan().all()


def test_a_moved_mask_keeps_its_size_and_is_itself_where_it_was_not_moved():
    still = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert torch.equal(shares_of_moved(still), still)
    for by in (0.1, 0.25, 0.4, 0.5, 0.6, 0.9):
        moved = shares_of_moved((1 - by) * still + by * still.roll(1))
        assert moved.sum().item() == pytest.approx(3.0)
        assert moved.min() >= 0 and moved.max() <= 1


def test_an_empty_mask_has_no_mean_and_no_gradient():
    values = torch.ones(1, 1, 3, requires_grad=True)
    mean = regional_mean(values, torch.zeros(1, 1, 3, dtype=torch.bool))
    mean.nansum().backward()
    assert mean.isnan().all() and (values.grad == 0).all()


@pytest.mark.parametrize("shape", [(4, 30, 29), (40, 41), (50,)])
def test_the_box_of_a_mask_is_the_one_scipy_finds(shape):
    mask = np.random.default_rng(0).random(shape) < 0.02
    assert bounding_box(torch.from_numpy(mask)) == find_objects(mask.astype(int))[0]


def test_the_box_of_all_is_all_and_of_nothing_holds_nothing():
    everywhere = torch.ones(3, 4, 5, dtype=torch.bool)
    assert everywhere[bounding_box(everywhere)].shape == (3, 4, 5)
    assert everywhere[bounding_box(~everywhere)].numel() == 0
