"""Calibration fitted on validation cases and applied to others (method, section 5)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from clinfuse.functional.calibration import (
    conformal_quantile,
    error_curve,
    on_curve,
    with_temperature,
)

REGIONS = ("brain", "bone", "tissue", "air")
"""Where calibration differs: errors are not of one kind. What is neither brain nor bone is air
where the fused image is as dark as air, else tissue: scalp, muscle, orbits."""

AIR = -0.95
"""Values of model space up to this are air."""

FLOOR = 0.005
"""Spread below which no voxel is believed, in model space: air has none, and errors after all."""

VOXELS = 20_000
"""Voxels of a case and region that calibration is fitted on, so that all cases count alike."""

KNOTS = 8
"""Of the curve of a region, at most; chosen by leaving validation cases out."""

FOLDS = 10
"""Parts that the cases are dealt into, each scored by the curve of the others."""

_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Calibration:
    """What validation cases say of a method's uncertainty.

    Attributes:
        level: share of voxels that an interval should cover.
        curve: by region, from the spread (``FLOOR`` included) to the size of the errors found where
            it was stated: two rows of knots, as ``functional.calibration.error_curve``.
        quantile: conformal half-width of the interval by region, in units of the calibrated
            standard deviation: 1.64 at a level of 0.9 if errors are normal.
        temperature: of the lesion probability; None where no head predicted any, or no case has
            lesion to judge it by.
        case_ids: what it was fitted on.
        misregistration_mm: at which.
    """

    level: float
    curve: Mapping[str, Sequence[Sequence[float]]]
    quantile: Mapping[str, float]
    temperature: float | None
    case_ids: Sequence[str]
    misregistration_mm: float

    def std(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        spread: Float[Tensor, "b 1 *dhw"],
        roi: Bool[Tensor, "b r *dhw"],
    ) -> Float[Tensor, "b 1 *dhw"]:
        """The calibrated standard deviation of the predictive mean's error; as ``interval``."""
        return self._std(spread, region_map(roi, fused))

    def interval(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        spread: Float[Tensor, "b 1 *dhw"],
        roi: Bool[Tensor, "b r *dhw"],
    ) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]]:
        """Low and high of the ``level`` interval, within model space.

        Args:
            fused: predictive mean.
            spread: ensemble standard deviation.
            roi: masks as the method places them; with ``fused`` they decide the region.
        """
        return self.std_and_interval(fused, spread, roi)[1:]

    def std_and_interval(
        self,
        fused: Float[Tensor, "b 1 *dhw"],
        spread: Float[Tensor, "b 1 *dhw"],
        roi: Bool[Tensor, "b r *dhw"],
    ) -> tuple[Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"], Float[Tensor, "b 1 *dhw"]]:
        """``std``, and both bounds of ``interval``."""
        region = region_map(roi, fused)
        std = self._std(spread, region)
        half = std * fused.new_tensor([self.quantile[name] for name in REGIONS])[region]
        return std, (fused - half).clamp(-1, 1), (fused + half).clamp(-1, 1)

    def _std(self, spread: Tensor, region: Tensor) -> Tensor:
        stated = spread + FLOOR
        std = torch.empty_like(stated)
        for index, name in enumerate(REGIONS):
            here = region == index
            std[here] = on_curve(stated[here], stated.new_tensor(self.curve[name]))
        return std

    def probability(self, probability: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """The calibrated lesion probability."""
        if self.temperature is None:
            return probability
        return with_temperature(probability, self.temperature)


class CalibrationSample:
    """Collects errors and spreads case by case, then fits a ``Calibration``.

    Args:
        level: of the intervals.
    """

    def __init__(self, level: float = 0.9) -> None:
        self.level = level
        self.case_ids: list[str] = []
        self._found: dict[str, list[Tensor]] = {region: [] for region in REGIONS}
        self._lesions: list[tuple[Tensor, Tensor]] = []

    def update(
        self,
        case_id: str,
        fused: Float[Tensor, "1 *dhw"],
        reference: Float[Tensor, "1 *dhw"],
        spread: Float[Tensor, "1 *dhw"],
        roi: Bool[Tensor, "r *dhw"],
    ) -> None:
        """Take in one case: predictive mean, what it should be, spread, and masks as placed."""
        self.case_ids.append(case_id)
        region = region_map(roi[None], fused[None])[0].cpu()
        pair = torch.stack([fused - reference, spread + FLOOR]).float().cpu()
        for index, name in enumerate(REGIONS):
            if (region == index).any():
                self._found[name].append(_thinned(pair[:, region == index]))

    def update_lesion(
        self,
        probability: Float[Tensor, "1 *dhw"],
        lesion: Bool[Tensor, "1 *dhw"],
        inside: Bool[Tensor, "1 *dhw"],
    ) -> None:
        """Take in one case's lesion probability, judged within ``inside``: the brain."""
        self._lesions.append((probability[inside].float().cpu(), lesion[inside].cpu()))

    def fit(self, misregistration_mm: float) -> Calibration:
        """The calibration of what was collected.

        A curve is fitted on all cases. The conformal scores |error| / std of a case are by a curve
        that has not seen it, where there are two (cross-conformal prediction, Vovk 2015): by its
        own, errors would look too small. Voxels of a patient are not exchangeable with those of
        another: the finite-sample guarantee of ``conformal_quantile`` is of the average voxel of
        patients like these, and no promise for each.

        Raises:
            ValueError: if no case was.
        """
        if not self.case_ids:
            raise ValueError("expected validation cases to calibrate on, got none")
        everywhere = [part for parts in self._found.values() for part in parts]
        curve, quantile = {}, {}
        for region, parts in self._found.items():
            here = parts or everywhere  # a region that no case has
            curve[region] = error_curve(here, KNOTS).tolist()
            quantile[region] = conformal_quantile(_scores(here), self.level)
        return Calibration(
            level=self.level,
            curve=curve,
            quantile=quantile,
            temperature=self._temperature(),
            case_ids=list(self.case_ids),
            misregistration_mm=misregistration_mm,
        )

    def _temperature(self) -> float | None:
        """The temperature of least log loss (Guo et al. 2017, Sec. 4.2).

        Without a voxel of lesion, or of anything else, the least loss is at no doubt whatever.
        """
        if not self._lesions:
            return None
        probability, lesion = (torch.cat(part) for part in zip(*self._lesions, strict=True))
        if not lesion.any() or lesion.all():
            return None
        logits = torch.logit(probability.double(), eps=1e-6)

        def loss(log_temperature: float) -> float:
            scaled = logits / math.exp(log_temperature)
            return float(
                torch.nn.functional.binary_cross_entropy_with_logits(scaled, lesion.double())
            )

        bounds = [math.log(t) for t in _TEMPERATURES]
        return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


class Reliability:
    """Errors found where errors of a size were stated, streaming over cases.

    Bins of the stated standard deviation are evenly spaced in its logarithm, from ``FLOOR`` to 1.

    Args:
        bins: how many.
        fewest: voxels that a bin needs to be shown.
    """

    def __init__(self, bins: int = 16, fewest: int = 200) -> None:
        self.edges = torch.logspace(math.log10(FLOOR), 0, bins + 1, dtype=torch.float64)[1:-1]
        self.fewest = fewest
        self.sums = torch.zeros(3, bins, dtype=torch.float64)

    def update(
        self,
        std: Float[Tensor, "b 1 *dhw"],
        error: Float[Tensor, "b 1 *dhw"],
        mask: Bool[Tensor, "b 1 *dhw"],
    ) -> None:
        """Take in the mask's voxels."""
        stated, found = (volume[mask].double().cpu() for volume in (std, error))
        where = torch.bucketize(stated, self.edges)
        columns = torch.stack([torch.ones_like(stated), stated.square(), found.square()])
        self.sums.index_add_(1, where, columns)

    def points(self) -> Float[Tensor, "n 2"]:
        """Root mean square stated and found of each bin with voxels enough."""
        enough = self.sums[0] >= self.fewest
        count, stated, found = self.sums[:, enough]
        return torch.stack([stated / count, found / count], 1).sqrt()


def region_map(
    roi: Bool[Tensor, "b r *dhw"], fused: Float[Tensor, "b 1 *dhw"]
) -> Int[Tensor, "b 1 *dhw"]:
    """Index into ``REGIONS`` at every voxel; brain before bone where masks overlap."""
    outside = torch.where(fused > AIR, REGIONS.index("tissue"), REGIONS.index("air"))
    return torch.where(roi[:, 0:1], 0, torch.where(roi[:, 1:2], 1, outside))


def _scores(cases: Sequence[Tensor]) -> Tensor:
    """|error| / std of all voxels, each case's by the curve of others."""
    folds = min(len(cases), FOLDS)
    scores = []
    for fold in range(folds):
        others = [case for index, case in enumerate(cases) if index % folds != fold]
        curve = error_curve(others or cases, KNOTS).float()
        scores += [error.abs() / on_curve(std, curve) for error, std in cases[fold::folds]]
    return torch.cat(scores)


def _thinned(columns: Tensor) -> Tensor:
    """At most ``VOXELS`` columns, evenly spaced."""
    if columns.shape[1] <= VOXELS:
        return columns
    return columns[:, torch.linspace(0, columns.shape[1] - 1, VOXELS).long()]
