"""Per-case rows to summaries: means with bootstrap intervals, the headline table, paired tests.

Values of one case (seeds, say) are averaged before cases are. A mean is over cases, but its
uncertainty is over patients: slices of one head are no independent witnesses, so that patients are
resampled with all their slices, and tests compare patients. Where each case is a patient of its
own, as volumes usually are, that is the same. An undefined value is NaN; it is left out of the mean
and counted. Tables are of unperturbed cases, moved or not; ``robustness.py`` shows the others.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import rich.box
from jaxtyping import Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from scipy import stats

from clinfuse.reporting.rows import Rows, as_rows, unperturbed

HEADLINE_SCORES = (("bone", "psnr"), ("brain", "ssim"), ("whole", "ssim"))
"""The three scores of the headline table, as (roi, metric)."""

CALIBRATION_SCORES = (
    ("brain", "coverage"),
    ("bone", "coverage"),
    ("whole", "ence_raw"),
    ("whole", "ence"),
    ("whole", "ause"),
)
"""What a reader asks of an uncertainty: do intervals hold, is its size right, is its order."""

KEPT_SCORES = tuple(
    ("whole", metric)
    for metric in ("qabf", "vif", "ssim_sources", "mi", "scd", "fmi_pixel", "sf", "ag", "sd", "en")
)
"""What the fusion field asks of a picture: how much it keeps of both sources, how much it shows."""

LESION_SCORES = (("lesion", "dice"), ("lesion", "nsd"), ("lesion", "hd95"))
"""How well a lesion head finds the lesion in what was fused."""

LOCALISATION_SCORES = tuple(
    ("lesion", metric) for metric in ("sensitivity", "false_positives", "f1", "centroid_distance")
)
"""How a segmentation does lesion by lesion."""

SEEN_SCORES = tuple(
    (roi, metric) for roi in ("lesion", "findings") for metric in ("conspicuity", "conspicuity_min")
)
"""How visible findings stay: a case's median finding and its lowest."""

NEITHER_IS_BETTER = frozenset({"coverage"})
"""Metrics with an aim of their own, of which none is best: coverage should be the level."""

FINDING_KINDS = {"lesion": "lesion on MRI", "findings": "only on CT"}
"""What a reader calls the findings of each roi that has a conspicuity."""

LOWER_IS_BETTER = frozenset(
    {"hd95", "mae", "mse", "rmse", "nll", "lpips", "width", "seconds", "adaptation_seconds"}
    | {"false_positives", "centroid_distance"}
    | {"ause", "ause_constant", "ause_random"}
    | {name + suffix for name in ("ece", "brier", "uce", "ence") for suffix in ("", "_raw")}
)
"""Metrics whose best value is the smallest; of all others it is the largest."""

CONSPICUITY_COLUMNS = (
    "finding",
    "CT moved (mm)",
    "method",
    "cases",
    "median",
    "lowest",
    "worst case",
)
"""Of ``conspicuity_table``."""

CONSPICUITY_TEXT = (
    "Does anything visible vanish? A finding's contrast to noise in the fused image over that in "
    "the source that shows it better: 1 keeps it as it was, 0 loses it. Median over the cases that "
    "have such a finding, and below it the lowest of all findings with its case."
)
"""What a conspicuity is, in sentences."""

STATISTICS = ("mean", "low", "high", "n", "patients", "undefined")
"""What is known of one score: mean over cases, its interval, cases, patients, values left out."""

FEWEST_PATIENTS = 3
"""Fewer have no interval: resampling two patients finds only those two and their mean."""

_DASH = "\N{EN DASH}"
_VARIANTS = ("preset", "mask_source", "steps", "perturbation")
_GROUPS = ("method", "misregistration_mm")
_UNITS = {"psnr": "dB", "hd95": "mm", "centroid_distance": "mm", "seconds": "s"}
_NAMES = {
    "dice": "Dice",
    "ence_raw": "ENCE before calibration",
    "conspicuity_min": "lowest conspicuity",
    "qabf": "Qabf",
    "ssim_sources": "SSIM to both sources",
    "fmi_pixel": "FMI of pixels",
}


class Cell(NamedTuple):
    """One score of one method as text: ``mean``, ``interval``, a ``note`` where cases lack.

    ``half_width`` is half of the interval's.
    """

    mean: str
    interval: str
    note: str
    is_best: bool
    is_second: bool = False
    half_width: str = ""


_NO_CELL = Cell(_DASH, "", "", is_best=False)


class Block(NamedTuple):
    """A printed table: ``label`` and ``header`` above ``lines`` of cells by name.

    ``scores`` are the (roi, metric) pairs of a headline table that it shows.
    """

    label: str
    header: list[str]
    lines: dict[str, list[Cell]]
    scores: list[tuple[str, str]]


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    patients: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one value a case.

    Efron & Tibshirani (1993), ch. 13; patients are drawn with replacement, each with all its cases
    (cluster bootstrap: Field & Welsh (2007)). The same values and seed give the same interval.
    Fewer than ``FEWEST_PATIENTS``, or an infinite value, have no interval: (NaN, NaN). Values hold
    no NaN.

    Args:
        values: one a case.
        confidence: of the interval.
        resamples: bootstrap draws.
        seed: of the draws.
        patients: whose each value is; None for as many patients as values.
    """
    owner = np.arange(len(values)) if patients is None else pd.factorize(np.asarray(patients))[0]
    cases = np.bincount(owner)
    if len(cases) < FEWEST_PATIENTS or not np.isfinite(values).all():
        return float("nan"), float("nan")
    sums = np.bincount(owner, weights=values)
    drawn = np.random.default_rng(seed).integers(0, len(cases), (resamples, len(cases)))
    means = sums[drawn].sum(axis=1) / cases[drawn].sum(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def summary(
    rows: Rows,
    by: Sequence[str] = _GROUPS,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Mean over cases of each (roi, metric) in each group, with its bootstrap interval.

    A method that ran with several presets, mask sources, numbers of steps or perturbations becomes
    several methods, named ``ours (mask_source none)``: such rows answer different questions and are
    never averaged. What still repeats within a case, its seeds, is averaged first.

    Args:
        rows: as ``cases.csv``.
        by: columns that make a group; methods stay in order of appearance, amplitudes rise.
        confidence: of the interval.
        resamples: bootstrap draws of the patients.

    Returns:
        One row a group and score: ``by``, roi, metric, then ``STATISTICS``. ``n`` is the number of
        cases with a value, ``patients`` of those whose they are, ``undefined`` the number of rows
        whose value is NaN.
    """
    frame = name_variants(as_rows(rows), by)
    records = []
    keys = [*by, "roi", "metric"]
    for key, group in frame.groupby(keys, sort=False):
        of_case = group.groupby(["patient_id", "case_id"], sort=False)["value"].mean().dropna()
        values, patients = of_case.to_numpy(float), of_case.index.get_level_values(0)
        low, high = bootstrap_interval(values, confidence, resamples, patients=patients.tolist())
        mean = float(values.mean()) if len(values) else float("nan")
        undefined = int(group["value"].isna().sum())
        records.append((*key, mean, low, high, len(values), patients.nunique(), undefined))
    table = pd.DataFrame(records, columns=[*keys, *STATISTICS])
    return _in_order(table, keys, frame)


def name_variants(frame: pd.DataFrame, by: Sequence[str] = _GROUPS) -> pd.DataFrame:
    """The rows, with what varies within a method (preset, steps, ...) in its name."""
    frame = frame.copy()
    if "method" not in by:
        return frame
    apart = [c for c in _VARIANTS if c not in by]
    for method, group in frame.groupby("method", sort=False):
        group = group.assign(perturbation=_named_perturbations(group))
        varying = [c for c in apart if group[c].nunique() > 1]
        if varying:
            names = [name.replace("_", " ") for name in varying]
            frame.loc[group.index, "method"] = [
                f"{method} ({', '.join(f'{n} {v}' for n, v in zip(names, values, strict=True))})"
                for values in group[varying].itertuples(index=False)
            ]
    return frame


def _named_perturbations(group: pd.DataFrame) -> list[str]:
    pairs = zip(group["perturbation"], group["amount"], strict=True)
    return [
        f"{perturbation} {amount:g}" if perturbation else "none" for perturbation, amount in pairs
    ]


def headline(
    rows: Rows,
    scores: Sequence[tuple[str, str]] = HEADLINE_SCORES,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Method by misregistration, for the scores that answer the clinical question; unperturbed.

    Returns:
        Numbers: one row a method, columns (roi, metric, misregistration_mm, statistic) with the
        statistics of ``STATISTICS``; NaN where a method lacks a score. Scores that no row
        defines are left out. ``to_markdown``, ``print_table`` and the report know this shape.
    """
    frame = unperturbed(rows)
    defined = frame[frame["value"].notna()].groupby(["roi", "metric"]).groups
    scores = [score for score in scores if score in defined]
    wanted = pd.MultiIndex.from_frame(frame[["roi", "metric"]]).isin(scores)
    long = summary(frame[wanted], confidence=confidence, resamples=resamples)
    columns = pd.MultiIndex.from_tuples(
        [
            (roi, metric, amplitude, statistic)
            for roi, metric in scores
            for amplitude in sorted(
                long.query("roi == @roi and metric == @metric")[_GROUPS[1]].unique()
            )
            for statistic in STATISTICS
        ],
        names=["roi", "metric", "misregistration_mm", "statistic"],
    )
    table = pd.DataFrame(
        np.nan, index=pd.Index(long["method"].unique(), name="method"), columns=columns
    )
    for row in long.itertuples():
        for statistic in STATISTICS:
            key = (row.roi, row.metric, row.misregistration_mm, statistic)
            table.loc[row.method, key] = getattr(row, statistic)
    return table


def conspicuity_table(rows: Rows) -> pd.DataFrame:
    """Whether anything vanishes (method, section 3): the median, and the worst of all findings.

    Returns:
        One row a kind of finding, amplitude and method: ``finding``, ``CT moved (mm)``,
        ``method``, ``cases`` that have a finding some source shows, ``median`` over them of a
        case's own median, ``lowest`` of all findings and seeds, and ``worst case``, where that
        is. Kinds that no case has are left out; a method without a value has NaN.
    """
    frame = name_variants(unperturbed(rows))
    keys = ["finding", "misregistration_mm", "method"]
    frame["finding"] = frame["roi"].map(FINDING_KINDS)
    frame = frame[frame["metric"].isin(["conspicuity", "conspicuity_min"])]
    records = []
    for (kind, *key), group in frame.groupby(keys, sort=False):
        if frame.loc[frame["finding"] == kind, "value"].isna().all():
            continue
        of_case = group.groupby(["metric", "case_id"])["value"]
        middle = of_case.mean()["conspicuity"].dropna()
        lowest = of_case.min()["conspicuity_min"].dropna()
        worst = (lowest.min(), lowest.idxmin()) if len(lowest) else (np.nan, None)
        records.append((kind, *key, len(middle), middle.median(), *worst))
    table = pd.DataFrame(records, columns=[*keys, *CONSPICUITY_COLUMNS[3:]])
    return _in_order(table, keys, frame).set_axis(list(CONSPICUITY_COLUMNS), axis=1)


def is_conspicuity(table: pd.DataFrame) -> bool:
    """Whether a frame has the columns that ``conspicuity_table`` makes."""
    return tuple(table.columns) == CONSPICUITY_COLUMNS


def conspicuity_blocks(table: pd.DataFrame) -> list[Block]:
    """A block for each kind of finding of a conspicuity table: methods by amplitudes.

    A cell's mean is the median and its interval the lowest finding; best is the highest median.
    """
    blocks = []
    for kind, part in table.groupby("finding", sort=False):
        most, amplitudes = part["cases"].max(), sorted(part["CT moved (mm)"].unique())
        best = part.groupby("CT moved (mm)")["median"].max().round(2)
        lines = {}
        for method, of_method in part.groupby("method", sort=False):
            cells = {
                amplitude: Cell(
                    mean=_number(median, 2),
                    interval="" if np.isnan(lowest) else f"lowest {lowest:.2f}, {worst}",
                    note=f"n {cases}" if cases < most else "",
                    is_best=part["method"].nunique() > 1 and round(median, 2) == best[amplitude],
                )
                for _, amplitude, _, cases, median, lowest, worst in of_method.itertuples(
                    index=False
                )
            }
            lines[str(method)] = [cells.get(amplitude, _NO_CELL) for amplitude in amplitudes]
        label = f"{str(kind)[0].upper()}{str(kind)[1:]}, n = {most}"
        blocks.append(Block(label, [f"{a:g} mm" for a in amplitudes], lines, []))
    return blocks


def is_headline(table: pd.DataFrame) -> bool:
    """Whether a frame has the columns that ``headline`` makes."""
    return list(table.columns.names) == ["roi", "metric", "misregistration_mm", "statistic"]


def headline_scores(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (roi, metric) pairs of a headline table, in order."""
    return list(
        dict.fromkeys(
            zip(*(table.columns.get_level_values(name) for name in ("roi", "metric")), strict=True)
        )
    )


def amplitudes_mm(table: pd.DataFrame, roi: str, metric: str) -> list[float]:
    """The misregistrations at which a headline table has a score, rising."""
    return [float(a) for a in score_columns(table, roi, metric).columns.unique(0)]


def score_columns(table: pd.DataFrame, roi: str, metric: str) -> pd.DataFrame:
    """One score of a headline table: columns (misregistration_mm, statistic)."""
    return pd.DataFrame(table.xs((roi, metric), axis=1, level=("roi", "metric")))


def score_label(roi: str, metric: str) -> str:
    """A score as a reader expects it: ``Bone PSNR (dB)``; of pictures, ``Qabf`` alone."""
    unit = f" ({_UNITS[metric]})" if metric in _UNITS else ""
    name = metric.upper() if len(metric) <= 4 or metric == "hd95" else metric.replace("_", " ")
    name = _NAMES.get(metric, name)
    return f"{name}{unit}" if (roi, metric) in KEPT_SCORES else f"{roi.capitalize()} {name}{unit}"


def score_cells(table: pd.DataFrame, roi: str, metric: str) -> dict[str, list[Cell]]:
    """Per method, one ``Cell`` for each of ``amplitudes_mm``.

    Best is the best mean of its column as printed, so equal numbers are marked alike, and second
    the next number, however many are best; one method alone is neither. The note says how many
    cases (and patients) counted where that is not the table's largest number, and how many values
    were undefined.
    """
    part = score_columns(table, roi, metric)
    decimals = 1 if metric in _UNITS else 3
    amplitudes = amplitudes_mm(table, roi, metric)
    means = pd.DataFrame(part.xs("mean", axis=1, level=1)).round(decimals)
    if metric in NEITHER_IS_BETTER or len(table) < 2:
        means = means * np.nan
    best = _best(means, metric)
    second = _best(means.mask(means == best), metric)
    most = (_largest(table, "n"), _largest(table, "patients"))
    return {
        str(method): [
            _cell(part.loc[method, amplitude], decimals, best[column], second[column], *most)
            for column, amplitude in enumerate(amplitudes)
        ]
        for method in table.index
    }


def better(metric: str) -> str:
    """An arrow towards the better values of a metric; none where it has an aim of its own."""
    if metric in NEITHER_IS_BETTER:
        return ""
    return "↓" if metric in LOWER_IS_BETTER else "↑"


def score_blocks(table: pd.DataFrame) -> list[Block]:
    """A headline table as it is printed.

    One amplitude makes one block, methods by scores; so does one method, scores by amplitudes.
    Otherwise each score is a block, methods by amplitudes.
    """
    scores, amplitudes = headline_scores(table), _all_amplitudes_mm(table)
    cells = {
        score: {
            method: dict(zip(amplitudes_mm(table, *score), line, strict=True))
            for method, line in score_cells(table, *score).items()
        }
        for score in scores
    }
    if len(amplitudes) == 1:
        lines = {
            str(method): [cells[score][str(method)].get(amplitudes[0], _NO_CELL) for score in cells]
            for method in table.index
        }
        return [Block("method", [score_label(*score) for score in scores], lines, scores)]
    header = [f"{amplitude:g} mm" for amplitude in amplitudes]
    if len(table) == 1 and scores:
        method = str(table.index[0])
        lines = {
            score_label(*score): [line[method].get(a, _NO_CELL) for a in amplitudes]
            for score, line in cells.items()
        }
        return [Block(method, header, lines, scores)]
    return [
        Block(
            score_label(*score),
            [f"{amplitude:g} mm" for amplitude in amplitudes_mm(table, *score)],
            {method: list(line.values()) for method, line in lines.items()},
            [score],
        )
        for score, lines in cells.items()
    ]


def footnote(table: pd.DataFrame) -> str:
    """What the numbers of a headline table are, in a sentence."""
    kinds = table.columns.get_level_values("statistic")
    undefined = int(np.nansum(table.loc[:, kinds == "undefined"].to_numpy(float)))
    left_out = f"{undefined} undefined left out" if undefined else "none undefined"
    n, patients = _largest(table, "n"), _largest(table, "patients")
    amplitudes = _all_amplitudes_mm(table)
    cases = f"{n:.0f} cases" if n == patients else f"{n:.0f} images of {_patients(patients)}"
    interval = (
        f"without intervals, which need {FEWEST_PATIENTS} patients"
        if patients < FEWEST_PATIENTS
        else f"with its 95% bootstrap interval over {'cases' if n == patients else 'patients'}"
    )
    sentences = [f"Mean over n = {cases} unless a cell says otherwise ({left_out}), {interval}."]
    sentences += ["Best of each column in bold."] if len(table) > 1 else []
    sentences += [f"The CT was {_moved(amplitudes[0])}."] if len(amplitudes) == 1 else []
    return " ".join(sentences)


def paired_differences(
    rows: Rows,
    ours: str,
    scores: Sequence[tuple[str, str]] | None = None,
    resamples: int = 2000,
) -> pd.DataFrame:
    """Ours minus each baseline on the same unperturbed cases, with a paired Wilcoxon test.

    Method §6. The difference is the mean over cases, and its interval resamples patients. Wilcoxon
    (1945), two-sided, on the mean difference of each patient; p-values are corrected by Holm (1979)
    over the baselines, within each score and misregistration. Cases where either value is undefined
    are left out. Without any difference p is 1; without any pair it is NaN.

    Args:
        rows: as ``cases.csv``; variants of a method are methods of their own, as in ``summary``.
        ours: the method that the others are compared with.
        scores: (roi, metric) pairs; None means all.
        resamples: bootstrap draws of the patients for the 95% interval.

    Returns:
        One row a baseline, score and amplitude: method (the baseline), misregistration_mm, roi,
        metric, difference, low, high, n, p, rank_biserial, p_holm. ``n`` is the number of patients
        compared, ``rank_biserial`` the effect that the test looks at (Kerby (2014)): the share of
        ranks where ours is larger less that where it is smaller, in [-1, 1].

    Raises:
        ValueError: no row is from ``ours``.
    """
    frame = name_variants(unperturbed(rows))
    if ours not in set(frame["method"]):
        raise ValueError(f"expected one of {sorted(set(frame['method']))} as ours, got {ours!r}")
    records = []
    keys = ["misregistration_mm", "roi", "metric"]
    for (amplitude, roi, metric), group in frame.groupby(keys, sort=False):
        if scores is not None and (roi, metric) not in scores:
            continue
        case = ["patient_id", "case_id", "method"]
        cases = group.groupby(case, sort=False)["value"].mean().unstack()
        for method in (name for name in cases.columns if name != ours and ours in cases):
            difference = (cases[ours] - cases[method]).dropna()
            values, patients = difference.to_numpy(float), difference.index.get_level_values(0)
            interval = bootstrap_interval(values, resamples=resamples, patients=patients.tolist())
            mean = float(values.mean()) if len(values) else float("nan")
            of_patient = difference.groupby(level=0, sort=False).mean().to_numpy(float)
            test = (len(of_patient), _wilcoxon(of_patient), _rank_biserial(of_patient))
            records.append((method, amplitude, roi, metric, mean, *interval, *test))
    columns = [*_GROUPS, "roi", "metric", "difference", "low", "high", "n", "p", "rank_biserial"]
    table = pd.DataFrame(records, columns=columns)
    table["p_holm"] = table.groupby(keys)["p"].transform(lambda p: holm(p.to_numpy(float)))
    return _in_order(table, [*_GROUPS, "roi", "metric"], frame)


def holm(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """P-values adjusted for all of them being tested: Holm (1979). NaN stays and is not counted."""
    adjusted = np.full(len(p), np.nan)
    defined = np.flatnonzero(~np.isnan(p))
    order = defined[np.argsort(p[defined], kind="stable")]
    steps = (len(order) - np.arange(len(order))) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def to_markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown: the ``score_blocks`` of a headline table, else one block.

    Numbers of other tables have four significant digits; NaN is a dash.
    """
    if not is_headline(table):
        return _markdown(*plain_cells(table))
    blocks = [
        _markdown(
            [block.label, *block.header],
            [[name, *map(_markdown_cell, cells)] for name, cells in block.lines.items()],
        )
        for block in score_blocks(table)
    ]
    return "\n\n".join([*blocks, footnote(table)]) + "\n"


def print_table(
    table: pd.DataFrame, title: str | None = None, console: Console | None = None
) -> None:
    """Print a table to the terminal with rich: the ``score_blocks`` of a headline table.

    A terminal too narrow for intervals shows means alone.
    """
    console = console or Console()
    if not is_headline(table):
        console.print(_rich(title, *plain_cells(table)))
        return
    if title:
        console.print(f"[bold]{escape(title)}[/]")
    for block in score_blocks(table):
        has_room = console.width >= 20 + 14 * len(block.header)
        body = [
            [escape(name), *(_rich_cell(cell, has_room) for cell in cells)]
            for name, cells in block.lines.items()
        ]
        console.print(_rich(None, [block.label, *block.header], body, markup=True))
    console.print(footnote(table), style="dim", highlight=False)


def plain_cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and body of any frame as text; a named or textual index becomes columns."""
    if (
        table.index.name is not None
        or table.index.nlevels > 1
        or table.index.dtype.kind not in "iu"
    ):
        table = table.reset_index()
    header = [" ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in table.columns]
    return header, [[_plain(value) for value in row] for row in table.itertuples(index=False)]


def _in_order(table: pd.DataFrame, keys: Sequence[str], frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted by ``keys``: names in order of appearance in ``frame``, numbers rising."""

    def rank(column: pd.Series) -> pd.Series:
        if pd.api.types.is_numeric_dtype(column):
            return column
        order = {name: i for i, name in enumerate(frame[column.name].unique())}
        return column.map(order)

    return table.sort_values(list(keys), key=rank, kind="stable", ignore_index=True)


def _wilcoxon(difference: Float[np.ndarray, " n"]) -> float:
    if not len(difference):
        return float("nan")
    if not difference.any():
        return 1.0
    return float(stats.wilcoxon(difference).pvalue)


def _rank_biserial(difference: Float[np.ndarray, " n"]) -> float:
    if not len(difference):
        return float("nan")
    moved = difference[difference != 0]
    ranks = stats.rankdata(np.abs(moved))
    return float((np.sign(moved) * ranks).sum() / ranks.sum()) if len(moved) else 0.0


def _best(means: pd.DataFrame, metric: str) -> Float[np.ndarray, " columns"]:
    """The best number of each column; NaN where it has none."""
    return (means.min() if metric in LOWER_IS_BETTER else means.max()).to_numpy(float)


def _all_amplitudes_mm(table: pd.DataFrame) -> list[float]:
    """Rising, of any score of a headline table."""
    return sorted({a for score in headline_scores(table) for a in amplitudes_mm(table, *score)})


def _moved(amplitude_mm: float) -> str:
    return f"moved by {amplitude_mm:g} mm" if amplitude_mm else "not moved"


def _largest(table: pd.DataFrame, statistic: str) -> float:
    """Of any score in a headline table; 0 in an empty one."""
    is_statistic = table.columns.get_level_values("statistic") == statistic
    return float(np.nanmax(table.loc[:, is_statistic].to_numpy(float), initial=0))


def _patients(number: float) -> str:
    return f"{number:.0f} patient" + ("" if number == 1 else "s")


def _cell(
    values: pd.Series,
    decimals: int,
    best: float,
    second: float,
    most_cases: float,
    most_patients: float,
) -> Cell:
    mean, low, high, n, patients, undefined = (float(values[name]) for name in STATISTICS)
    of = f" of {_patients(patients)}" if n and patients < most_patients < most_cases else ""
    notes = [f"n {n:.0f}{of}"] if n < most_cases else []
    notes += [f"{undefined:.0f} undefined"] if undefined > 0 else []
    return Cell(
        mean=_number(mean, decimals),
        interval=_interval(low, high, decimals),
        note=", ".join(notes),
        is_best=bool(np.round(mean, decimals) == best),
        is_second=bool(np.round(mean, decimals) == second),
        half_width="" if np.isnan(low) else f"{(high - low) / 2:.{decimals}f}",
    )


def _interval(low: float, high: float, decimals: int) -> str:
    if np.isnan(low):
        return ""
    between = _DASH if low >= 0 else " to "
    return f"{low:.{decimals}f}{between}{high:.{decimals}f}"


def _number(value: float, decimals: int) -> str:
    if np.isnan(value):
        return _DASH
    return f"{value:.{decimals}f}" if np.isfinite(value) else ("∞" if value > 0 else "-∞")


def _plain(value: object) -> str:
    if isinstance(value, float | np.floating):
        return _DASH if np.isnan(value) else f"{value:.4g}"
    return _DASH if value is None else str(value)


def _markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    texts = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in texts)


def _markdown_cell(cell: Cell) -> str:
    mean = f"**{cell.mean}**" if cell.is_best else cell.mean
    interval = f" ({cell.interval})" if cell.interval else ""
    return mean + interval + (f", {cell.note}" if cell.note else "")


def _rich_cell(cell: Cell, has_room: bool) -> str:
    mean = f"[bold]{cell.mean}[/]" if cell.is_best else cell.mean
    below = "".join(
        f"\n{line}" for line in ((cell.interval, cell.note) if has_room else ()) if line
    )
    return f"{mean}[dim]{below}[/]"


def _rich(
    title: str | None,
    header: Sequence[str],
    body: Iterable[Sequence[str]],
    markup: bool = False,
) -> Table:
    table = Table(title=title and escape(title), box=rich.box.SIMPLE_HEAD, title_justify="left")
    body = [[cell if markup else escape(cell) for cell in line] for line in body]
    for number, name in enumerate(header):
        widest = max((Text.from_markup(line[number]).cell_len for line in body), default=0)
        table.add_column(
            escape(name.replace("_", " ")) if number else escape(name),
            justify="right" if number else "left",
            min_width=None if markup else widest,
            overflow="fold",
        )
    for line in body:
        table.add_row(*line)
    return table
