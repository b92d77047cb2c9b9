"""Structural similarity with local Gaussian windows, over the whole image or a region."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.cores import on_every_core
from clinfuse.functional.gaussian import gaussian_smooth, is_one_voxel, window_matrix
from clinfuse.functional.regional import bounding_box, regional_mean
from clinfuse.functional.spacing import SpacingMm, shared_spacing

LEAST_SHARE = 1e-4
"""Of a window that voxels of the mask make up at least, so that no division is by nothing."""

BAND = 64
"""Rows of a window's matrix that are multiplied at a time."""

VOXELS_A_PART = 1 << 16
"""That a core smooths at a time: five numbers for each stay in its cache."""


def ssim_map(
    a: Float[Tensor, "b 1 *dhw"],
    b: Float[Tensor, "b 1 *dhw"],
    sigma: Sequence[float | int],
    data_range: float = 2.0,
    mask: Bool[Tensor, "b 1 *dhw"] | None = None,
) -> Float[Tensor, "b 1 *dhw"]:
    """Local structural similarity around each voxel, in [-1, 1]; never clamped.

    Wang et al. (2004), Eq. 13 with K1 = 0.01, K2 = 0.03 and population covariances, as
    ``skimage.metrics.structural_similarity(gaussian_weights=True, use_sample_covariance=False)``.
    Symmetric and differentiable in both images.

    Args:
        a: one image.
        b: the other.
        sigma: standard deviations of the window in voxels, one a spatial axis; below 0.2 the
            window is one voxel wide along that axis.
        data_range: width of the range of values, 2 in model space.
        mask: voxels that windows may see, by normalised convolution (Knutsson & Westin 1993);
            None for all. Values at voxels outside it mean nothing.
    """
    moments = torch.cat((a, b, a * a + b * b, a * b), dim=1)
    if mask is None:
        means = gaussian_smooth(moments, sigma)
    else:
        seen = mask.to(moments.dtype)
        share = gaussian_smooth(seen, sigma).clamp(min=LEAST_SHARE)
        means = gaussian_smooth(moments * seen, sigma) / share
    return _similarity(means.split(1, dim=1), data_range)


def ssim(
    a: Float[Tensor, "b 1 *dhw"],
    b: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    sigma_mm: float = 3.0,
    data_range: float = 2.0,
) -> Float[Tensor, " b"]:
    """Mean of the local similarity at the mask's voxels; NaN where the mask is empty.

    The SSIM(., . | M) of Eq. 2. Windows see the mask's voxels alone: with ordinary windows the
    brain's score near the skull would fall with every voxel of bone that fusion is meant to add,
    and rise when bone is moved away.

    Without a gradient on a CPU, only the box around the mask is looked at, a part that fits in a
    core's cache at a time.

    Args:
        a: one image.
        b: the other.
        mask: voxels to average over.
        spacing_mm: voxel size, the same for all cases.
        sigma_mm: standard deviation of the window, in mm in every direction.
        data_range: width of the range of values, 2 in model space.
    """
    sigma = sigma_voxels(spacing_mm, sigma_mm)
    has_gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.device.type == "cpu" and not has_gradient:
        cases = zip(a[:, 0], b[:, 0], mask[:, 0], strict=True)
        means = [_mean_in_box(*case, sigma, data_range) for case in cases]
        return torch.stack(means).to(a.dtype)
    return regional_mean(ssim_map(a, b, sigma, data_range, mask), mask)


def sigma_voxels(spacing_mm: SpacingMm, sigma_mm: float) -> tuple[float, ...]:
    """A window's standard deviation in voxels along each axis.

    Raises:
        ValueError: if the cases of a batch have different spacings.
    """
    return tuple(sigma_mm / size for size in shared_spacing(spacing_mm))


def _mean_in_box(
    a: Tensor, b: Tensor, mask: Tensor, sigma: Sequence[float], data_range: float
) -> Tensor:
    """``ssim`` of one case without its channel, in two passes over the box around the mask.

    What lies outside the box is nothing to a window, so the box's part of a window's matrix does.
    """
    if a.ndim == 2:
        return _mean_in_box(a[None], b[None], mask[None], (0.0, *sigma), data_range)
    if not mask.any():
        return a.new_tensor(torch.nan)
    is_full, box = bool(mask.all()), bounding_box(mask)  # a window then sees nothing but the mask
    windows = [
        None
        if is_one_voxel(size, width)
        else torch.from_numpy(window_matrix(size, float(width))[side, side]).to(a.dtype)
        for size, width, side in zip(a.shape, sigma, box, strict=True)
    ]
    a, b, mask = a[box], b[box], mask[box]
    depth, height, width = mask.shape
    means = a.new_empty(depth, 4 if is_full else 5, height, width)

    def across(rows: slice) -> None:
        """Moments of some rows of all slices, smoothed along both axes they have all of."""
        x, y, seen = a[:, rows], b[:, rows], mask[:, rows].to(a.dtype)
        moments = torch.stack([x, y, x * x + y * y, x * y, seen][: means.shape[1]])
        if not is_full:
            moments[:4] *= seen
        if windows[0] is not None:
            moments = _smoothed(moments.flatten(2), windows[0]).view_as(moments)
        if windows[2] is not None:
            lines = moments.flatten(0, 2)
            parts = [lines[:, near] @ band.T for near, band in _bands(windows[2])]
            moments = torch.cat(parts, 1).view_as(moments)
        means[:, :, rows] = moments.transpose(0, 1)

    def along(slices: slice) -> Tensor:
        """The sum of similarities over the mask in some slices, once smoothed along their rows."""
        moments = means[slices]
        if windows[1] is not None:
            moments = _smoothed(moments.flatten(0, 1), windows[1]).view_as(moments)
        if not is_full:
            moments = moments[:, :4] / moments[:, 4:].clamp(min=LEAST_SHARE)
        similarity = _similarity(moments.unbind(1), data_range)
        return torch.where(mask[slices], similarity, 0).sum(dtype=torch.double)

    on_every_core(across, _parts(height, depth * width))
    return torch.stack(on_every_core(along, _parts(depth, height * width))).sum() / mask.sum()


def _smoothed(pictures: Tensor, window: Tensor) -> Tensor:
    """The window's matrix times each picture."""
    return torch.cat(
        [band.expand(len(pictures), -1, -1) @ pictures[:, near] for near, band in _bands(window)], 1
    )


def _bands(window: Tensor) -> list[tuple[slice, Tensor]]:
    """A matrix some rows at a time, without the columns far off its diagonal where they are 0."""
    bands = []
    for band in window.split(BAND):
        seen = band.any(0).nonzero()
        near = slice(int(seen[0]), int(seen[-1]) + 1)
        bands.append((near, band[:, near]))
    return bands


def _parts(size: int, voxels: int) -> list[slice]:
    """An axis in parts, of which a place has so many voxels."""
    step = max(1, VOXELS_A_PART // voxels)
    return [slice(start, start + step) for start in range(0, size, step)]


def _similarity(means: Sequence[Tensor], data_range: float) -> Tensor:
    """From the means of a, b, a^2 + b^2 and a b in a window."""
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b, mean_squares, mean_product = means
    squared_means, product = mean_a**2 + mean_b**2, mean_a * mean_b
    luminance = (2 * product + c_1) / (squared_means + c_1)
    contrast_structure = (2 * (mean_product - product) + c_2) / (mean_squares - squared_means + c_2)
    return luminance * contrast_structure
