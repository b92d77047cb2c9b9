import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from clinfuse.preparation.affines import affine_of, image_at, upright

OBLIQUE = Rotation.from_euler("xyz", (12, -20, 33), degrees=True).as_matrix()


@pytest.mark.parametrize("tilt_deg", [0.0, 15.0])
def test_an_image_lies_where_its_affine_puts_each_voxel(dicom, tilt_deg):
    affine = dicom.affine((0.7, 0.8, 5), tilt_deg, OBLIQUE)
    image = image_at(dicom.hounsfield(), affine)
    np.testing.assert_allclose(affine_of(image), affine, atol=1e-9)
    for index in ((0, 0, 0), (23, 0, 0), (5, 19, 7)):
        there = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(there, (affine @ [*index, 1])[:3], atol=1e-9)
    assert image[5, 19, 7] == dicom.hounsfield()[7, 19, 5]


def test_an_image_with_perpendicular_axes_is_its_own_upright_one(dicom):
    affine = dicom.affine((0.7, 0.8, 5), turn=OBLIQUE)
    same = upright(image_at(dicom.hounsfield(), affine), outside=0)
    np.testing.assert_allclose(affine_of(same), affine, atol=1e-9)
    np.testing.assert_allclose(sitk.GetArrayFromImage(same), dicom.hounsfield(), atol=1e-2)


def test_an_upright_image_holds_every_voxel_of_the_sheared_one_and_nothing_beside_it(dicom):
    sheared = dicom.affine((1, 1, 5), tilt_deg=15)
    image = upright(image_at(np.full((8, 20, 24), 7, np.float32), sheared), outside=-1)
    found = sitk.GetArrayFromImage(image)
    assert set(np.unique(found)) == {-1, 7}
    assert abs((found == 7).sum() - 8 * 20 * 24) <= 7 * 24  # a row at most of each slice that moves
