import pytest
import torch

from clinfuse.functional.spacing import shared_spacing, spacing_of_each


def test_a_sequence_and_equal_rows_mean_the_same():
    assert shared_spacing([4, 2.0]) == shared_spacing(torch.tensor([[4.0, 2.0], [4.0, 2.0]]))
    assert spacing_of_each((4.0, 2.0), cases=2) == [(4.0, 2.0)] * 2
    assert spacing_of_each(torch.tensor([[4.0, 2.0], [1.0, 1.0]]), cases=2) == [(4, 2), (1, 1)]


def test_spacings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="one voxel spacing for the whole batch"):
        shared_spacing(torch.tensor([[4.0, 2.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="above 0 mm"):
        shared_spacing((0.0, 2.0))
    with pytest.raises(ValueError, match="expected 3 rows"):
        spacing_of_each(torch.ones(2, 3), cases=3)
