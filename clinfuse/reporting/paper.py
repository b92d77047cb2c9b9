"""Rows to the tables of a paper, with tests against ours: as long CSV and as Markdown.

``latex.py`` prints the same tables for LaTeX.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from clinfuse.reporting.collection import Scored
from clinfuse.reporting.rows import Rows, as_rows, unperturbed
from clinfuse.reporting.tables import (
    FEWEST_PATIENTS,
    HEADLINE_SCORES,
    KEPT_SCORES,
    LESION_SCORES,
    LOCALISATION_SCORES,
    LOWER_IS_BETTER,
    NEITHER_IS_BETTER,
    SEEN_SCORES,
    Cell,
    amplitudes_mm,
    better,
    headline,
    headline_scores,
    name_variants,
    paired_differences,
    score_cells,
    score_label,
    summary,
)

Score = tuple[str, str]

GROUPS: dict[str, tuple[str, tuple[Score, ...]]] = {
    "quality": ("Fusion quality", HEADLINE_SCORES),
    "kept": ("What is kept of both sources", KEPT_SCORES),
    "lesion": ("How well a lesion is found in the fused image", LESION_SCORES),
    "localisation": ("How well lesions are localised", LOCALISATION_SCORES),
    "conspicuity": ("Conspicuity of findings", SEEN_SCORES),
}
"""Scores that make a table together, by name, and what the table is called."""

LEVEL = 0.05
"""A p-value below it, corrected, is a difference."""

SIGNS = {"win": "+", "loss": "−", "tie": "=", "": ""}
"""What stands beside a method's number: ours is better, worse, or no difference was shown."""

LONG_COLUMNS = (
    *("method", "roi", "metric", "misregistration_mm"),
    *("mean", "low", "high", "n", "patients", "undefined"),
    *("difference", "pairs", "p", "p_holm", "rank_biserial", "mark"),
)
"""Of ``long_table``, in order."""

MOST_COLUMNS = 5
"""Columns of numbers that a printed page has room for."""


def ours_last(rows: Rows, ours: str | None) -> pd.DataFrame:
    """The unperturbed rows with variants named, our method's after those of all others."""
    frame = name_variants(unperturbed(rows))
    is_ours = frame["method"] == ours
    return pd.concat([frame[~is_ours], frame[is_ours]], ignore_index=True)


def long_table(rows: Rows, scores: Sequence[Score], ours: str | None = None) -> pd.DataFrame:
    """One row a method, score and misregistration: its statistics, and its test against ours.

    Args:
        rows: as ``cases.csv``.
        scores: (roi, metric) pairs; those that no row defines are left out.
        ours: the method that the others are compared with; None compares none.

    Returns:
        ``LONG_COLUMNS``. ``difference`` is ours less the method's, over ``pairs`` patients, and
        ``mark`` is ``win`` where ours is better at ``LEVEL``, ``loss`` where it is worse, ``tie``
        where no difference is shown, and empty where nothing was tested.

    Raises:
        ValueError: no row is from ``ours``.
    """
    named = name_variants(unperturbed(rows))
    defined = named[named["value"].notna()].groupby(["roi", "metric"]).groups
    scores = [score for score in scores if score in defined]
    frame = named[pd.MultiIndex.from_frame(named[["roi", "metric"]]).isin(scores)]
    table = summary(frame)
    compared = [*LONG_COLUMNS[10:15]]
    if ours is not None and ours not in (methods := set(named["method"])):
        raise ValueError(f"expected one of {sorted(methods)} as ours, got {ours!r}")
    if ours is None or ours not in set(frame["method"]):
        table = table.assign(**dict.fromkeys(compared, math.nan))
    else:
        tests = paired_differences(frame, ours)
        tests = tests.drop(columns=["low", "high"]).rename(columns={"n": "pairs"})
        table = table.merge(tests, on=[*LONG_COLUMNS[:4]], how="left")
    table["mark"] = [
        _mark(*line)
        for line in table[["metric", "p_holm", "rank_biserial"]].itertuples(index=False)
    ]
    order = {score: number for number, score in enumerate(scores)}
    table["order"] = [order[score] for score in zip(table["roi"], table["metric"], strict=True)]
    return table.sort_values("order", kind="stable", ignore_index=True)[list(LONG_COLUMNS)]


def _mark(metric: str, p_holm: float, rank_biserial: float) -> str:
    if math.isnan(p_holm) or metric in NEITHER_IS_BETTER:
        return ""
    if p_holm >= LEVEL:
        return "tie"
    is_higher = rank_biserial > 0  # the direction that was tested; a mean may follow one outlier
    return "win" if is_higher != (metric in LOWER_IS_BETTER) else "loss"


class Column(NamedTuple):
    """What a column of numbers shows."""

    score: Score
    amplitude_mm: float
    header: str


class Entry(NamedTuple):
    """A cell, and its sign against ours."""

    cell: Cell
    sign: str


class Panel(NamedTuple):
    """Methods by columns, under a title; its lines go by method."""

    title: str
    columns: list[Column]
    lines: dict[str, list[Entry]]


@dataclass(frozen=True)
class PaperTable:
    """A printed table before it is Markdown or LaTeX.

    Attributes:
        name: of ``GROUPS``, or another that a label can have.
        caption: sentences.
        panels: stand below one another.
        notes: sentences below the table.
        ours: the method set off from the others, or None.
    """

    name: str
    caption: Sequence[str]
    panels: Sequence[Panel]
    notes: Sequence[str]
    ours: str | None


def paper_table(
    rows: Rows,
    name: str,
    title: str,
    scores: Sequence[Score],
    ours: str | None = None,
    provenance: Sequence[str] = (),
    long: pd.DataFrame | None = None,
) -> PaperTable | None:
    """A table of some scores, or None where no row defines any of them.

    Args:
        rows: as ``cases.csv``; methods stand in their order.
        name: for its label.
        title: what its caption begins with.
        scores: (roi, metric) pairs.
        ours: as in ``long_table``.
        provenance: sentences that the caption ends with.
        long: ``long_table`` of the same rows, where it is known already.
    """
    table = headline(rows, scores)
    shown = headline_scores(table)
    if not shown:
        return None
    long = long_table(rows, shown, ours) if long is None else long
    long = long[pd.MultiIndex.from_frame(long[["roi", "metric"]]).isin(shown)]
    tested = as_rows(rows)[["case_id", "patient_id"]].nunique()
    caption = [*_caption(title, long, ours, *tested), *provenance]
    return PaperTable(name, caption, _panels(table, long), _notes(long, shown, ours), ours)


def _panels(table: pd.DataFrame, long: pd.DataFrame) -> list[Panel]:
    """One amplitude gives methods by scores; several give each score a panel by amplitudes."""
    key = ["method", "roi", "metric", "misregistration_mm"]
    signs = {tuple(line[:4]): SIGNS[line[4]] for line in long[[*key, "mark"]].to_numpy()}
    scores = headline_scores(table)
    amplitudes = sorted({a for score in scores for a in amplitudes_mm(table, *score)})
    titles = {score: f"{score_label(*score)} {better(score[1])}".strip() for score in scores}
    if len(amplitudes) == 1:
        columns = [Column(score, amplitudes[0], titles[score]) for score in scores]
        parts = [("", part) for part in _chunks(columns)]
    else:
        parts = [
            (titles[score], part)
            for score in scores
            for part in _chunks(
                [Column(score, a, f"{a:g} mm") for a in amplitudes_mm(table, *score)]
            )
        ]
    cells = {score: score_cells(table, *score) for score in scores}
    at = {score: amplitudes_mm(table, *score) for score in scores}

    def entry(method: str, column: Column) -> Entry:
        cell = cells[column.score][method][at[column.score].index(column.amplitude_mm)]
        return Entry(cell, signs.get((method, *column.score, column.amplitude_mm), ""))

    return [
        Panel(
            title, part, {str(m): [entry(str(m), column) for column in part] for m in table.index}
        )
        for title, part in parts
    ]


def _chunks(columns: Sequence[Column]) -> list[list[Column]]:
    """As few parts as have at most ``MOST_COLUMNS``, of nearly equal size."""
    parts = math.ceil(len(columns) / MOST_COLUMNS)
    size = math.ceil(len(columns) / parts)
    return [list(columns[start : start + size]) for start in range(0, len(columns), size)]


def _caption(
    title: str, long: pd.DataFrame, ours: str | None, cases: int, patients: int
) -> list[str]:
    defined, of = int(long["n"].max()), int(long["patients"].max())
    are_of = f"{_count(cases, 'test case')} of {_count(patients, 'patient')}"
    if defined < cases:
        are_of = f"the {defined} of {are_of} that have a value"
    amplitudes = sorted(long["misregistration_mm"].unique())
    interval = (
        f"without intervals, which need {FEWEST_PATIENTS} patients"
        if of < FEWEST_PATIENTS
        else "± half the width of its 95% bootstrap interval over patients"
    )
    moved = _listed(f"{a:g}" for a in amplitudes)
    moved = f"moved by {moved} mm" if any(amplitudes) else "not moved"
    sentences = [f"{title}: mean over {are_of}, {interval}.", f"The second source was {moved}."]
    if long["method"].nunique() > 1:
        sentences.append(
            "Best of each column bold, second best underlined; ↑ higher is better, ↓ lower is."
        )
    if ours is not None and (long["mark"] != "").any():
        sentences.append(
            f"Against {ours}, two-sided paired Wilcoxon tests of patients' means at {LEVEL:g}, "
            f"corrected by Holm over the methods of a column: {SIGNS['win']} {ours} is better, "
            f"{SIGNS['loss']} it is worse, {SIGNS['tie']} no difference is shown."
        )
    return sentences


def _notes(long: pd.DataFrame, scores: Sequence[Score], ours: str | None) -> list[str]:
    notes = []
    if total := int(long["undefined"].sum()):
        by_score = long.groupby(["roi", "metric"], sort=False)["undefined"].sum()
        parts = [f"{score_label(*score)} {by_score[score]}" for score in scores if by_score[score]]
        notes.append(f"Undefined values, left out of means: {total} ({', '.join(parts)}).")
    else:
        notes.append("No value is undefined.")
    tested = long[long["mark"] != ""]
    if ours is not None and len(tested):
        counts = []
        for score in scores:
            of = tested[(tested["roi"] == score[0]) & (tested["metric"] == score[1])]["mark"]
            if len(of):
                numbers = "/".join(str((of == mark).sum()) for mark in ("win", "tie", "loss"))
                counts.append(f"{score_label(*score)} {numbers}")
        notes.append(f"{ours} is better/not different/worse: {', '.join(counts)}.")
        notes += _power(tested, scores)
    return notes


def _power(tested: pd.DataFrame, scores: Sequence[Score]) -> list[str]:
    """A sentence on scores where even differences of one sign in all patients would not be shown.

    Of n differences the signs fall all alike with probability 2 / 2^n, which is the smallest p.
    """
    columns = tested.groupby(["roi", "metric", "misregistration_mm"])
    column = columns.agg(pairs=("pairs", "max"), comparisons=("p", "count"))
    column["smallest"] = column["comparisons"] * 2.0 ** (1 - column["pairs"])
    column = column.sort_values("smallest").reset_index().drop_duplicates(["roi", "metric"])
    shown = ["roi", "metric", "pairs", "comparisons"]
    few = column.loc[column["smallest"] >= LEVEL, shown].to_numpy()
    sizes = {
        (roi, metric): f"{_count(pairs, 'patient')}, {_count(comparisons, 'comparison')}"
        for roi, metric, pairs, comparisons in few
    }
    parts = [f"{score_label(*score)} ({sizes[score]})" for score in scores if score in sizes]
    return [f"Too few patients for any difference to be shown: {', '.join(parts)}."] * bool(parts)


def provenance(rows: Rows, scored: Sequence[Scored]) -> list[str]:
    """Sentences on data, split, seeds, versions and commits of what was collected."""
    roots = list(dict.fromkeys(part.root for part in scored if part.root))
    data: dict[str, dict[str, None]] = {}
    for part in scored:
        for name, value in part.data.items():
            data.setdefault(name, {})[value] = None  # several, where a table compares them
    described = [_listed(roots)] if roots else []
    described += [f"{name} {_listed(values)}" for name, values in data.items()]
    splits = [
        "the lists that came with the data" if part.split == part.root else part.split
        for part in scored
        if part.split
    ]
    return [
        f"Data: {'; '.join(described) or 'not recorded'}.",
        f"Split: {_listed(dict.fromkeys(splits)) if splits else 'not recorded'}.",
        _seeds(unperturbed(rows)),
        _versions([facts for part in scored for facts in part.facts]),
        _commits(scored),
    ]


def _seeds(frame: pd.DataFrame) -> str:
    of_method = name_variants(frame).groupby("method", sort=False)["seed"].unique()
    seeds = {method: _listed(map(str, sorted(found))) for method, found in of_method.items()}
    if len(set(seeds.values())) == 1:
        (alike,) = set(seeds.values())
        return f"Seed: {alike}." if alike.isdigit() else f"Seeds: {alike}, averaged within a case."
    by_seeds: dict[str, list[str]] = {}
    for method, found in seeds.items():
        by_seeds.setdefault(found, []).append(str(method))
    parts = [f"{found} of {_listed(methods)}" for found, methods in by_seeds.items()]
    return f"Seeds, averaged within a case: {'; '.join(parts)}."


def _versions(facts: Sequence[Mapping[str, str]]) -> str:
    names = ("clinfuse", "python", "torch", "lightning", "monai", "torchio", "numpy")
    found = {name: list(dict.fromkeys(f[name] for f in facts if name in f)) for name in names}
    parts = [f"{name} {_listed(versions)}" for name, versions in found.items() if versions]
    return f"Versions: {', '.join(parts) if parts else 'not recorded'}."


def _commits(scored: Sequence[Scored]) -> str:
    commits = list(dict.fromkeys(f["commit"] for p in scored for f in p.facts if "commit" in f))
    lacking = [part.folder for part in scored if not part.has_commit]
    word = "Commit" if len(commits) == 1 else "Commits"
    text = f"{word}: {_listed(commits) if commits else 'not recorded'}"
    if lacking and commits:
        text += f", and none recorded of the scoring in {_listed(lacking)}"
    return text + "."


def markdown(table: PaperTable) -> str:
    """A table in GitHub's Markdown: its caption, its panels, its notes."""
    parts = [_markdown_text(" ".join(table.caption))]
    for panel in table.panels:
        header = [panel.title or "method", *(column.header for column in panel.columns)]
        body = [
            [method, *(_markdown_entry(entry) for entry in line)]
            for method, line in panel.lines.items()
        ]
        rule = ["---", *["---:"] * len(panel.columns)]
        lines = [[_markdown_text(text) for text in header], rule]
        lines += [[_markdown_text(method), *cells] for method, *cells in body]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append(_markdown_text(" ".join(table.notes)))
    return "\n\n".join(parts) + "\n"


def _markdown_entry(entry: Entry) -> str:
    cell = entry.cell
    mean = f"**{cell.mean}**" if cell.is_best else cell.mean
    mean = f"<ins>{mean}</ins>" if cell.is_second else mean
    half = f" ± {cell.half_width}" if cell.half_width else ""
    sign = f" {entry.sign}" if entry.sign else ""
    return mean + half + sign + (f", {cell.note}" if cell.note else "")


def _markdown_text(text: str) -> str:
    """Text that shows as it stands, in a table too."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", " ".join(text.split()))


def _listed(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def _count(number: float | int, noun: str) -> str:
    return f"{number:.0f} {noun}" + ("" if number == 1 else "s")
