"""What a method states of its own errors against the errors, region by region."""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.cores import on_every_core
from clinfuse.functional.ranked_errors import correlation, least_curve, ranked
from clinfuse.metrics.calibration import Calibration

STATED = ("spread_error_correlation", "ause", "ause_constant", "ause_random", "uce_raw", "ence_raw")
CALIBRATED = ("spread_error_correlation_calibrated", "uce", "ence", "coverage", "width")

VOXELS_A_PART = 1 << 17
"""That a core calibrates at a time."""


def spread_scores(
    fused: Float[Tensor, "b 1 *dhw"],
    spread: Float[Tensor, "b 1 *dhw"],
    reference: Float[Tensor, "b 1 *dhw"],
    masks: Mapping[str, Bool[Tensor, "b 1 *dhw"]],
    calibration: Calibration | None,
    placed: Bool[Tensor, "b r *dhw"],
) -> dict[tuple[str, str], list[float]]:
    """The calibration columns of ``suite.case_metrics``, one value a case, NaN in empty regions.

    Only voxels of the masks are looked at; each region's are sorted once by each size of errors
    that was stated, side by side.

    Args:
        fused: predictive mean.
        spread: ensemble standard deviation.
        reference: what ``fused`` should be.
        masks: by region.
        calibration: adds the scores of what it makes of the spread; None adds none.
        placed: masks as the method places them, which say how a voxel is calibrated.
    """
    random = torch.rand(fused.shape, generator=torch.Generator().manual_seed(0)).to(fused)
    names = STATED if calibration is None else STATED + CALIBRATED
    columns: dict[tuple[str, str], list[float]] = {key: [] for key in product(masks, names)}
    for case in range(len(fused)):
        regions = {name: mask[case].flatten() for name, mask in masks.items()}
        anywhere = torch.stack([*regions.values()]).any(0).nonzero()[:, 0]
        voxels = torch.stack([v[case].flatten()[anywhere] for v in (fused, spread, reference)])
        scores = _of_regions(
            voxels,
            random[case].flatten()[anywhere],
            [mask[anywhere] for mask in regions.values()],
            calibration,
            placed[case].flatten(1)[:, anywhere],
        )
        for region, of_region in zip(masks, scores, strict=True):
            for name in names:
                columns[region, name].append(float(of_region.get(name, torch.nan)))
    return columns


def _of_regions(
    voxels: Tensor,
    random: Tensor,
    regions: Sequence[Tensor],
    calibration: Calibration | None,
    placed: Tensor,
) -> list[dict[str, Tensor]]:
    """The scores of each region of a case by name; none of an empty one.

    ``voxels`` are those of fused, spread and reference in any region.
    """
    fused, spread, reference = voxels
    error = fused - reference

    def least(here: Tensor) -> dict[str, Tensor]:
        return {"least": least_curve(error[here])}

    def as_stated(here: Tensor) -> dict[str, Tensor]:
        errors = ranked(spread[here], error[here])
        return {
            "spread_error_correlation": correlation(errors.stated, errors.error.abs()),
            "curve": errors.sparsification_curve(),
            "uce_raw": errors.uce(),
            "ence_raw": errors.ence(),
        }

    def at_random(here: Tensor) -> dict[str, Tensor]:
        return {"random": ranked(random[here], error[here]).sparsification_curve()}

    kinds = [least, as_stated, at_random]
    if calibration is not None:
        std, is_covered, width = _calibrated(calibration, fused, spread, reference, placed)

        def as_calibrated(here: Tensor) -> dict[str, Tensor]:
            errors = ranked(std[here], error[here])
            return {
                "spread_error_correlation_calibrated": correlation(
                    errors.stated, errors.error.abs()
                ),
                "uce": errors.uce(),
                "ence": errors.ence(),
                "coverage": is_covered[here].double().mean(),
                "width": width[here].double().mean(),
            }

        kinds.append(as_calibrated)
    places = [region.nonzero()[:, 0] for region in regions]
    parts = [(n, kind) for n, kind in product(range(len(places)), kinds) if len(places[n])]
    found = on_every_core(lambda part: part[1](places[part[0]]), parts)
    scores: list[dict[str, Tensor]] = [{} for _ in regions]
    for (n, _), of_kind in zip(parts, found, strict=True):
        scores[n] |= of_kind
    for of_region in filter(None, scores):
        best = of_region["least"]
        of_region["ause"] = (of_region["curve"] - best).mean()
        of_region["ause_constant"] = (1 - best).mean()  # whatever is taken away
        of_region["ause_random"] = (of_region["random"] - best).mean()
    return scores


def _calibrated(
    calibration: Calibration, fused: Tensor, spread: Tensor, reference: Tensor, placed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each voxel: standard deviation, whether the interval holds it, the interval's width."""

    def of_part(start: int) -> tuple[Tensor, Tensor, Tensor]:
        part = slice(start, start + VOXELS_A_PART)
        given = fused[None, None, part], spread[None, None, part], placed[None, :, part]
        std, low, high = (found[0, 0] for found in calibration.std_and_interval(*given))
        is_covered = (low <= reference[part]) & (reference[part] <= high)
        return std, is_covered, high - low

    parts = on_every_core(of_part, range(0, max(len(fused), 1), VOXELS_A_PART))
    std, is_covered, width = (torch.cat(column) for column in zip(*parts, strict=True))
    return std, is_covered, width
