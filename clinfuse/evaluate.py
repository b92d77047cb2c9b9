"""Score runs and rules on the same perturbed cases: ``python -m clinfuse.evaluate run=RUN``.

With ``shared=true out=FOLDER`` each case's rows are kept by themselves: any number of the same
command share the cases and may stop and start, and the last one writes the table.
"""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from clinfuse.callbacks.calibration import read_calibration
from clinfuse.callbacks.interruption import Interruptions
from clinfuse.callbacks.ranks import alone
from clinfuse.callbacks.recorder import CaseRecorder
from clinfuse.configuration import (
    CONFIG_PATH,
    building,
    choice_was_made,
    fingerprint,
    in_one_sentence,
    is_sampled_as_trained,
    lesion_head_of,
    memory_budget,
    quiet_libraries,
    register_resolvers,
    rule,
    run_config,
    run_facts,
    runs_named,
    trained_method,
    weights_file,
    with_other_guidance,
)
from clinfuse.data.one_case import OneCase
from clinfuse.data.splits import read_splits
from clinfuse.data.worklist import Worklist, begun_alike, digest_of, share_of
from clinfuse.metrics.calibration import Calibration
from clinfuse.networks.windows import limit_memory, windows_used
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.card import write_run_card
from clinfuse.reporting.collection import Scored, merged
from clinfuse.reporting.rows import CASE_COLUMNS, read_rows, write_rows
from clinfuse.reporting.tables import (
    KEPT_SCORES,
    headline,
    headline_scores,
    print_table,
    to_markdown,
)

log = logging.getLogger(__name__)
register_resolvers()

Scoring = tuple[str, str, int, Any, Calibration | None]
"""Name, preset, seed, method and calibration of what is scored."""


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Test every method named on the same cases; leave cases.csv, figures and report.html."""
    quiet_libraries()
    runs = runs_named(cfg)
    head = None if cfg.lesion_head is None else lesion_head_of(cfg.lesion_head)
    methods = list(methods_of(cfg, runs, head))
    if not methods:
        raise ValueError(
            "expected run=RUN_FOLDER, method=NAME or baselines=[NAMES], got none of them"
        )
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data = data_of(cfg, runs)
    perturbed = {
        name: ", ".join(f"{amount:g}" for amount in amounts)
        for name, amounts in perturbations_of(cfg).items()
    }
    facts = {
        "data": str(data.root),
        "cases": cases_of(data),
        **perturbed,
        "runs": ", ".join(runs) or "none",
        "mask source": cfg.mask_source,
        **run_facts(),
    }
    recorder = CaseRecorder(
        cfg.out,
        preset=methods[0][1],
        seed=cfg.seed,
        method=methods[0][0],
        mask_source=cfg.mask_source,
        pictures=cfg.pictures,
        pictures_at_mm=cfg.pictures_at_mm,
        lesion_head=head,
        facts=facts,
        title="Evaluation: " + ", ".join(name for name, *_ in methods),
    )
    if cfg.shared or cfg.shard is not None:
        score_shared(cfg, methods, data, recorder, runs)
    else:
        score(cfg, methods, data, recorder)
        write_evaluation(cfg, data, recorder)


def score(cfg: DictConfig, methods: Sequence[Scoring], data: Any, recorder: CaseRecorder) -> None:
    """Test every method on all cases of ``data``, into the recorder."""
    trainer = trainer_of(cfg, recorder)
    for name, preset, seed, method, calibration in methods:
        recorder.method, recorder.preset, recorder.seed = name, preset, seed
        recorder.calibration = calibration
        print(f"scoring {name}", flush=True)
        limit_memory(method, memory_budget(cfg.memory_gb, trainer.strategy.root_device))
        trainer.test(method, datamodule=data, verbose=False)
        if windows := windows_used(method):
            print(f"{name} was evaluated in windows: {windows}")


def trainer_of(cfg: DictConfig, *callbacks: Any) -> lightning.Trainer:
    """What tests, on its device."""
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks, Interruptions()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **alone(cfg.trainer.devices),
        _convert_="all",
    )
    return trainer


def write_evaluation(cfg: DictConfig, data: Any, recorder: CaseRecorder) -> None:
    """cases.csv, report.html and what else an evaluation's folder has."""
    data.write_splits(Path(cfg.out) / "splits.json")
    record = {**run_facts(), "seed": cfg.seed, "data": {"root": str(data.root)}}
    write_atomically(Path(cfg.out) / "facts.json", json.dumps(record, indent=1) + "\n")
    print(f"report: {recorder.write()}")
    write_run_card(Path(cfg.out))


def score_shared(
    cfg: DictConfig,
    methods: Sequence[Scoring],
    data: Any,
    recorder: CaseRecorder,
    runs: Sequence[str],
) -> None:
    """Score this worker's cases, one by one into ``rows/CASE``, and all together if none is left.

    The table is that of one worker but for seconds; the report has no pictures of cases.
    """
    out = Path(cfg.out)
    if not choice_was_made("out"):
        raise ValueError("expected out=FOLDER, the same for all that share the cases, got none")
    data.setup("test")  # what cannot be tested is said now, of all cases
    agree(cfg, runs)
    recorder.pictures = 0
    worklist = Worklist(out / "rows", data.splits["test"], share_of(cfg.shard, os.environ))

    def make(case: str, scratch: Path) -> None:
        for of_another in (recorder.rows, recorder.views, recorder.pairs):
            of_another.clear()
        score(cfg, methods, OneCase(data, case), recorder)
        write_rows(scratch / "cases.csv", recorder.rows)
        print(f"scored: {case}", flush=True)

    worklist.go(make)
    failed = worklist.failed
    for case, reason in failed.items():
        print(f"clinfuse: failed: {case}: {reason}", file=sys.stderr)
    with worklist.alone():
        if len(worklist.done) == len(worklist.cases):
            recorder.rows = in_order([worklist.folder / case for case in worklist.cases])
            recorder.views, recorder.pairs = [], []
            recorder.levels = {c.level for *_, c in methods if c is not None}
            recorder.reliability.clear()  # of this worker's cases alone
            write_evaluation(cfg, data, recorder)
    print(f"{len(worklist.done)} of {len(worklist.cases)} cases scored")
    if failed:
        sys.exit(1)


def agree(cfg: DictConfig, runs: Sequence[str]) -> None:
    """Have all workers score alike: what is asked for, and the first one's precision and memory.

    Raises:
        ValueError: ``out`` is of another evaluation.
    """
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    asked = {name: value for name, value in plain.items() if name not in _OF_A_WORKER}
    own = {
        "key": fingerprint([asked, digest_of(map(weights_file, runs))]),
        "commit": run_facts()["commit"],
        "precision": cfg.trainer.precision,
        "memory_gb": memory_budget(cfg.memory_gb, trainer_of(cfg).strategy.root_device),
    }
    begun = begun_alike(Path(cfg.out) / "evaluation.json", own)
    cfg.trainer.precision, cfg.memory_gb = begun["precision"], begun["memory_gb"]


_OF_A_WORKER = ("out", "shard", "shared", "cache_dir", "trainer", "memory_gb")


def in_order(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The rows of cases, one folder each, in the order in which one worker would have made them."""
    rows = pd.concat(
        [read_rows(folder / "cases.csv").assign(case=i) for i, folder in enumerate(folders)]
    )
    tests = rows[list(_TEST)].apply(tuple, axis=1)
    order = {test: i for i, test in enumerate(dict.fromkeys(tests))}
    ordered = rows.assign(test=tests.map(order)).sort_values(["test", "case"], kind="stable")
    plain = ordered[list(CASE_COLUMNS)].itertuples(index=False)
    return [dict(zip(CASE_COLUMNS, row, strict=True)) for row in plain]


_TEST = ("method", "preset", "seed", "misregistration_mm", "perturbation", "amount")
"""What tells one pass over all cases from another."""


def methods_of(
    cfg: DictConfig, runs: Sequence[str], head: nn.Module | None = None
) -> Iterator[Scoring]:
    """All that is to be scored.

    Runs come first, then ``method``, then baselines. A run that was trained without a lesion head
    is guided by the one that scores, and is then not sampled as it was calibrated.
    """
    for folder in runs:
        saved = with_other_guidance(run_config(folder), cfg)
        method, calibration = trained_method(folder, saved), None
        lent = head is not None and vars(method).get("lesion_head", head) is None
        if lent:
            method.lesion_head = head
        if is_sampled_as_trained(saved, folder) and not lent:
            calibration = read_calibration(folder, method)
        name = saved.get("label") or saved.method_name
        yield name, saved.preset, saved.seed, method, calibration
    names = [HydraConfig.get().runtime.choices.get("method"), *cfg.baselines]
    for name in (name for name in names if name):
        method = rule(name)
        if method.is_trainable:
            raise ValueError(
                f"expected a method without weights, got {name}: name its run folder, run="
            )
        yield name, cfg.preset or "default", cfg.seed, method, None


def data_of(cfg: DictConfig, runs: Sequence[str]) -> Any:
    """The cases to score: those of the first run unless the command line chooses others."""
    own = runs and not choice_was_made("data")
    chosen = run_config(runs[0]) if own else cfg
    data_cfg, axes = chosen.data, chosen.get("spatial_dims", 3)
    for folder in runs:
        if (theirs := run_config(folder).get("spatial_dims", 3)) != axes:
            raise ValueError(
                f"expected runs trained on images of {axes} axes, as the data has, got one trained "
                f"on {theirs}: {folder}"
            )
    amplitudes = cfg.misregistration_mm
    if not (isinstance(amplitudes, ListConfig) and len(amplitudes)):
        raise ValueError(f"expected misregistration_mm=[LIST], got {amplitudes}")
    if not all(isinstance(a, int | float) and math.isfinite(a) for a in amplitudes):
        raise ValueError(f"expected numbers in misregistration_mm, got {amplitudes}")
    amplitudes = [float(amplitude) for amplitude in amplitudes]
    wrong: dict[str, Any] = {}
    if perturbations := perturbations_of(cfg):
        wrong = {"perturbations": perturbations, "perturbed_at_mm": cfg.perturbed_at_mm}
    with building(runs[0]) if own else contextlib.nullcontext():
        data = instantiate(data_cfg, misregistration_mm=amplitudes, **wrong, _convert_="all")
    data.prepare_data()
    return data


def perturbations_of(cfg: DictConfig) -> dict[str, Any]:
    """What is to be wrong with cases besides misregistration: amounts, those that are given."""
    plain = OmegaConf.to_container(cfg.perturbations, resolve=True)
    assert isinstance(plain, dict)
    asked = {str(name): amounts for name, amounts in plain.items() if amounts is not None}
    if "without_lesion" in asked and cfg.mask_source != "expert":
        raise ValueError(
            f"expected mask_source=expert where perturbations.without_lesion withholds its lesion, "
            f"got mask_source={cfg.mask_source}"
        )
    return asked


def cases_of(data: Any) -> str:
    """How many test cases there are, and of how many patients where that is fewer."""
    cases = data.splits["test"]
    patients = len({data.patients[case] for case in cases})
    return f"{len(cases)} test" + (f", of {patients} patients" if patients < len(cases) else "")


class OneTable(Callback):
    """After ``-m``: all jobs' rows in ``cases.csv``, and ``table.md``, in the sweep's folder."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            print(f"table: {one_table(Path(config.hydra.sweep.dir))}")
        except (ValueError, FileNotFoundError) as error:  # Hydra would drop it
            log.error("no table: %s", error)


def one_table(folder: Path) -> Path:
    """Merge the rows of the evaluations in a folder's own folders; returns the table's path.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they tested different cases, or one method twice.
    """
    files = sorted(folder.glob("*/cases.csv"))
    if not files:
        raise FileNotFoundError(f"expected evaluations with cases.csv, found none: {folder}")
    tested = {file: (read_splits(file.parent) or {}).get("test") for file in files}
    rows = merged([Scored(str(file.parent), read_rows(file), tested[file]) for file in files])
    write_rows(folder / "cases.csv", rows)
    quality, kept = headline(rows), headline(rows, KEPT_SCORES)
    is_defined = bool(headline_scores(quality))
    print_table(quality if is_defined else headline(rows, KEPT_SCORES[:5]), "All together")
    tables = [quality, kept] if is_defined else [kept]
    return write_atomically(folder / "table.md", "\n\n".join(map(to_markdown, tables)) + "\n")


if __name__ == "__main__":
    from clinfuse.evaluate import main as run  # by this name the processes of a launcher find it

    run()
