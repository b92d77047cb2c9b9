"""Structural similarity with local Gaussian windows, over the whole image or a region."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional import ssim_cpu
from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.regional import bounding_box, regional_mean
from clinfuse.functional.spacing import SpacingMm, shared_spacing
from clinfuse.functional.ssim_cpu import LEAST_SHARE


def ssim_map(
    a: Float[Tensor, "b 1 *dhw"],
    b: Float[Tensor, "b 1 *dhw"],
    sigma: Sequence[float | int],
    data_range: float = 2.0,
    mask: Bool[Tensor, "b 1 *dhw"] | Float[Tensor, "b 1 *dhw"] | None = None,
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
        mask: voxels that windows may see, or how far, from 0 to 1, by normalised convolution
            (Knutsson & Westin 1993); None for all. Values at voxels outside it mean nothing.
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
    mask: Bool[Tensor, "b 1 *dhw"] | Float[Tensor, "b 1 *dhw"],
    spacing_mm: SpacingMm,
    sigma_mm: float = 3.0,
    data_range: float = 2.0,
    black: float = 0.0,
) -> Float[Tensor, " b"]:
    """Mean of the local similarity at the mask's voxels; NaN where the mask is empty.

    The SSIM(., . | M) of Eq. 2. Windows see the mask's voxels alone: with ordinary windows the
    brain's score near the skull would fall with every voxel of bone that fusion is meant to add,
    and rise when bone is moved away.

    Without a gradient on a CPU, a compiled loop looks at the box around a mask of booleans alone.

    Args:
        a: one image.
        b: the other.
        mask: voxels to average over, or the share of each, by which it is seen and counts.
        spacing_mm: voxel size, the same for all cases.
        sigma_mm: standard deviation of the window, in mm in every direction.
        data_range: width of the range of values, 2 in model space.
        black: the value whose luminance is 0.
    """
    sigma = sigma_voxels(spacing_mm, sigma_mm)
    has_gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if a.device.type == "cpu" and mask.dtype == torch.bool and not has_gradient:
        cases = zip(a[:, 0], b[:, 0], mask[:, 0], strict=True)
        means = [_mean_in_box(*case, sigma, data_range, black) for case in cases]
        return torch.tensor(means, dtype=a.dtype)
    return regional_mean(ssim_map(a - black, b - black, sigma, data_range, mask), mask)


def sigma_voxels(spacing_mm: SpacingMm, sigma_mm: float) -> tuple[float, ...]:
    """A window's standard deviation in voxels along each axis.

    Raises:
        ValueError: if the cases of a batch have different spacings.
    """
    return tuple(sigma_mm / size for size in shared_spacing(spacing_mm))


def _mean_in_box(
    a: Tensor, b: Tensor, mask: Tensor, sigma: Sequence[float], data_range: float, black: float
) -> float:
    """``ssim`` of one case without its channel."""
    if a.ndim == 2:
        a, b, mask, sigma = a[None], b[None], mask[None], (0.0, *sigma)
    if not mask.numpy().any():
        return float("nan")
    precision = torch.promote_types(a.dtype, torch.float32)
    x, y = (image.detach().to(precision).numpy() for image in (a, b))
    numbers = (*_constants(data_range), black)
    return ssim_cpu.mean_similarity(x, y, mask.numpy(), bounding_box(mask), sigma, numbers)


def _similarity(means: Sequence[Tensor], data_range: float) -> Tensor:
    """From the means of a, b, a^2 + b^2 and a b in a window."""
    c_1, c_2 = _constants(data_range)
    mean_a, mean_b, mean_squares, mean_product = means
    squared_means, product = mean_a**2 + mean_b**2, mean_a * mean_b
    luminance = (2 * product + c_1) / (squared_means + c_1)
    contrast_structure = (2 * (mean_product - product) + c_2) / (mean_squares - squared_means + c_2)
    return luminance * contrast_structure


def _constants(data_range: float) -> tuple[float, float]:
    """C1 and C2: of luminance, and of contrast and structure."""
    return (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
