"""Train a method and score it: ``python -m clinfuse.train preset=stroke``."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, Timer, WeightAveraging
from omegaconf import DictConfig, OmegaConf

from clinfuse.allowed import check_places
from clinfuse.callbacks.calibration import CalibrationFit, read_calibration
from clinfuse.callbacks.checkpoint import RunCheckpoint
from clinfuse.callbacks.interruption import Interruptions
from clinfuse.callbacks.loggers import all_of
from clinfuse.callbacks.ranks import Silent, alone, gather, is_first, part, starts_its_own
from clinfuse.callbacks.recorder import CaseRecorder
from clinfuse.configuration import (
    CHECKPOINT,
    CONFIG_PATH,
    add_draws,
    build_method,
    building,
    checkpoint_content,
    checkpoint_of,
    choice_was_made,
    group_of,
    in_one_sentence,
    quiet_libraries,
    register_resolvers,
    run_config,
    run_facts,
    save_config,
    trained_method,
)
from clinfuse.metrics.calibration import Calibration
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.run_folder import CONFIG
from clinfuse.runs import (
    State,
    adopt_training,
    begun,
    own_checkpoint,
    run_key,
    shared_training,
    training_key,
)
from clinfuse.teaching import check_patients, is_student, learn_from, taught

log = logging.getLogger(__name__)
register_resolvers()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
@in_one_sentence
def main(cfg: DictConfig) -> float | None:
    """Fit, then sample and score the test cases; the objective metric goes back to a sweep."""
    quiet_libraries()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume:
        if own_checkpoint(Path(cfg.resume)) is None:  # before the run's record is written anew
            checkpoint_of(cfg.resume)
        cfg = resumed(cfg)
        state = State(run_key(cfg), config=OmegaConf.to_yaml(cfg))
    else:
        if cfg.teacher is not None or is_student(cfg):
            cfg = taught(cfg)
        for name in ("name", "method_name", "label"):
            cfg[name] = str(cfg[name])  # known to Hydra alone
        if cfg.lesion_head is not None:
            cfg.lesion_head = str(Path(cfg.lesion_head).resolve())  # wherever it is read from
        state = begun(folder, cfg)
        if is_first():
            save_config(cfg, folder)
        if state.is_finished:
            print(f"finished before: {folder}", flush=True)
            return state.objective
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    built: Callable[[], Any] = contextlib.nullcontext
    if cfg.resume:  # from a file that may be edited or damaged
        built = partial(building, folder)
    with built():
        data = instantiate(cfg.data, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    if cfg.test:
        data.setup("test")  # what cannot be tested is said now, not after the training
    with built():
        method = build_method(cfg)
    if cfg.get("teacher") is not None:
        check_patients(cfg.teacher, data)
        if own_checkpoint(folder) is None:
            learn_from(cfg.teacher, method, folder)
    if cfg.lesion_head is None and "lesion_head" in cfg.method:
        log.info(
            "no lesion head (lesion_head=FOLDER names one): gamma is off, lesion rows are left out"
        )
    with built():
        trainer = trainer_of(cfg)
    if method.is_trainable or not starts_its_own(trainer):
        gather_ranks(trainer)
    facts: dict[str, Any] = {}
    if is_first():
        facts = {**run_facts(), "seed": cfg.seed, "data": data.describe()}
        write_record(cfg, state, facts, data, folder)
        settings = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(settings, dict)
        for logger in trainer.loggers:
            logger.log_hyperparams({**settings, "facts": facts})
    if method.is_trainable:
        trainings = None if cfg.get("trainings") is None else Path(cfg.trainings)
        train(method, data, trainer, folder, trainings, training_key(cfg))
    part(trainer)
    if not is_first():
        return None
    if trainer.world_size > 1:
        trainer = first_rank_alone(cfg, trainer)
        method = trained_method(folder, cfg) if method.is_trainable else method
    else:
        add_draws(method, folder / "checkpoints")
    if cfg.get("validate") and last_measured(trainer, cfg.objective_metric) is None:
        trainer.validate(method, datamodule=data, verbose=False)
    objective = last_measured(trainer, cfg.objective_metric)
    calibration = calibrated(cfg, method, data, folder)
    if cfg.test:
        for recorder in (c for c in trainer.callbacks if isinstance(c, CaseRecorder)):
            recorder.facts = report_facts(cfg, facts)
            recorder.lesion_head = getattr(method, "lesion_head", None)
            recorder.calibration = calibration
        trainer.test(method, datamodule=data, verbose=False)
        if (folder / "report.html").exists():
            print(f"report: {folder / 'report.html'}")
    state._replace(is_finished=True, objective=objective).write(folder)
    return objective


def trainer_of(cfg: DictConfig) -> Any:
    """What trains, with callbacks and loggers; of several ranks the first alone has loggers."""
    callbacks = all_of(instantiate(cfg.callbacks, _convert_="all"))
    loggers = all_of(instantiate(cfg.logger, _convert_="all")) if is_first() else [Silent()]
    if not loggers:  # logger=none: Lightning refuses a monitor that nobody listens to
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all")


def gather_ranks(trainer: Any) -> None:
    """Wait until all that train together are here.

    Raises:
        ValueError: a sweep whose jobs would have to start their own: the second could not.
    """
    if starts_its_own(trainer) and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(
            f"expected one training at a time on {trainer.world_size} processes, or a sweep whose "
            "jobs Slurm starts that many of (hydra/launcher=slurm), got a sweep on this machine"
        )
    gather(trainer)


def first_rank_alone(cfg: DictConfig, trainer: Any) -> Any:
    """A trainer that goes on by itself where all ranks have ended training: Lightning's advice.

    It has the same callbacks and loggers, and has come as far.
    """
    own = instantiate(
        cfg.trainer,
        callbacks=[c for c in trainer.callbacks if not isinstance(c, WeightAveraging)],
        logger=trainer.loggers,
        **alone(cfg.trainer.devices),
        _convert_="all",
    )
    own.fit_loop.load_state_dict(trainer.fit_loop.state_dict())
    return own


def write_record(
    cfg: DictConfig, state: State, facts: dict[str, Any], data: Any, folder: Path
) -> None:
    """What the run's folder says of itself: ``run.json``, ``facts.json`` and the split."""
    for place in (folder, folder / ".hydra"):
        for half_written in place.glob(".*.tmp"):  # by who was stopped while writing
            half_written.unlink(missing_ok=True)
    if not cfg.resume:  # once more: each of several ranks has put Hydra's own there meanwhile
        save_config(cfg, folder)
    state.write(folder)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    data.write_splits(folder / "splits.json")


def train(
    method: Any, data: Any, trainer: Any, folder: Path, trainings: Path | None, key: str
) -> None:
    """Give a method its weights: go on where the folder's last checkpoint is, or begin.

    Where ``trainings`` remembers a run with the same training, its weights are taken instead.
    """
    with contextlib.ExitStack() as stack:
        trained = None
        if trainings is not None and is_first():
            trained = stack.enter_context(shared_training(trainings, key, folder))
        trained = trainer.strategy.broadcast(trained)
        if trained is not None:
            if is_first():
                log.info("trained before, with the same data and settings: %s", trained)
                adopt_training(trained, folder)
                method.load_state_dict(checkpoint_content(folder / CHECKPOINT)["state_dict"])
            return
        with losing_a_worker(folder):
            checkpoint = own_checkpoint(folder)
            trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        if is_first():
            cost = training_cost(trainer)
            write_atomically(folder / "cost.json", json.dumps(cost, indent=1) + "\n")


@contextlib.contextmanager
def losing_a_worker(folder: Path) -> Iterator[None]:
    """Training with data from other processes, of which torch says in many lines that one died.

    Raises:
        ValueError: the same in one sentence.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"expected data.num_workers processes that draw until the training ends, got one that "
            f"died, as for want of memory ({reason}): resume={folder} goes on"
        ) from error


def last_measured(trainer: Any, metric: str) -> float | None:
    """A metric's last value, in this session of the run or in one that was interrupted."""
    measured = dict(trainer.callback_metrics)
    for callback in trainer.callbacks:
        if isinstance(callback, RunCheckpoint):
            measured = {**callback.metrics, **measured}
    return float(measured[metric]) if metric in measured else None


def training_cost(trainer: Any) -> dict[str, int | float]:
    """What a finished training cost: its steps, its seconds without validation, the weights.

    Seconds are those of all sessions of a run that was interrupted, and need the callback Timer.
    """
    parameters = list(trainer.lightning_module.parameters())
    cost: dict[str, int | float] = {
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "training_steps": trainer.global_step,
    }
    for callback in trainer.callbacks:
        if isinstance(callback, Timer):
            cost["training_seconds"] = round(callback.time_elapsed("train"), 1)
    return cost


def calibrated(cfg: DictConfig, method: Any, data: Any, folder: Path) -> Calibration | None:
    """What all validation cases say of a method's uncertainty, kept in the run's folder.

    None for a method without spread, or where ``interval_level`` is null.
    """
    level = cfg.get("interval_level")  # runs of before it was there are resumed without
    if level is None or getattr(method, "members", 1) < 2:
        return None
    trainer = instantiate(
        cfg.trainer,
        callbacks=[CalibrationFit(folder, level), Interruptions()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=1.0,
        **alone(cfg.trainer.devices),
        _convert_="all",
    )
    trainer.validate(method, datamodule=data, verbose=False)
    return read_calibration(folder, method)


def resumed(cfg: DictConfig) -> DictConfig:
    """The interrupted run's own configuration, with what this command line changes.

    But for its loggers: see ``loggers_of``.

    Raises:
        FileNotFoundError: no run.
        ValueError: a configuration as in ``run_config``, one that writes elsewhere, or another
            method, data, ... asked for.
    """
    saved = run_config(cfg.resume)
    apart = ("resume", "logger")
    changes = [o for o in HydraConfig.get().overrides.task if group_of(o) not in apart]
    groups = [o for o in changes if "=" in o and o.split("=")[0] in _GROUPS]
    if groups:
        raise ValueError(f"a resumed run keeps its method and data, and cannot change {groups}")
    plain = OmegaConf.to_container(saved, resolve=False)
    asked = [o.lstrip("+~").split("=")[0] for o in changes]
    check_places(plain, Path(cfg.resume) / CONFIG, asked)
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(changes), {"resume": cfg.resume})
    assert isinstance(merged, DictConfig)
    merged.logger = loggers_of(saved, cfg)
    return merged


_GROUPS = {path.name for path in Path(CONFIG_PATH).iterdir() if path.is_dir()}


def loggers_of(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """Where a run that goes on is logged: as this command line says, if it says anything of it.

    Else by the loggers that it had, as they are configured here: a run may come from a stranger,
    who is not to say where curves and pictures are sent. What he had otherwise is named.
    """
    if choice_was_made("logger"):
        return cfg.logger
    options = {path.stem: OmegaConf.load(path) for path in Path(CONFIG_PATH, "logger").glob("*")}
    had = OmegaConf.to_container(saved, resolve=False)
    assert isinstance(had, dict)
    kept, others = OmegaConf.create(), list[str]()
    named = had.get("logger") or {}
    for name, theirs in named.items() if isinstance(named, dict) else ():
        if theirs is None:  # switched off
            continue
        if not isinstance(theirs, dict) or (ours := options.get(name, {}).get(name)) is None:
            others.append(f"logger.{name}")
            continue
        kept[name] = ours
        here = OmegaConf.to_container(ours, resolve=False)
        assert isinstance(here, dict)
        changed = {k: v for k, v in theirs.items() if k not in here or here[k] != v}
        others += [f"logger.{name}.{key}={str(value)[:100]!r}" for key, value in changed.items()]
    if others:
        log.warning(
            "a run that goes on is logged as this machine's conf or its command line says, and "
            "that says nothing of what the run had: %s",
            ", ".join(others),
        )
    log.info("logged to: %s (logger=csv, logger=wandb, ... asks for others)", ", ".join(kept))
    return kept


def report_facts(cfg: DictConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What the report's head says of a run, in a reader's words."""
    guidance, data = cfg.guidance, facts["data"]
    shown = {
        "preset": f"{cfg.preset}: "
        f"alpha {guidance.alpha}, beta {guidance.beta}, gamma {guidance.gamma}",
        "guidance": f"eta {guidance.eta}, eta_u {guidance.eta_u}, kappa {guidance.kappa}",
        "data": data["root"],
        "cases": ", ".join(f"{count} {split}" for split, count in data["cases"].items()),
        "split": f"by {data.get('split_by', 'patient')}, {data['splits_source']}",
        "training epochs": cfg.trainer.max_epochs,
        "seed": cfg.seed,
    }
    return shown | {name: value for name, value in facts.items() if isinstance(value, str)}


if __name__ == "__main__":
    from clinfuse.train import main as run  # by this name the processes of a launcher find it

    run()
