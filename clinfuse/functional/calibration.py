"""Does a stated uncertainty hold? Calibration scores of intensities and of probabilities.

Every score is of one case and over the voxels of a mask; NaN where the mask is empty. ``std`` is
the stated standard deviation of ``error`` = prediction - truth, voxel by voxel, in one unit.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from scipy.optimize import isotonic_regression
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from clinfuse.functional.regional import regional_mean

BINS = 15
"""Bins of every binned score (Guo et al. 2017; Laves et al. 2020)."""

LEAST = 1e-4
"""The smallest error that a curve states, in model space: where none was found one may yet come."""


def total_variance(
    draws: Float[Tensor, "m k b 1 *dhw"],
) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]]:
    """Predictive mean, epistemic and aleatoric variance of M model draws with K noise draws each.

    The law of total variance (method.md section 5; Depeweg et al. 2018): epistemic is the variance
    over models of their means, Var_m E_k, aleatoric the mean of their variances, E_m Var_k. The
    means of K independent noise draws vary by aleatoric / K more; ``diffusion.ensemble``'s are
    matched in their moments and do not. One model has no epistemic part, one noise draw no
    aleatoric one.
    """
    models, members = draws.shape[:2]
    of_models = draws.mean(1)
    nothing = torch.zeros_like(of_models[0])
    aleatoric = draws.var(1).mean(0) if members > 1 else nothing
    epistemic = of_models.var(0) if models > 1 else nothing
    return of_models.mean(0), epistemic, aleatoric


def coverage(
    truth: Float[Tensor, "b 1 *dhw"],
    low: Float[Tensor, "b 1 *dhw"],
    high: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Share of the mask's voxels whose truth lies in [low, high], bounds included."""
    return regional_mean(((low <= truth) & (truth <= high)).to(truth.dtype), mask)


def ence(
    std: Float[Tensor, "b 1 *dhw"],
    error: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    bins: int = BINS,
) -> Float[Tensor, " b"]:
    """Expected normalised calibration error: mean over bins of |RMV - RMSE| / RMV.

    Levi et al. (2022), Eq. 8. Bins hold equally many voxels, in order of ``std``; RMV is a bin's
    root mean variance. 0 where the stated size of errors is their size at every level of it.
    """

    def score(s: Tensor, e: Tensor) -> Tensor:
        order = s.argsort()
        parts = zip(s[order].tensor_split(bins), e[order].tensor_split(bins), strict=True)
        return torch.stack([_relative_gap(a, b) for a, b in parts if len(a)]).mean()

    return _by_case(score, mask, std, error)


def uce(
    std: Float[Tensor, "b 1 *dhw"],
    error: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    bins: int = BINS,
) -> Float[Tensor, " b"]:
    """Uncertainty calibration error: sum over bins of share * |mean error^2 - mean variance|.

    Laves et al. (2020), Eq. 11, in squared units. Bins are equally wide, from the smallest to the
    largest variance of the case.
    """

    def score(s: Tensor, e: Tensor) -> Tensor:
        variance, square = s.square(), e.square()
        low, high = variance.min(), variance.max()
        where = ((variance - low) / (high - low).clamp(min=1e-30) * bins).long().clamp(max=bins - 1)
        gap = variance.new_zeros(bins).index_add(0, where, square - variance)
        return gap.abs().sum() / len(s)

    return _by_case(score, mask, std, error)


def ause(
    uncertainty: Float[Tensor, "b 1 *dhw"],
    error: Float[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    fractions: int = 100,
) -> Float[Tensor, " b"]:
    """Area between the sparsification curves of the uncertainty and of the error itself.

    Ilg et al. (2018), Sec. 4.2. A curve is the mean |error| of what is left when the most uncertain
    voxels are taken away, relative to that of all; the best order is that of the error. 0 is
    that order; the curve of an uninformative one stays near 1. Voxels of equal uncertainty each
    count as their mean: the order they are stored in is from the neck up, and knows of errors.
    """

    def score(u: Tensor, e: Tensor) -> Tensor:
        size = e.abs()
        if size.sum() == 0:
            return e.new_tensor(math.nan)
        kept = [max(len(size) - len(size) * f // fractions, 1) for f in range(fractions)]

        def curve(ordered: Tensor) -> Tensor:
            total = ordered.double().cumsum(0)
            return torch.stack([total[k - 1] / k for k in kept]) / size.double().mean()

        _, rank, equal = u.unique(return_inverse=True, return_counts=True)
        together = size.new_zeros(len(equal), dtype=torch.double).index_add(0, rank, size.double())
        by_uncertainty = (together / equal).repeat_interleave(equal)
        gap = curve(by_uncertainty) - curve(size.sort().values)
        return gap.mean().to(e.dtype)

    return _by_case(score, mask, uncertainty, error)


def brier(
    probability: Float[Tensor, "b 1 *dhw"],
    target: Bool[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
) -> Float[Tensor, " b"]:
    """Mean squared difference between a probability and what came (Brier 1950), two classes."""
    return regional_mean((probability - target.to(probability)).square(), mask)


def expected_calibration_error(
    probability: Float[Tensor, "b 1 *dhw"],
    target: Bool[Tensor, "b 1 *dhw"],
    mask: Bool[Tensor, "b 1 *dhw"],
    bins: int = BINS,
) -> Float[Tensor, " b"]:
    """Share-weighted gap between the probability of lesion and its frequency: torchmetrics' own.

    Guo et al. (2017), Eq. 3, over equally wide bins of the probability of lesion itself, not of the
    likelier class: where 0.3 is said, 30 % of the voxels should be lesion. Where lesions are rare
    nearly all voxels lie in the lowest bin, and a head that never says lesion scores their share,
    which is small: read it beside ``brier`` and a score of the segmentation.
    """

    def score(p: Tensor, t: Tensor) -> Tensor:
        # Its checks of whole numbers sort them, and take longer than the score.
        return binary_calibration_error(p, t.long(), bins, validate_args=False)

    return _by_case(score, mask, probability, target)


def conformal_quantile(scores: Float[Tensor, " n"], level: float) -> float:
    """The ceil((n + 1) level)-th smallest score: split conformal prediction.

    Vovk et al. (2005); Lei et al. (2018), Alg. 2. A new score exchangeable with these is no larger
    with probability ``level`` at least. Infinite where n is too small to say so.

    Raises:
        ValueError: if ``level`` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}")
    rank = math.ceil((len(scores) + 1) * level)
    return math.inf if rank > len(scores) else float(scores.kthvalue(rank).values)


def error_curve(
    cases: Sequence[Float[Tensor, "2 _"]], bins: int, fewest: int = 30
) -> Float[Tensor, "2 n"]:
    """Knots of the curve from the stated to the found size of errors; neither ever falls.

    Bins of a case hold equally many of its voxels, in order of the stated standard deviation, as
    those of ``ence`` do. A knot is the median over cases of a bin's root mean variance, and that
    times the median of found / stated, so that one patient that went wrong does not rule. Isotonic
    regression (Barlow et al. 1972) levels where more is stated and less found. Bins that state
    the same but for a hundredth are one.

    Args:
        cases: error and stated standard deviation of each case's voxels.
        bins: at most as many knots.
        fewest: voxels that a bin needs; cases too small for it are heard only if all are, as one.
    """
    heard = [case for case in cases if case.shape[1] >= bins * fewest] or [torch.cat([*cases], 1)]
    bins = min(bins, heard[0].shape[1])
    squares = torch.stack([_binned_squares(case.double(), bins) for case in heard], 1)
    variance = squares[1].quantile(0.5, 0)
    found = variance * (squares[0] / squares[1]).quantile(0.5, 0)
    apart = [k for k in range(1, bins) if variance[k] > 1.02 * variance[k - 1]]
    variance, found = (
        torch.stack([part.mean() for part in column.tensor_split(apart)])
        for column in (variance, found)
    )
    level = torch.from_numpy(isotonic_regression(found.numpy()).x)
    return torch.stack([variance, level.clamp(min=LEAST**2)]).sqrt()


def on_curve(
    stated: Float[Tensor, "*shape"], curve: Float[Tensor, "2 n"]
) -> Float[Tensor, "*shape"]:
    """What the knots make of a stated standard deviation; beyond the ends in the ratio found there.

    Linear between knots. One knot is a factor.
    """
    x, y = curve
    slope = torch.cat([(y / x)[:1], y.diff() / x.diff(), (y / x)[-1:]])
    x_0, y_0 = torch.nn.functional.pad(curve, (1, 0))
    segment = torch.bucketize(stated, x)
    return y_0[segment] + slope[segment] * (stated - x_0[segment])


def with_temperature(
    probability: Float[Tensor, "*shape"], temperature: float
) -> Float[Tensor, "*shape"]:
    """sigmoid(logit / temperature) of a probability (Guo et al. 2017); above 1 it is less sure."""
    return torch.sigmoid(torch.logit(probability, eps=1e-6) / temperature)


def _binned_squares(case: Tensor, bins: int) -> Tensor:
    """Mean square of error and of standard deviation in each bin."""
    squares = case[:, case[1].argsort(stable=True)].square()
    return torch.stack([part.mean(1) for part in squares.tensor_split(bins, 1)], 1)


def _relative_gap(std: Tensor, error: Tensor) -> Tensor:
    stated, found = (part.square().mean().sqrt() for part in (std, error))
    return (stated - found).abs() / stated.clamp(min=1e-30)


def _by_case(score: Callable[..., Tensor], mask: Tensor, *volumes: Tensor) -> Tensor:
    """The score of the mask's voxels of each case; NaN for a case without any."""
    undefined = volumes[0].new_tensor(math.nan)
    cases = zip(mask, *volumes, strict=True)
    return torch.stack(
        [
            score(*(volume[inside] for volume in of_case)) if inside.any() else undefined
            for inside, *of_case in cases
        ]
    )
