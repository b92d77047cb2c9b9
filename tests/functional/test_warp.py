import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from clinfuse.functional.warp import rigid_displacement, rigid_matrix, warp

SPACING_MM = (4.0, 2.0, 1.5)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matrices_agree_with_scipy_rotations():
    vectors = torch.cat((random(4, 3), torch.zeros(1, 3)))
    matrices = rigid_matrix(vectors, random(5, 3, seed=1))
    expected = Rotation.from_rotvec(vectors.numpy()).as_matrix()
    np.testing.assert_allclose(matrices[:, :3, :3], expected, atol=1e-12)
    np.testing.assert_array_equal(matrices[:, :3, 3], random(5, 3, seed=1))
    np.testing.assert_array_equal(matrices[:, 3], [[0, 0, 0, 1]] * 5)


def test_a_quarter_turn_of_a_slice_takes_axis_h_to_axis_w():
    matrix = rigid_matrix(torch.tensor([[torch.pi / 2]]), torch.zeros(1, 2))
    torch.testing.assert_close(matrix[0] @ torch.tensor([1.0, 0, 1]), torch.tensor([0, 1.0, 1]))


def test_no_rotation_has_a_gradient():
    rotation = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rigid_matrix, (rotation, random(1, 3).requires_grad_()))


def test_the_displacement_is_a_p_minus_p_about_the_grids_centre():
    matrix = rigid_matrix(random(2, 3) / 10, random(2, 3, seed=1))
    u = rigid_displacement(matrix, (5, 6, 7), SPACING_MM)
    p = (np.array([4, 1, 0]) - (np.array([5, 6, 7]) - 1) / 2) * SPACING_MM
    for case in range(2):
        expected = (matrix[case].numpy() @ np.append(p, 1))[:3] - p
        np.testing.assert_allclose(u[case, :, 4, 1, 0], expected)


@pytest.mark.parametrize("shape", [(6, 8, 10), (8, 10)])
@pytest.mark.parametrize(("padding", "mode"), [("border", "nearest"), ("zeros", "grid-constant")])
def test_warping_agrees_with_scipy_interpolation(shape, padding, mode):
    spacing_mm = SPACING_MM[: len(shape)]
    volume, u = random(1, 1, *shape), 4 * random(1, len(shape), *shape, seed=1)
    at = np.indices(shape) + u[0].numpy() / np.reshape(spacing_mm, (-1, *[1] * len(shape)))
    expected = map_coordinates(volume[0, 0].numpy(), at, order=1, mode=mode)
    np.testing.assert_allclose(warp(volume, u, spacing_mm, padding)[0, 0], expected, atol=1e-9)


def test_one_voxel_to_the_right_is_one_spacing_in_mm():
    volume = random(1, 2, 3, 4, 5)
    u = torch.zeros(1, 3, 3, 4, 5, dtype=torch.float64)
    u[:, 2] = SPACING_MM[2]
    torch.testing.assert_close(warp(volume, u, SPACING_MM)[..., :-1], volume[..., 1:])


def test_each_case_has_its_own_spacing():
    volume, u = random(2, 1, 3, 4, 5), random(2, 3, 3, 4, 5, seed=1)
    both = warp(volume, u, torch.tensor([SPACING_MM, (1.0, 1.0, 1.0)]))
    torch.testing.assert_close(both[:1], warp(volume[:1], u[:1], SPACING_MM))
    torch.testing.assert_close(both[1:], warp(volume[1:], u[1:], (1.0, 1.0, 1.0)))


def test_a_motion_is_undone_by_its_displacement():
    # FusionBatch: what lies at p in the clean CT lies at A p in the moved one, and
    # clean(p) = ct(p + u(p)). A smooth blob keeps what linear interpolation blurs small.
    shape = (17, 33, 33)
    matrix = rigid_matrix(torch.tensor([[0.1, -0.05, 0.2]]), torch.tensor([[3.0, -2.0, 1.0]]))
    points = rigid_displacement(torch.zeros(1, 4, 4), shape, SPACING_MM).neg()

    def blob(p):
        centre = torch.tensor([4.0, -6.0, 5.0]).reshape(1, 3, 1, 1, 1)
        return torch.exp(-((p - centre) ** 2).sum(1, keepdim=True) / (2 * 8.0**2))

    moved = blob(points + rigid_displacement(matrix.inverse(), shape, SPACING_MM))
    restored = warp(moved, rigid_displacement(matrix, shape, SPACING_MM), SPACING_MM)
    assert (restored - blob(points)).abs().max() < 0.04  # (h/σ)²/8 for h = 4 mm, σ = 8 mm
    assert (moved - blob(points)).abs().max() > 0.15


def test_gradients_match_finite_differences():
    volume, u = random(1, 1, 3, 4, 3), random(1, 3, 3, 4, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda volume, u: warp(volume, u, SPACING_MM),
        (volume.requires_grad_(), u.requires_grad_()),
    )


def test_a_slab_of_one_slice_moves_within_its_plane():
    volume = random(1, 1, 1, 6, 6)
    u = torch.zeros(1, 3, 1, 6, 6, dtype=torch.float64)
    u[:, 0], u[:, 1] = 3.0, 2.0
    moved = warp(volume, u, (5.0, 2.0, 2.0))
    torch.testing.assert_close(moved[:, :, :, :-1], volume[:, :, :, 1:])


def test_mismatched_numbers_of_rotations_and_axes_are_refused():
    with pytest.raises(ValueError, match="3 rotations for 3 axes"):
        rigid_matrix(torch.zeros(1, 1), torch.zeros(1, 3))
