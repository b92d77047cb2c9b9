"""Scores from many folders into one set of rows, if they may stand in one table."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from clinfuse.reporting.rows import ROW_KEY


@dataclass(frozen=True)
class Scored:
    """The scores in one folder, and what it records of them.

    Attributes:
        folder: its path, as sentences name it.
        rows: as ``cases.csv``.
        test_cases: of its split; None where it records none.
        split: where the split is from.
        root: of the data.
        data: what must be alike within a table, by its name for a reader (``CT map``).
        facts: versions and ``commit`` of the scoring, and of the training of each run it scored.
        has_commit: whether the scoring itself is among ``facts``.
    """

    folder: str
    rows: pd.DataFrame
    test_cases: Collection[str] | None = None
    split: str | None = None
    root: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[Mapping[str, str]] = ()
    has_commit: bool = False


def merged(scored: Sequence[Scored], may_differ: Collection[str] = ()) -> pd.DataFrame:
    """The rows of all folders, in their order.

    Args:
        scored: the folders.
        may_differ: names of ``Scored.data`` that need not be alike: what an ablation varies.

    Raises:
        ValueError: they tested different cases, or on data of another kind or range, or one method
            comes twice with the same ``ROW_KEY``.
    """
    splits = [(set(s.test_cases), s.folder) for s in scored if s.test_cases is not None]
    for tested in (splits, [(set(s.rows["case_id"]), s.folder) for s in scored]):
        _check_cases(tested)
    names = dict.fromkeys(name for part in scored for name in part.data)
    for name in (name for name in names if name not in may_differ):
        _check_data(name, [part for part in scored if name in part.data])
    rows = pd.concat([part.rows.assign(folder=part.folder) for part in scored])
    twice = rows[rows.duplicated(list(ROW_KEY), keep=False)]
    if len(twice):
        first_twice = twice.iloc[0]
        same = twice[(twice[list(ROW_KEY)] == first_twice[list(ROW_KEY)]).all(axis=1)]
        raise ValueError(
            f"expected each method once, got {first_twice['method']} with the same preset and seed "
            f"in {' and '.join(same['folder'].unique()[:2])}"
        )
    return rows.drop(columns="folder").reset_index(drop=True)


def _check_cases(tested: Sequence[tuple[set[str], str]]) -> None:
    """Whether all sets of cases, each with its folder, are one."""
    for cases, folder in tested[1:]:
        if apart := sorted(cases ^ tested[0][0]):
            more = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
            raise ValueError(
                f"expected evaluations of the same test cases, got others in {folder} than in "
                f"{tested[0][1]}: {', '.join(apart[:3])}{more} in one of them alone"
            )


def _check_data(name: str, scored: Sequence[Scored]) -> None:
    first = scored[0]
    for other in scored[1:]:
        if other.data[name] != first.data[name]:
            raise ValueError(
                f"expected the same {name} in all of a table, got {first.data[name]} in "
                f"{first.folder} and {other.data[name]} in {other.folder}"
            )
