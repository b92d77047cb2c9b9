"""Beyond rigid: affine, and free-form deformation by B-splines (Rueckert et al. 1999)."""

from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.registration_search import (
    HEAD_RADIUS_MM,
    SAMPLES,
    Level,
    Pyramid,
    metric,
    search,
)


def affine(pyramid: Pyramid, seed: int) -> sitk.AffineTransform:
    """The affine transform that fits best near the best rigid one."""
    _, middle, fine = pyramid.levels
    return stretched(fine, stretched(middle, search(pyramid, seed)[0], seed), seed)


def stretched(
    level: Level, start: sitk.Euler3DTransform | sitk.AffineTransform, seed: int
) -> sitk.AffineTransform:
    """The affine transform that gradient descent of mutual information from ``start`` arrives at.

    It descends in head radii instead of millimetres. The optimizer's step is a length in its
    parameters: in millimetres, and from the best rigid place, where no translation gains anything,
    it would change the matrix by whole units and lose the head.

    Args:
        level: both scans at one voxel size.
        start: near the optimum, within some millimetres.
        seed: of the points the metric looks at.
    """
    small = replace(
        level,
        fixed=_in_radii(level.fixed),
        moving=_in_radii(level.moving),
        mask=_in_radii(level.mask),
        seen=None if level.seen is None else _in_radii(level.seen),
    )
    method = metric(small)
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = min(SAMPLES / level.fixed.GetNumberOfPixels(), 1.0)
    method.SetMetricSamplingPercentage(share, seed + 1)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=level.spacing_mm / 2 / HEAD_RADIUS_MM,
        minStep=level.spacing_mm / 100 / HEAD_RADIUS_MM,
        numberOfIterations=100,
        relaxationFactor=0.7,
        gradientMagnitudeTolerance=1e-8,
    )
    found = _affine(start, 1 / HEAD_RADIUS_MM)
    method.SetInitialTransform(found, inPlace=True)
    try:
        method.Execute(small.fixed, small.moving)
    except RuntimeError:  # the scans came apart
        return _affine(start, 1.0)
    return _affine(found, HEAD_RADIUS_MM)


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


def _in_radii(image: sitk.Image) -> sitk.Image:
    small = sitk.Image(image)
    small.SetSpacing((np.array(image.GetSpacing()) / HEAD_RADIUS_MM).tolist())
    small.SetOrigin((np.array(image.GetOrigin()) / HEAD_RADIUS_MM).tolist())
    return small


def _affine(
    transform: sitk.Euler3DTransform | sitk.AffineTransform, unit: float
) -> sitk.AffineTransform:
    """The same as an affine transform, its lengths multiplied by ``unit``."""
    affine = sitk.AffineTransform(3)
    affine.SetCenter((np.array(transform.GetCenter()) * unit).tolist())
    affine.SetMatrix(transform.GetMatrix())
    affine.SetTranslation((np.array(transform.GetTranslation()) * unit).tolist())
    return affine
