"""Every metric of the evaluation protocol for every case: the rows that all tables are made of."""

from functools import partial
from statistics import median

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clinfuse.functional.calibration import brier, expected_calibration_error
from clinfuse.functional.conspicuity import conspicuity
from clinfuse.functional.fsim import fsim_to_each
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim
from clinfuse.functional.surface import surface_agreement
from clinfuse.metrics.calibration import AIR, Calibration
from clinfuse.metrics.fusion import fusion_metrics
from clinfuse.metrics.regional import BLACK, LESION_THRESHOLD
from clinfuse.metrics.spread import spread_scores
from clinfuse.types import FusionBatch

Row = tuple[str, str, float]
"""One measurement of one case: (roi, metric, value), NaN where it is undefined."""


def case_metrics(
    fused: Float[Tensor, "b 1 *dhw"],
    batch: FusionBatch,
    lesion_probability: Float[Tensor, "b 1 *dhw"] | None = None,
    spread: Float[Tensor, "b 1 *dhw"] | None = None,
    tau_mm: float = 2.0,
    calibration: Calibration | None = None,
    roi: Bool[Tensor, "b r *dhw"] | None = None,
    with_fusion: bool | None = None,
) -> list[list[Row]]:
    """One list of (roi, metric, value) for each case of the batch.

    Compares with the truth, never with the perturbed sources: brain with the clean MRI, bone with
    the clean CT, the whole grid with the reference, each within the clean masks. Where the batch
    has no clean field, its own sources and masks are the truth; without a reference, what needs one
    is NaN. What says how well a lesion was found appears only with a prediction, so that none can
    be scored by its own mask. ``conspicuity`` and ``conspicuity_min`` are the median and the
    smallest over a case's lesions, and over its CT-only findings (roi ``findings``): how visible
    they are in ``fused`` itself; NaN for a case without any.

    Args:
        fused: a method's output, in [-1, 1].
        batch: the studies it was made from.
        lesion_probability: predicted from ``fused``; thresholded at one half.
        spread: ensemble standard deviation of ``fused``. Adds ``spread_error_correlation``
            (Pearson's), ``ause`` (and that of two spreads that say nothing, ``ause_constant`` and
            ``ause_random``), ``uce_raw`` and ``ence_raw`` over the head (where the reference is not
            air), the brain and bone.
        tau_mm: tolerance of the surface Dice, in mm.
        calibration: fitted on other cases. Adds ``uce``, ``ence`` and
            ``spread_error_correlation_calibrated`` of the calibrated spread, and ``coverage`` and
            ``width`` of the intervals; with a prediction, ``ece`` and ``brier`` too, of which
            ``ece_raw`` and ``brier_raw`` are without.
        roi: the masks as the method places them, which say what region a voxel is calibrated
            with; None takes those of the batch as they are given.
        with_fusion: adds ``metrics.fusion`` of the whole image against the clean sources; None
            does so for 2-D pairs, whose tables are made of them, and not for volumes.

    Raises:
        ValueError: if ``fused`` is not finite. A NaN would pass for an undefined metric, and a
            method that diverges would be scored on its other cases alone.
    """
    for case_id, volume in zip(batch.case_id, fused, strict=True):
        if not all(bound.isfinite() for bound in volume.aminmax()):  # which a NaN would be
            raise ValueError(f"expected a finite fused volume, got NaN or inf in {case_id}")
    with torch.no_grad(), torch.autocast(fused.device.type, enabled=False):
        fused = fused.float()
        columns = _similarity(fused, batch) | _conspicuity(fused, batch)
        if with_fusion or (with_fusion is None and fused.ndim == 4):
            columns |= _fusion(fused, batch)
        if lesion_probability is not None:
            columns |= _lesion(lesion_probability, batch, tau_mm)
            columns |= _lesion_calibration(lesion_probability, batch, calibration)
        if spread is not None:
            placed = batch.roi if roi is None else roi
            columns |= _calibration(fused, spread.float(), batch, calibration, placed)
    return [
        [(roi, metric, values[case]) for (roi, metric), values in columns.items()]
        for case in range(len(batch))
    ]


def _similarity(fused: Tensor, batch: FusionBatch) -> dict[tuple[str, str], list[float]]:
    mri, ct, roi = batch.truth()
    brain, bone = roi[:, 0:1], roi[:, 1:2]
    shown = partial(ssim, fused, spacing_mm=batch.spacing_mm, black=BLACK)
    aims = [(mri, brain)]
    if batch.reference is not None:
        whole = torch.ones_like(brain)
        aims.append((batch.reference, whole))
    alike = fsim_to_each(fused, aims)
    columns = {
        ("brain", "ssim"): shown(mri, brain),
        ("brain", "fsim"): alike[0],
        ("bone", "psnr"): psnr(fused, ct, bone),
        ("bone", "ssim"): shown(ct, bone),
    }
    if batch.reference is None:
        unknown = torch.full((len(batch),), torch.nan)
        columns |= {("whole", metric): unknown for metric in ("psnr", "ssim", "fsim")}
    else:
        columns |= {
            ("whole", "psnr"): psnr(fused, batch.reference, whole),
            ("whole", "ssim"): shown(batch.reference, whole),
            ("whole", "fsim"): alike[1],
        }
    return _as_lists(columns)


def _fusion(fused: Tensor, batch: FusionBatch) -> dict[tuple[str, str], list[float]]:
    mri, ct, _ = batch.truth()
    scores = fusion_metrics(fused, mri, ct)
    return _as_lists({("whole", name): values for name, values in scores.items()})


def _conspicuity(fused: Tensor, batch: FusionBatch) -> dict[tuple[str, str], list[float]]:
    mri, ct, roi = batch.truth()
    brain, lesion = roi[:, 0:1], roi[:, 2:3]
    dense = torch.zeros_like(lesion) if batch.findings is None else batch.findings
    columns = {}
    for name, found, others in (("lesion", lesion, dense), ("findings", dense, lesion)):
        shares = conspicuity(fused, mri, ct, found, brain, batch.spacing_mm, others)
        defined = [share[~share.isnan()].tolist() or [torch.nan] for share in shares]
        columns[name, "conspicuity"] = [median(of_case) for of_case in defined]
        columns[name, "conspicuity_min"] = [min(of_case) for of_case in defined]
    return columns


def _lesion(
    probability: Tensor, batch: FusionBatch, tau_mm: float
) -> dict[tuple[str, str], list[float]]:
    predicted, lesion = probability > LESION_THRESHOLD, batch.truth()[2][:, 2:3]
    agreement = surface_agreement(predicted, lesion, batch.spacing_mm)
    return _as_lists(
        {
            ("lesion", "dice"): agreement.dice,
            ("lesion", "nsd"): agreement.nsd(tau_mm),
            ("lesion", "hd95"): agreement.hd95(),
        }
    )


def _lesion_calibration(
    probability: Tensor, batch: FusionBatch, calibration: Calibration | None
) -> dict[tuple[str, str], list[float]]:
    """Judged in the brain: elsewhere a head has nothing to say, and would be praised for it."""
    roi = batch.truth()[2]
    cases = zip(probability, roi[:, 0:1], roi[:, 2:3], strict=True)
    scores = [_calibrated_in(*case, calibration) for case in cases]
    return {("lesion", name): [of_case[name] for of_case in scores] for name in scores[0]}


def _calibrated_in(
    probability: Tensor, brain: Tensor, lesion: Tensor, calibration: Calibration | None
) -> dict[str, float]:
    """One case's scores of the brain's voxels, taken out once."""
    inside = brain.flatten().nonzero()[:, 0]
    found, true = (volume.flatten()[inside][None, None] for volume in (probability, lesion))
    everywhere = torch.ones_like(true)
    stated = {"_raw": found}
    if calibration is not None:
        stated[""] = calibration.probability(found)
    scores = {"ece": expected_calibration_error, "brier": brier}
    return {
        name + suffix: score(p, true, everywhere).item()
        for suffix, p in stated.items()
        for name, score in scores.items()
    }


def _calibration(
    fused: Tensor,
    spread: Tensor,
    batch: FusionBatch,
    calibration: Calibration | None,
    placed: Tensor,
) -> dict[tuple[str, str], list[float]]:
    if batch.reference is None:
        unknown = [torch.nan] * len(batch)
        return {(roi, "spread_error_correlation"): unknown for roi in ("whole", "brain", "bone")}
    reference, roi = batch.reference, batch.truth()[2]
    masks = {"whole": reference > AIR, "brain": roi[:, 0:1], "bone": roi[:, 1:2]}
    return spread_scores(fused, spread, reference, masks, calibration, placed)


def _as_lists(columns: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], list[float]]:
    return {name: values.tolist() for name, values in columns.items()}
