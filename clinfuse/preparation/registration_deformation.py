"""Beyond rigid: affine, and free-form deformation by B-splines (Rueckert et al. 1999)."""

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.registration_search import (
    SAMPLES,
    Level,
    Pyramid,
    metric,
    refined,
    search,
)


def affine(pyramid: Pyramid, seed: int) -> sitk.AffineTransform:
    """The affine transform that fits best near the best rigid one."""
    rigid = search(pyramid, seed)[0]
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(rigid.GetMatrix())
    transform.SetTranslation(rigid.GetTranslation())
    transform.SetCenter(rigid.GetCenter())
    for level in pyramid.levels[1:]:
        transform = refined(level, transform, seed)
    return transform


def deformable(
    pyramid: Pyramid, seed: int, control_spacing_mm: float, least_jacobian: float
) -> sitk.CompositeTransform:
    """The best rigid motion after a deformation by cubic B-splines, fitted at 4 mm.

    A deformation whose Jacobian falls below ``least_jacobian`` somewhere in the head is halved
    until none does, so that it never folds.

    Args:
        pyramid: of both scans.
        seed: of starts and samples.
        control_spacing_mm: between control points, at most.
        least_jacobian: between 0 and 1.
    """
    rigid = search(pyramid, seed)[0]
    level = pyramid.levels[1]
    extent_mm = np.multiply(level.fixed.GetSize(), level.fixed.GetSpacing())
    mesh = np.ceil(extent_mm / control_spacing_mm).astype(int).tolist()
    spline = sitk.BSplineTransformInitializer(level.fixed, mesh)
    method = metric(level)
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = min(SAMPLES / level.fixed.GetNumberOfPixels(), 1.0)
    method.SetMetricSamplingPercentage(share, seed + 1)
    method.SetMovingInitialTransform(rigid)
    method.SetInitialTransform(spline, inPlace=True)
    method.SetOptimizerAsLBFGSB(numberOfIterations=30, maximumNumberOfCorrections=5)
    method.Execute(level.fixed, level.moving)
    together = sitk.CompositeTransform([rigid, spline])
    while smallest_jacobian(level, together) < least_jacobian:
        spline.SetParameters((np.array(spline.GetParameters()) / 2).tolist())
        together = sitk.CompositeTransform([rigid, spline])
    return together


def smallest_jacobian(level: Level, transform: sitk.Transform) -> float:
    """The smallest Jacobian determinant of a transform about the fixed head; 1 for a rigid one."""
    grid = level.fixed
    field = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(),
        grid.GetDirection(),
    )  # fmt: skip
    displacement_mm = sitk.GetArrayFromImage(field)
    slopes = np.gradient(displacement_mm, *reversed(grid.GetSpacing()), axis=(0, 1, 2))
    along_axes = np.stack(slopes[::-1], axis=-1)  # of displacement (x, y, z) by steps (i, j, k)
    direction = np.array(grid.GetDirection()).reshape(3, 3)
    jacobian = np.linalg.det(np.eye(3) + along_axes @ direction.T)
    return float(jacobian[sitk.GetArrayFromImage(level.mask) > 0].min())
