"""What scoring costs: the full ROI suite of a case, and what MONAI and surface-distance have of it.

python experiments/performance/metrics.py [--turns 5] [--shape 160x256x256] [--out FOLDER]

The case is a phantom drawn at twice the voxel size and interpolated; its fused volume is the
reference with errors as large as the spread says, its lesion is predicted two voxels off, with a
false finding elsewhere. All calls take turns in one process; others' get the same masks and
spacing, and values are printed side by side. ``--out`` writes ``metrics.json``, with machine and
versions.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import machine
from measure import Pair, in_turns, pair, shape_of, show, written
from monai.metrics import (
    PSNRMetric,
    SSIMMetric,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from torch import Tensor
from torch.nn import functional as F

from clinfuse.data.paired_volumes import study_item
from clinfuse.data.phantoms import make_phantom, write_study
from clinfuse.data.studies import load_study
from clinfuse.functional.gaussian import gaussian_smooth
from clinfuse.functional.psnr import psnr
from clinfuse.functional.ssim import ssim, ssim_map
from clinfuse.functional.surface import surface_agreement
from clinfuse.metrics.calibration import Calibration, CalibrationSample
from clinfuse.metrics.suite import case_metrics
from clinfuse.types import FusionBatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it imports scipy by an old name
    import surface_distance

TAU_MM = 2.0

WINDOW, SIGMA = 11, 1.5
"""Voxels of the window of MONAI's SSIM, as it comes; ours has as many at 1.5."""


@dataclass
class Case:
    """A study and what a method made of it.

    Attributes:
        batch: the study.
        fused: the mean of an ensemble.
        spread: its standard deviation.
        probability: of lesion.
        calibration: fitted on the case itself: what matters here is what it costs to apply.
    """

    batch: FusionBatch
    fused: Tensor
    spread: Tensor
    probability: Tensor
    calibration: Calibration


def main(turns: int, shape: tuple[int, ...], out: Path | None) -> None:
    case = made_case(shape)
    suite = partial(
        case_metrics,
        case.fused,
        case.batch,
        case.probability,
        case.spread,
        tau_mm=TAU_MM,
        calibration=case.calibration,
        roi=case.batch.roi,
    )
    (rows,) = suite()
    start = time.process_time()
    seconds = in_turns({"suite": suite}, turns, warmup=0)["suite"]
    of_processor = (time.process_time() - start) / turns
    threads = torch.get_num_threads()
    print(
        f"{written(shape)} voxels, {threads} threads: {len(rows)} values of a case in "
        f"{median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f}), of the processor "
        f"{of_processor:.2f} s\n"
    )
    for roi, metric, value in rows:
        print(f"  {roi} {metric}: {value:.5f}")
    pairs: list[Pair] = []
    for name, masks in surfaces(case).items():
        pairs += overlap(name, *masks, case.batch.spacing_mm, turns)
    pairs += similarity(case, turns)
    show(pairs)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "machine": machine(),
            "versions": {name: version(name) for name in ("monai", "scipy", "surface-distance")},
            "shape": shape,
            "turns": turns,
            "suite_seconds": seconds,
            "suite_processor_seconds": of_processor,
            "suite": {f"{roi} {metric}": value for roi, metric, value in rows},
            "pairs": [p.as_json() for p in pairs],
        }
        (out / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")


def made_case(shape: tuple[int, ...]) -> Case:
    """The phantom at a voxel size of 1 mm, and an ensemble's summary of it."""
    half = [size // 2 for size in shape]
    drawn = next(p for p in (make_phantom(n, 5, half, (2.0,) * 3) for n in range(20)) if is_rich(p))
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), drawn, 5)
        study = study_item(load_study(Path(folder)), torch.eye(4, dtype=torch.float64))
    batch = enlarged(study, shape)
    generator = torch.Generator().manual_seed(0)
    assert batch.reference is not None
    grain = torch.randn(batch.mri.shape, generator=generator)
    spread = 0.02 + 0.1 * gaussian_smooth(grain, (2.0,) * 3).abs()
    fused = batch.reference + spread * torch.randn(batch.mri.shape, generator=generator)
    lesion, brain, _ = batch.lesion, batch.brain, batch.bone
    elsewhere = lesion.flip(-1).roll(9, -2) & brain
    probability = gaussian_smooth((lesion.roll(2, -1) | elsewhere).float(), (1.5,) * 3)
    sample = CalibrationSample()
    fused = fused.clamp(-1, 1)
    sample.update("case", fused[0], batch.reference[0], spread[0], batch.roi[0])
    sample.update_lesion(probability[0], lesion[0], brain[0])
    return Case(batch, fused, spread, probability, sample.fit(0.0))


def is_rich(phantom) -> bool:
    """Whether there is a lesion, and a finding that CT alone shows."""
    return bool(phantom.lesion.sum() > 200 and phantom.findings.any())


def enlarged(batch: FusionBatch, shape: tuple[int, ...]) -> FusionBatch:
    """The same study on a finer grid."""

    def image(volume: Tensor) -> Tensor:
        return F.interpolate(volume, shape, mode="trilinear", align_corners=False)

    before = batch.mri.shape[2:]
    images = ("mri", "ct", "reference", "clean_mri", "clean_ct")
    masks = ("roi", "clean_roi", "findings")
    return replace(
        batch,
        **{name: image(getattr(batch, name)) for name in images},
        **{name: image(getattr(batch, name).float()) > 0.5 for name in masks},
        lesion_distance_mm=None,
        spacing_mm=batch.spacing_mm
        * torch.tensor([[a / b for a, b in zip(before, shape, strict=True)]]),
    )


def surfaces(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Predicted and true masks: a lesion, and the brain with an outline that is off by some mm."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(case.fused.shape, generator=generator)
    brain = case.batch.brain
    rough = gaussian_smooth(brain.float(), (3.0,) * 3) + 4 * gaussian_smooth(noise, (3.0,) * 3)
    return {
        "lesion": (case.probability > 0.5, case.batch.lesion),
        "brain": (rough > 0.5, brain),
    }


def overlap(
    name: str, predicted: Tensor, true: Tensor, spacing_mm: Tensor, turns: int
) -> list[Pair]:
    """Dice, surface Dice and 95 % Hausdorff distance of a pair of masks."""
    row = spacing_mm[0].tolist()
    arrays = true[0, 0].numpy(), predicted[0, 0].numpy()

    def ours() -> list[float]:
        agreement = surface_agreement(predicted, true, spacing_mm)
        return [agreement.dice.item(), agreement.nsd(TAU_MM).item(), agreement.hd95().item()]

    def monais() -> list[float]:
        # The masks as they are: it would copy floats of another type once more.
        pair = predicted, true
        given = {"include_background": True, "spacing": row}
        dice = compute_dice(*pair, include_background=True)
        nsd = compute_surface_dice(*pair, [TAU_MM], **given)
        hd95 = compute_hausdorff_distance(*pair, percentile=95, **given)
        return [dice.item(), nsd.item(), hd95.item()]

    def deepminds() -> list[float]:
        found = surface_distance.compute_surface_distances(*arrays, row)
        return [
            surface_distance.compute_dice_coefficient(*arrays),
            surface_distance.compute_surface_dice_at_tolerance(found, TAU_MM),
            surface_distance.compute_robust_hausdorff(found, 95),
        ]

    calls = {"ours": ours, "MONAI": monais, "surface-distance": deepminds}
    print(f"\nDice, NSD at {TAU_MM:g} mm and HD95 in mm of the {name}:")
    return compared(f"Dice + NSD + HD95, {name}", calls, turns, 1e-5)


def similarity(case: Case, turns: int) -> list[Pair]:
    """PSNR and SSIM of the whole volume, which MONAI has; of regions it has none."""
    fused, reference = case.fused, case.batch.reference
    assert reference is not None
    whole = torch.ones_like(case.batch.brain)
    ratio, structure = PSNRMetric(max_val=2.0), SSIMMetric(3, 2.0, "gaussian", WINDOW, SIGMA)
    print("\nPSNR in dB of the whole volume:")
    pairs = compared(
        "PSNR, whole",
        {
            "ours": lambda: [psnr(fused, reference, whole).item()],
            "MONAI": lambda: [ratio(fused, reference).item()],
        },
        turns,
        1e-4,
    )
    row = [SIGMA] * 3
    sigma_mm = [1.0 / size for size in row]  # a sigma of 1 "mm" is 1.5 voxels
    print("\nSSIM of the whole volume, windows of 11 voxels (MONAI's only where they fit in):")
    calls: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: [ssim(fused, reference, whole, sigma_mm, 1.0).item()],
        "MONAI": lambda: [structure(fused, reference).item()],
    }
    pairs += compared("SSIM, whole", calls, 1, None)
    inner = ssim_map(fused, reference, row)[(..., *[slice(WINDOW // 2, -(WINDOW // 2))] * 3)]
    print(f"  ours where they fit in: {inner.mean().item():.6f}")
    # Its window's weights add up to 1 but for rounding, which weighs on flat air's variance.
    assert np.isclose(inner.mean().item(), structure(fused, reference).item(), atol=5e-4)
    return pairs


def compared(
    what: str, calls: dict[str, Callable[[], list[float]]], turns: int, tolerance: float | None
) -> list[Pair]:
    """Times of all calls, the first ours; prints their values.

    Args:
        what: is measured.
        calls: by who wrote them.
        turns: of each.
        tolerance: within which MONAI's values have to be ours; None does not compare.
    """
    values = {name: call() for name, call in calls.items()}  # and to warm up
    for name, of_each in values.items():
        print(f"  {name}: " + ", ".join(f"{value:.6f}" for value in of_each))
    if tolerance is not None:
        np.testing.assert_allclose(values["MONAI"], values["ours"], rtol=tolerance)
    spent = in_turns(calls, turns, warmup=0)
    others = [name for name in calls if name != "ours"]
    pairs = [pair("metrics", what, "s", spent["ours"], spent[name], name) for name in others]
    for found in pairs:
        print(
            f"  {found.ours:.3f} s, {found.against} {found.reference:.3f} s, "
            f"ratio {found.ratio:.2f}",
            flush=True,
        )
    return pairs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What scoring a case costs.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shape", type=shape_of, default=(160, 256, 256))
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    main(settings.turns, settings.shape, settings.out)
