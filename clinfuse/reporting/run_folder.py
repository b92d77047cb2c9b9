"""What a run's folder records of it: its configuration as it was written, and all for its cards."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml  # type: ignore[import-untyped]

from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.rows import read_rows, unperturbed

CONFIG, DIGEST = Path(".hydra") / "config.yaml", Path(".hydra") / "config.sha256"
"""A run's configuration, and what ``sha256sum`` says of it, as ``sha256sum -c`` reads it."""


def write_config(folder: Path, text: str) -> None:
    """Keep a run's configuration with its SHA-256; who is stopped in between leaves none."""
    (folder / DIGEST).unlink(missing_ok=True)
    write_atomically(folder / CONFIG, text)
    write_atomically(folder / DIGEST, f"{sha256_of(text)}  {CONFIG.name}\n")


def check_config(folder: Path) -> None:
    """Refuse a configuration that is not what the run wrote; one without a SHA-256 passes.

    Raises:
        ValueError: it was damaged or edited.
    """
    config, digest = folder / CONFIG, folder / DIGEST
    try:
        written, content = digest.read_bytes(), config.read_bytes()
    except FileNotFoundError:
        return
    if written[:64] != sha256_of(content).encode():
        raise ValueError(
            f"expected the configuration that the run has written, got one that was damaged or "
            f"edited since: {config} (the command that began the run puts it back; if it was "
            f"edited on purpose, remove {digest.name} beside it)"
        )


def sha256_of(content: str | bytes) -> str:
    """In 64 characters; of a text as UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """The records of a training or an evaluation; what a folder lacks is empty.

    Attributes:
        name: the run's, else the folder's.
        rows: of unperturbed cases.
        job: the entry point: ``train``, ``evaluate``; None where Hydra was not asked.
        config: as recorded, with its interpolations.
        choices: which option of each group of the configuration was taken.
        overrides: what the command line said.
        facts: versions, machine, commit, seed and what the data said of itself.
        cost: of the training.
        calibration: as fitted on validation cases.
        splits: case ids by split.
    """

    name: str
    rows: pd.DataFrame
    job: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    splits: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "RunFolder":
        """A folder that has been scored.

        Raises:
            FileNotFoundError: it has no ``cases.csv``.
            ValueError: a record that cannot be read, or a configuration as in ``check_config``.
        """
        folder = Path(folder)
        if not (folder / "cases.csv").is_file():
            raise FileNotFoundError(f"expected a scored run with cases.csv, found none: {folder}")
        check_config(folder)
        config = _record(folder / CONFIG)
        hydra = _record(folder / ".hydra" / "hydra.yaml").get("hydra") or {}
        return cls(
            name=str(config.get("name") or folder.resolve().name),
            rows=unperturbed(read_rows(folder / "cases.csv")),
            job=(hydra.get("job") or {}).get("name"),
            config=config,
            choices=(hydra.get("runtime") or {}).get("choices") or {},
            overrides=(hydra.get("overrides") or {}).get("task") or (),
            facts=_record(folder / "facts.json"),
            cost=_record(folder / "cost.json"),
            calibration=_record(folder / "calibration.json"),
            splits=_record(folder / "splits.json"),
        )

    @property
    def data(self) -> Mapping[str, Any]:
        """What the data said of itself."""
        return self.facts.get("data") or {}

    @property
    def versions(self) -> dict[str, str]:
        """Packages, machine and commit."""
        return {name: value for name, value in self.facts.items() if isinstance(value, str)}

    def setting(self, path: str) -> Any:
        """A value of the configuration, ``data.jitter.max_mm``; None where it is not a plain one.

        What refers to another place (``${seed}``) is looked up there.
        """
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, str) and "${" in value:
            inner = value[2:-1]
            is_plain = value.startswith("${") and value.endswith("}") and ":" not in inner
            return self.setting(inner) if is_plain and "{" not in inner and inner != path else None
        return value


def _record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(
            f"expected a record of a run, got {type(error).__name__}: {path}"
        ) from error
    return content if isinstance(content, dict) else {}
