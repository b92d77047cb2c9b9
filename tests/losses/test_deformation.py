import math

import pytest
import torch

from clinfuse.functional.warp import rigid_displacement, rigid_matrix
from clinfuse.losses.deformation import folding, roughness

SPACINGS = [(1.2, 0.7), (5.0, 0.9, 1.3)]


def rigid(spacing_mm, angle, shift_mm):
    n = len(spacing_mm)
    rotation = torch.full((1, 1), angle) if n == 2 else torch.tensor([[angle, 0.0, 0.0]])
    matrix = rigid_matrix(rotation.double(), torch.full((1, n), shift_mm).double())
    return rigid_displacement(matrix, (9, 11, 10)[:n], spacing_mm)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_a_rigid_motion_does_not_fold_and_a_turn_is_as_rough_as_its_angle(spacing_mm):
    shift, turn = rigid(spacing_mm, 0.0, 3.0), rigid(spacing_mm, 0.2, 3.0)
    zero = torch.zeros(1, dtype=torch.float64)
    for u in (shift, turn):
        torch.testing.assert_close(folding(u, spacing_mm), zero)
    torch.testing.assert_close(roughness(shift, spacing_mm), zero, atol=1e-12, rtol=0)
    # R - I has two axes of the plane with (1 - cos a)^2 + sin^2 a each
    torch.testing.assert_close(roughness(turn, spacing_mm), zero + 4 * (1 - math.cos(0.2)))


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_a_mirrored_axis_folds_everywhere_as_much_as_it_is_stretched(spacing_mm):
    n = len(spacing_mm)
    h = torch.arange(8, dtype=torch.float64).reshape(-1, *[1] * (n - 1)) * spacing_mm[0]
    u = torch.zeros(2, n, 8, *[6] * (n - 1), dtype=torch.float64)
    u[0, 0] = -3.0 * h  # p -> -2 p: its Jacobian is -2
    u[1, 0] = -0.9 * h  # p -> 0.1 p, squeezed and not folded
    torch.testing.assert_close(folding(u, spacing_mm), torch.tensor([2.0, 0.0]).double())
    torch.testing.assert_close(roughness(u, spacing_mm), torch.tensor([9.0, 0.81]).double())


def test_descent_unfolds_a_folded_field():
    u = torch.randn(1, 2, 12, 12).mul(2).requires_grad_()
    before = folding(u, (1.0, 1.0))
    for _ in range(20):
        loss = folding(u, (1.0, 1.0)).sum()
        (slope,) = torch.autograd.grad(loss, u)
        u = (u - 10 * slope).detach().requires_grad_()
    assert before > 0.5 and folding(u, (1.0, 1.0)) < 0.3 * before


def test_an_axis_of_one_voxel_neither_folds_nor_is_rough():
    u = torch.zeros(1, 3, 1, 5, 5)
    u[:, 1] = torch.arange(5.0)[:, None]
    assert folding(u, (5.0, 1.0, 1.0)) == 0
    torch.testing.assert_close(roughness(u, (5.0, 1.0, 1.0)), torch.ones(1))
