import numpy as np
import pytest
from matplotlib.colors import to_rgba

from clinfuse.reporting.slices import BORDER_COLOURS, slices_figure, slices_through
from clinfuse.reporting.views import PLANES, CaseView, Panel, head_box

SHAPE, SPACING_MM = (10, 20, 24), (5.0, 2.0, 1.5)


@pytest.fixture
def head():
    """An ellipsoid of 0 in air, brighter in the patient's right half."""
    d, h, w = np.indices(SHAPE)
    inside = ((d - 4.5) / 4) ** 2 + ((h - 9.5) / 8) ** 2 + ((w - 11.5) / 10) ** 2 < 1
    volume = np.where(inside, np.where(w > 11.5, 0.5, 0.0), -1.0).astype(np.float32)
    return CaseView("a", volume, volume, volume, SPACING_MM)


def panel(view):
    return Panel("MRI", view.mri, "grey", -1.0, 1.0)


def slices_of(figure):
    return [axes for axes in figure.axes if axes.images and axes.get_aspect() != "auto"]


def test_a_picture_has_the_proportions_of_the_head(head):
    for axes, plane in zip(slices_of(slices_figure(head, [panel(head)])), PLANES, strict=True):
        left, right, bottom, top = axes.images[0].get_extent()
        picture = axes.images[0].get_array()
        pixel_mm = ((bottom - top) / picture.shape[0], (right - left) / picture.shape[1])
        assert axes.get_aspect() == 1  # a millimetre is as long down as across
        assert pixel_mm == pytest.approx(plane.pixel_mm(SPACING_MM))


def test_the_patients_right_is_on_the_left_and_says_so(head):
    axial = slices_of(slices_figure(head, [panel(head)]))[0]
    picture = axial.images[0].get_array()
    half = picture.shape[1] // 2
    assert picture[:, :half].mean() > picture[:, half:].mean()
    right = next(text for text in axial.texts if text.get_text() == "R")
    assert right.get_position()[0] < 0.5


def test_a_slice_is_named_by_its_number_in_the_whole_volume(head):
    axial = slices_of(slices_figure(head, [panel(head)], at=(3, 9, 11)))[0]
    assert "axial 4" in [text.get_text() for text in axial.texts]
    box = head_box(head)
    expected = PLANES[0].picture(head.mri[box], 3 - box[0].start)
    np.testing.assert_array_equal(axial.images[0].get_array(), expected)


def test_a_bar_has_the_unit_and_the_ends_of_its_panel(head):
    hu = Panel("CT", head.ct * 1000, "grey", -200.0, 1200.0, unit="HU")
    bar = slices_figure(head, [hu]).axes[-1].child_axes[-1]
    assert bar.get_xlabel() == "HU"
    assert bar.get_xlim() == (-200, 1200)


def test_a_mask_is_outlined_in_its_colour_on_grey_alone(head):
    mask = np.zeros(SHAPE, bool)
    mask[4:6, 8:12, 10:14] = True
    columns = [panel(head), Panel("Error", np.abs(head.mri), "difference", 0.0, 1.0)]
    figure = slices_figure(head, columns, {"lesion": mask}, at=slices_through(mask))
    colours = [{to_rgba(line.get_color()) for line in axes.lines} for axes in slices_of(figure)]
    amber = to_rgba(BORDER_COLOURS["lesion"])
    assert [amber in seen for seen in colours] == [True, False] * len(PLANES)
    assert [text.get_text() for text in figure.legends[0].texts] == ["lesion"]


def test_slices_go_through_most_of_a_mask():
    mask = np.zeros(SHAPE, bool)
    mask[2, 5:9, 7] = True
    mask[8, 5, 20] = True
    assert slices_through(mask) == (2, 5, 7)
    assert slices_through(np.zeros(SHAPE, bool)) == (5, 10, 12)


def test_a_volume_on_another_grid_is_refused(head):
    other = Panel("CT", head.ct[:5], "grey", -1.0, 1.0)
    with pytest.raises(ValueError, match=r"a: expected CT on the grid of the case, \(10, 20, 24\)"):
        slices_figure(head, [panel(head), other])
