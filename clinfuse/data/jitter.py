"""Residual misregistration: the CT and its bone mask moved rigidly against the MRI, by TorchIO.

Every movement is one homogeneous matrix A in millimetres about the grid's centre, axes in tensor
order (d, h, w): what lies at p comes to lie at A p. TorchIO sees the tensor as an image whose
first, second and third axes are d, h and w, so that its millimetres and degrees are ours.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk
import torch
import torchio as tio
from jaxtyping import Bool, Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from clinfuse.data.volumes import Box, part_of

CT_AIR = -1.0
"""What fills the volume where a movement uncovers it: air, the bottom of model space."""

Interpolation = Literal["bspline", "linear"]


Mover = Callable[..., Tensor]
"""What moves volumes, called like ``move``, which is TorchIO's and defines what a movement is;
``spline.move`` is the same in a fraction of the time, on a GPU too."""


@dataclass(frozen=True)
class RegistrationJitter:
    """Random rigid misregistration of a training draw.

    With ``probability``, a shift uniform in ±``max_mm`` along each axis and a rotation uniform in
    ±``max_deg`` about each axis (in the order of TorchIO's ``RandomAffine``); else none.
    """

    max_mm: float | int = 2.0
    max_deg: float | int = 2.0
    probability: float | int = 0.5

    def __post_init__(self) -> None:
        if self.max_mm < 0 or self.max_deg < 0 or not 0 <= self.probability <= 1:
            raise ValueError(
                "expected max_mm and max_deg of at least 0 and a probability in [0, 1], got "
                f"{self.max_mm}, {self.max_deg} and {self.probability}"
            )

    def draw(self, generator: torch.Generator) -> Float[Tensor, "4 4"]:
        """The matrix of one draw. The generator advances equally whether or not it moves."""
        moves = torch.rand((), generator=generator, dtype=torch.float64) < self.probability
        uniform = 2 * torch.rand(6, generator=generator, dtype=torch.float64) - 1
        if not moves:
            return torch.eye(4, dtype=torch.float64)
        degrees, shift_mm = uniform[:3] * self.max_deg, uniform[3:] * self.max_mm
        return _homogeneous(_from_torchio_degrees(degrees.tolist()), shift_mm.numpy())


def fixed_misregistration(
    case_id: str, amplitude_mm: float | int, amplitude_deg: float | int, seed: int = 0
) -> Float[Tensor, "4 4"]:
    """A shift of exactly ``amplitude_mm`` and a turn of exactly ``amplitude_deg`` for evaluation.

    Direction and axis are uniform on the sphere and depend on seed and case alone: the same for
    every method and for every amplitude, so that a curve over amplitude follows one direction.
    """
    digest = hashlib.sha256(f"{seed}/{case_id}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    direction, axis = (v / np.linalg.norm(v) for v in random.standard_normal((2, 3)))
    rotation = Rotation.from_rotvec(np.radians(amplitude_deg) * axis)
    return _homogeneous(rotation, amplitude_mm * direction)


def move(
    volume: Float[Tensor, "c d h w"],
    matrix: Float[Tensor, "4 4"],
    spacing_mm: Sequence[float | int],
    fill: float = CT_AIR,
    interpolation: Interpolation = "bspline",
    window: Box | None = None,
) -> Float[Tensor, "c d_out h_out w_out"]:
    """The volume with what lay at p now at A p; ``fill`` comes in from outside.

    The default is a cubic B-spline: a patient scanned in another pose gives an image as sharp as
    this one, while linear interpolation would blur it. Values overshoot by what a spline does.

    Args:
        volume: what to move, each channel by itself.
        matrix: a rigid movement, or a similarity (rotation, one scale, shift), about the centre.
        spacing_mm: voxel size.
        fill: what comes in from outside.
        interpolation: TorchIO's name of the method.
        window: the part of the moved volume that is asked for; only that is resampled. None for
            all of it.
    """
    if is_still(matrix):
        return volume if window is None else part_of(volume, window)
    affine = _torchio_affine(matrix, fill, interpolation)
    image = tio.ScalarImage(tensor=volume, affine=np.diag([*spacing_mm, 1.0]))
    if window is None:
        return affine(image).data
    return torch.stack([_window_of(affine, channel, image, window) for channel in volume])


def move_mask(
    mask: Bool[Tensor, "c d h w"],
    matrix: Float[Tensor, "4 4"],
    spacing_mm: Sequence[float | int],
    window: Box | None = None,
    by: Mover = move,
) -> Bool[Tensor, "c d_out h_out w_out"]:
    """A mask moved like ``move``, but interpolated linearly, and cut at one half.

    Nearest-neighbour sampling would keep masks still for shifts under half a (thick) slice.
    """
    if is_still(matrix):
        return mask if window is None else part_of(mask, window)
    return by(mask.float(), matrix, spacing_mm, 0.0, "linear", window) > 0.5


def is_still(matrix: Float[Tensor, "m m"]) -> bool:
    """Whether the movement is none."""
    return torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))


def about_another_centre(
    matrix: Float[Tensor, "m m"], centre_mm: Float[Tensor, " n"]
) -> Float[Tensor, "m m"]:
    """The same movement written about a centre that lies at ``centre_mm`` from the old one.

    A patch needs this: the matrix of a batch is about the centre of the patch's own grid. Of a
    volume the matrix is 4 x 4, of a slice 3 x 3.
    """
    there, back = (torch.eye(len(matrix), dtype=matrix.dtype) for _ in range(2))
    there[:-1, -1], back[:-1, -1] = centre_mm, -centre_mm
    return back @ matrix @ there


def _window_of(
    affine: tio.Affine, volume: Float[Tensor, "d h w"], image: tio.ScalarImage, window: Box
) -> Float[Tensor, "d_out h_out w_out"]:
    """What ``affine`` makes of the volume, in the window alone: its transform and interpolator."""
    floating = tio.ScalarImage(tensor=volume[None], affine=image.affine).as_sitk(force_3d=True)
    start, size = [s.start for s in window], [s.stop - s.start for s in window]
    resampled = sitk.Resample(
        floating,
        size,
        affine.get_affine_transform(image),
        affine.get_sitk_interpolator(affine.image_interpolation),
        floating.TransformIndexToPhysicalPoint(start),
        floating.GetSpacing(),
        floating.GetDirection(),
        affine.default_pad_value,
        sitk.sitkFloat32,
    )
    return torch.from_numpy(sitk.GetArrayFromImage(resampled).transpose())


def _torchio_affine(
    matrix: Float[Tensor, "4 4"], fill: float, interpolation: Interpolation
) -> tio.Affine:
    linear, shift_mm = matrix[:3, :3].double().numpy(), matrix[:3, 3].double().numpy()
    scale = float(np.cbrt(np.linalg.det(linear)))
    assert np.allclose(linear @ linear.T, scale**2 * np.eye(3), atol=1e-5), "not a similarity"
    about_z, about_x, about_y = Rotation.from_matrix(linear / scale).as_euler("ZXY", degrees=True)
    return tio.Affine(
        scales=(scale, scale, scale),
        degrees=(about_x, about_y, about_z),
        translation=tuple((shift_mm / scale).tolist()),  # TorchIO scales after it shifts
        center="image",
        default_pad_value=fill,
        image_interpolation=interpolation,
    )


def _from_torchio_degrees(degrees: Sequence[float]) -> Rotation:
    """TorchIO turns about the second axis first, then the first, then the third (ITK Euler)."""
    about_x, about_y, about_z = degrees
    return Rotation.from_euler("ZXY", [about_z, about_x, about_y], degrees=True)


def _homogeneous(rotation: Rotation, shift_mm: Float[np.ndarray, " 3"]) -> Float[Tensor, "4 4"]:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = torch.from_numpy(rotation.as_matrix())
    matrix[:3, 3] = torch.from_numpy(np.asarray(shift_mm))
    return matrix
