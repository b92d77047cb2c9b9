"""A sweep's report on Weights & Biases, made from code: ``pip install 'clinfuse[report]'``."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

from clinfuse.callbacks.loggers import has_wandb_key

log = logging.getLogger(__name__)


def publish_report(project: str, group: str, tables: Path) -> str | None:
    """Put a sweep's report online, with its tables; returns its address.

    None without a key or the package, and where W&B fails, which one warning says: the tables are
    in their folder all the same.

    Args:
        project: that the runs are in.
        group: the sweep's name.
        tables: the folder with ``table.md``.
    """
    if not has_wandb_key() or importlib.util.find_spec("wandb_workspaces") is None:
        return None
    try:
        import wandb

        entity = str(wandb.Api(timeout=20).default_entity)
        text = (tables / "table.md").read_text()
        report = sweep_report(entity, project, group, f"Sweep {group}", text)
        report.save()
        return str(report.url)
    except Exception as error:  # whatever a service may raise; no sweep fails of it
        log.warning("no report on W&B (%s: %s)", type(error).__name__, error)
        return None


def sweep_report(entity: str, project: str, group: str, title: str, text: str = "") -> Any:
    """Curves, scores and pictures of a sweep's runs; its ``save()`` puts it online.

    Args:
        entity: the user or team that the project is of.
        project: that the runs are in.
        group: that the runs are in, the sweep's name.
        title: of the report.
        text: in Markdown, below the title: the sweep's tables.

    Raises:
        ValueError: the package wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError(
            "expected the package wandb-workspaces for a report, found none: "
            "pip install 'clinfuse[report]'"
        )
    import wandb_workspaces.reports.v2 as reports

    scores = ["test/bone_psnr/2mm", "test/brain_ssim/2mm", "test/whole_ssim/2mm"]
    pictures = ["test_regions", "figures/robustness", "figures/reliability"]
    runs = reports.Runset(entity=entity, project=project, filters=f"Metric('group') == '{group}'")
    panels: list[Any] = [
        reports.LinePlot(x="trainer/global_step", y=["train/loss"]),
        *(reports.BarPlot(title=score, metrics=[score]) for score in scores),
        reports.MediaBrowser(media_keys=pictures),
    ]
    return reports.Report(
        entity=entity,
        project=project,
        title=title,
        blocks=[
            *([reports.MarkdownBlock(text=text)] if text else []),
            reports.PanelGrid(runsets=[runs], panels=panels),
        ],
    )
