"""Where the voxels of an image lie: its affine, and perpendicular axes for a sheared one."""

import itertools

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float


def image_at(array: Float[np.ndarray, "k j i"], affine_lps: Float[np.ndarray, "4 4"]) -> sitk.Image:
    """An image from its voxels and from where index (i, j, k) lies in LPS millimetres."""
    spacing_mm = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(affine_lps[:3, 3].tolist())
    image.SetSpacing(spacing_mm.tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing_mm).ravel().tolist())
    return image


def affine_of(image: sitk.Image) -> Float[np.ndarray, "4 4"]:
    """Index (i, j, k) to LPS millimetres: the inverse of ``image_at``."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


def upright(image: sitk.Image, outside: float | int) -> sitk.Image:
    """An image with sheared axes resampled, linearly, onto perpendicular ones.

    Rows and columns keep their directions and the slices their planes, so that of a tilted scan no
    slice is mixed with its neighbour: each is only shifted within its plane, the first not at all.
    The field of view grows until it holds every voxel.

    Args:
        outside: value of voxels that were not scanned.
    """
    affine = affine_of(image)
    axes, shear = np.linalg.qr(affine[:3, :3])
    sign = np.sign(np.diag(shear))
    axes, shear = axes * sign, shear * sign[:, None]
    spacing_mm = np.diag(shear)
    corners = np.array(list(itertools.product(*((0, n - 1) for n in image.GetSize()))))
    steps = corners @ shear.T / spacing_mm
    low = np.floor(steps.min(0) + 1e-6).astype(int)
    high = np.ceil(steps.max(0) - 1e-6).astype(int)
    return sitk.Resample(
        image,
        (high - low + 1).tolist(),
        sitk.Transform(),
        sitk.sitkLinear,
        (affine[:3, 3] + axes @ (low * spacing_mm)).tolist(),
        spacing_mm.tolist(),
        axes.ravel().tolist(),
        outside,
        sitk.sitkFloat32,
    )
