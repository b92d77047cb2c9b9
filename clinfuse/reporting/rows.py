"""The long-form table of per-case scores: one line a case, method, condition, region and metric.

Every table and figure is made from these rows, so nothing in a paper is typed by hand.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd

from clinfuse.reporting.atomic import write_atomically

CASE_COLUMNS = (
    "case_id",
    "patient_id",
    "method",
    "preset",
    "seed",
    "misregistration_mm",
    "perturbation",
    "amount",
    "mask_source",
    "steps",
    "roi",
    "metric",
    "value",
)
"""Columns of ``cases.csv`` in order. ``steps`` is 0 for a method that does not sample.

``patient_id`` says whose case it is: several slices may be of one patient. Rows that lack it are
read as one patient a case. ``perturbation`` is what else was wrong with the case by ``amount``,
empty where nothing was, or where rows lack both columns.
"""

ROW_KEY = tuple(name for name in CASE_COLUMNS if name not in ("patient_id", "value"))
"""What identifies a row: everything but its value, and whose case it is."""

_INTEGERS = ("seed", "steps")
_FLOATS = ("misregistration_mm", "amount", "value")
_MISSING = ["", "nan", "NaN"]

Rows = pd.DataFrame | Iterable[Mapping[str, Any]]


def case_rows(
    scores: Iterable[tuple[str, str, Any]],
    *,
    case_id: str,
    method: str,
    preset: str,
    seed: int,
    misregistration_mm: float,
    mask_source: str,
    steps: int,
    patient_id: str | None = None,
    perturbation: str = "",
    amount: float = 0.0,
) -> list[dict[str, Any]]:
    """The rows of one case from its ``(roi, metric, value)`` scores.

    Without ``patient_id`` the case is its own patient.
    """
    key = {
        "case_id": case_id,
        "patient_id": patient_id or case_id,
        "method": method,
        "preset": preset,
        "seed": seed,
        "misregistration_mm": misregistration_mm,
        "perturbation": perturbation,
        "amount": amount,
        "mask_source": mask_source,
        "steps": steps,
    }
    return [{**key, "roi": roi, "metric": m, "value": float(value)} for roi, m, value in scores]


def as_rows(rows: Rows) -> pd.DataFrame:
    """A frame with ``CASE_COLUMNS`` in order and in their types, one row a key (the last wins).

    An undefined metric stays as NaN. Amplitudes and amounts are rounded to 1e-6, so that a key
    survives floating-point arithmetic.

    Raises:
        ValueError: a column is missing or unknown, a key is empty, a number is not one, an amount
            is of no perturbation, or a case is said to be of two patients.
    """
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if frame.empty and not len(frame.columns):
        frame = pd.DataFrame(columns=list(CASE_COLUMNS))
    _check_columns(frame.columns)
    if "patient_id" not in frame.columns:
        frame = frame.assign(patient_id=frame["case_id"])
    if not {"perturbation", "amount"} & set(frame.columns):
        frame = frame.assign(perturbation="", amount=0.0)
    frame = frame[list(CASE_COLUMNS)].copy()
    frame["perturbation"] = frame["perturbation"].astype(object).fillna("")
    _check_keys(frame)
    for column in CASE_COLUMNS:
        frame[column] = _typed(frame[column])
    for column in ("misregistration_mm", "amount"):
        frame[column] = frame[column].round(6)
    _check_amounts(frame)
    frame = frame.drop_duplicates(list(ROW_KEY), keep="last", ignore_index=True)
    _check_patients(frame)
    return frame


def read_rows(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows in a CSV file, with NaN where ``value`` is empty or ``nan``.

    Text is taken as it stands: a case called ``007`` or ``NA`` keeps its name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold rows.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values={"value": _MISSING})
    except pd.errors.EmptyDataError:
        raise ValueError(f"expected rows with columns {CASE_COLUMNS} in {path}, got none") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"expected rows as CSV in {path}, got {type(error).__name__}") from error
    try:
        return as_rows(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {shorten(str(error), 600, placeholder=' …')}") from None


def unperturbed(rows: Rows) -> pd.DataFrame:
    """The rows of cases with which nothing was wrong but misregistration: those of all tables."""
    frame = as_rows(rows)
    return frame[frame["perturbation"] == ""].reset_index(drop=True)


def write_rows(path: str | os.PathLike[str], rows: Rows) -> None:
    """Add rows to a CSV file, replacing those with the same key, in one atomic step.

    NaN is written as ``nan``. The file is read, merged and renamed into place: a run that is
    stopped leaves the old file or the new one. Two processes should not share one file, because
    the slower one would win; a sweep gives each run its own folder.

    Raises:
        ValueError: as ``as_rows``; the file is then left as it was.
    """
    new = as_rows(rows)
    if Path(path).exists():
        new = as_rows(pd.concat([read_rows(path), new]))
    write_atomically(path, new.to_csv(index=False, na_rep="nan", lineterminator="\n"))


def _check_columns(columns: Iterable[Any]) -> None:
    got = list(columns)
    later = {"patient_id"}  # rows of earlier versions lack it, and both of the other two
    later |= set() if {"perturbation", "amount"} & set(got) else {"perturbation", "amount"}
    missing = [name for name in CASE_COLUMNS if name not in got and name not in later]
    unknown = [name for name in got if name not in CASE_COLUMNS]
    if missing or unknown:
        raise ValueError(
            f"expected the columns {CASE_COLUMNS}; missing {missing}, not known {unknown}"
        )


def _check_keys(frame: pd.DataFrame) -> None:
    for name in (*(name for name in ROW_KEY if name != "perturbation"), "patient_id"):
        empty = frame[name].isna() | (frame[name].astype(str) == "")
        if empty.any():
            first = frame[empty].iloc[0].to_dict()
            raise ValueError(f"expected a {name} in every row, got none in {first}")


def _check_amounts(frame: pd.DataFrame) -> None:
    nothing = frame[(frame["perturbation"] == "") & (frame["amount"] != 0)]
    if len(nothing):
        first = nothing.iloc[0].to_dict()
        raise ValueError(f"expected amount 0 where perturbation is empty, got {first}")


def _check_patients(frame: pd.DataFrame) -> None:
    pairs = frame[["case_id", "patient_id"]].drop_duplicates()
    twice = pairs[pairs["case_id"].duplicated(keep=False)]
    if len(twice):
        case_id = twice["case_id"].iloc[0]
        of: Sequence[str] = twice.loc[twice["case_id"] == case_id, "patient_id"].tolist()
        raise ValueError(f"expected one patient for case {case_id!r}, got {of}")


def _typed(column: pd.Series) -> pd.Series:
    if column.name not in _INTEGERS + _FLOATS:
        return column.astype(str)
    try:
        numbers = column.astype(object).map(float).astype(float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected numbers in column {column.name}: {error}") from None
    if column.name != "value" and not np.isfinite(numbers).all():
        raise ValueError(f"expected finite numbers in column {column.name}, got {list(column)}")
    if column.name not in _INTEGERS:
        return numbers
    if not np.array_equal(numbers, numbers.round()):
        raise ValueError(f"expected whole numbers in column {column.name}, got {list(column)}")
    return numbers.astype("int64")
