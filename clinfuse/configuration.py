"""What the entry points share: the configuration's place, run folders, and one-sentence errors.

Only the entry points import this; past them nobody sees a configuration.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from clinfuse.allowed import check_named, check_text
from clinfuse.callbacks.checkpoint import PREVIOUS
from clinfuse.callbacks.model_draws import read_draws
from clinfuse.functional.free_memory import free_memory
from clinfuse.networks.pretrained import SAFETENSORS, read_safetensors, read_whole
from clinfuse.networks.windows import is_out_of_memory
from clinfuse.preparation.identifiers import without_identity
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.run_folder import CONFIG, DIGEST, check_config, write_config

log = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "conf"
_CHECKOUT = _PACKAGE.parent / "conf"

CONFIG_PATH = str(_SHIPPED if _SHIPPED.is_dir() else _CHECKOUT)
"""Absolute path of ``conf``: inside the package when installed, beside it in a checkout.

The shipped folder is asked for first, since beside an installed package lies site-packages, whose
``conf`` would be somebody else's.
"""

CHECKPOINT = Path("checkpoints") / "last.ckpt"
EXPORTED = CHECKPOINT.with_suffix(SAFETENSORS)
LESION_HEAD = "clinfuse.methods.lesion_head.LesionHead"


def register_resolvers() -> None:
    """What YAML can ask for: ``${precision:}``, ``${fingerprint:...}``, ``${run_dir:...}``."""
    resolvers: dict[str, Callable[..., Any]] = {
        "precision": fastest_precision,
        "deterministic": determinism,
        "fingerprint": fingerprint,
        "swept": swept,
        "swept_folder": lambda: re.sub(r"[^\w.,+-]+", "_", swept()).strip("_"),
        "sweep_dir": lambda group, scale, fresh: (
            f"runs/sweeps/{group}" + (f"/{scale}" if scale else "") if group else str(fresh)
        ),
        "run_dir": lambda resume, fresh: str(resume or of_slurm_step(str(fresh))),
        "hydra_subdir": lambda resume: ".hydra_resumed" if resume else ".hydra",
        "record_if": lambda keep_ids: ".hydra" if keep_ids else None,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def of_slurm_step(folder: str) -> str:
    """A run's folder, named by the job where srun has started this process, and not by the time.

    So all its ranks have one, and find it again when the job is put back into the queue.
    """
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None or step is None or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return folder
    return str(Path(folder).with_name(f"slurm_{job}_{step}"))


def swept() -> str:
    """What this job of a sweep has of its own: ``method.steps=10,sampler=ddim``.

    As the sweep's ``sweep.json`` says; where there is none, all that its command line has.
    """
    hydra = HydraConfig.get()
    record = Path(hydra.sweep.dir) / SWEEP
    own = [str(override) for override in OmegaConf.to_container(hydra.overrides.task) or []]
    jobs = json.loads(record.read_text())["jobs"] if record.is_file() else []
    for job in jobs:
        if job and set(job) <= set(own):
            return ",".join(job)
    params = hydra.sweeper.get("params") or {}
    of_params = [override for override in own if override.split("=")[0] in params]
    return ",".join(of_params) or str(hydra.job.override_dirname)


SWEEP = "sweep.json"
"""What a sweep's folder says of its jobs."""


def fastest_precision() -> str:
    """``bf16-mixed`` where the hardware multiplies bfloat16 natively, else ``32-true``."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    is_native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16-mixed" if is_native else "32-true"


def determinism() -> bool | str:
    """True; ``warn`` where there is a GPU, for which PyTorch lacks some kernels that repeat.

    Those are said in a warning, where true would stop the run: sums along an axis and medians, in
    scores.
    """
    return "warn" if torch.cuda.is_available() else True


def fingerprint(node: Any) -> str:
    """Eight characters that differ when a piece of configuration does."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


_EXPECTED = (
    *(ValueError, FileNotFoundError, FileExistsError, ConnectionError),
    *(MissingMandatoryValue, MisconfigurationException),
)


class Refused(Exception):
    """Bad input of one job of a sweep, which has been said already."""


class FailuresLast(Callback):
    """In a sweep a job that fails does not stop the others; the sweep then ends with status 1.

    What failed, and why, stands in ``failed.txt`` in the job's folder.
    """

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        Path(config.hydra.runtime.output_dir, FAILED).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status is not JobStatus.FAILED:
            return
        error = job_return._return_value
        if isinstance(error, SIGTERMException):  # of the sweep, not of the job
            sys.exit(128 + signal.SIGTERM)
        if not isinstance(error, Refused):
            traceback.print_exception(error)
        sentence = f"{'' if isinstance(error, Refused) else f'{type(error).__name__}: '}{error}"
        write_atomically(Path(config.hydra.runtime.output_dir, FAILED), f"{sentence}\n")
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        failed = sorted(Path(config.hydra.sweep.dir).rglob(FAILED))
        for path in failed:
            print(f"clinfuse: failed: {path.parent}: {path.read_text().strip()}", file=sys.stderr)
        if failed:
            sys.exit(1)


FAILED = "failed.txt"


def in_one_sentence(main: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """An entry point whose bad input ends in one sentence on stderr and exit status 1."""

    @functools.wraps(main)
    def explained(cfg: DictConfig) -> Any:
        shown = without_names(cfg)
        try:
            with nameless_logs(shown):
                return main(cfg)
        except (*_EXPECTED, InstantiationException, RuntimeError, MemoryError, OSError) as error:
            cause: BaseException = error
            while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
                cause = cause.__cause__
            if is_out_of_memory(cause):
                cause = ValueError(out_of_memory(cause))
            if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, _EXPECTED):
                place = "" if cause.filename is None else f": {cause.filename}"
                cause = ValueError(
                    f"expected files that can be read and written, got {cause.strerror}{place}"
                )
            if not isinstance(cause, _EXPECTED) or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            if isinstance(cause, MissingMandatoryValue):
                cause = ValueError(f"expected {cause.full_key}=VALUE on the command line, got none")
            sentence = shown(" ".join(str(cause).split()))
            print(f"clinfuse: {sentence}", file=sys.stderr)
            if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                raise Refused(sentence) from None  # FailuresLast lets the other jobs run
            print("(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
            sys.exit(1)

    return explained


OF_PATIENTS = ("input", "mri", "ct", "brain_mask", "bone_mask", "lesion_mask")
"""Settings whose paths may name a patient."""


def without_names(cfg: DictConfig) -> Callable[[str], str]:
    """What makes a text fit for a log: paths of scans, where ``keep_ids`` is false, are left out.

    ``<mri>`` stands for what the command line says, and a hash for a patient's folder within
    ``input``. Where nothing says that names are not to be kept, a text stays as it is.
    """
    if OmegaConf.is_missing(cfg, "keep_ids") or cfg.get("keep_ids", True):
        return str
    paths: dict[str, str] = {}
    names: list[str] = []
    for setting in OF_PATIENTS:
        if OmegaConf.is_missing(cfg, setting) or not cfg.get(setting):
            continue
        given = Path(str(cfg[setting]))
        for place in (given, given.absolute(), given.resolve()):
            if len(place.parent.parts) > 1:
                paths.setdefault(str(place.parent), f"<{setting}>/..")
            paths[str(place)] = f"<{setting}>"
        if setting == "input" and given.is_dir():
            names = [each.name for each in given.iterdir() if each.is_dir()]
    salt = str(cfg.get("salt") or "")

    def shown(text: str) -> str:
        for path in sorted(paths, key=len, reverse=True):
            text = text.replace(path, paths[path])
        return without_identity(text, names, salt)

    return shown


@contextlib.contextmanager
def nameless_logs(shown: Callable[[str], str]) -> Iterator[None]:
    """Whatever is logged meanwhile, by whomever, is logged as ``shown``."""

    def rewrite(record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        return True

    handlers = list(logging.getLogger().handlers)
    for handler in handlers:
        handler.addFilter(rewrite)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(rewrite)


def out_of_memory(error: BaseException) -> str:
    """What to do where memory ran out and windows did not help."""
    said = (str(error).splitlines() or ["none left"])[0]
    if said.startswith("memory ran out"):  # a network that was evaluated in windows
        return said
    return (
        f"memory ran out ({said}): expected in training a smaller data.patch_shape or "
        f"data.batch_size (trainer.accumulate_grad_batches makes up for it) or a smaller network, "
        f"in fusing and scoring a smaller memory_gb or fewer members"
    )


def run_config(folder: str | Path) -> DictConfig:
    """The configuration that a run was made with, checked as one that a stranger may have written.

    Raises:
        FileNotFoundError: the folder is no run's.
        ValueError: its configuration cannot be read, is none, is not what the run wrote, or names
            what ``conf`` does not (see ``allowed``).
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"expected a run folder with {CONFIG}, found none in {folder}")
    check_config(Path(folder))
    cfg = checked_config(read_text(path), path)
    if not isinstance(cfg, DictConfig) or not {"method", "data"} <= set(cfg):
        raise ValueError(f"expected a run's configuration with method and data, got none: {path}")
    return cfg


def save_config(cfg: DictConfig, folder: str | Path) -> None:
    """Keep a configuration as that of a run."""
    write_config(Path(folder), OmegaConf.to_yaml(cfg))


def checked_config(text: str, path: Path) -> Any:
    """A configuration that somebody wrote, nothing in it resolved, refused if it may do harm.

    Raises:
        ValueError: it cannot be read, or names what ``conf`` does not (see ``allowed``).
    """
    check_text(text, path)
    try:
        cfg = OmegaConf.load(io.StringIO(text))
        plain = OmegaConf.to_container(cfg, resolve=False)
    except Exception as error:  # what is no configuration may fail in any way
        raise ValueError(
            f"expected a run's configuration, got {type(error).__name__}: {path}"
        ) from error
    check_named(plain, path, Path(CONFIG_PATH))
    return cfg


def read_text(path: Path) -> str:
    """A text in UTF-8, as we write them.

    Raises:
        ValueError: it is none.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a text in UTF-8, got other bytes: {path}") from error


def checkpoint_of(folder: str | Path) -> Path:
    """The last checkpoint of a run.

    Raises:
        FileNotFoundError: the run has not saved one.
    """
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint at {path}, found none: train the run first")
    return path


def build_method(cfg: DictConfig) -> Any:
    """The method that a configuration describes, untrained; its lesion head frozen, if named."""
    method_cfg = cfg.method
    if cfg.get("lesion_head") is None or "lesion_head" not in method_cfg:
        return instantiate(method_cfg, _convert_="all")
    head = lesion_head_of(cfg.lesion_head)
    return instantiate(method_cfg, lesion_head=head, _convert_="all")


def memory_budget(asked: Any, device: torch.device | None = None) -> float | None:
    """What ``memory_gb`` allows for a network's features, in 10^9 bytes; None for any amount.

    ``auto`` is half of what is free now on the device: the other half is for the volumes.

    Raises:
        ValueError: neither auto, null nor a number above 0.
    """
    if asked is None:
        return None
    if asked == "auto":
        if device is not None and device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0] / 2e9
        return free_memory() / 2e9
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not asked > 0:
        raise ValueError(f"expected memory_gb=auto, null or a number above 0, got {asked!r}")
    return float(asked)


def runs_named(cfg: DictConfig) -> list[str]:
    """The folders of ``run=FOLDER`` or ``run=[FOLDERS]``; none where it is null."""
    if cfg.run is None:
        return []
    return list(map(str, cfg.run)) if isinstance(cfg.run, ListConfig) else [str(cfg.run)]


def rule(name: str) -> Any:
    """A method that needs no training, by its configuration's name."""
    folder = Path(CONFIG_PATH) / "method"
    path = folder / f"{name}.yaml"
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"expected a method of {', '.join(known)}, got {name!r}")
    configuration = OmegaConf.load(path)
    if "defaults" in configuration or "optimizer" in configuration:
        raise ValueError(
            f"expected a method without weights, got {name}: name its run folder, run="
        )
    return instantiate(configuration, _convert_="all")


def lesion_head_of(path: str | Path) -> Any:
    """The lesion head S^(F) in a folder, frozen and in evaluation mode.

    Args:
        path: a run of method=lesion_head, a MONAI bundle, or a trained nnU-Net v2 folder, which
            are told apart by the files that each must have.

    Raises:
        FileNotFoundError: it is none of them, or a file in it is missing.
        ValueError: a run of another method, or a file that cannot be read or used.
    """
    from clinfuse.networks.lesion_heads import read_bundle, read_nnunet  # MONAI takes its seconds

    folder = Path(path)
    if (folder / CONFIG).is_file():
        cfg = run_config(folder)
        if cfg.method.get("_target_") != LESION_HEAD:
            raise ValueError(
                f"expected a run of method=lesion_head, got one of method={cfg.method_name}: {path}"
            )
        return trained_method(folder, cfg).requires_grad_(False)
    if (folder / "configs" / "metadata.json").is_file():
        return read_bundle(folder)
    if all((folder / name).is_file() for name in ("plans.json", "dataset.json")):
        return read_nnunet(folder)
    raise FileNotFoundError(
        f"expected a lesion head (a run of method=lesion_head with .hydra/config.yaml, a MONAI "
        f"bundle with configs/metadata.json, or an nnU-Net folder with plans.json and "
        f"dataset.json), found {'none of them in' if folder.is_dir() else 'no folder at'} {path}"
    )


def trained_method(folder: str | Path, cfg: DictConfig | None = None) -> Any:
    """The method of a run with the weights of its last checkpoint (averaged, where it averages).

    With its model draws, where it kept some.

    Args:
        folder: of the run.
        cfg: its configuration, perhaps with other guidance; None reads it.

    Raises:
        FileNotFoundError: no run, no checkpoint, or its lesion head has moved.
        ValueError: the configuration does not build a method; the checkpoint cannot be read, or is
            of another architecture.
    """
    cfg = run_config(folder) if cfg is None else cfg
    weights = weights_of(folder)
    try:
        with building(folder):
            method = build_method(cfg)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} was trained with a lesion head whose files are gone: {error} "
            f"(put it back, or correct lesion_head in {Path(folder) / CONFIG} and remove "
            f"{DIGEST.name} beside it)"
        ) from error
    with expecting(f"the weights of {cfg.get('method_name')}", weights.path):
        method.load_state_dict(weights.state)
    if hasattr(method, "add_draw"):
        for draw in weights.draws:
            with expecting("model draws of this run", weights.path.parent):
                method.add_draw(draw)
    return method.eval()


class Weights(NamedTuple):
    """What a run has learned.

    Attributes:
        path: of the file.
        state: of the method, as ``load_state_dict`` takes it.
        draws: the model draws, of a run that kept some.
    """

    path: Path
    state: dict[str, torch.Tensor]
    draws: list[dict[str, torch.Tensor]]


def weights_of(folder: str | Path) -> Weights:
    """A run's weights: of its last checkpoint, else of the safetensors that were made of it.

    Raises:
        FileNotFoundError: it has neither.
        ValueError: they cannot be read.
    """
    path = weights_file(folder)
    if path.suffix == SAFETENSORS:
        return read_exported(path)
    return Weights(path, checkpoint_content(path)["state_dict"], read_draws(path.parent))


def weights_file(folder: str | Path) -> Path:
    """The file that a run's weights are in, unread: whether they are whole its reader says.

    Raises:
        FileNotFoundError: there is none.
    """
    exported = Path(folder) / EXPORTED
    try:
        return checkpoint_of(folder)
    except FileNotFoundError:
        if not exported.is_file():
            raise
    return exported


def draws_of(folder: str | Path) -> list[dict[str, torch.Tensor]]:
    """A run's model draws, without its weights where these are in a file of their own.

    Raises:
        FileNotFoundError: it has no weights.
        ValueError: they cannot be read.
    """
    path = weights_file(folder)
    return read_exported(path).draws if path.suffix == SAFETENSORS else read_draws(path.parent)


def read_exported(path: Path) -> Weights:
    """What ``clinfuse.export`` has written.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read.
    """
    state: dict[str, torch.Tensor] = {}
    draws: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_safetensors(path)[0].items():
        draw, is_draw, weight = name.rpartition("/")
        (draws.setdefault(draw, {}) if is_draw else state)[weight] = tensor
    return Weights(path, state, [draws[draw] for draw in sorted(draws)])


@contextlib.contextmanager
def building(folder: str | Path) -> Iterator[None]:
    """Building what a run's configuration describes, which may go wrong in any way.

    Raises:
        ValueError: the same in one sentence, with the file; what is one already passes.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        path, said = Path(folder) / CONFIG, " ".join(str(cause).split())
        if isinstance(cause, _EXPECTED) and not isinstance(cause, OmegaConfBaseException):
            if not isinstance(cause, ValueError) or str(folder) in said:
                raise
            raise ValueError(f"{said} (in {path})") from error
        reason = shorten(f"{type(cause).__name__}: {said}", 200, placeholder=" …")
        raise ValueError(f"expected a configuration that builds, got {reason}: {path}") from error


def checkpoint_content(path: Path) -> dict[str, Any]:
    """What a run has saved, read without running anything in it.

    Raises:
        ValueError: it cannot be read, was changed since it was written, or is no checkpoint.
    """
    try:
        content = read_whole(path)
    except Exception as error:
        sentence = f"expected a readable checkpoint, got {type(error).__name__}: {path}"
        if path.name != PREVIOUS and path.with_name(PREVIOUS).is_file():
            sentence += f" (clinfuse.train resume={path.parents[1]} goes on from the one before it)"
        raise ValueError(sentence) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"expected a run's checkpoint with state_dict, got something else: {path}")
    return content


def add_draws(method: Any, folder: Path) -> None:
    """Give a method the model draws kept in a folder of checkpoints, where it can have some.

    Raises:
        ValueError: weights that cannot be read, or of another architecture.
    """
    for draw in read_draws(folder) if hasattr(method, "add_draw") else []:
        with expecting("model draws of this run", folder):
            method.add_draw(draw)


@contextlib.contextmanager
def expecting(weights: str, path: Path) -> Iterator[None]:
    """Loading weights, of which torch says in many lines, or in many ways, that they are others.

    Raises:
        ValueError: the same in one sentence.
    """
    try:
        yield
    except Exception as error:  # of what is no tensor where one should be
        last = (str(error).splitlines() or [type(error).__name__])[-1]
        reason = shorten(last.strip(), 200, placeholder=" …")
        raise ValueError(f"expected {weights}, got others ({reason}): {path}") from error


def with_other_guidance(saved: DictConfig, cfg: DictConfig) -> DictConfig:
    """A run's configuration with the guidance, and the preset, that this command line asks for.

    Raises:
        ValueError: a setting that guidance does not have, or a student, whose guidance is learned.
    """
    asked = {str(name): value for name, value in cfg.guidance.items() if value is not None}
    unknown = sorted(set(asked) - {str(name) for name in saved.guidance})
    if unknown:
        raise ValueError(f"expected guidance settings of {sorted(saved.guidance)}, got {unknown}")
    if "teacher" in saved.method and (asked or (cfg.preset and cfg.preset != saved.preset)):
        raise ValueError(
            "expected a run that is guided as it samples, got a student that has learned its "
            f"teacher's guidance: ask its teacher {saved.get('teacher')}, or train another student"
        )
    merged = OmegaConf.merge(saved, {"guidance": asked})
    assert isinstance(merged, DictConfig)
    if cfg.preset:
        merged.preset = cfg.preset
    return merged


def is_sampled_as_trained(saved: DictConfig, folder: str | Path) -> bool:
    """Whether a configuration samples as its run did: only then does the run's calibration hold.

    Says so in the log where it does not.
    """
    own = run_config(folder)
    same = saved.get("guidance") == own.get("guidance") and saved.get("preset") == own.get("preset")
    if not same:
        log.warning(
            "other guidance than %s was calibrated with: its intervals are left out", folder
        )
    return same


def choice_was_made(group: str) -> bool:
    """Whether the command line itself names an option of a config group, or a key within it."""
    return group in map(group_of, HydraConfig.get().overrides.task)


def group_of(override: str) -> str:
    """The first name of what a word of the command line is about: ``data`` of ``data.root=x``."""
    return override.lstrip("+~").split("=")[0].split(".")[0].split("@")[0]


def run_facts() -> dict[str, str]:
    """Versions, machine and commit, for the run's record."""
    packages = ("clinfuse", "torch", "lightning", "monai", "torchio", "numpy")
    facts = {name: _version(name) for name in packages}
    facts["python"] = platform.python_version()
    facts["processor"] = f"{platform.machine()}, {os.cpu_count()} logical cores"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts["commit"] = commit()
    return facts


def commit() -> str:
    """The checkout's commit, marked where files differ from it; ``unknown`` outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not (_PACKAGE.parent / ".git").exists():
            return "unknown"
        changed = " (with changes)" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def quiet_libraries() -> None:
    """Hold back what libraries say at import and on every fit, and what only their authors need."""
    for talkative in ("lightning.pytorch.utilities.rank_zero", "alembic", "fontTools"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    for text in (
        ".*Experiment logs directory.*exists and is not empty.*",  # it is the run's own folder
        ".*LeafSpec.*deprecated.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*does not have many workers.*",
        ".*`srun` command is available on your system but is not used.*",  # of one process
        ".*number of training batches.*smaller than the logging interval.*",
        ".*The total number of parameters detected may be inaccurate.*",
        ".*You're using the WeightAveraging callback, but.*",
        ".*Found .* module.* in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", text)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
