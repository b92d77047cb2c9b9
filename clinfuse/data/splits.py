"""Which patients train, validate and test: read from the cohort, or drawn once by patient."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")

SPLITS_FILES = ("splits.json", "split_info.json")
"""What a cohort's lists may be called, beside ``splits/{train,val,test}.txt``."""

Splits = dict[str, list[str]]
"""Case ids of each of ``SPLITS``."""


def read_splits(root: Path | str) -> Splits | None:
    """Case lists of a cohort from the first of ``SPLITS_FILES`` that it has; else None.

    Raises:
        ValueError: unreadable, a list missing, or a case in two lists or twice in one.
    """
    root = Path(root)
    for name in SPLITS_FILES:
        if (root / name).is_file():
            return read_splits_file(root / name)
    if (root / "splits").is_dir():
        return _from_text(root / "splits")
    return None


def read_splits_file(path: Path | str) -> Splits:
    """Case lists from a JSON file: train, val and test, by themselves or under ``splits``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, a list missing, or a case in two lists or twice in one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file with lists {SPLITS}, found none: {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON with lists {SPLITS}, got {error}: {path}") from error
    lists = content.get("splits", content) if isinstance(content, dict) else content
    if not isinstance(lists, dict) or any(not isinstance(lists.get(s), list) for s in SPLITS):
        got = shorten(str(sorted(lists)), 200) if isinstance(lists, dict) else type(lists).__name__
        raise ValueError(f"expected JSON with lists {SPLITS}, got {got}: {path}")
    return _checked({split: [str(case) for case in lists[split]] for split in SPLITS}, path)


def write_splits(path: Path | str, splits: Mapping[str, Sequence[str]], source: str) -> None:
    """Record case lists as JSON that ``read_splits_file`` reads; ``source`` says where from.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**{split: list(splits[split]) for split in SPLITS}, "source": source}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_splits(
    case_ids: Sequence[str],
    patients: Mapping[str, str] | None = None,
    seed: int = 42,
    fractions: Sequence[float] = (0.70, 0.15, 0.15),
) -> Splits:
    """Patients shuffled and dealt into train, val and test, every case with its patient.

    Numbers are rounded so that val and test get at least one patient each when there are three.

    Args:
        patients: patient of each case; each case is its own patient by default.
        fractions: of patients, summing to one.
    """
    if len(fractions) != 3 or abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise ValueError(f"expected three fractions that sum to 1, got {list(fractions)}")
    patients = {case: case for case in case_ids} if patients is None else patients
    people = sorted({patients[case] for case in case_ids})
    order = np.random.default_rng(seed).permutation(len(people))
    few = 1 if len(people) >= 3 else 0
    n_val, n_test = (max(few * (f > 0), round(len(people) * f)) for f in fractions[1:])
    dealt = {
        "val": order[:n_val],
        "test": order[n_val : n_val + n_test],
        "train": order[n_val + n_test :],
    }
    of_patient = {people[i]: split for split, who in dealt.items() for i in who}
    return {
        split: sorted(case for case in case_ids if of_patient[patients[case]] == split)
        for split in SPLITS
    }


def check_splits(
    splits: Mapping[str, Sequence[str]],
    patients: Mapping[str, str] | None = None,
    source: Path | str = "splits",
) -> None:
    """Refuse a patient in two lists, or a case listed twice: test scores would be worthless."""
    seen: dict[str, tuple[str, str]] = {}
    for split in SPLITS:
        cases = splits[split]
        twice = sorted({case for case in cases if list(cases).count(case) > 1})
        if twice:
            raise ValueError(f"expected each case once, got {twice} twice in {split}: {source}")
        for case in cases:
            patient = (patients or {}).get(case, case)
            other, other_case = seen.setdefault(patient, (split, case))
            if other != split:
                raise ValueError(
                    f"expected each patient in one list, got {patient!r} in {other} "
                    f"(as {other_case!r}) and {split} (as {case!r}): {source}"
                )


def _from_text(folder: Path) -> Splits:
    missing = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").is_file()]
    if missing:
        raise FileNotFoundError(f"expected train.txt, val.txt and test.txt, no {missing}: {folder}")
    try:
        lines = {split: (folder / f"{split}.txt").read_text().splitlines() for split in SPLITS}
    except UnicodeDecodeError as error:
        raise ValueError(f"expected lists of cases as text, got other bytes: {folder}") from error
    return _checked({s: [x.strip() for x in lines[s] if x.strip()] for s in SPLITS}, folder)


def _checked(splits: Splits, source: Path) -> Splits:
    check_splits(splits, source=source)
    return splits
