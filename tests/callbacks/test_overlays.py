import numpy as np
import pytest
import torch

from clinfuse.callbacks.overlays import Overlays, of_pair, of_view
from clinfuse.reporting.views import CaseView
from clinfuse.types import SliceBatch


def ramp(shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def test_a_volume_is_shown_where_its_lesion_is_largest_with_front_on_top_and_left_to_the_right():
    mri, lesion, brain = ramp((4, 5, 6)), np.zeros((4, 5, 6), bool), np.ones((4, 5, 6), bool)
    lesion[2, 3:, :2] = True
    view = CaseView("a", mri, -mri, 0 * mri, (5.0, 1.0, 1.0), lesion=lesion, brain=brain)
    shown = of_view(view)
    assert list(shown.pictures) == ["MRI", "CT as given", "Fused"]
    grey = np.round(255 * (mri[2] + 1) / 2).astype(np.uint8)
    np.testing.assert_array_equal(shown.pictures["MRI"], grey[::-1, ::-1])
    np.testing.assert_array_equal(shown.masks["lesion"], lesion[2, ::-1, ::-1])
    assert shown.masks["brain"].all() and set(shown.masks) == {"brain", "lesion"}


def test_what_a_lesion_head_finds_is_a_region_of_its_own():
    mri = ramp((4, 5, 6))
    probability = np.full((4, 5, 6), 0.4, np.float32)
    probability[:, 1, 1] = 0.6
    view = CaseView("a", mri, mri, mri, (5.0, 1.0, 1.0), lesion_probability=probability)
    assert of_view(view).masks["lesion found"].sum() == 1


@pytest.mark.parametrize("name, number", [("brain", 1), ("lesion", 3), ("lesion found", 4)])
def test_a_region_keeps_its_number_and_name_whatever_is_beside_it(name, number):
    mask = np.eye(3, dtype=bool)
    (drawn,) = Overlays({}, {name: mask}).wandb_masks().values()
    assert drawn["class_labels"] == {number: name}
    np.testing.assert_array_equal(drawn["mask_data"], number * np.eye(3))


def test_a_pair_of_pictures_is_shown_as_it_lies_without_the_regions_it_has_not():
    mri = torch.linspace(-1, 1, 24).reshape(1, 1, 4, 6)
    roi = torch.zeros(1, 3, 4, 6, dtype=torch.bool)
    roi[:, 1, 2, 3] = True
    batch = SliceBatch(mri, -mri, roi, torch.ones(1, 2), ["a"])
    shown = of_pair(batch, 0, 0 * mri)
    assert shown.pictures["MRI"][0, 0] == 0 and shown.pictures["CT"][0, 0] == 255
    assert list(shown.masks) == ["bone"] and np.argwhere(shown.masks["bone"]).tolist() == [[2, 3]]
