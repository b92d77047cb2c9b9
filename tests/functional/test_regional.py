import numpy as np
import pytest
import torch
from scipy.ndimage import find_objects

from clinfuse.functional.regional import bounding_box, regional_mean


def test_the_mean_is_over_the_mask_whatever_lies_outside():
    values = torch.tensor([[[1.0, 3.0, float("nan")]]])
    mask = torch.tensor([[[True, True, False]]])
    assert regional_mean(values, mask).item() == 2.0


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
