"""What W&B keeps of a run, read back by W&B."""

import json
import os
import subprocess
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb


@dataclass
class Reading:
    """An offline run as ``wandb leet inspect``, W&B's own reader, gives it out.

    ``history`` has one entry a call of ``log``; nested names are joined by dots.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def curve(self, name: str) -> dict[int, float]:
        """Values by training step."""
        return {row["trainer/global_step"]: row[name] for row in self.history if name in row}

    def table(self, name: str) -> list[dict[str, Any]]:
        """The lines of a table, by column."""
        content = json.loads((self.folder / "files" / self.summary[f"{name}.path"]).read_text())
        return [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]

    def pictures(self, name: str) -> dict[str, Path]:
        """Pictures that were logged last under a name, by caption."""
        files = [self.folder / "files" / file for file in self.summary[f"{name}.filenames"]]
        return dict(zip(self.summary[f"{name}.captions"], files, strict=True))


def read_wandb(run_folder: Path) -> Reading:
    """The one W&B run in a run's folder."""
    (folder,) = run_folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "No such command" in done.stderr:
        pytest.skip(f"wandb {wandb.__version__} has no reader: wandb leet inspect")
    assert done.returncode == 0, done.stderr
    reading = Reading(folder)
    for record in map(json.loads, done.stdout.splitlines()):
        content = record.get(record["type"], {})
        match record["type"]:
            case "run":
                reading.run = dict(ChainMap(content, reading.run))
                reading.config |= content.get("config", {}).get("update", {})
            case "config":
                reading.config |= content["update"]
            case "history":
                reading.history.append(content["item"])
            case "summary":
                reading.summary |= content["update"]
            case "exit":
                reading.exit_code = content.get("exit_code", 0)
    return reading


@pytest.fixture
def wandb_reading() -> Callable[[Path], Reading]:
    """Reads the W&B run in a folder."""
    return read_wandb


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without any trace of W&B, whose session reads the environment anew."""
    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_SILENT", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    wandb.teardown()
