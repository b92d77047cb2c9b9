import math

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebval

from clinfuse.networks.chebyshev_graph import (
    ChebyshevBlock,
    ChebyshevConvolution,
    chebyshev_terms,
    scaled_laplacian,
)

SHAPES = [(5, 7), (4, 6), (1, 5), (3, 4, 5)]


def dense_laplacian(shape):
    """2 L / lambda_max - I of the grid's graph, written out voxel by voxel."""
    voxels = list(np.ndindex(*shape))
    adjacent = np.array([[np.abs(np.subtract(a, b)).sum() == 1 for b in voxels] for a in voxels])
    root = np.diag(adjacent.sum(1) ** -0.5)
    laplacian = np.eye(len(voxels)) - root @ adjacent @ root
    return 2 * laplacian / np.linalg.eigvalsh(laplacian).max() - np.eye(len(voxels))


def volume(shape, channels=2):
    return torch.randn(3, channels, *shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_stencil_is_the_product_with_the_dense_laplacian(shape):
    x = volume(shape)
    expected = x.flatten(2).numpy() @ dense_laplacian(shape).T
    np.testing.assert_allclose(scaled_laplacian(x).flatten(2), expected, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_are_numpys_chebyshev_polynomials_of_the_dense_laplacian(shape):
    x, order = volume(shape), 5
    values, vectors = np.linalg.eigh(dense_laplacian(shape))
    terms = chebyshev_terms(x, order).flatten(2).split(2, 1)
    assert len(terms) == order
    for k, term in enumerate(terms):
        polynomial = vectors @ np.diag(chebval(values, np.eye(order)[k])) @ vectors.T
        np.testing.assert_allclose(term, x.flatten(2).numpy() @ polynomial, atol=1e-10)


def test_the_kth_term_reaches_k_voxels_and_no_further():
    x = torch.zeros(1, 1, 11, 11)
    x[..., 5, 5] = 1
    h, w = torch.meshgrid(torch.arange(11), torch.arange(11), indexing="ij")
    far = (h - 5).abs() + (w - 5).abs()
    for k, term in enumerate(chebyshev_terms(x, 4).unbind(1)):
        assert far[term[0] != 0].max() == k


def test_a_grid_whose_dense_laplacian_would_not_fit_into_memory_takes_its_own_size():
    x = torch.randn(1, 1, 300, 300)  # N x N would be 32 GB
    assert ChebyshevConvolution(2, 1, 2, 4)(x).shape == (1, 2, 300, 300)


def test_a_voxel_without_neighbours_has_no_terms_but_itself():
    x = volume((1, 1))
    terms = chebyshev_terms(x, 3).split(2, 1)
    assert torch.equal(terms[0], x) and (terms[1] == 0).all() and torch.equal(terms[2], -x)


def test_a_convolution_weighs_its_terms_and_knows_no_direction():
    convolution = ChebyshevConvolution(2, 2, 3, 4).double()
    x = volume((6, 5))
    y = convolution(x)
    weight, bias = convolution.mix.weight[..., 0, 0], convolution.mix.bias
    expected = torch.einsum("ok,bkhw->bohw", weight, chebyshev_terms(x, 4))
    torch.testing.assert_close(y, expected + bias[:, None, None])
    torch.testing.assert_close(convolution(x.flip(2)), y.flip(2))
    torch.testing.assert_close(convolution(x.mT), y.mT)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 2)])
def test_a_block_starts_as_the_identity_and_learns_from_the_noise_level(shape):
    block = ChebyshevBlock(len(shape), 8, 16, order=3, norm_num_groups=4)
    x, level = torch.randn(2, 8, *shape), torch.randn(2, 16)
    assert torch.equal(block(x, level), x)
    torch.nn.init.normal_(block.second.mix.weight)
    assert not torch.allclose(block(x, level), block(x, 2 * level))
    assert math.isfinite(block(x, level).square().sum())


def test_an_order_without_terms_is_refused():
    with pytest.raises(ValueError, match="Chebyshev order of at least 1, got 0"):
        ChebyshevConvolution(2, 2, 2, 0)
