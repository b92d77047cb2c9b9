import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import convolve1d

from clinfuse.methods.laplacian_pyramid import (
    LaplacianPyramid,
    from_pyramid,
    halved_axes,
    laplacian_pyramid,
)
from clinfuse.methods.selection import larger, larger_magnitude, mean
from clinfuse.types import FusionBatch

SHAPES = st.lists(st.integers(1, 19), min_size=2, max_size=3)


def pair(*shape, spacing_mm=None):
    mri, ct = 2 * torch.rand(2, 2, 1, *shape) - 1
    spacing = torch.tensor([spacing_mm or [1.0] * len(shape)] * 2)
    roi = torch.zeros(2, 3, *shape, dtype=torch.bool)
    return FusionBatch(mri, ct, roi, spacing, ["a", "b"])


def mri_of(mri, ct):
    return mri


@given(shape=SHAPES, levels=st.integers(1, 5))
@settings(max_examples=25)
def test_the_pyramid_of_any_size_is_the_image_itself(shape, levels):
    image, axes = torch.randn(1, 1, *shape, dtype=torch.float64), [range(len(shape))] * levels
    pyramid = laplacian_pyramid(image, axes)
    sizes = [shape]
    for _ in range(levels):
        sizes.append([(size + 1) // 2 for size in sizes[-1]])
    assert [list(level.shape[2:]) for level in pyramid] == [*sizes[:-1], sizes[-1]]
    torch.testing.assert_close(from_pyramid(pyramid, axes), image)


def test_away_from_the_border_a_level_is_burt_and_adelsons():
    image = np.random.default_rng(0).normal(size=41)
    detail, base = laplacian_pyramid(torch.from_numpy(image)[None, None, None], [(1,)])
    window = np.array([1, 4, 6, 4, 1]) / 16
    coarse = convolve1d(image, window)[::2]
    spread = np.zeros(41)
    spread[::2] = coarse
    inside = slice(4, -4)
    np.testing.assert_allclose(base[0, 0, 0, 2:-2], coarse[2:-2], atol=1e-12)
    expected = image - convolve1d(spread, 2 * window)
    np.testing.assert_allclose(detail[0, 0, 0, inside], expected[inside], atol=1e-12)


@given(shape=SHAPES)
@settings(max_examples=10)
def test_what_is_flat_has_no_detail_up_to_the_border(shape):
    flat = torch.full((1, 1, *shape), 0.7, dtype=torch.float64)
    *details, base = laplacian_pyramid(flat, [range(len(shape))] * 3)
    assert max(detail.abs().max() for detail in details) < 1e-12
    torch.testing.assert_close(base, torch.full_like(base, 0.7))


def test_of_thick_slices_the_plane_is_halved_until_a_voxel_is_about_a_cube():
    assert halved_axes([5.0, 0.9, 0.9], 4) == [(1, 2), (1, 2), (0, 1, 2), (0, 1, 2)]
    assert halved_axes([1.0, 1.0], 2) == [(0, 1), (0, 1)]


@pytest.mark.parametrize("shape", [(17, 22), (5, 13, 16)])
def test_equal_sources_are_what_they_fuse_to(shape):
    batch = pair(*shape)
    batch.ct = batch.mri
    for base in (mean, larger):
        fused = LaplacianPyramid(3, larger_magnitude, base).fuse(batch)
        torch.testing.assert_close(fused, batch.mri, atol=1e-5, rtol=0)


def test_details_come_from_the_source_that_has_some_and_the_base_from_its_own_rule():
    batch = pair(21, 18)
    batch.ct = torch.full_like(batch.mri, 0.25)
    restored = LaplacianPyramid(3, larger_magnitude, mri_of).fuse(batch)
    torch.testing.assert_close(restored, batch.mri, atol=1e-5, rtol=0)
    axes = halved_axes([1.0, 1.0], 2)
    *details, base = laplacian_pyramid(batch.mri, axes)
    brighter = from_pyramid([*details, base.clamp(min=0.25)], axes).clamp(-1, 1)
    fused = LaplacianPyramid(2, larger_magnitude, larger).fuse(batch)
    torch.testing.assert_close(fused, brighter, atol=1e-5, rtol=0)


def test_mixed_precision_does_not_blur_the_result():
    batch, method = pair(16, 24, 24, spacing_mm=[5.0, 0.9, 0.9]), LaplacianPyramid(2, mri_of, mean)
    with torch.autocast("cpu", torch.bfloat16):
        inside = method.fuse(batch)
    assert inside.dtype == torch.float32 and torch.equal(inside, method.fuse(batch))


def test_a_pyramid_without_detail_is_refused():
    with pytest.raises(ValueError, match="at least one level of the pyramid, got 0"):
        LaplacianPyramid(0, larger_magnitude, mean)


def test_cases_of_unlike_voxels_in_one_batch_are_refused():
    batch = pair(8, 8)
    batch.spacing_mm = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    with pytest.raises(ValueError, match="one voxel spacing for the whole batch"):
        LaplacianPyramid(1, larger_magnitude, mean).fuse(batch)
