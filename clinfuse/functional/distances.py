"""Distances in mm to the nearest voxel of a mask, on the device where the mask is."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from torch import Tensor

GPU_TRANSFORMS = ("cupyx.scipy.ndimage", "cucim.core.operations.morphology")
"""Modules with a ``distance_transform_edt`` for arrays of cupy; the first that can be imported."""

VOXELS_A_POINT = 8
"""Fewer points than one in so many voxels are looked up in a tree: of a brain, in a
fraction of the time of the transform; of a lesion, in as much."""

LARGEST = 2**24
"""Voxels beyond which ITK measures: it takes ten bytes for each, where scipy takes fifty."""


def distance_to(
    mask: Bool[Tensor, "*dhw"], spacing_mm: Sequence[float | int]
) -> Float[Tensor, "*dhw"]:
    """Distance from each voxel's centre to the nearest of the mask's; infinite where it is empty.

    For a mask on a GPU where cupy or cuCIM can be imported they compute it there, by the parallel
    banding algorithm of Cao et al. (2010), which is exact too; else scipy does on the CPU, or for a
    mask of more than ``LARGEST`` voxels ITK, by that of Maurer et al. (2003), in single precision.
    The way to the GPU is tested with a stand-in for these modules only: it has not been run on a
    GPU yet.
    """
    if not mask.any():
        return torch.full(mask.shape, torch.inf, dtype=torch.float64, device=mask.device)
    module = gpu_module() if mask.is_cuda else None
    if module is None and mask.numel() > LARGEST:
        return _by_itk(mask, spacing_mm)
    if module is None:
        distance = distance_transform_edt(~mask.cpu().numpy(), sampling=spacing_mm)
        return torch.from_numpy(distance).to(mask.device)
    return _by_cupy(module, ~mask, spacing_mm)


def distance_between(
    points: Bool[Tensor, "*dhw"], mask: Bool[Tensor, "*dhw"], spacing_mm: Sequence[float | int]
) -> Float[Tensor, " n"]:
    """``distance_to`` the mask at the points alone, in the order of their places.

    On a CPU few points are looked up in a tree of the mask's voxels, as MONAI does.
    """
    voxels, count = points.numel(), int(points.sum()) + int(mask.sum())
    on_gpu = mask.is_cuda and gpu_module() is not None
    if on_gpu or not mask.any() or count * VOXELS_A_POINT > voxels:
        return distance_to(mask, spacing_mm)[points]
    distance_mm = torch.zeros(points.shape, dtype=torch.float64)
    apart = (points & ~mask).cpu()  # what lies on the mask is 0 from it
    places_mm, nearest_mm = (part.nonzero().numpy() * spacing_mm for part in (apart, mask.cpu()))
    if len(places_mm):
        tree = KDTree(nearest_mm, leafsize=32, compact_nodes=False, balanced_tree=False)
        found, _ = tree.query(places_mm, workers=torch.get_num_threads())
        distance_mm[apart] = torch.from_numpy(found)
    return distance_mm[points.cpu()].to(points.device)


@cache
def gpu_module() -> ModuleType | None:
    """The module whose distance transform runs on a GPU; None where there is none.

    Looked for at the first mask on a GPU, and never without one.
    """
    for name in GPU_TRANSFORMS:
        try:
            module = import_module(name)
        except ImportError:
            continue
        if hasattr(module, "distance_transform_edt"):
            return module
    return None


def _by_itk(mask: Tensor, spacing_mm: Sequence[float | int]) -> Tensor:
    image = sitk.GetImageFromArray(mask.cpu().to(torch.uint8).numpy())
    image.SetSpacing([float(size) for size in reversed(spacing_mm)])
    signed = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    return torch.from_numpy(sitk.GetArrayFromImage(signed)).clamp_(min=0).to(mask.device)


def _by_cupy(module: ModuleType, image: Tensor, spacing_mm: Sequence[float | int]) -> Tensor:
    """Distance to the nearest zero of the image; nothing is copied between torch and cupy."""
    cupy: Any = import_module("cupy")
    transform: Callable[..., Any] = module.distance_transform_edt
    sampling = [float(size) for size in spacing_mm]
    found = transform(
        cupy.from_dlpack(image.to(torch.uint8)), sampling=sampling, float64_distances=True
    )
    return torch.from_dlpack(found)
