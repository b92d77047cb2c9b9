"""Random variation of training draws that keeps the truth true: geometry, contrast, noise."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How far training draws vary. All zero is no augmentation.

    Attributes:
        flip: probability of mirroring left and right.
        affine: probability of one small similarity for everything in the study.
        max_deg: its rotation about each axis, uniform in plus or minus.
        max_mm: its shift along each axis, uniform in plus or minus.
        max_scale: its size change, 0.05 for 5 % either way.
        max_log_gamma: exponent exp(uniform in plus or minus) of the MRI on [0, 1], noisy and
            clean alike: another contrast of the same anatomy.
        max_noise: standard deviation of Gaussian noise on the two inputs, uniform from 0.
    """

    flip: float | int = 0.5
    affine: float | int = 0.5
    max_deg: float | int = 5.0
    max_mm: float | int = 4.0
    max_scale: float | int = 0.05
    max_log_gamma: float | int = 0.2
    max_noise: float | int = 0.03

    def __post_init__(self) -> None:
        if not (0 <= self.flip <= 1 and 0 <= self.affine <= 1):
            raise ValueError(f"expected probabilities in [0, 1], got {self.flip}, {self.affine}")
        limits = (self.max_deg, self.max_mm, self.max_scale, self.max_log_gamma, self.max_noise)
        if min(limits) < 0 or self.max_scale >= 1:
            raise ValueError(f"expected limits of at least 0 and max_scale below 1, got {limits}")

    def draw(self, generator: torch.Generator) -> "AugmentationDraw":
        """One draw. The generator advances equally whatever the draw."""
        chance = torch.rand(2, generator=generator, dtype=torch.float64)
        u = 2 * torch.rand(10, generator=generator, dtype=torch.float64) - 1
        matrix = torch.eye(4, dtype=torch.float64)
        if chance[1] < self.affine:
            rotation = Rotation.from_euler("ZXY", (self.max_deg * u[:3]).tolist(), degrees=True)
            scale = math.exp(math.log1p(self.max_scale) * float(u[3]))
            matrix[:3, :3] = scale * torch.from_numpy(rotation.as_matrix())
            matrix[:3, 3] = self.max_mm * u[4:7]
        return AugmentationDraw(
            flips=bool(chance[0] < self.flip),
            matrix=matrix,
            gamma=math.exp(self.max_log_gamma * float(u[7])),
            mri_noise=self.max_noise * float(u[8].abs()),
            ct_noise=self.max_noise * float(u[9].abs()),
        )


@dataclass(frozen=True)
class AugmentationDraw:
    """The numbers of one draw.

    Attributes:
        flips: whether to mirror the last axis, before the similarity.
        matrix: rotation times scale, and shift in mm, about the grid's centre.
        gamma: exponent of the MRI on [0, 1].
        mri_noise: standard deviation on the MRI in model space.
        ct_noise: standard deviation on the CT in model space.
    """

    flips: bool
    matrix: Float[Tensor, "4 4"]
    gamma: float
    mri_noise: float
    ct_noise: float

    @property
    def scale(self) -> float:
        """Size change of the similarity, which distances in mm follow."""
        return float(torch.linalg.det(self.matrix[:3, :3])) ** (1 / 3)


def mirrored(volume: Tensor) -> Tensor:
    """The volume with left and right exchanged: the last axis of tensor order, reversed."""
    return volume.flip(-1)


def with_gamma(mri: Float[Tensor, "1 d h w"], gamma: float | int) -> Float[Tensor, "1 d h w"]:
    """The MRI raised to ``gamma`` on [0, 1], and back in model space. Ends stay fixed."""
    if gamma == 1:
        return mri
    return 2 * ((mri + 1) / 2).clamp(0, 1) ** gamma - 1


def with_noise(
    volume: Float[Tensor, "1 *dhw"], sigma: float | int, generator: torch.Generator
) -> Float[Tensor, "1 *dhw"]:
    """Gaussian noise of standard deviation ``sigma`` added, clipped to model space.

    The generator is one of the volume's device.
    """
    if sigma == 0:
        return volume
    noise = torch.randn(volume.shape, generator=generator, device=volume.device)
    return (volume + sigma * noise).clamp(-1, 1)
