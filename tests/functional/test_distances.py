import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from clinfuse.functional import distances
from clinfuse.functional.distances import GPU_TRANSFORMS, distance_between, distance_to, gpu_module

SPACING_MM = (5.0, 0.9, 1.2)


def voxels(share, shape=(9, 20, 17), seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def by_scipy(mask, spacing_mm=SPACING_MM):
    return distance_transform_edt(~mask.numpy(), sampling=spacing_mm)


SMALL, LARGE = (9, 20, 17), (50, 60, 50)


@pytest.mark.parametrize(("share", "shape"), [(1e-4, LARGE), (0.01, SMALL), (0.6, SMALL)])
def test_distances_at_points_are_those_of_scipys_transform(share, shape):
    mask, points = voxels(share, shape), voxels(share, shape, seed=1)
    points |= mask & voxels(0.5, shape, seed=2)  # some lie on it
    np.testing.assert_array_equal(distance_to(mask, SPACING_MM), by_scipy(mask))
    found = distance_between(points, mask, SPACING_MM)
    np.testing.assert_allclose(found, by_scipy(mask)[points.numpy()], rtol=1e-12)


@pytest.mark.parametrize("share", [1e-3, 0.3])
def test_a_large_masks_distances_are_itks_and_the_same(monkeypatch, share):
    monkeypatch.setattr(distances, "LARGEST", 1000)
    monkeypatch.setattr(distances, "distance_transform_edt", None)
    mask = voxels(share)
    found = distance_to(mask, SPACING_MM)
    np.testing.assert_allclose(found, by_scipy(mask), rtol=1e-6, atol=1e-6)


def test_few_points_are_looked_up_and_many_are_read_off_the_transform(monkeypatch):
    trees = []

    def tree(*args, **settings):
        trees.append(args)
        return plain(*args, **settings)

    plain = distances.KDTree
    monkeypatch.setattr(distances, "KDTree", tree)
    distance_between(voxels(0.6), voxels(0.6, seed=1), SPACING_MM)
    assert not trees
    distance_between(voxels(1e-4, LARGE), voxels(1e-4, LARGE, seed=1), SPACING_MM)
    assert len(trees) == 1


def test_nothing_is_infinitely_far_and_no_points_have_no_distances():
    nothing, some = torch.zeros(4, 5, 6, dtype=torch.bool), voxels(0.3, (4, 5, 6))
    assert distance_to(nothing, SPACING_MM).isinf().all()
    assert distance_between(some, nothing, SPACING_MM).isinf().all()
    assert len(distance_between(nothing, some, SPACING_MM)) == 0
    assert (distance_between(some, some, SPACING_MM) == 0).all()


@pytest.fixture
def cupy_of_scipy(monkeypatch):
    """What a GPU's modules are asked for, answered by numpy and scipy."""
    asked = []

    def transform(image, sampling, float64_distances):
        asked.append((image.dtype, sampling, float64_distances))
        return distance_transform_edt(image, sampling=sampling)

    cupy = ModuleType("cupy")
    cupy.from_dlpack = np.from_dlpack
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for name in GPU_TRANSFORMS:
        for parent in (name[:dot] for dot, letter in enumerate(name) if letter == "."):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        module.distance_transform_edt = transform
        monkeypatch.setitem(sys.modules, name, module)
    gpu_module.cache_clear()
    yield asked
    gpu_module.cache_clear()


def test_a_gpus_transform_is_asked_for_scipys_answer(cupy_of_scipy):
    mask = voxels(0.02)
    found = distances._by_cupy(gpu_module(), ~mask, SPACING_MM)
    np.testing.assert_array_equal(found, by_scipy(mask))
    assert cupy_of_scipy == [(np.uint8, list(SPACING_MM), True)]


def test_cupys_own_transform_comes_before_cucims_and_an_old_cupy_has_none(
    cupy_of_scipy, monkeypatch
):
    assert gpu_module().__name__ == GPU_TRANSFORMS[0]
    gpu_module.cache_clear()
    monkeypatch.delattr(sys.modules[GPU_TRANSFORMS[0]], "distance_transform_edt")
    assert gpu_module().__name__ == GPU_TRANSFORMS[1]
    gpu_module.cache_clear()
    for name in GPU_TRANSFORMS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert gpu_module() is None


def test_a_mask_on_the_cpu_never_looks_for_a_gpus_modules(monkeypatch):
    monkeypatch.setattr(distances, "gpu_module", lambda: pytest.fail("looked for"))
    distance_to(voxels(0.5), SPACING_MM)
    distance_between(voxels(0.1), voxels(0.1, seed=1), SPACING_MM)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_mask_on_a_gpu_is_measured_there_and_on_the_cpu_without_its_modules(
    cupy_of_scipy, monkeypatch
):
    mask, points = voxels(0.01), voxels(0.01, seed=1)
    there = mask.as_subclass(OnGpu)
    np.testing.assert_array_equal(distance_to(there, SPACING_MM), by_scipy(mask))
    expected = by_scipy(mask)[points.numpy()]
    np.testing.assert_array_equal(distance_between(points, there, SPACING_MM), expected)
    assert len(cupy_of_scipy) == 2
    gpu_module.cache_clear()
    for name in GPU_TRANSFORMS:
        monkeypatch.setitem(sys.modules, name, None)
    np.testing.assert_array_equal(distance_to(there, SPACING_MM), by_scipy(mask))
    found = distance_between(points, there, SPACING_MM)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(cupy_of_scipy) == 2
