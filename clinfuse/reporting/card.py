"""A run's model card and run card in Markdown, made of what its folder records.

Every number is from the run, and what a run does not have its card does not speak of.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.run_folder import RunFolder
from clinfuse.reporting.tables import (
    CALIBRATION_SCORES,
    FEWEST_PATIENTS,
    HEADLINE_SCORES,
    KEPT_SCORES,
    LESION_SCORES,
    headline,
    headline_scores,
    score_label,
    summary,
    to_markdown,
)

MODEL_CARD, RUN_CARD = "model_card.md", "run_card.md"

TABLES = {
    "Fusion quality": HEADLINE_SCORES,
    "What is kept of both sources": KEPT_SCORES,
    "How well a lesion is found in the fused image": LESION_SCORES,
}

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def write_model_card(folder: str | Path, about: str = "") -> Path:
    """Write ``model_card.md`` into the folder of a run that was trained and scored.

    Args:
        folder: of the run.
        about: what the method is, in a sentence.

    Raises:
        FileNotFoundError: the run was not scored.
        ValueError: a record of it cannot be read.
    """
    with _understood(folder):
        card = model_card(RunFolder.read(folder), about)
    return write_atomically(Path(folder) / MODEL_CARD, card)


def write_run_card(folder: str | Path) -> Path:
    """Write ``run_card.md`` into the folder of a scored run or evaluation; raises as above."""
    with _understood(folder):
        card = run_card(RunFolder.read(folder))
    return write_atomically(Path(folder) / RUN_CARD, card)


@contextmanager
def _understood(folder: str | Path) -> Iterator[None]:
    """Reading records, which may hold anything where a number or a name should be.

    Raises:
        ValueError: that something else was there, with the folder.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise
        raise ValueError(
            f"expected the records of a run, got something else ({type(error).__name__}): {folder}"
        ) from error


def model_card(run: RunFolder, about: str = "") -> str:
    """What the model is, what it was made of, how well it does and where that ends."""
    return _render(
        "model_card.md.jinja",
        run=run,
        about=about,
        method=run.rows["method"].iloc[0] if len(run.rows) else run.name,
        settings=_settings(run),
        data=_data(run),
        training=_training(run),
        tables=_tables(run, TABLES),
        calibration=list(_calibration(run)),
        calibration_tables=_tables(run, {"Calibration": CALIBRATION_SCORES}),
        limits=list(limits(run)),
        versions=run.versions,
    )


def run_card(run: RunFolder) -> str:
    """The command, what it chose, what it cost and what came out."""
    command = ["python", "-m", f"clinfuse.{run.job}", *run.overrides] if run.job else []
    return _render(
        "run_card.md.jinja",
        run=run,
        command=shlex.join(command),
        choices={k: v for k, v in run.choices.items() if v and not k.startswith("hydra/")},
        cost=run.cost,
        tables=_tables(run, TABLES | {"Calibration": CALIBRATION_SCORES}),
        versions=run.versions,
    )


def limits(run: RunFolder) -> Iterator[str]:
    """What the scores do not say, a sentence each."""
    if is_generated(run):
        yield "Trained and tested on generated heads: nothing here says how it does on patients."
    else:
        yield (
            "Trained and tested on one set of data: nothing here says how it does with other "
            "scanners, protocols or diseases."
        )
    if run.data.get("split_by") == "slice":
        yield "Slices of one patient are in training and in test: the scores are too good."
    patients = run.rows["patient_id"].nunique()
    few = ", too few for intervals" if patients < FEWEST_PATIENTS else ""
    yield f"The scores are of {_count(patients, 'test patient')}{few}."
    tested, scored = set(run.splits.get("test") or ()), set(run.rows["case_id"])
    if scored < tested:
        yield f"Only {len(scored)} of {_count(len(tested), 'test case')} were scored."
    yield from _limits_of_images(run)
    yield from _limits_of_misregistration(run)
    yield from _limits_of_lesions(run)
    yield from _limits_of_masks(run)
    yield from _limits_of_uncertainty(run)
    undefined = run.rows[run.rows["value"].isna()]
    if len(undefined):
        names = sorted({score_label(*score) for score in undefined[["roi", "metric"]].to_numpy()})
        yield f"{len(undefined)} values are undefined, and in no mean, of {', '.join(names)}."
    if "with changes" in str(run.facts.get("commit")):
        yield "The code differed from its commit, so that the commit alone does not repeat the run."


def is_generated(run: RunFolder) -> bool:
    """Whether the images were drawn rather than taken of somebody."""
    return bool(run.setting("data.prepare"))


def _limits_of_images(run: RunFolder) -> Iterator[str]:
    spacings = run.data.get("spacings_mm_dhw") or []
    if len(spacings) == 1:
        yield f"All voxels are of {_times(spacings[0])} mm: no other resolution was tested."
    elif spacings:
        yield (
            f"Voxels are of {len(spacings)} sizes, {_times(min(spacings))} to "
            f"{_times(max(spacings))} mm: no finer or coarser ones were tested."
        )
    if run.data.get("cases_with_own_reference") == 0:
        yield (
            "No case has a fused image of its own to compare with: the reference of training and "
            "of whole-image scores is made from its sources."
        )


def _limits_of_misregistration(run: RunFolder) -> Iterator[str]:
    tested = sorted(run.rows["misregistration_mm"].unique())
    if not tested:
        return
    if tested == [0]:
        yield "The CT was not moved against the MRI: misregistration was not tested."
        return
    amounts = ", ".join(f"{mm:g}" for mm in tested)
    yield f"In the test the CT was moved by {amounts} mm: nothing beyond was tested."
    trained = run.setting("data.jitter.max_mm")
    if isinstance(trained, int | float):
        beyond = ", less than in the test" if trained < tested[-1] else ""
        yield f"In training it was moved by at most {trained:g} mm{beyond}."


def _limits_of_lesions(run: RunFolder) -> Iterator[str]:
    if run.data.get("cases_with_lesion") == 0:
        yield "No case has a lesion."
    if not (run.rows["metric"] == "dice").any():
        yield "There was no lesion head: whether lesions are found in the fused image is not known."


def _limits_of_masks(run: RunFolder) -> Iterator[str]:
    for roi, sources in (run.data.get("mask_sources") or {}).items():
        cases = sources.get("segmented") if isinstance(sources, Mapping) else None
        if cases or sources == "segmented":
            number = f" in {_count(len(cases), 'case')}" if cases else ""
            yield f"The {roi} was segmented by a tool{number}, and scores within it trust that."


def _limits_of_uncertainty(run: RunFolder) -> Iterator[str]:
    level = run.calibration.get("level")
    coverage = summary(run.rows[run.rows["metric"] == "coverage"], resamples=1)
    coverage = coverage[coverage["n"] > 0]
    if level is None or coverage.empty:
        has_spread = (run.rows["metric"] == "ence_raw").any()
        yield f"Its uncertainty is not {'calibrated' if has_spread else 'stated'}."
        return
    yield (
        f"Intervals of {100 * level:g}% hold for the average voxel of cases like those they were "
        "fitted on, and promise nothing for one voxel or one patient."
    )
    worst = coverage.sort_values("mean").iloc[0]
    yield (
        f"In the test they covered least in the region {worst['roi']} with the CT moved by "
        f"{worst['misregistration_mm']:g} mm: {100 * worst['mean']:.1f}% of voxels."
    )


def _settings(run: RunFolder) -> dict[str, Any]:
    guidance = {k: run.setting(f"guidance.{k}") for k in ("alpha", "beta", "gamma")}
    known = {name: value for name, value in guidance.items() if value is not None}
    preset = run.setting("preset")
    settings = {
        "preset": ", ".join(filter(None, (preset, *(f"{k} {v}" for k, v in known.items())))),
        "network evaluations a sample": int(run.rows["steps"].max()) if len(run.rows) else None,
        "samples a case": run.setting("method.members"),
        "weights": _thousands(run.cost.get("parameters")),
        "lesion head": run.setting("lesion_head"),
        "learned from": "/".join(Path(run.setting("teacher") or "").parts[-2:]),
    }
    return {name: value for name, value in settings.items() if value}


def _data(run: RunFolder) -> dict[str, str]:
    said, source = run.data, run.data.get("splits_source")
    splits = {
        f"{SPLIT_NAMES[split]} cases": _with_patients(run, split, count)
        for split, count in (said.get("cases") or {}).items()
    }
    facts = {
        "from": said.get("root"),
        "kind": "generated heads" if is_generated(run) else None,
        **splits,
        "split": ", ".join(filter(None, (f"by {said.get('split_by', 'patient')}", source)))
        if splits
        else None,
        "grids (d × h × w)": _each(said.get("shapes_dhw")),
        "voxels (mm)": _each(said.get("spacings_mm_dhw")),
        "units of CT": ", ".join(said.get("ct_units") or []),
        "cases with a lesion": said.get("cases_with_lesion"),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _with_patients(run: RunFolder, split: str, count: int) -> str:
    patients = (run.data.get("patients") or {}).get(split)
    return f"{count} of {_count(len(patients), 'patient')}" if patients else str(count)


def _training(run: RunFolder) -> dict[str, Any]:
    machine = run.facts.get("gpu") or run.facts.get("processor")
    facts = {
        "steps": run.cost.get("training_steps"),
        "seconds, without validation": run.cost.get("training_seconds"),
        "on": machine,
        "weights trained": _thousands(run.cost.get("trained_parameters")),
        "seed": run.facts.get("seed"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _tables(run: RunFolder, tables: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, str]:
    made = {name: headline(run.rows, scores) for name, scores in tables.items()}
    return {name: to_markdown(t).strip() for name, t in made.items() if headline_scores(t)}


def _calibration(run: RunFolder) -> Iterator[str]:
    """What was fitted, and what that did to the size of the uncertainty."""
    if not run.calibration:
        return
    at_mm, cases = run.calibration["misregistration_mm"], run.calibration["case_ids"]
    yield (
        f"Fitted on {_count(len(cases), 'validation case')} with the CT moved by {at_mm:g} mm, "
        f"for intervals of {100 * run.calibration['level']:g}%."
    )
    long = summary(run.rows[run.rows["misregistration_mm"] == at_mm], resamples=1)
    of_head = long[(long["roi"] == "whole") & (long["n"] > 0)].set_index("metric")["mean"]
    found = {name: float(of_head[name]) for name in ("ence_raw", "ence") if name in of_head}
    if len(found) == 2:
        yield (
            f"There, over the head, the expected normalised calibration error (ENCE) is "
            f"{found['ence_raw']:.3f} before calibration and {found['ence']:.3f} after."
        )


def _render(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("clinfuse.reporting", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|")
    return environment.get_template(template).render(**context).strip() + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _thousands(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _times(values: Sequence[float | int]) -> str:
    return " × ".join(f"{value:g}" for value in values)


def _each(values: Sequence[Sequence[float | int]] | None) -> str:
    return ", ".join(map(_times, values or []))
