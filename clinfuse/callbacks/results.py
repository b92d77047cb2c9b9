"""What a run's test left in its folder, to its loggers: to W&B all of it, to others the figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from clinfuse.callbacks.loggers import RunWandbLogger, log_picture
from clinfuse.callbacks.overlays import log_overlays, of_view
from clinfuse.callbacks.recorder import CaseRecorder
from clinfuse.reporting.card import MODEL_CARD
from clinfuse.reporting.rows import read_rows, unperturbed
from clinfuse.reporting.tables import (
    CALIBRATION_SCORES,
    HEADLINE_SCORES,
    KEPT_SCORES,
    LESION_SCORES,
    SEEN_SCORES,
    score_label,
    summary,
)

TABLES = {
    "quality": HEADLINE_SCORES,
    "kept": KEPT_SCORES,
    "lesion": LESION_SCORES,
    "calibration": CALIBRATION_SCORES,
    "conspicuity": SEEN_SCORES,
}
"""Scores that make a table together."""

COLUMNS = ("method", "score", "misregistration_mm", "mean", "low", "high", "cases", "patients")
"""Of those tables; ``low`` and ``high`` bound the bootstrap interval of the mean."""


class LoggedResults(Callback):
    """Logs what the recorder and the cards, which come before it, have written.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not (self.folder / "cases.csv").is_file():  # no fusion: the lesion head
            return
        step, callbacks = trainer.global_step, trainer.callbacks  # type: ignore[attr-defined]
        for path in sorted((self.folder / "figures").glob("*.png")):
            if not path.stem.startswith("validation_step"):
                picture = np.asarray(Image.open(path).convert("RGB"))
                log_picture(trainer.loggers, f"figures/{path.stem}", picture, step, path.stem)
        views = [v for c in callbacks if isinstance(c, CaseRecorder) for v in c.views]
        shown = {view.case_id: of_view(view) for view in views}
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.attempt(log_folder, logger, self.folder, step)
                if shown:
                    log_overlays(logger, "test_regions", shown, step)


def log_folder(logger: WandbLogger, folder: Path, step: int) -> None:
    """``cases`` and ``tables/*``, ``report``, the card as the run's notes, and the summary."""
    import wandb

    rows = read_rows(folder / "cases.csv")
    frames = {"cases": rows} | {f"tables/{name}": t for name, t in score_tables(rows).items()}
    for name, frame in frames.items():
        columns, plain = plain_table(frame)
        logger.log_table(name, columns, plain, step=step)
    if (folder / "report.html").is_file():
        report = wandb.Html((folder / "report.html").read_text("utf-8"), inject=False)
        logger.experiment.log({"report": report, "trainer/global_step": step})
    if (folder / MODEL_CARD).is_file() and not logger.experiment.notes:
        logger.experiment.notes = (folder / MODEL_CARD).read_text("utf-8")
    logger.experiment.summary.update(scores(rows) | costs(folder))


def score_tables(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Means with intervals, one line a method, score and misregistration: ``COLUMNS``."""
    long = summary(unperturbed(rows)).rename(columns={"n": "cases"})
    pairs = list(zip(long["roi"], long["metric"], strict=True))
    long["score"] = [score_label(roi, metric) for roi, metric in pairs]
    tables = {name: long[[pair in of for pair in pairs]] for name, of in TABLES.items()}
    return {
        name: table.loc[table["cases"] > 0, list(COLUMNS)]
        for name, table in tables.items()
        if table["cases"].any()
    }


def plain_table(frame: pd.DataFrame) -> tuple[list[str], list[list[Any]]]:
    """Columns and lines of a frame in Python's own types, what is undefined as None."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [str(column) for column in frame.columns], plain.values.tolist()


def scores(rows: pd.DataFrame) -> dict[str, float]:
    """The mean of each headline score by misregistration: ``test/bone_psnr/2mm``."""
    long = summary(unperturbed(rows), resamples=1)
    return {
        f"test/{row['roi']}_{row['metric']}/{row['misregistration_mm']:g}mm": float(row["mean"])
        for _, row in long.iterrows()
        if (row["roi"], row["metric"]) in (*HEADLINE_SCORES, *CALIBRATION_SCORES) and row["n"]
    }


def costs(folder: Path) -> dict[str, float]:
    """What ``cost.json`` says, where a training wrote one."""
    path = folder / "cost.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    return {f"cost/{name}": value for name, value in content.items()}
