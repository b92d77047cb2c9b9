import numpy as np
import pytest
import torch
from scipy.ndimage import spline_filter

from clinfuse.data import jitter, spline
from clinfuse.data.augmentation import Augmentation
from clinfuse.data.jitter import RegistrationJitter, fixed_misregistration

SPACING_MM = (4.0, 2.0, 3.0)
SHAPE = (9, 24, 20)
MATRICES = {
    "fixed": fixed_misregistration("case_07", 6.0, 8.0),
    "jitter": RegistrationJitter(5, 7, 1).draw(torch.Generator().manual_seed(0)),
    "similarity": Augmentation(affine=1).draw(torch.Generator().manual_seed(1)).matrix,
}

SINGLE = 4e-6
"""Single precision against ITK's double: 64 products of coefficients of up to 10 times the values'
size, each to 6e-8 of itself."""

SINGLE_PLACES = 2e-4
"""Where places are in single precision too: 24 voxels to 6e-8 of themselves, times the greatest
slope of a spline through noise, about 10 of the values' range a voxel, and eight look-ups."""


def noise(channels=2, shape=SHAPE):
    """The hardest there is to interpolate."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(channels, *shape, generator=generator) - 1


@pytest.mark.parametrize("interpolation", ["bspline", "linear"])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_volumes_are_moved_as_torchio_moves_them(matrix, interpolation):
    volume, options = noise(), {"fill": -1.0, "interpolation": interpolation}
    theirs = jitter.move(volume, matrix, SPACING_MM, **options)
    ours = spline.move(volume, matrix, SPACING_MM, **options)
    assert (
        theirs == -1
    ).float().mean() > 0.02  # something came in from outside, at the same places
    torch.testing.assert_close(ours, theirs, atol=SINGLE, rtol=0)


@pytest.mark.parametrize("shape", [(1, 20, 24), (2, 3, 30), (5, 1, 1)])
def test_the_thinnest_volumes_are_too(shape):
    volume = noise(1, shape)
    theirs = jitter.move(volume, MATRICES["jitter"], SPACING_MM)
    ours = spline.move(volume, MATRICES["jitter"], SPACING_MM)
    torch.testing.assert_close(ours, theirs, atol=SINGLE, rtol=0)


@pytest.mark.parametrize("interpolation", ["bspline", "linear"])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_a_gpus_way_gives_what_the_cpus_does(matrix, interpolation):
    volume, whole = noise(), tuple(slice(0, size) for size in SHAPE)
    source = spline._to_source(matrix, SHAPE, SPACING_MM, whole)
    cubic = interpolation == "bspline"
    by_torch = spline.cubic_by_torch if cubic else spline.linear_by_torch
    values = spline.coefficients(volume) if cubic else volume
    theirs = by_torch(spline._bordered(values, cubic), source, SHAPE, -1.0)
    ours = spline.move(volume, matrix, SPACING_MM, -1.0, interpolation)
    torch.testing.assert_close(theirs, ours, atol=SINGLE_PLACES, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("interpolation", ["bspline", "linear"])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_a_gpu_moves_volumes_as_the_cpu_does(matrix, interpolation):
    here = spline.move(noise(), matrix, SPACING_MM, -1.0, interpolation)
    there = spline.move(noise().cuda(), matrix, SPACING_MM, -1.0, interpolation)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, atol=SINGLE_PLACES, rtol=0)


@pytest.mark.parametrize("interpolation", ["bspline", "linear"])
@pytest.mark.parametrize("matrix", [*MATRICES.values(), torch.eye(4).double()])
@pytest.mark.parametrize("move", [jitter.move, spline.move], ids=["torchio", "spline"])
def test_a_window_of_what_is_moved_is_cut_out_of_it(move, matrix, interpolation):
    window = (slice(2, 7), slice(11, 24), slice(0, 5))
    whole = move(noise(), matrix, SPACING_MM, -1.0, interpolation)
    part = move(noise(), matrix, SPACING_MM, -1.0, interpolation, window)
    torch.testing.assert_close(part, whole[(..., *window)], atol=1e-6, rtol=0)


@pytest.mark.parametrize("coefficients", [spline.coefficients, spline.coefficients_by_torch])
@pytest.mark.parametrize("shape", [SHAPE, (2, 40, 1)])
def test_coefficients_are_those_of_scipy(coefficients, shape):
    volume = noise(2, shape)
    before = volume.clone()
    for ours, channel in zip(coefficients(volume), volume, strict=True):
        theirs = spline_filter(channel.numpy().astype(np.float64), 3, mode="mirror")
        np.testing.assert_allclose(ours, theirs, atol=SINGLE)
    assert torch.equal(volume, before)


def test_no_movement_changes_no_voxel():
    volume = noise()
    assert torch.equal(spline.move(volume, torch.eye(4).double(), SPACING_MM), volume)


def test_what_is_moved_there_and_back_by_whole_voxels_is_what_it_was():
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([4.0, -4.0, 6.0])  # 1, -2 and 2 voxels
    moved = spline.move(noise(), matrix, SPACING_MM)
    torch.testing.assert_close(moved[:, 1:, :-2, 2:], noise()[:, :-1, 2:, :-2], atol=SINGLE, rtol=0)
    back = spline.move(moved, torch.linalg.inv(matrix), SPACING_MM)
    inside = (..., slice(0, -1), slice(2, None), slice(0, -2))
    torch.testing.assert_close(back[inside], noise()[inside], atol=10 * SINGLE, rtol=0)
