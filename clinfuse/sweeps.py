"""What a sweep leaves beside its runs: the list of its jobs, and at its end their table."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from clinfuse.callbacks.wandb_report import publish_report
from clinfuse.configuration import SWEEP, commit
from clinfuse.reporting.atomic import write_atomically
from clinfuse.tables import tables_of_sweep


class SweepRecord(Callback):
    """Names a sweep's jobs before the first begins, so that a table can name those that lack."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        table = OmegaConf.to_container(config.get("table") or OmegaConf.create(), resolve=True)
        record = {
            "group": config.group,
            "scale": config.scale_name,
            "jobs": jobs_of(config),
            "table": table,
            "command": command_of(config),
            "commit": commit(),
        }
        write_atomically(folder / SWEEP, json.dumps(record, indent=1) + "\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.get("group") is None or not config.test:
            return
        try:
            written = tables_of_sweep(Path(config.hydra.sweep.dir))
        except (ValueError, FileNotFoundError) as error:  # Hydra would drop it
            print(f"clinfuse: no table: {error}", file=sys.stderr)
            return
        for path in written:
            print(f"{path.suffix[1:]}: {path}")
        to_wandb = (config.get("logger") or {}).get("wandb")
        if to_wandb and os.environ.get("WANDB_MODE", "online") == "online":
            address = publish_report(to_wandb.project, config.group, written[0].parent)
            print(f"report: {address or 'only in the folder'}")


def command_of(config: DictConfig) -> str:
    """The command line that began a sweep."""
    return " ".join(["python -m clinfuse.train -m", *asked_of(config)])


def asked_of(config: DictConfig) -> list[str]:
    """The command line's own overrides, as they were written."""
    written = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(written, list)
    return list(map(str, written))


def jobs_of(config: DictConfig) -> list[list[str]]:
    """What each job of a grid has of its own; empty for a sweep that finds its jobs on the way.

    Of the command line and ``hydra.sweeper.params``, multiplied out by Hydra's own sweeper. What
    the params sweep is a job's own, even if the command line leaves it one value.
    """
    if "basic_sweeper" not in config.hydra.sweeper._target_:
        return []
    params = config.hydra.sweeper.get("params") or {}
    asked = [*(f"{name}={value}" for name, value in params.items()), *asked_of(config)]
    parsed = OverridesParser.create().parse_overrides(overrides=asked)
    last = {override.get_key_element(): override for override in parsed}
    swept = [
        override
        for name, override in last.items()
        if override.is_sweep_override() or name in params
    ]
    return [list(job) for job in BasicSweeper.split_arguments(swept, None)[0]]
