"""Runs and evaluations to a paper's tables: ``python -m clinfuse.tables from=[RUNS] out=A``."""

import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pandas as pd
import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clinfuse.allowed import check_references
from clinfuse.configuration import (
    CONFIG_PATH,
    LESION_HEAD,
    SWEEP,
    in_one_sentence,
    quiet_libraries,
    register_resolvers,
)
from clinfuse.data.splits import SPLITS_FILES, read_splits
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.collection import Scored, merged
from clinfuse.reporting.figures import figure_png, robustness_figure
from clinfuse.reporting.latex import figure_pdf, latex
from clinfuse.reporting.paper import (
    GROUPS,
    PaperTable,
    Score,
    long_table,
    markdown,
    ours_last,
    paper_table,
    provenance,
)
from clinfuse.reporting.parameters import Axis, parameter_figure
from clinfuse.reporting.robustness import FILES as PERTURBED
from clinfuse.reporting.robustness import robustness_files, robustness_of
from clinfuse.reporting.rows import as_rows, read_rows
from clinfuse.reporting.run_folder import CONFIG, check_config
from clinfuse.reporting.tables import headline, headline_scores, print_table

register_resolvers()

TABLES_PATH = str(Path(CONFIG_PATH) / "tables")
"""A folder of its own: beside the group ``experiment`` Hydra would take experiment=NAME for it."""

CASES = "cases.csv"


class LeftOut(NamedTuple):
    """What was asked for and is in no table, and why; ``is_missing`` where nothing is there."""

    folder: str
    reason: str
    is_missing: bool = False

    def __str__(self) -> str:
        return f"{'missing' if self.is_missing else 'left out'}: {self.folder} {self.reason}"


@dataclass(frozen=True)
class Collected:
    """The folders of scores that were found, and those that have none to offer."""

    scored: Sequence[Scored]
    left_out: Sequence[LeftOut]


@hydra.main(version_base="1.3", config_path=TABLES_PATH, config_name="tables")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Collect the folders and write their tables; name what could not be collected."""
    quiet_libraries()
    asked, scale = cfg["from"], cfg.scale
    if (asked is None) == (cfg.experiment is None):
        raise ValueError("expected either from=[FOLDERS] or experiment=NAME, a sweep's")
    if cfg.experiment is not None:
        folder = Path("runs", "sweeps", str(cfg.experiment), *([str(scale)] if scale else []))
        for path in tables_of_sweep(folder, None if cfg.out is None else Path(str(cfg.out))):
            print(f"{path.suffix[1:]}: {path}")
        return
    if cfg.out is None:
        raise ValueError("expected out=FOLDER for the tables, got none")
    patterns = [str(p) for p in (asked if isinstance(asked, ListConfig) else [asked])]
    out = Path(str(cfg.out))
    collected = collect(patterns, out)
    for left in collected.left_out:
        print(f"clinfuse: {left}", file=sys.stderr)
    ours = None if cfg.ours is None else str(cfg.ours)
    name = str(cfg.name or out.resolve().name)
    scores = [cfg.scores] if isinstance(cfg.scores, str) else list(cfg.scores or GROUPS)
    for path in write_tables(collected, out, ours, scores, name):
        print(f"{path.suffix[1:]}: {path}")


def tables_of_sweep(folder: Path, out: Path | None = None) -> list[Path]:
    """The tables of a sweep, with its jobs named as it says; returns their paths.

    Args:
        folder: of the sweep, with ``sweep.json``.
        out: where the tables go; None is ``table`` in the sweep's folder.

    Raises:
        FileNotFoundError: no sweep has been begun there.
        ValueError: as ``write_tables``.
    """
    if not (folder / SWEEP).is_file():
        raise FileNotFoundError(
            f"expected a sweep with {SWEEP}, found none (python -m clinfuse.train -m sweep=NAME "
            f"scale=SCALE begins one): {folder}"
        )
    sweep = _json(folder / SWEEP)
    table = sweep.get("table") or {}
    out = folder / "table" if out is None else out
    jobs = [job for job in _folders(folder.iterdir()) if (job / CONFIG.parent).is_dir()]
    collected = collect(map(str, jobs), out)
    lacking = never_begun(folder, sweep.get("jobs") or [])
    for left in [*collected.left_out, *lacking]:
        print(f"clinfuse: {left}", file=sys.stderr)
    names = table.get("names") or {}
    scored = [_renamed(part, names) for part in collected.scored]
    collected = Collected(scored, [*collected.left_out, *lacking])
    return write_tables(
        collected,
        out,
        ours=table.get("ours"),
        scores=table.get("scores") or tuple(GROUPS),
        name=str(sweep.get("group")),
        may_differ=table.get("may_differ") or (),
        axis=None if table.get("axis") is None else axis_of(scored, **table["axis"]),
        command=sweep.get("command"),
    )


def never_begun(folder: Path, jobs: Sequence[Sequence[str]]) -> list[LeftOut]:
    """The jobs of a sweep, by their overrides, that have no folder."""
    files = folder.rglob(".hydra/overrides.yaml")
    begun = [{str(override) for override in yaml.safe_load(f.read_text()) or []} for f in files]
    return [
        LeftOut(str(folder), f"has no run of {' '.join(job)}: it was never begun", is_missing=True)
        for job in jobs
        if not any(set(job) <= overrides for overrides in begun)
    ]


def _renamed(part: Scored, names: dict[str, str]) -> Scored:
    rows = part.rows.assign(method=[readable(method, names) for method in part.rows["method"]])
    return replace(part, rows=rows)


def readable(label: str, names: Mapping[str, str]) -> str:
    """A job's overrides as a reader would say them: ``guidance.eta=0.1`` as ``η 0.1``.

    Args:
        label: of a run.
        names: what stands for what, the longest first; what is left of ``=`` becomes a space.
    """
    label = label.replace("_", " ")
    for long in sorted(names, key=len, reverse=True):
        label = label.replace(long.replace("_", " "), names[long])
    return " ".join(label.replace("=", " ").replace(",", ", ").split())


def axis_of(scored: Sequence[Scored], key: str, name: str) -> Axis:
    """What a sweep varies in numbers: by method's name, the value that its run's settings have.

    Args:
        scored: folders of runs.
        key: of a setting, ``method.steps``.
        name: of it, as the methods' names have it: ``steps`` of ``ddim, steps 10``.
    """
    values: dict[str, tuple[str, float]] = {}
    for part in scored:
        cfg = config_of(Path(part.folder))
        value = None if cfg is None else OmegaConf.select(cfg, key)
        if isinstance(value, int | float):
            for method in map(str, part.rows["method"].unique()):
                series = re.sub(rf"(, )?{re.escape(name)} [-+.\de]+", "", method).strip(", ")
                values[method] = series, float(value)
    return Axis(name, values)


def collect(patterns: Iterable[str], out: Path) -> Collected:
    """The scores in all folders that are named, or match, or lie below one that does.

    Args:
        patterns: folders, or globs (``**`` reaches any depth).
        out: a folder that is written to, and not read from.
    """
    left_out: list[LeftOut] = []
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        found = [folder for match in _matches(pattern) for folder in scored_folders(match, out)]
        folders |= {folder.resolve(): folder for folder in found}
        if not found:
            there = "holds no run and no evaluation" if _matches(pattern) else "matches no folder"
            left_out.append(LeftOut(pattern, there, is_missing=True))
    scored = []
    for folder in folders.values():
        try:
            scored.append(read_scored(folder))
        except (ValueError, FileNotFoundError) as error:
            left_out.append(LeftOut(str(folder), _one_line(error)))
    return Collected(scored, left_out)


def _matches(pattern: str) -> list[Path]:
    """Folders by a name or a glob; what is the very name of a folder is no glob."""
    if Path(pattern).is_dir():
        return [Path(pattern)]
    return _folders(map(Path, glob.glob(pattern, recursive=True)))


def _folders(paths: Iterable[Path]) -> list[Path]:
    """Those that are folders, sorted, with job 10 after job 9."""

    def key(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", str(path))
        return [(len(part) if part.isdigit() else 0, part) for part in parts]

    return sorted((path for path in paths if path.is_dir()), key=key)


def scored_folders(folder: Path, out: Path) -> Iterator[Path]:
    """Runs and evaluations in a folder, or itself; below one that has scores nothing is looked for.

    A folder that Hydra has not made is one where it has ``cases.csv`` and no other has any below
    it: the folder of a sweep may hold all its jobs' rows together.
    """
    is_run = (folder / CONFIG).is_file() and is_of_a_run(folder)
    if is_run and (folder / CASES).is_file():
        yield folder
        return
    below = [
        found
        for inner in _folders(folder.iterdir())
        if not inner.name.startswith(".") and not inner.is_symlink()
        for found in scored_folders(inner, out)
    ]
    if is_run or ((folder / CASES).is_file() and not below and folder.resolve() != out.resolve()):
        yield folder
    yield from below


def is_of_a_run(folder: Path) -> bool:
    """Whether Hydra's record in a folder is of a training or an evaluation, as far as it says."""
    try:
        cfg = config_of(folder)
    except ValueError:
        return True  # to be named, not overlooked
    return cfg is not None and "data" in cfg


def config_of(folder: Path) -> DictConfig | None:
    """The configuration that Hydra recorded in a folder; None where it has not been.

    Raises:
        ValueError: it cannot be read, or is not what the run wrote.
    """
    check_config(folder)
    return _yaml(folder / CONFIG)


def _yaml(path: Path) -> DictConfig | None:
    if not path.is_file():
        return None
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"has a configuration that cannot be read: {path}") from error
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"has a configuration that is none: {path}")
    return cfg


def read_scored(folder: Path) -> Scored:
    """The scores in a folder and what it records of them.

    Raises:
        ValueError: it has none, or they or its records cannot be read.
    """
    cfg = config_of(folder)
    if not (folder / CASES).is_file():
        raise ValueError(_why_not_scored(cfg))
    rows = read_rows(folder / CASES)
    if rows.empty:
        raise ValueError(f"has no rows in its {CASES}")
    facts = [_json(folder / "facts.json")]
    recorded = facts[0].get("data")
    recorded = recorded if isinstance(recorded, dict) else {}
    runs = [] if cfg is None else runs_scored(folder, cfg)
    facts += [_json(run / "facts.json") for run in runs]
    if cfg is not None and _is_evaluation(cfg) and not _chose_data(folder, cfg):
        cfg = config_of(runs[0]) if runs else None
    data = {} if cfg is None else _resolved(cfg.get("data"))
    splits = read_splits(folder)
    source = [_json(folder / name).get("source") for name in SPLITS_FILES if splits]
    return Scored(
        folder=str(folder),
        rows=rows,
        test_cases=None if splits is None else splits["test"],
        split=next(filter(None, [recorded.get("splits_source"), *source]), None),
        root=recorded.get("root") or data.get("root"),
        data=data_facts(data, recorded),
        facts=[{k: v for k, v in f.items() if isinstance(v, str)} for f in facts if f],
        has_commit="commit" in facts[0],
    )


def _why_not_scored(cfg: DictConfig | None) -> str:
    if cfg is not None and cfg.get("test") is False:
        return "was not to be scored (test=false): clinfuse.evaluate run=FOLDER scores it"
    if cfg is not None and (cfg.get("method") or {}).get("_target_") == LESION_HEAD:
        return "is a lesion head, which fuses nothing"
    return f"has no {CASES}: it failed, was stopped, or still runs"


def _is_evaluation(cfg: DictConfig) -> bool:
    return "baselines" in cfg


def _chose_data(folder: Path, cfg: DictConfig) -> bool:
    """Whether an evaluation was of the data in its own configuration, not of its first run's."""
    path = folder / ".hydra" / "overrides.yaml"
    text = path.read_text() if path.is_file() else ""
    return cfg.get("run") is None or re.search(r"^\W*data[=.@]", text, re.MULTILINE) is not None


def runs_scored(folder: Path, cfg: DictConfig) -> list[Path]:
    """Folders of the runs that an evaluation scored, those that can be found from here."""
    if not _is_evaluation(cfg) or cfg.get("run") is None:
        return []
    named = cfg.run if isinstance(cfg.run, ListConfig) else [cfg.run]
    recorded = _yaml(folder / ".hydra" / "hydra.yaml") or OmegaConf.create()
    then = OmegaConf.select(recorded, "hydra.runtime.cwd", default=".")
    asked = [Path(str(run)) for run in named]
    places = [[Path(str(then)) / run, run, folder / run.name] for run in asked]
    found = [[place for place in of if (place / CONFIG).is_file()] for of in places]
    return [of[0] for of in found if of]


def _resolved(node: Any) -> dict[str, Any]:
    if not OmegaConf.is_config(node):
        return {}
    try:
        check_references(OmegaConf.to_container(node, resolve=False), CONFIG)
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"has a configuration of data that cannot be read ({error})") from error
    return {str(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}


def data_facts(data: dict[str, Any], recorded: dict[str, Any]) -> dict[str, str]:
    """What must be alike where scores are compared, by the words for it; what is unknown is absent.

    Args:
        data: the configuration of a DataModule; empty where it is not known.
        recorded: what the DataModule said of itself.
    """
    facts: dict[str, Any] = {}
    if data:
        made = data.get("prepare") or {}
        target = str(data.get("_target_", "")).rsplit(".", 1)[-1]
        kind = {"PairedVolumes": "volumes", "PairedSlices": "2-D pairs"}.get(target, target)
        facts["kind of data"] = ("generated " if made else "") + kind
        drawn = {k: v for k, v in made.items() if k not in ("_target_", "_partial_", "workers")}
        facts["cohort"] = ", ".join(f"{k} {_said(v)}" for k, v in drawn.items()) or None
        facts["CT map"] = data.get("ct_map")
        facts["voxel size asked for (mm)"] = data.get("resample_mm")
        facts["turn for each mm of misregistration (degrees)"] = data.get(
            "misregistration_deg_per_mm"
        )
        facts["seed of misregistrations"] = data.get("misregistration_seed")
    facts["kind of pairs"] = data.get("kind") or recorded.get("kind")
    facts["units of CT"] = recorded.get("ct_units")
    facts["CT maps applied"] = recorded.get("ct_maps")
    facts["voxel sizes (mm)"] = recorded.get("spacings_mm_dhw")
    facts["pixel size (mm)"] = recorded.get("pixel_mm")
    return {name: _said(value) for name, value in facts.items() if value is not None}


def _said(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:g}" if isinstance(value, int | float) else str(value)
    apart = " × " if all(isinstance(v, int | float) for v in value) else ", "
    return apart.join(map(_said, value)) or "none"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a {path.name} that cannot be read: {path}") from error
    return content if isinstance(content, dict) else {}


def write_tables(
    collected: Collected,
    out: Path,
    ours: str | None = None,
    scores: Sequence[str] = tuple(GROUPS),
    name: str = "table",
    may_differ: Sequence[str] = (),
    axis: Axis | None = None,
    command: str | None = None,
) -> list[Path]:
    """Write all tables and figures into a folder, each file whole or not at all; returns paths.

    Nothing is written where anything is refused.

    Args:
        collected: from ``collect``.
        out: a folder of its own.
        ours: the method that the others are tested against; None tests none.
        scores: names of ``GROUPS`` and of single scores, ``bone/psnr``.
        name: of the LaTeX labels.
        may_differ: facts of the data that may differ within the table, which then says so.
        axis: what the methods differ in, where that is a number: adds ``curves.png`` and ``.pdf``.
        command: that made the runs, for the table's end.

    Raises:
        ValueError: nothing was collected, or what was may not stand in one table; ``out`` is one
            of the folders; ``ours`` has no rows and no folder was left out that may have had them;
            a score that is none.
    """
    scored, left_out = collected.scored, collected.left_out
    if not scored:
        reasons = "; ".join(map(str, left_out[:3])) or "nothing was asked for"
        reasons += f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise ValueError(f"expected folders with {CASES}, got none: {reasons}")
    if out.resolve() in {Path(part.folder).resolve() for part in scored}:
        raise ValueError(f"expected a folder of its own as out, got one of the scores: {out}")
    rows = as_rows(merged(scored, may_differ))
    groups = groups_of(scores, rows)
    named = ours_last(rows, ours)
    methods = list(named["method"].unique())
    if ours is not None and ours not in methods:
        if not left_out:
            raise ValueError(
                f"expected one of {', '.join(methods)} as ours (or ours=null), got {ours}"
            )
        print(f"clinfuse: no scores of {ours}, so nothing is tested against it", file=sys.stderr)
        ours = None
    wanted = list(dict.fromkeys(score for _, of in groups.values() for score in of))
    long = long_table(named, wanted, ours)
    if long.empty:
        raise ValueError(
            f"expected rows of {', '.join(groups)}, got none: "
            f"{', '.join(sorted(_known_scores(rows)))}"
        )
    origin = provenance(rows, scored)
    made = [
        paper_table(named, key, title, of, ours, origin, long)
        for key, (title, of) in groups.items()
    ]
    tables = [table for table in made if table is not None]
    files: dict[str, str | bytes] = {
        CASES: rows.to_csv(index=False, na_rep="nan", lineterminator="\n"),
        "table.csv": long.to_csv(index=False, na_rep="nan", lineterminator="\n"),
        "table.md": markdown_file(tables, scored, left_out, command),
        "table.tex": latex_file(tables, name, scored, left_out),
    }
    curves = next(headline(named, of) for _, of in groups.values() if set(of) & _defined(long))
    if long["misregistration_mm"].nunique() > 1:
        files |= curves_of(curves, ours)
    if axis is not None and len(axis.values) > 1:
        figure = parameter_figure(long, axis)
        files |= {"curves.png": figure_png(figure), "curves.pdf": figure_pdf(figure)}
    if (robustness := robustness_of(rows, ours)) is not None:
        files |= robustness_files(*robustness)
    figures = {f"{figure}.{kind}" for figure in FIGURES for kind in ("png", "pdf")}
    for stale in {*figures, *PERTURBED} - set(files):
        (out / stale).unlink(missing_ok=True)
    print_table(headline(named, headline_scores(curves)[:MOST_PRINTED]), name)
    return [write_atomically(out / file, content) for file, content in files.items()]


FIGURES = ("robustness", "curves")

MOST_PRINTED = 5
"""Scores that a terminal has room for."""


def groups_of(
    scores: Sequence[str], rows: pd.DataFrame
) -> dict[str, tuple[str, tuple[Score, ...]]]:
    """Groups of scores as ``GROUPS``, single ones together in a group ``scores``.

    Raises:
        ValueError: a name that is neither a group's nor a score's of the rows.
    """
    known = _known_scores(rows)
    unknown = [name for name in scores if name not in GROUPS and name not in known]
    if unknown:
        raise ValueError(
            f"expected scores of {', '.join(GROUPS)} or single ones of {', '.join(sorted(known))}, "
            f"got {', '.join(unknown)}"
        )
    groups = {name: GROUPS[name] for name in scores if name in GROUPS}
    single = tuple(known[name] for name in scores if name not in GROUPS)
    return groups | ({"scores": ("Scores", single)} if single else {})


def _known_scores(rows: pd.DataFrame) -> dict[str, Score]:
    pairs = rows[["roi", "metric"]].drop_duplicates().itertuples(index=False)
    return {f"{roi}/{metric}": (roi, metric) for roi, metric in pairs}


def _defined(long: pd.DataFrame) -> set[Score]:
    return set(zip(long["roi"], long["metric"], strict=True))


def curves_of(table: pd.DataFrame, ours: str | None) -> dict[str, str | bytes]:
    """``robustness.png`` and ``.pdf`` of a headline table; a dollar in a name is a dollar."""
    table = table.rename(index=lambda method: method.replace("$", r"\$"))
    figure = robustness_figure(table, None if ours is None else ours.replace("$", r"\$"))
    return {"robustness.png": figure_png(figure), "robustness.pdf": figure_pdf(figure)}


def markdown_file(
    tables: Sequence[PaperTable],
    scored: Sequence[Scored],
    left_out: Sequence[LeftOut],
    command: str | None = None,
) -> str:
    """All tables, then where they are from and what they lack."""
    parts = [*map(markdown, tables)]
    parts += [_bullets("Made by", [command])] if command else []
    parts += [_bullets("Collected from", [p.folder for p in scored])]
    parts += [_bullets("Not collected", list(map(str, left_out)))] if left_out else []
    return "\n".join(parts)


def latex_file(
    tables: Sequence[PaperTable],
    name: str,
    scored: Sequence[Scored],
    left_out: Sequence[LeftOut],
) -> str:
    """All tables to ``\\input``, below comments that say where they are from."""
    lines = [r"needs \usepackage{booktabs}", *(f"from {part.folder}" for part in scored)]
    comments = [f"% {_one_line(line)}\n" for line in [*lines, *map(str, left_out)]]
    return "".join(comments) + "\n" + "\n".join(latex(t, f"{name}-{t.name}") for t in tables)


def _bullets(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:\n", *(f"- `{_one_line(line)}`" for line in lines)]) + "\n"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


if __name__ == "__main__":
    main()
