import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter1d

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.grids import on_grid, volume_ml


def grid(
    size: Sequence[int],
    spacing_mm: Sequence[float],
    turned_deg: float = 0.0,
    shift_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> sitk.Image:
    """An empty grid whose middle is at ``shift_mm``, turned about x as a tilted scan is."""
    image = sitk.Image([int(n) for n in size], sitk.sitkFloat32)
    image.SetSpacing([float(mm) for mm in spacing_mm])
    turn = sitk.Euler3DTransform((0, 0, 0), np.radians(turned_deg), 0, 0)
    image.SetDirection(turn.GetMatrix())
    middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in size])
    image.SetOrigin([float(s - m) for s, m in zip(shift_mm, middle, strict=True)])
    return image


def points_mm(image: sitk.Image) -> np.ndarray:
    """LPS of every voxel, (d, h, w, 3)."""
    w, h, d = image.GetSize()
    index = np.stack(np.meshgrid(range(w), range(h), range(d), indexing="ij"), axis=-1)
    axes = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return (index @ axes.T + image.GetOrigin()).transpose(2, 1, 0, 3)


def drawn(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(image)
    return result


def ellipsoid(on: sitk.Image, radii_mm: Sequence[float], label: int = 1) -> sitk.Image:
    inside = ((points_mm(on) / np.array(radii_mm)) ** 2).sum(axis=-1) <= 1
    return drawn(on, (inside * label).astype(np.uint8))


FINE = grid((60, 60, 60), (1.0, 1.0, 1.0), turned_deg=12.0)

THICK = {
    "head, 0.9 x 0.9 x 5 mm": grid((70, 70, 14), (0.9, 0.9, 5.0), shift_mm=(0, 0, 1.3)),
    "coarse, 4 mm": grid((20, 20, 20), (4.0, 4.0, 4.0), shift_mm=(0.7, 1.1, 1.9)),
    "turned, 1 x 1 x 8 mm": grid((70, 70, 10), (1.0, 1.0, 8.0), turned_deg=-20.0),
    "fine, 0.5 mm": grid((120, 120, 120), (0.5, 0.5, 0.5), turned_deg=12.0, shift_mm=(0.1, 0, 0)),
}


@pytest.mark.parametrize("name", THICK)
@pytest.mark.parametrize("radii_mm", [(14, 9, 6), (4, 20, 7), (6, 6, 6)])
def test_a_lesion_keeps_its_volume_on_any_grid(name, radii_mm):
    lesion = ellipsoid(FINE, radii_mm)
    carried = on_grid(lesion, THICK[name], is_label=True)
    assert volume_ml(carried) == pytest.approx(volume_ml(lesion), rel=0.02)
    inside = sitk.GetArrayFromImage(carried) > 0
    off_mm = points_mm(carried)[inside].mean(axis=0)  # it was drawn about the origin
    assert np.abs(off_mm).max() < 0.5 * max(THICK[name].GetSpacing())


def test_nearest_neighbour_alone_would_lose_or_win_more_than_that():
    lesion = ellipsoid(FINE, (6, 6, 6))
    nearest = sitk.Resample(
        lesion, THICK["coarse, 4 mm"], sitk.Transform(), sitk.sitkNearestNeighbor
    )
    assert abs(volume_ml(nearest) / volume_ml(lesion) - 1) > 0.02


def test_where_nearest_neighbour_keeps_the_volume_it_is_what_comes_back():
    lesion = ellipsoid(FINE, (14, 9, 6))
    fine = THICK["fine, 0.5 mm"]
    nearest = sitk.Resample(lesion, fine, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    assert volume_ml(nearest) == pytest.approx(volume_ml(lesion), rel=0.01)
    np.testing.assert_array_equal(
        *map(sitk.GetArrayFromImage, (on_grid(lesion, fine, is_label=True), nearest))
    )


def test_the_voxels_a_lesion_gets_are_those_it_fills_most():
    bar = grid((40, 40, 40), (1.0, 1.0, 1.0))
    voxels = np.zeros((40, 40, 40), np.uint8)
    voxels[20:29, 10:20, 10:20] = 1  # 9 mm high: of slices of 4 mm, two full and a quarter below
    thick = grid((40, 40, 10), (1.0, 1.0, 4.0))
    carried = sitk.GetArrayFromImage(on_grid(drawn(bar, voxels), thick, is_label=True))
    assert carried[5:7, 10:20, 10:20].all()
    assert carried.sum() == 225 and carried[7].sum() == 25


def test_a_phantoms_lesion_keeps_its_volume_between_its_scans():
    phantom = make_phantom(1, seed=0, shape=(40, 64, 64), spacing_mm=(3.0, 3.0, 3.0))
    lesion = sitk.GetImageFromArray(phantom.lesion.astype(np.uint8))
    lesion.SetSpacing((3.0, 3.0, 3.0))
    thick = sitk.Image(213, 213, 24, sitk.sitkFloat32)
    thick.SetSpacing((0.9, 0.9, 5.0))
    carried = on_grid(lesion, thick, is_label=True)
    assert volume_ml(lesion) > 0.5
    assert volume_ml(carried) == pytest.approx(volume_ml(lesion), rel=0.02)


def test_a_mask_that_the_grid_shows_in_part_keeps_the_volume_of_that_part():
    lesion = ellipsoid(grid((60, 60, 60), (1.0, 1.0, 1.0)), (12, 12, 12))
    upper = grid((40, 40, 5), (1.5, 1.5, 4.0), shift_mm=(0, 0, 10.0))  # from z = 0 upwards
    carried = on_grid(lesion, upper, is_label=True)
    assert volume_ml(carried) == pytest.approx(volume_ml(lesion) / 2, rel=0.02)


def test_labels_keep_their_values_and_their_type():
    two = ellipsoid(FINE, (14, 9, 6), label=3) + ellipsoid(FINE, (6, 4, 3), label=4)
    carried = on_grid(two, THICK["coarse, 4 mm"], is_label=True)
    assert set(np.unique(sitk.GetArrayFromImage(carried))) == {0, 3, 7}
    one = on_grid(ellipsoid(FINE, (6, 6, 6), label=3), THICK["coarse, 4 mm"], is_label=True)
    assert set(np.unique(sitk.GetArrayFromImage(one))) == {0, 3}
    assert carried.GetPixelID() == one.GetPixelID() == sitk.sitkUInt8


def test_a_lesion_smaller_than_a_voxel_is_kept_and_the_log_says_at_what_size(caplog):
    speck = ellipsoid(FINE, (1.5, 1.5, 1.5))
    with caplog.at_level(logging.WARNING):
        carried = on_grid(speck, THICK["coarse, 4 mm"], is_label=True)
    assert volume_ml(carried) == pytest.approx(0.064)  # one voxel
    assert "a mask of 0.0" in caplog.text and "is 0.064 ml" in caplog.text


def test_an_empty_mask_and_one_out_of_view_are_empty():
    empty = drawn(FINE, np.zeros((60, 60, 60), np.uint8))
    assert volume_ml(on_grid(empty, THICK["coarse, 4 mm"], is_label=True)) == 0
    far = grid((10, 10, 10), (2.0, 2.0, 2.0), shift_mm=(500, 0, 0))
    assert volume_ml(on_grid(ellipsoid(FINE, (6, 6, 6)), far, is_label=True)) == 0


def test_an_image_comes_back_where_it_lies_in_millimetres():
    ramp = drawn(FINE, points_mm(FINE) @ np.array([1.0, -2.0, 3.0]))
    for there in THICK.values():
        carried = on_grid(ramp, there, fill=np.nan)
        expected = points_mm(there) @ np.array([1.0, -2.0, 3.0])
        inner = (
            np.linalg.norm(points_mm(there), axis=-1) < 15
        )  # far from edges that smoothing meets
        np.testing.assert_allclose(
            sitk.GetArrayFromImage(carried)[inner], expected[inner], atol=0.1
        )


def test_a_transform_takes_points_of_the_grid_to_points_of_the_image():
    lesion = ellipsoid(FINE, (8, 8, 8))
    shift = sitk.TranslationTransform(3, (5.0, 0.0, 0.0))
    for is_label in (True, False):
        carried = sitk.GetArrayFromImage(on_grid(lesion, FINE, shift, is_label=is_label))
        moved = points_mm(FINE)[carried > 0.5].mean(axis=0)
        np.testing.assert_allclose(moved, (-5, 0, 0), atol=0.1)


def test_an_image_gets_its_fill_outside_of_its_field_of_view():
    ct = drawn(FINE, np.full((60, 60, 60), 40.0, np.float32))
    wide = on_grid(ct, grid((40, 40, 40), (4.0, 4.0, 4.0)), fill=-1024)
    values = sitk.GetArrayFromImage(wide)
    assert values[0, 0, 0] == -1024 and values[20, 20, 20] == pytest.approx(40)


def test_an_image_is_smoothed_before_it_gets_coarser_and_not_when_it_gets_finer():
    plain = grid((30, 30, 40), (1.0, 1.0, 1.0))
    stripes = drawn(
        plain, np.where(np.arange(40) % 2, 100.0, 0.0)[:, None, None] + np.zeros((40, 30, 30))
    )
    thick = sitk.GetArrayFromImage(on_grid(stripes, grid((30, 30, 8), (1.0, 1.0, 5.0))))
    np.testing.assert_allclose(thick[1:-1], 50, atol=1)  # the mean, of which samples know nothing
    fine = sitk.GetArrayFromImage(on_grid(stripes, plain))
    np.testing.assert_array_equal(fine, sitk.GetArrayFromImage(stripes))


def test_the_smoothing_is_the_gaussian_of_cardoso():
    plain = grid((20, 20, 60), (1.0, 1.0, 1.0))
    signal = np.random.default_rng(0).normal(size=60).cumsum()
    image = drawn(plain, signal[:, None, None] + np.zeros((60, 20, 20)))
    thick = grid((20, 20, 20), (1.0, 1.0, 3.0))
    sigma = np.sqrt((3**2 - 1) / (8 * np.log(2)))
    expected = gaussian_filter1d(signal, sigma, mode="nearest")[1::3]
    got = sitk.GetArrayFromImage(on_grid(image, thick))[:, 10, 10]
    np.testing.assert_allclose(got[3:-3], expected[3:-3], atol=0.05 * signal.std())


def test_other_than_three_axes_are_refused():
    with pytest.raises(ValueError, match="expected a 3-D image, got 2-D"):
        on_grid(sitk.Image(4, 4, sitk.sitkUInt8), FINE)
    with pytest.raises(ValueError, match="expected a 3-D grid, got 2-D"):
        on_grid(FINE, sitk.Image(4, 4, sitk.sitkUInt8))


REAL = ("flair", "dwi", "adc", "msk")


@pytest.fixture
def real(shared_data: Path) -> dict[str, sitk.Image]:
    folder = shared_data / "isles22_case"
    stem = "sub-strokecase0009_ses-0001"
    return {name: sitk.ReadImage(folder / f"{stem}_{name}.nii.gz") for name in REAL}


def test_the_real_lesion_keeps_its_volume_on_flair_and_on_head_sized_voxels(real):
    lesion = real["msk"]
    assert real["flair"].GetSize() == (512, 512, 29) and lesion.GetSize() == (112, 112, 73)
    middle = lesion.TransformContinuousIndexToPhysicalPoint([55.5, 55.5, 36.0])
    head = grid((256, 256, 33), (0.9, 0.9, 5.0), shift_mm=middle)
    for there in (real["flair"], head, grid((64, 64, 40), (4.0, 4.0, 4.0), shift_mm=middle)):
        carried = on_grid(lesion, there, is_label=True)
        assert volume_ml(carried) == pytest.approx(volume_ml(lesion), rel=0.02)
        print(f"{there.GetSpacing()} mm: {volume_ml(lesion):.3f} to {volume_ml(carried):.3f} ml")


def test_the_real_scans_meet_on_one_grid_by_their_affines(real):
    """Brains overlap where the affines put them, and not where the array indices would."""
    dwi = on_grid(real["dwi"], real["flair"])
    brain, same = (sitk.GetArrayFromImage(i) for i in (real["flair"], dwi))
    assert dwi.GetSize() == real["flair"].GetSize()
    stretched = sitk.Image(real["dwi"])
    stretched.SetOrigin((0, 0, 0))
    elsewhere = sitk.GetArrayFromImage(on_grid(stretched, real["flair"]))
    assert dice(brain, same) > 0.95 > 0.6 > dice(brain, elsewhere)


def test_the_real_lesion_lies_where_diffusion_is_restricted_on_flair_too(real):
    flair = real["flair"]
    lesion = sitk.GetArrayFromImage(on_grid(real["msk"], flair, is_label=True)) > 0
    dwi, adc = (sitk.GetArrayFromImage(on_grid(real[name], flair)) for name in ("dwi", "adc"))
    brain = dwi > 0.2 * np.percentile(dwi, 99)
    assert np.median(dwi[lesion]) > 1.5 * np.median(dwi[brain])
    assert np.median(adc[lesion]) < np.median(adc[brain])


def dice(one: np.ndarray, other: np.ndarray) -> float:
    one, other = (a > 0.15 * np.percentile(a, 99) for a in (one, other))
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
