"""Score every test case of whatever method is tested: rows, pictures and the report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from clinfuse.data.slices import colour_picture, write_colour
from clinfuse.functional.calibration import total_variance
from clinfuse.functional.surface import NO_SURFACE_MM, signed_distance_mm
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.objective import lesion_probability
from clinfuse.methods.rules import MaskComposite
from clinfuse.metrics.calibration import Calibration, Reliability
from clinfuse.metrics.regional import LESION_THRESHOLD
from clinfuse.metrics.suite import Row, case_metrics
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.figures import pictures_figure, reliability_figure, save_figures
from clinfuse.reporting.html import write_report
from clinfuse.reporting.robustness import TEXT as ROBUSTNESS_TEXT
from clinfuse.reporting.robustness import robustness_files, robustness_of
from clinfuse.reporting.rows import case_rows, write_rows
from clinfuse.reporting.tables import (
    CALIBRATION_SCORES,
    KEPT_SCORES,
    conspicuity_table,
    headline,
    headline_scores,
    print_table,
    score_label,
)
from clinfuse.reporting.views import CaseView
from clinfuse.types import FusionBatch, SliceBatch

MASK_SOURCES = ("expert", "automatic", "none")

RELIABILITY_TEXT = (
    "Voxels of all test cases, grouped by the error that the uncertainty states for them. On the "
    "dashed line it is the error found; above it the uncertainty says too little. The calibration "
    "was fitted on validation cases."
)

PAIRS_TEXT = (
    "Some pairs tested: the source fused as MRI, the one fused as CT, and the fused picture: "
    "its luma is the method's, its hue the second source's. The folder fused has all of them."
)

_NO_CHIPS = frozenset(
    {"uce", "ence", "uce_raw", "ence_raw", "width", "ece", "brier", "conspicuity_min", "seconds"}
    | {"ause", "ause_constant", "ause_random", "spread_error_correlation_calibrated"}
)
"""Scores of many voxels together that say little of one case."""


class CaseRecorder(Callback):
    """Collects per-case rows and pictures while methods are tested, one after another.

    Each test dataloader is one condition, a misregistration or another perturbation, in the order
    of ``datamodule.conditions``; whose case each is says ``datamodule.patients``. Pictures are of
    unperturbed cases. Of 2-D pairs every fused picture at the smallest amplitude is written, in
    colour where they have some, as ``fused/METHOD/CASE.png``.

    Args:
        folder: where ``write`` puts ``cases.csv``, ``figures/`` and ``report.html``.
        preset: named in every row.
        seed: named in every row.
        method: name of the method under test; assign it anew before each test.
        mask_source: where the lesion mask that methods are given comes from: ``expert``;
            ``automatic``, what the lesion head finds in the mask composite of the sources as they
            come; or ``none``, which takes it away before they see it.
        pictures: cases to show.
        pictures_of: the method whose results are shown; None shows the first one tested.
        pictures_at_mm: the misregistration at which they are shown, where it is tested.
        lesion_head: frozen network from F to lesion probability; None leaves lesion rows out.
        calibration: of the method under test; assign it anew before each test.
        facts: what the report says of the run.
        title: of the report.
    """

    def __init__(
        self,
        folder: str | Path,
        preset: str,
        seed: int,
        method: str,
        mask_source: str = "expert",
        pictures: int = 3,
        pictures_of: str | None = None,
        pictures_at_mm: float = 2.0,
        lesion_head: nn.Module | None = None,
        calibration: Calibration | None = None,
        facts: Mapping[str, Any] | None = None,
        title: str = "clinfuse",
    ) -> None:
        if mask_source not in MASK_SOURCES:
            raise ValueError(f"expected mask_source of {MASK_SOURCES}, got {mask_source!r}")
        if mask_source == "automatic" and lesion_head is None:
            raise ValueError(
                "expected a lesion head for mask_source=automatic (lesion_head=FOLDER)"
            )
        self.folder, self.preset, self.seed, self.method = Path(folder), preset, seed, method
        self.mask_source, self.pictures = mask_source, pictures
        self.pictures_of, self.pictures_at_mm = pictures_of or method, pictures_at_mm
        self.lesion_head, self.calibration, self.title = lesion_head, calibration, title
        self.facts = dict(facts or {})
        self.reliability: dict[str, dict[str, Reliability]] = {
            region: {"as stated": Reliability(), "calibrated": Reliability()}
            for region in ("Brain", "Bone")
        }
        self.levels: set[float] = set()
        self.rows: list[dict[str, Any]] = []
        self.views: list[CaseView] = []
        self.pairs: list[dict[str, Image.Image]] = []
        self._began_s = 0.0
        self._fused_folders: dict[str, tuple[str, str, int]] = {}

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: FusionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.mask_source == "none":
            batch.roi = torch.cat([batch.roi[:, :2], torch.zeros_like(batch.roi[:, 2:])], 1)
            if batch.lesion_distance_mm is not None:
                batch.lesion_distance_mm = torch.full_like(batch.lesion_distance_mm, NO_SURFACE_MM)
        if self.mask_source == "automatic":
            assert self.lesion_head is not None
            lesion = automatic_lesion(batch, self.lesion_head)
            batch.roi = torch.cat([batch.roi[:, :2], lesion], 1)
            batch.lesion_distance_mm = signed_distance_mm(lesion, batch.spacing_mm).to(batch.mri)
        self._began_s = seconds_now(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: FusionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if outputs is None:  # no fusion: the lesion head
            return
        seconds = (seconds_now(pl_module) - self._began_s) / len(batch)
        data = trainer.datamodule  # type: ignore[attr-defined]
        condition, patients = data.conditions[dataloader_idx], data.patients
        amplitude_mm, is_shown = condition.misregistration_mm, not condition.perturbation
        summary = summary_of(outputs)
        fused, spread = summary.mean, summary.std
        probability = None
        if self.lesion_head is not None:
            probability = lesion_probability(self.lesion_head, fused, batch.truth()[2][:, :1])
        assert isinstance(pl_module, FusionMethod)
        roi = None
        if self.calibration is not None:
            self.levels.add(self.calibration.level)
            roi = pl_module.registered_roi(batch)
        scores = case_metrics(
            fused, batch, probability, spread, calibration=self.calibration, roi=roi
        )
        if isinstance(batch, SliceBatch):
            if is_shown and amplitude_mm == min(data.misregistration_mm):
                self._take_pictures(batch, fused, pl_module.fused_chroma(batch))
                if self.method == self.pictures_of and batch_idx in self._shown_pairs(trainer):
                    self.pairs.append(
                        pair_pictures(batch, 0, fused, f"{self.method}: {batch.case_id[0]}")
                    )
        elif is_shown and self._is_picked(trainer, amplitude_mm):
            self._take_reliability(batch, fused, spread, roi)
        for index, (case_id, case_scores) in enumerate(zip(batch.case_id, scores, strict=True)):
            case_scores.append(("whole", "seconds", seconds))
            if case_id in pl_module.adaptation_seconds:
                adapting = pl_module.adaptation_seconds[case_id]
                case_scores.append(("whole", "adaptation_seconds", adapting))
            self.rows += case_rows(
                case_scores,
                case_id=case_id,
                patient_id=patients[case_id],
                method=self.method,
                preset=self.preset,
                seed=self.seed,
                misregistration_mm=amplitude_mm,
                perturbation=condition.perturbation,
                amount=condition.amount,
                mask_source=self.mask_source,
                steps=int(getattr(pl_module, "steps", 0)),
            )
            is_wanted = self._is_picked(trainer, amplitude_mm) and len(self.views) < self.pictures
            if is_shown and is_wanted and not isinstance(batch, SliceBatch):
                caption = f"{self.method}, preset {self.preset}, CT moved by {amplitude_mm:g} mm"
                self.views.append(
                    case_view(
                        batch,
                        index,
                        fused,
                        spread,
                        caption,
                        case_scores,
                        epistemic=summary.epistemic,
                        aleatoric=summary.aleatoric,
                        lesion_probability=probability,
                    )
                )

    def write(self) -> Path:
        """Put rows, figures and the report into the folder; returns the report's path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_rows(self.folder / "cases.csv", self.rows)
        table, kept = headline(self.rows), headline(self.rows, KEPT_SCORES)
        tables, charts = {}, self._charts()
        if headline_scores(table):
            tables["Fusion quality under misregistration"] = table
        if headline_scores(kept):
            tables["What is kept of both sources"] = kept
        if any(row["metric"] == "coverage" for row in self.rows):
            of = " and ".join(f"{100 * level:g}%" for level in sorted(self.levels))
            name = f"Calibration of the uncertainty: intervals of {of} coverage"
            tables[name] = headline(self.rows, CALIBRATION_SCORES)
        if len(seen := conspicuity_table(self.rows)):
            tables["Conspicuity of findings"] = seen
        save_figures(self.folder / "figures", self.views, table, self.pictures_of, charts)
        shown = {name.capitalize(): (figure, RELIABILITY_TEXT) for name, figure in charts.items()}
        if (robustness := robustness_of(self.rows, self.pictures_of)) is not None:
            shown["Robustness"] = (robustness[1], ROBUSTNESS_TEXT)
            for name, content in robustness_files(*robustness).items():
                write_atomically(self.folder / "figures" / name, content)
        if self.pairs:
            shown["Pairs"] = (pictures_figure(self.pairs), PAIRS_TEXT)
        report = write_report(
            self.folder / "report.html",
            self.title,
            self.views,
            tables,
            self.facts,
            self.pictures_of,
            shown,
        )
        if not headline_scores(table):
            table = headline(self.rows, KEPT_SCORES[:5])  # what a terminal has room for
        print_table(table, self.title)
        return report

    def _charts(self) -> dict[str, Figure]:
        """The reliability diagram by its file's name, where a calibration was applied."""
        points = {
            region: {kind: seen.points().numpy() for kind, seen in kinds.items()}
            for region, kinds in self.reliability.items()
        }
        if not any(len(part["calibrated"]) for part in points.values()):
            return {}
        return {"reliability": reliability_figure(points)}

    def _take_reliability(
        self, batch: FusionBatch, fused: Tensor, spread: Tensor | None, placed: Tensor | None
    ) -> None:
        if self.calibration is None or spread is None or batch.reference is None:
            return
        assert placed is not None
        error, roi = fused - batch.reference, batch.truth()[2]
        stds = {"as stated": spread, "calibrated": self.calibration.std(fused, spread, placed)}
        for channel, kinds in enumerate(self.reliability.values()):
            for kind, std in stds.items():
                kinds[kind].update(std, error, roi[:, channel : channel + 1])

    def _take_pictures(
        self,
        batch: SliceBatch,
        fused: Float[Tensor, "b 1 h w"],
        chroma: Float[Tensor, "b 2 h w"] | None,
    ) -> None:
        folder = self._fused_folder()
        for index, case_id in enumerate(batch.case_id):
            colour = None if chroma is None else chroma[index]
            write_colour(folder / f"{case_id}.png", fused[index], colour)

    def _shown_pairs(self, trainer: Trainer) -> set[int]:
        """Batches whose pair the report shows, spread over all: neighbours are of one patient."""
        tested = len(trainer.datamodule.splits["test"])  # type: ignore[attr-defined]
        return {round(at) for at in np.linspace(0, tested - 1, min(self.pictures, tested))}

    def _fused_folder(self) -> Path:
        """The method's own; runs of one method under several presets or seeds are told apart."""
        mine = (self.method, self.preset, self.seed)
        for name in (self.method, f"{self.method}_{self.preset}_seed_{self.seed}"):
            if self._fused_folders.setdefault(name, mine) == mine:
                break
        return self.folder / "fused" / name

    def _shown_mm(self, trainer: Trainer) -> float:
        tested = trainer.datamodule.misregistration_mm  # type: ignore[attr-defined]
        return self.pictures_at_mm if self.pictures_at_mm in tested else tested[0]

    def _is_picked(self, trainer: Trainer, amplitude_mm: float) -> bool:
        """Whether what is tested is what the report shows in pictures."""
        return self.method == self.pictures_of and amplitude_mm == self._shown_mm(trainer)


class RunReport(CaseRecorder):
    """The recorder of a training run: writes when its test has ended."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows and trainer.is_global_zero:
            self.write()


def seconds_now(method: LightningModule) -> float:
    """A clock's reading when all that a method has begun on its device is done."""
    if method.device.type == "cuda":
        torch.cuda.synchronize(method.device)
    return time.perf_counter()


@torch.no_grad()
def automatic_lesion(batch: FusionBatch, lesion_head: nn.Module) -> Bool[Tensor, "b 1 *dhw"]:
    """The lesion that a head finds in the sources: in their mask composite, within the brain."""
    return (lesion_head(MaskComposite().fuse(batch)) > LESION_THRESHOLD) & batch.brain


def case_view(
    batch: FusionBatch,
    index: int,
    fused: Float[Tensor, "b 1 *dhw"],
    spread: Float[Tensor, "b 1 *dhw"] | None,
    caption: str,
    scores: Sequence[Row] = (),
    epistemic: Float[Tensor, "b 1 *dhw"] | None = None,
    aleatoric: Float[Tensor, "b 1 *dhw"] | None = None,
    lesion_probability: Float[Tensor, "b 1 *dhw"] | None = None,
) -> CaseView:
    """One case of a batch as the report shows it, with the true masks."""

    def array(volume: Tensor | None) -> Any:
        return None if volume is None else volume[index, 0].float().cpu().numpy()

    masks = batch.truth()[2][index].cpu().numpy()
    return CaseView(
        case_id=batch.case_id[index],
        mri=array(batch.mri),
        ct=array(batch.ct),
        fused=array(fused),
        spacing_mm=batch.spacing_mm[index].tolist(),
        reference=array(batch.reference),
        spread=array(spread),
        epistemic=array(epistemic),
        aleatoric=array(aleatoric),
        lesion_probability=array(lesion_probability),
        lesion=masks[2] if masks[2].any() else None,
        bone=masks[1],
        brain=masks[0],
        caption=caption,
        scores={
            score_label(roi, metric): value
            for roi, metric, value in scores
            if metric not in _NO_CHIPS
        },
    )


def pair_pictures(
    batch: SliceBatch, index: int, fused: Float[Tensor, "b 1 h w"], name: str
) -> dict[str, Image.Image]:
    """One pair of a batch: its sources and, under ``name``, the fused picture in its colour."""
    chroma = None if batch.chroma is None else batch.chroma[index]
    return {
        "Fused as MRI": colour_picture(batch.mri[index], None),
        "Fused as CT": colour_picture(batch.ct[index], chroma),
        name: colour_picture(fused[index], chroma),
    }


@dataclass(frozen=True)
class Summary:
    """What the draws of a method say of the fused volumes, in model space.

    Attributes:
        mean: the predictive mean.
        std: the predictive standard deviation, sqrt(epistemic^2 + aleatoric^2); None for one draw.
        epistemic: standard deviation over the models of what each means; None for one model.
        aleatoric: of the noise draws about their model's mean; None for one noise draw a model.
    """

    mean: Float[Tensor, "b 1 *dhw"]
    std: Float[Tensor, "b 1 *dhw"] | None
    epistemic: Float[Tensor, "b 1 *dhw"] | None
    aleatoric: Float[Tensor, "b 1 *dhw"] | None


def summary_of(draws: Float[Tensor, "m k b 1 *dhw"]) -> Summary:
    """Mean over all draws, and their standard deviation in its two parts (``total_variance``).

    A draw may leave model space by its noise. As an image it is clamped; clamped before their mean
    is taken, though, all draws would move air up.
    """
    models, members = draws.shape[:2]
    _, epistemic, aleatoric = total_variance(draws.clamp(-1, 1))
    return Summary(
        mean=draws.mean((0, 1)).clamp(-1, 1),
        std=(epistemic + aleatoric).sqrt() if models * members > 1 else None,
        epistemic=epistemic.sqrt() if models > 1 else None,
        aleatoric=aleatoric.sqrt() if members > 1 else None,
    )
