import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clinfuse.reporting.views import (
    COLOUR_MAPS,
    LESION_LEVEL,
    OVERLAY_MAPS,
    PLANES,
    CaseView,
    Panel,
    chosen_slices,
    contours,
    cropped,
    differences,
    head_box,
    isotropic,
    outlines,
    overlay_palette,
    overlays,
    palette,
    panels,
    parts_scale,
    scale_end,
    shared_scales,
    tile,
)

AXIAL, CORONAL, SAGITTAL = PLANES
SHAPE, SPACING_MM = (12, 40, 36), (5.0, 2.0, 2.0)


def ball(centre, radius_mm):
    """A ball in mm from the grid's corner, on SHAPE and SPACING_MM."""
    places = np.indices(SHAPE) * np.reshape(SPACING_MM, (3, 1, 1, 1))
    offset = places - np.reshape(np.multiply(centre, SPACING_MM), (3, 1, 1, 1))
    return np.sqrt((offset**2).sum(0)) < radius_mm


@pytest.fixture
def view():
    """A round head: a shell of bone around a brain, with a lesion on the patient's right."""
    head, brain = ball((6, 20, 18), 28), ball((6, 20, 18), 22)
    mri = np.where(brain, 0.2, np.where(head, -0.8, -1.0)).astype(np.float32)
    ct = np.where(head & ~brain, 0.9, np.where(brain, -0.3, -1.0)).astype(np.float32)
    reference = np.where(head & ~brain, ct, mri)
    return CaseView(
        case_id="case_000",
        mri=mri,
        ct=ct,
        fused=(reference + 0.1 * brain).astype(np.float32),
        spacing_mm=SPACING_MM,
        reference=reference,
        spread=(0.05 * head).astype(np.float32),
        lesion=ball((7, 24, 25), 6),
        bone=head & ~brain,
        caption="ours at 2 mm",
    )


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_letters_stand_where_the_anatomy_is(plane):
    """A mark at each anatomical end of the head must come out at the edge that has its letter."""
    ends = {
        "I": (0, 2, 2), "P": (2, 0, 2), "L": (2, 2, 0),
        "S": (4, 2, 2), "A": (2, 4, 2), "R": (2, 2, 4),
    }  # fmt: skip
    edges = {"top": (0, 2), "bottom": (4, 2), "left": (2, 0), "right": (2, 4)}
    for edge, place in edges.items():
        volume = np.zeros((5, 5, 5))
        volume[ends[getattr(plane, edge)]] = 1
        picture = plane.picture(volume, 2)
        assert np.argwhere(picture).tolist() == [list(place)]


def test_axial_and_coronal_slices_have_the_patients_right_on_the_left():
    assert (AXIAL.left, AXIAL.top) == ("R", "A")
    assert (CORONAL.left, CORONAL.top) == ("R", "S")
    assert (SAGITTAL.left, SAGITTAL.top) == ("A", "S")


def test_pixels_are_as_large_as_the_voxels_they_show():
    assert [plane.pixel_mm((5.0, 2.0, 1.0)) for plane in PLANES] == [(2, 1), (5, 1), (5, 2)]


@pytest.mark.parametrize("plane", PLANES, ids=lambda plane: plane.name)
def test_a_ball_is_round_in_every_plane_at_anisotropic_spacing(plane):
    picture = plane.picture(ball((6, 20, 18), 24).astype(float), (6, 20, 18)[plane.axis])
    shown = isotropic(picture, plane.pixel_mm(SPACING_MM), mm_per_pixel=0.5) > 0.5
    height, width = (np.ptp(np.flatnonzero(shown.any(axis=a))) * 0.5 for a in (1, 0))
    assert height == pytest.approx(48, abs=5) and width == pytest.approx(48, abs=5)  # one voxel


def test_interpolation_keeps_the_pictures_range():
    picture = np.random.default_rng(0).random((9, 7))
    shown = isotropic(picture, (5.0, 2.0), 1.0)
    assert shown.shape == (45, 14)
    assert picture.min() - 1e-6 <= shown.min() and shown.max() <= picture.max() + 1e-6


def test_slices_pass_through_the_largest_part_of_the_lesion(view):
    lesion = view.lesion.copy()
    lesion[2, 10, 10] = True
    lesion[9, 6:34, 6] = True  # long in one slice, but smaller than the ball
    assert chosen_slices(replace(view, lesion=lesion)) == (7, 24, 25)


def test_without_a_lesion_the_axial_slice_has_most_bone_with_brain_in_it(view):
    bone = view.bone.copy()
    bone[11] = True  # a vertex: all bone, no head around it
    bone[4, 4:36, 4:32] = view.mri[4, 4:36, 4:32] > -0.9
    d, h, w = chosen_slices(replace(view, lesion=np.zeros_like(view.lesion), bone=bone))
    assert d == 4
    assert abs(h - 20) <= 2 and abs(w - 18) <= 2


def test_slices_are_found_without_any_mask_and_in_an_empty_volume(view):
    d, h, w = chosen_slices(replace(view, lesion=None, bone=None))
    assert abs(h - 20) <= 1 and abs(w - 18) <= 1 and 3 <= d <= 9
    air = np.full(SHAPE, -1, np.float32)
    empty = CaseView("air", air, air, air, SPACING_MM)
    assert all(0 <= i < n for i, n in zip(chosen_slices(empty), SHAPE, strict=True))
    assert cropped(empty).mri.shape == SHAPE


def test_the_crop_holds_the_whole_head_and_leaves_air_out(view):
    part = cropped(view)
    assert part.mri.shape[1] < SHAPE[1] and (view.mri[head_box(view)] == part.mri).all()
    assert (view.mri > -1).sum() == (part.mri > -1).sum()
    assert part.lesion.sum() == view.lesion.sum()


def test_panels_are_those_that_the_case_has(view):
    names = [panel.name for panel in panels(view)]
    assert names == ["MRI", "CT as given", "Fused", "|Fused - reference|", "Uncertainty (s.d.)"]
    assert [p.name for p in panels(replace(view, reference=None, spread=None))] == names[:3]


def test_the_difference_is_absolute_and_scales_are_shared(view):
    difference = panels(view)[3]
    np.testing.assert_allclose(difference.volume, np.abs(view.fused - view.reference))
    worse = replace(view, fused=view.reference - 0.4 * (view.mri > 0), spread=None)
    assert shared_scales([view, worse]) == pytest.approx((0.4, 0.05))
    assert panels(view, 0.4)[3].high == 0.4
    assert shared_scales([replace(view, reference=None, spread=None)]) == (None, None)


def test_a_perfect_result_has_a_scale_too():
    assert scale_end([np.zeros((2, 2, 2))]) == 1.0


def test_a_grey_tile_has_one_level_for_each_value():
    volume = np.zeros((1, 2, 2), np.float32)
    volume[0] = [[-1.0, 0.0], [1.0, 5.0]]
    panel = Panel("MRI", volume, "grey", -1.0, 1.0)
    image = Image.open(io.BytesIO(tile(panel, volume[0], (1.0, 1.0), 1.0)))
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 128], [255, 255]]


def test_a_coloured_tile_shows_the_colours_of_its_map():
    picture = np.linspace(0, 0.5, 6, dtype=np.float32).reshape(2, 3)
    panel = Panel("difference", picture[None], "difference", 0.0, 0.5)
    image = Image.open(io.BytesIO(tile(panel, picture, (1.0, 1.0), 1.0))).convert("RGB")
    expected = 255 * COLOUR_MAPS["difference"](picture / 0.5)[..., :3]
    np.testing.assert_allclose(np.asarray(image), expected, atol=2)


@pytest.mark.parametrize("name", sorted(set(COLOUR_MAPS) - {"change"}))
def test_colour_maps_begin_in_black_and_get_steadily_brighter(name):
    luminance = palette(name) @ (0.2126, 0.7152, 0.0722)
    assert luminance[0] < 2 and (np.diff(luminance) > -0.5).all() and luminance[-1] > 200


def test_the_colours_of_a_change_are_black_at_none_and_brighter_to_both_ends():
    luminance = palette("change", 257) @ (0.2126, 0.7152, 0.0722)
    assert luminance[128] < 2
    assert (np.diff(luminance[128:]) > -0.5).all() and (np.diff(luminance[:129]) < 0.5).all()
    darker, brighter = palette("change", 257)[[0, -1]].astype(int)
    assert darker[2] > darker[0] and brighter[0] > brighter[2]  # blue and orange


@pytest.mark.parametrize("name", OVERLAY_MAPS)
def test_overlays_are_clear_at_nothing_get_denser_and_never_hide_what_is_beneath(name):
    opacity = overlay_palette(name)[:, 3].astype(int)
    assert opacity[0] == 0 and (np.diff(opacity) >= 0).all() and 128 < opacity[-1] < 255


def test_an_overlays_tile_is_transparent_where_its_value_is_nothing():
    picture = np.array([[0.0, 0.0], [0.2, 0.4]], np.float32)
    panel = Panel("Epistemic", picture[None], "parts", 0.0, 0.4, under=picture[None])
    image = Image.open(io.BytesIO(tile(panel, picture, (1.0, 1.0), 1.0))).convert("RGBA")
    shown = np.asarray(image)
    assert (shown[0, :, 3] == 0).all() and 0 < shown[1, 0, 3] < shown[1, 1, 3]
    np.testing.assert_array_equal(shown[1, 1], overlay_palette("parts")[-1])


def test_overlays_lie_on_the_fused_image_and_the_parts_share_one_scale(view):
    part = replace(view, epistemic=view.spread / 5, aleatoric=2 * view.spread)
    assert overlays(view) == []
    epistemic, aleatoric = overlays(part)
    assert (epistemic.low, epistemic.high) == (aleatoric.low, aleatoric.high) == (0.0, 0.1)
    assert all((panel.under == view.fused).all() for panel in (epistemic, aleatoric))
    assert overlays(part, 0.7)[0].high == 0.7
    assert parts_scale([view]) is None and parts_scale([view, part]) == 0.1
    assert [p.name.split()[0] for p in overlays(replace(part, epistemic=None))] == ["Aleatoric"]


def test_lesion_probability_has_its_own_scale_unit_and_a_contour(view):
    (panel,) = overlays(replace(view, lesion_probability=0.3 * view.lesion))
    assert (panel.low, panel.high, panel.unit) == (0.0, 1.0, "probability")
    assert panel.level == LESION_LEVEL


def test_differences_are_signed_from_the_first_on_one_scale(view):
    fused = {"a": view.fused, "b": view.fused - 0.5 * view.bone, "c": view.fused + 0.1}
    b, c = differences(fused)
    assert [panel.name for panel in (b, c)] == ["b − a", "c − a"]
    np.testing.assert_allclose(b.volume, -0.5 * view.bone, atol=1e-6)
    assert (b.low, b.high) == (c.low, c.high) == (-0.5, 0.5)


def test_a_contour_lies_where_the_picture_passes_the_level():
    ramp = np.repeat(np.array([[0.0, 0.2, 0.4, 0.8, 0.0]]), 6, 0)
    (border,) = contours(ramp, 0.5, (1.0, 2.0))
    crossing = 2 * (2.5 + 0.25)  # a quarter of the way from the third pixel to the fourth, in mm
    assert np.isclose(border[:, 0], crossing).sum() >= 4
    assert border[:, 0].min() >= crossing - 1e-6 and contours(ramp, 0.9, (1.0, 1.0)) == []


def test_an_outline_encloses_the_area_of_its_mask():
    mask = np.zeros((8, 10), bool)
    mask[2:5, 3:9] = True
    mask[0, 0] = True
    borders = outlines(mask, (5.0, 2.0))
    assert len(borders) == 2
    border = max(borders, key=len)
    assert border[:, 0].min() == pytest.approx(6) and border[:, 0].max() == pytest.approx(18)
    assert border[:, 1].min() == pytest.approx(10) and border[:, 1].max() == pytest.approx(25)
    x, y = border.T
    area_mm2 = abs(np.sum(x[:-1] * np.diff(y) - y[:-1] * np.diff(x))) / 2
    assert area_mm2 == pytest.approx(3 * 6 * 10, rel=0.05)  # its four corners are cut
    assert outlines(np.zeros((3, 3), bool), (1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fused": np.full(SHAPE, np.nan)}, "finite values in fused"),
        ({"spacing_mm": (5.0, 0.0, 2.0)}, "spacing_mm"),
        ({"spacing_mm": (5.0, 2.0)}, "spacing_mm"),
    ],
)
def test_a_view_that_cannot_be_shown_is_refused_by_name(view, change, message):
    with pytest.raises(ValueError, match=f"case_000.*{message}"):
        replace(view, **change)


def test_volumes_on_two_grids_are_refused(view):
    with pytest.raises((ValueError, TypeError)):  # TypeError: jaxtyping was faster
        replace(view, ct=np.zeros((2, 2, 2), np.float32))
