"""Where the CT belongs on the MRI: guess the CT from the MRI, then move the real one onto it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product

import torch
from einops import rearrange
from jaxtyping import Float
from monai.networks.nets import BasicUNet
from torch import Tensor
from torch.nn import functional as F

from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.haar import haar_dwt, haar_idwt
from clinfuse.functional.warp import (
    places_in,
    refined,
    rigid_displacement,
    rigid_matrix,
    sampled,
    warp,
)
from clinfuse.networks.fusion_unet import crop, pad_to_multiple
from clinfuse.networks.lean_unet import is_sampling, laid_out
from clinfuse.networks.mapped_memory import within_memory
from clinfuse.networks.precision import with_safe_convolutions
from clinfuse.networks.windows import Windowed, part_of, with_local_norms

LARGEST_SPLINE = 2**26
"""Samples of a spline made at once: 256 MiB."""

LARGEST_SLAB = 2**22
"""Voxels of a volume that are moved, or compared, at once: up to forty numbers each."""

BLOCK = 64
"""Voxels a side of the blocks that larger volumes are moved in: their splines fit into caches."""

SPLINE_REACH = 12
"""Voxels beyond which a cubic spline through others is the same to 1e-6."""


@dataclass
class Registration:
    """The motion found, and the guess of the CT that it was found with.

    Attributes:
        motion: homogeneous matrix A with clean_ct(p) = ct(A p), in mm about the grid's centre; what
            ``FusionBatch.misregistration`` is in truth.
        guess: the CT expected from the MRI alone, in model space.
        log_scale: logarithm of the guess's expected error, voxel by voxel.
    """

    motion: Float[Tensor, "b m m"]
    guess: Float[Tensor, "b 1 *dhw"]
    log_scale: Float[Tensor, "b 1 *dhw"]


class SynthesisRegistration(Windowed):
    """Estimates the rigid motion that takes a CT back onto its MRI, by way of a synthetic CT.

    A U-Net guesses the CT from the MRI and the brain mask, with an error scale at every voxel
    (cortical bone against fat is certain, bone against air in an ADC map is not). Between the
    guess and the real CT there is but one modality, so the motion is found by weighted Gauss-Newton
    on their difference (Lucas & Kanade 1981; by way of synthesis: Roy et al. 2014), coarse to
    fine: thousands of voxels on 6 unknowns, far finer than a voxel. Nothing is learned but the
    guess, which has a target at every voxel, and the search has no gradient.

    A head is rigid, and so is the motion between its two scans; u in method.md section 3 is the
    field of this motion.

    Args:
        spatial_dims: 2 or 3.
        features: of MONAI's ``BasicUNet``, in Haar space.
        smoothing_mm: standard deviations of the smoothing, coarse to fine.
        iterations: Gauss-Newton steps at each.
        prior_mm: standard deviation of the motion before looking; a weak pull to none.
        max_mm: a motion of the brain farther than this (root mean square) is not believed, and the
            CT left where it lies: residual misregistration is millimetres, and a guess after too
            little training can lead anywhere.
        local: as of ``FusionUNet``.
    """

    def __init__(
        self,
        spatial_dims: int,
        features: Sequence[int] = (24, 24, 48, 64, 96, 24),
        smoothing_mm: Sequence[float] = (8.0, 4.0, 2.0, 1.0),
        iterations: Sequence[int] = (3, 3, 3, 4),
        prior_mm: float = 4.0,
        max_mm: float = 12.0,
        local: bool = False,
    ) -> None:
        super().__init__()
        self.smoothing_mm, self.iterations = tuple(smoothing_mm), tuple(iterations)
        self.prior_mm, self.max_mm = prior_mm, max_mm
        bands = 2**spatial_dims
        network = BasicUNet(
            spatial_dims=spatial_dims,
            in_channels=2 * bands,
            out_channels=2 * bands,
            features=tuple(features),
            norm=("group", {"num_groups": 8}),
            act="swish",
            upsample="nontrainable",
        )
        with torch.no_grad():  # air everywhere: the approximation band of a volume of -1
            network.final_conv.bias.zero_()[0] = -(bands**0.5)
        if local:
            with_local_norms(network)
        self.network = with_safe_convolutions(network)
        self.bytes_per_voxel, self.is_local = 90.0 * features[0], local

    def forward(
        self,
        mri: Float[Tensor, "b 1 *dhw"],
        ct: Float[Tensor, "b 1 *dhw"],
        brain: Float[Tensor, "b 1 *dhw"],
        spacing_mm: Float[Tensor, "b n"],
    ) -> Registration:
        """The guess, with its gradient, and the motion, without."""
        guess, log_scale = self.synthesise(mri, brain)
        with torch.no_grad(), torch.autocast(mri.device.type, enabled=False):
            motion = gauss_newton(
                ct,
                guess.clamp(-1, 1),
                log_scale.exp(),
                spacing_mm,
                self.smoothing_mm,
                self.iterations,
                self.prior_mm,
            )
            still = torch.eye(motion.shape[-1], device=motion.device).expand_as(motion)
            far = registration_error_mm(motion, still, brain, spacing_mm) > self.max_mm
            motion = torch.where(far[:, None, None], still, motion)
        return Registration(motion, guess, log_scale)

    def synthesise(
        self, mri: Float[Tensor, "b 1 *dhw"], brain: Float[Tensor, "b 1 *dhw"]
    ) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]]:
        """The CT expected from the MRI, and the logarithm of its expected error."""
        images = pad_to_multiple(torch.cat([mri, brain], 1), 32)
        grid = [size // 2 for size in images.shape[2:]]

        def bands(window: tuple[slice, ...]) -> Tensor:
            place = tuple(slice(2 * part.start, 2 * part.stop) for part in window)
            known = haar_dwt(part_of(images, place))
            guessed: Tensor = self.network(laid_out(known) if is_sampling(self, mri) else known)
            return guessed.float()

        out = haar_idwt(self.answer(bands, grid, 16, len(images)))
        guess, log_scale = crop(out, mri.shape[2:]).split(1, 1)
        if not torch.is_grad_enabled():
            guess = guess.clone()  # or both would be held for the one's sake
        return guess, (log_scale - 1.5).clamp(-4, 1)


def gauss_newton(
    moving: Float[Tensor, "b 1 *dhw"],
    fixed: Float[Tensor, "b 1 *dhw"],
    scale: Float[Tensor, "b 1 *dhw"],
    spacing_mm: Float[Tensor, "b n"],
    smoothing_mm: Sequence[float],
    iterations: Sequence[int],
    prior_mm: float,
    lever_mm: float = 60.0,
) -> Float[Tensor, "b m m"]:
    """The rigid A that minimises sum_p w_p (moving(A p) - fixed(p))^2, as a homogeneous matrix.

    w_p = 1 / (scale_p^2 + e_p^2): the expected error, made robust by the residual e_p found (the
    weights of a Cauchy likelihood), so that what one image shows and the other does not has little
    say. A weak prior pulls towards no motion.

    Args:
        moving: the CT.
        fixed: its guess.
        scale: the guess's expected error.
        spacing_mm: voxel size.
        smoothing_mm: of both images, coarse to fine; wide smoothing reaches far motions.
        iterations: steps at each smoothing.
        prior_mm: standard deviation of the motion a priori.
        lever_mm: the distance at which a rotation's displacement counts against the prior.
    """
    n = spacing_mm.shape[1]
    motion = torch.eye(n + 1, device=moving.device).repeat(len(moving), 1, 1)
    for sigma_mm, count in zip(smoothing_mm, iterations, strict=True):
        sigma = (sigma_mm / spacing_mm[0]).tolist()
        smooth = gaussian_smooth(torch.cat([fixed, moving], 1), sigma)
        level, level_mm = _halved(torch.cat([smooth, scale], 1), spacing_mm, sigma_mm)
        smooth_fixed, smooth_moving, level_scale = level.split(1, 1)
        for _ in range(count):
            moved = move(smooth_moving, motion, level_mm)
            normal, right = _normal_equations(
                moved, smooth_fixed - moved, level_scale, level_mm, lever_mm
            )
            pull = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1) / prior_mm**2 + 1e-6
            prior = pull[:, None, None] * torch.eye(normal.shape[-1], device=normal.device)
            xi = torch.linalg.solve(normal + prior, right)
            motion = motion @ rigid_matrix(xi[:, n:] / lever_mm, xi[:, :n])
    return motion


def _normal_equations(
    moved: Tensor, residual: Tensor, scale: Tensor, spacing_mm: Tensor, lever_mm: float
) -> tuple[Tensor, Tensor]:
    """Both sides of the equations of a Gauss-Newton step, summed over slabs of the first axis.

    A voxel has some thirty numbers on the way: a large volume's at once would be most of what
    fusing it takes.
    """
    sizes = moved.shape[2:]
    axes = _axes_mm(sizes, spacing_mm)
    count = min(-(-moved[0].numel() // LARGEST_SLAB), sizes[0])
    edges = [round(i * sizes[0] / count) for i in range(count + 1)]

    def slab(start: int, stop: int) -> tuple[Tensor, Tensor]:
        low, high = max(start - 1, 0), min(stop + 1, sizes[0])
        slope = gradient_per_mm(moved[:, :, low:high], spacing_mm)[:, :, start - low :]
        slope = slope[:, :, : stop - start]
        rows = [axis[:, start:stop] if i == 0 else axis for i, axis in enumerate(axes)]
        error = residual[:, 0, start:stop]
        weight = 1 / (scale[:, 0, start:stop].square() + error.square())
        columns = torch.cat([slope, _turning(_grid(rows), slope) / lever_mm], 1).flatten(2)
        weighted = columns * weight.flatten(1)[:, None]
        right = (weighted @ error.flatten(1)[..., None])[..., 0]
        return weighted @ columns.mT, right

    sums = []
    for start, stop in pairwise(edges):
        with within_memory():
            sums.append(slab(start, stop))
    normals, rights = zip(*sums, strict=True)
    return sum(normals[1:], normals[0]), sum(rights[1:], rights[0])


def move(
    volume: Float[Tensor, "b c *dhw"],
    motion: Float[Tensor, "b m m"],
    spacing_mm: Float[Tensor, "b n"],
    refine: int = 1,
) -> Float[Tensor, "b c *dhw"]:
    """The volume seen through a rigid motion A in mm: out(p) = volume(A p), in full precision.

    ``refine`` as in ``functional.warp.warp``. A volume of more than ``LARGEST_SLAB`` voxels, or
    whose spline would have more than ``LARGEST_SPLINE`` samples, is moved block by block.
    """
    with torch.autocast(volume.device.type, enabled=False):
        volume = volume.float()
        samples = volume.numel() * refine ** (volume.ndim - 2)
        if volume.numel() <= LARGEST_SLAB and samples <= LARGEST_SPLINE:
            displacement = rigid_displacement(motion, tuple(volume.shape[2:]), spacing_mm)
            return warp(volume, displacement, spacing_mm, refine=refine)
        moved = torch.empty_like(volume)
        corners = product(*(range(0, size, BLOCK) for size in volume.shape[2:]))
        for corner in corners:
            ends = zip(corner, volume.shape[2:], strict=True)
            block = tuple(slice(start, min(start + BLOCK, size)) for start, size in ends)
            with within_memory():
                part = _moved_block(volume, motion, spacing_mm, refine, block)
            part_of(moved, block).copy_(part)
        return moved


def _moved_block(
    volume: Tensor, motion: Tensor, spacing_mm: Tensor, refine: int, block: tuple[slice, ...]
) -> Tensor:
    """A block of what ``move`` returns, from as much of the volume as it needs.

    The spline is made of a wider part along each axis in turn, for what it knows of a voxel falls
    by 3.7 with every voxel of distance.
    """
    n, sizes = len(block), volume.shape[2:]
    starts, shape = [axis.start for axis in block], [axis.stop - axis.start for axis in block]
    centre = [axis.start + axis.stop - size for axis, size in zip(block, sizes, strict=True)]
    offset_mm = torch.tensor(centre).to(motion) / 2 * spacing_mm
    of_block = motion.clone()
    turned = (motion[:, :n, :n] - torch.eye(n).to(motion)) @ offset_mm[..., None]
    of_block[:, :n, n:] += turned
    displacement = rigid_displacement(of_block, shape, spacing_mm)
    ends_mm = spacing_mm * (torch.tensor(shape).to(motion) - 1)  # of an affine map, corners say all
    corners = rigid_displacement(of_block, [2] * n, ends_mm).movedim(1, -1)
    ends = torch.cartesian_prod(*(torch.tensor([axis.start, axis.stop - 1]) for axis in block))
    places = corners.flatten(1, -2) / spacing_mm[:, None] + ends.to(motion)
    lows = places.amin((0, 1)).floor().int().tolist()
    highs = places.amax((0, 1)).ceil().int().tolist()
    seen, wide = [], []
    for low, high, size in zip(lows, highs, sizes, strict=True):
        low, high = (min(max(end, 0), size - 1) for end in (low, high))
        seen.append(slice(low, high + 1))
        wide.append(slice(max(low - SPLINE_REACH, 0), min(high + 1 + SPLINE_REACH, size)))
    part = part_of(volume, wide if refine > 1 else seen)
    if refine > 1:
        for axis, (near, far) in enumerate(zip(seen, wide, strict=True)):
            finer = refined(part, refine, [axis])
            start, length = near.start - far.start, near.stop - near.start
            part = finer.narrow(axis + 2, refine * start, refine * (length - 1) + 1)
    first = [start - near.start for start, near in zip(starts, seen, strict=True)]
    lengths = [near.stop - near.start for near in seen]
    return sampled(part, places_in(lengths, displacement, spacing_mm, first))


def gradient_per_mm(
    volume: Float[Tensor, "b 1 *dhw"], spacing_mm: Float[Tensor, "b n"]
) -> Float[Tensor, "b n *dhw"]:
    """Central differences along each spatial axis, in units a mm."""
    axes = tuple(range(1, volume.ndim - 1))
    slopes = torch.stack(torch.gradient(volume[:, 0], dim=axes), 1)
    return slopes / rearrange(spacing_mm, f"b n -> b n {'1 ' * len(axes)}")


def registration_error_mm(
    motion: Float[Tensor, "b m m"],
    true: Float[Tensor, "b m m"],
    inside: Float[Tensor, "b 1 *dhw"],
    spacing_mm: Float[Tensor, "b n"],
) -> Float[Tensor, " b"]:
    """Root mean square distance between two rigid motions over the voxels ``inside``, in mm.

    The target registration error (Fitzpatrick & West 2001) with the region as its targets.
    """
    n = spacing_mm.shape[1]
    with torch.autocast(motion.device.type, enabled=False):
        apart = motion - true
        linear, offset = apart[:, :n, :n], apart[:, :n, n]
        voxels, first, second = _moments(inside[:, 0], spacing_mm)
        square = (linear @ second * linear).sum((1, 2))
        square = square + 2 * (offset * (linear @ first[..., None])[..., 0]).sum(1)
        square = square + voxels * offset.square().sum(1)
        return (square.clamp(min=0) / voxels.clamp(min=1)).sqrt()


def _moments(inside: Tensor, spacing_mm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of voxels ``b d h w`` inside: how many, and the sums of p (b n) and p p^T (b n n), in mm."""
    n = inside.ndim - 1
    axes = _axes_mm(inside.shape[1:], spacing_mm)

    def left(*kept: int) -> Tensor:
        away = tuple(axis + 1 for axis in range(n) if axis not in kept)
        return inside.sum(away) if away else inside

    first = torch.stack([(left(i) * axes[i]).sum(1) for i in range(n)], 1)
    second = torch.diag_embed(
        torch.stack([(left(i) * axes[i].square()).sum(1) for i in range(n)], 1)
    )
    for i, j in combinations(range(n), 2):
        mixed = torch.einsum("bi,bij,bj->b", axes[i], left(i, j), axes[j])
        second[:, i, j] = second[:, j, i] = mixed
    return left(), first, second


def _halved(volumes: Tensor, spacing_mm: Tensor, sigma_mm: float) -> tuple[Tensor, Tensor]:
    """Volumes at half the resolution along the axes whose voxels are fine beside the smoothing.

    An axis of odd size stays, so that the grid keeps its centre.
    """
    sizes = zip(volumes.shape[2:], spacing_mm[0].tolist(), strict=True)
    factors = [2 if n % 2 == 0 and 2 * size <= sigma_mm else 1 for n, size in sizes]
    pool = F.avg_pool3d if volumes.ndim == 5 else F.avg_pool2d
    return pool(volumes, factors), spacing_mm * torch.tensor(factors, device=spacing_mm.device)


def _axes_mm(shape: Sequence[int], spacing_mm: Float[Tensor, "b n"]) -> list[Tensor]:
    """Where the voxels of each axis lie in each case, from the grid's centre: ``b size``."""
    sizes = zip(shape, spacing_mm.unbind(1), strict=True)
    return [
        (torch.arange(size, device=mm.device) - (size - 1) / 2) * mm[:, None] for size, mm in sizes
    ]


def _grid(axes: Sequence[Tensor]) -> Tensor:
    """Positions ``b n *dhw`` on a grid of such axes."""
    grids = [torch.meshgrid(*of_case, indexing="ij") for of_case in zip(*axes, strict=True)]
    return torch.stack([torch.stack(grid) for grid in grids])


def _turning(positions: Tensor, slope: Tensor) -> Tensor:
    """Slope with respect to a rotation about the centre, p x g: 3 components in 3-D, 1 in 2-D."""
    pairs = ((1, 2), (2, 0), (0, 1)) if positions.shape[1] == 3 else ((0, 1),)
    # several times as fast as torch.linalg.cross
    return torch.stack(
        [positions[:, i] * slope[:, j] - positions[:, j] * slope[:, i] for i, j in pairs], 1
    )
