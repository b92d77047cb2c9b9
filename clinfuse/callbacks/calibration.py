"""Fit a run's calibration on its validation cases, and keep it beside the checkpoint."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from clinfuse.callbacks.recorder import summary_of
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.objective import lesion_probability
from clinfuse.metrics.calibration import REGIONS, Calibration, CalibrationSample
from clinfuse.reporting.atomic import write_atomically
from clinfuse.types import FusionBatch

FILE = "calibration.json"
VERSION = "sampling_version"

log = logging.getLogger(__name__)


class CalibrationFit(Callback):
    """Fits on all cases of a validation and writes ``calibration.json``.

    A method of one draw has no spread to calibrate, and gets no file.

    Args:
        folder: of the run.
        level: share of voxels that intervals should cover.
    """

    def __init__(self, folder: str | Path, level: float = 0.9) -> None:
        self.folder, self.sample = Path(folder), CalibrationSample(level)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: FusionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None or batch.reference is None:
            return
        summary = summary_of(outputs)
        fused, spread = summary.mean, summary.std
        if spread is None:
            return
        assert isinstance(pl_module, FusionMethod)
        roi = pl_module.registered_roi(batch)
        for case, case_id in enumerate(batch.case_id):
            self.sample.update(case_id, fused[case], batch.reference[case], spread[case], roi[case])
        head = getattr(pl_module, "lesion_head", None)
        if head is not None:
            probability = lesion_probability(head, fused, batch.brain)
            for case in range(len(batch)):
                self.sample.update_lesion(
                    probability[case].detach(), batch.lesion[case], batch.brain[case]
                )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sample.case_ids and trainer.is_global_zero:
            at_mm = float(trainer.datamodule.val_misregistration_mm)  # type: ignore[attr-defined]
            assert isinstance(pl_module, FusionMethod)
            fitted = asdict(self.sample.fit(at_mm)) | {VERSION: pl_module.sampling_version}
            write_atomically(self.folder / FILE, json.dumps(fitted, indent=1) + "\n")


def read_calibration(folder: str | Path, method: FusionMethod) -> Calibration | None:
    """The calibration of a run; None where it has none, or none of how its method samples today.

    The second is said in the log.

    Raises:
        ValueError: a file that is no calibration.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        fitted = json.loads(path.read_text())
        version = fitted.pop(VERSION, 1)
        calibration = _checked(Calibration(**fitted))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = shorten(" ".join(str(error).split()), 200, placeholder=" …")
        raise ValueError(
            f"expected a calibration, got {reason}: {path}; "
            f"calibrate again by python -m clinfuse.train resume={folder}"
        ) from error
    if version != method.sampling_version:
        log.warning(
            "%s was calibrated before its method sampled as it does now, so its intervals are left "
            "out; python -m clinfuse.train resume=%s calibrates again", folder, folder,
        )  # fmt: skip
        return None
    return calibration


def _checked(calibration: Calibration) -> Calibration:
    """The same, if all its numbers are there: a file may say anything.

    Raises:
        ValueError: something else.
    """
    for curve in (np.array(calibration.curve[name], float) for name in REGIONS):
        is_two_rows = curve.ndim == 2 and curve.shape[0] == 2 and curve.shape[1] > 0
        if not (
            is_two_rows and np.isfinite(curve).all() and (np.diff(curve[0], prepend=0) > 0).all()
        ):
            raise ValueError("a curve that is not of two rows of numbers, the first rising from 0")
    level, temperature = float(calibration.level), calibration.temperature
    numbers = [calibration.misregistration_mm, *(calibration.quantile[r] for r in REGIONS)]
    if not (0 < level < 1 and np.isfinite(np.array(numbers, float)).all()):
        raise ValueError("a level outside of (0, 1), or quantiles that are no numbers")
    if temperature is not None and not 0 < float(temperature) < np.inf:
        raise ValueError(f"a temperature of {temperature}")
    return calibration
