"""The last steps of a registration by elastix (Klein et al. 2010), an optional dependency."""

import importlib
import importlib.util
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk

from clinfuse.preparation.registration_search import Pyramid, moved_by, search


def by_elastix(
    pyramid: Pyramid, seed: int, kind: Literal["rigid", "affine"]
) -> sitk.AffineTransform:
    """The transform that elastix arrives at, at 2 mm, from the best rigid one at 4 mm.

    elastix starts where its scans lie: the moving one is put there by its origin and direction,
    without interpolation.

    Args:
        pyramid: of both scans.
        seed: of starts and samples.
        kind: of elastix' own transform.

    Raises:
        ModuleNotFoundError: where itk-elastix is not installed.
    """
    if importlib.util.find_spec("itk") is None:
        raise ModuleNotFoundError(
            "expected the package itk-elastix for registration=elastix, found none: "
            "pip install 'clinfuse[elastix]'"
        )
    itk = importlib.import_module("itk")  # slow to import, and ships no types
    start = search(pyramid, seed, levels=2)[0]
    level = pyramid.levels[-1]
    parameters = itk.ParameterObject.New()
    settings = dict(parameters.GetDefaultParameterMap(kind, 2))
    settings["RandomSeed"] = (str(seed + 1),)
    settings["ErodeMask"] = settings["WriteResultImage"] = ("false",)
    settings["MaximumNumberOfIterations"] = ("400",)
    settings["NumberOfSpatialSamples"] = ("8192",)
    parameters.AddParameterMap(settings)
    _, result = itk.elastix_registration_method(
        _as_itk(itk, level.fixed),
        _as_itk(itk, moved_by(level.moving, start)),
        parameter_object=parameters,
        fixed_mask=_as_itk(itk, level.mask),
        number_of_threads=1,
    )
    found = _as_sitk(dict(result.GetParameterMap(result.GetNumberOfParameterMaps() - 1)))
    return _matrix_transform(sitk.CompositeTransform([start, found]))


def _as_itk(itk: Any, image: sitk.Image) -> Any:
    copy = itk.image_from_array(sitk.GetArrayFromImage(image))
    copy.SetOrigin(image.GetOrigin())
    copy.SetSpacing(image.GetSpacing())
    copy.SetDirection(np.array(image.GetDirection()).reshape(3, 3))
    return copy


def _as_sitk(found: dict[str, tuple[str, ...]]) -> sitk.Transform:
    """The transform of an elastix parameter map: the values in its order, about its centre."""
    transform: Any = sitk.AffineTransform(3)
    if found["Transform"][0] == "EulerTransform":
        transform = sitk.Euler3DTransform()
        transform.SetComputeZYX(found["ComputeZYX"][0] == "true")
    transform.SetCenter([float(value) for value in found["CenterOfRotationPoint"]])
    transform.SetParameters([float(value) for value in found["TransformParameters"]])
    return transform


def _matrix_transform(transform: sitk.Transform) -> sitk.AffineTransform:
    """One matrix for a chain of linear transforms."""
    corners = np.vstack([np.zeros(3), np.eye(3)])
    start, *ends = (np.array(transform.TransformPoint(corner)) for corner in corners.tolist())
    matrix = np.stack([end - start for end in ends], axis=1)
    return sitk.AffineTransform(matrix.ravel().tolist(), start.tolist())
