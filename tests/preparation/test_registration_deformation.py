"""The affine fit, on a phantom head whose CT was stretched by a known matrix."""

import numpy as np
import pytest
import SimpleITK as sitk

from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.grids import on_grid
from clinfuse.preparation.registration_deformation import smallest_jacobian, stretched
from clinfuse.preparation.registration_search import apart_mm, in_one_thread, pyramid

SCALE = (1.05, 0.96, 1.03)


@pytest.fixture(scope="module")
def scans(image_of):
    head = make_phantom(3, seed=1, shape=(36, 60, 52), spacing_mm=(4.0, 4.0, 4.0), contrast="t1")
    return image_of(head.mri, head.spacing_mm), image_of(head.ct_hu, head.spacing_mm)


@pytest.fixture(scope="module")
def both(scans):
    with in_one_thread():
        return pyramid(*scans)


@pytest.fixture(scope="module")
def scale():
    scale = sitk.AffineTransform(3)
    scale.Scale(SCALE)
    return scale


def still(pyramid):
    return sitk.Euler3DTransform(pyramid.centre_mm.tolist(), 0.0, 0.0, 0.0, [0.0, 0.0, 0.0])


def test_an_affine_fit_stays_where_a_rigid_one_is_right(both):
    with in_one_thread():
        found = stretched(both.levels[1], still(both), seed=0)
    assert apart_mm(found, still(both), both.points_mm) < 0.5  # an eighth of a voxel


def test_an_affine_fit_finds_the_matrix_that_stretched_a_head(scans, scale):
    mri, ct = scans
    with in_one_thread():
        both = pyramid(mri, on_grid(ct, ct, scale.GetInverse(), fill=-1000))
        found = stretched(both.levels[1], still(both), seed=0)
    assert apart_mm(scale, still(both), both.points_mm) > 2.0
    assert apart_mm(found, scale, both.points_mm) < 1.0  # a quarter of a voxel
    np.testing.assert_allclose(np.reshape(found.GetMatrix(), (3, 3)), np.diag(SCALE), atol=0.015)


def test_an_affine_fit_of_scans_that_do_not_meet_stays_at_its_start(both):
    far = still(both)
    far.SetTranslation([1000.0, 0.0, 0.0])
    with in_one_thread():
        found = stretched(both.levels[0], far, seed=0)
    assert apart_mm(found, far, both.points_mm) < 1e-6


def test_the_jacobian_of_a_scale_is_the_product_of_its_factors(both, scale):
    assert smallest_jacobian(both.levels[1], scale) == pytest.approx(np.prod(SCALE), rel=1e-6)
