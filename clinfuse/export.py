"""A run as one file of safetensors, and back: ``python -m clinfuse.export run=RUN out=FILE``.

The file holds tensors and texts, nothing that could run: what a checkpoint is to be shared as.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from clinfuse import __version__
from clinfuse.callbacks.calibration import FILE as CALIBRATION
from clinfuse.configuration import (
    CONFIG_PATH,
    EXPORTED,
    checked_config,
    in_one_sentence,
    quiet_libraries,
    read_text,
    register_resolvers,
    run_config,
    trained_method,
    weights_of,
)
from clinfuse.networks.pretrained import SAFETENSORS, read_safetensors
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.run_folder import CONFIG, sha256_of, write_config

register_resolvers()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="export")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Write a run's weights and configuration into a file, or a run's folder from such a file."""
    quiet_libraries()
    if (cfg.run is None) == (cfg.file is None) or OmegaConf.is_missing(cfg, "out"):
        raise ValueError("expected run=RUN out=FILE.safetensors, or file=FILE.safetensors out=RUN")
    if cfg.run is not None:
        print(f"exported: {export(Path(cfg.run), Path(cfg.out))}")
    else:
        print(f"run: {imported(Path(cfg.file), Path(cfg.out))}")


def export(run: Path, file: Path) -> Path:
    """A run's weights, its model draws among them, with what is needed to rebuild it as texts.

    Raises:
        FileNotFoundError: no run, or one without a checkpoint.
        ValueError: weights that are not of its configuration, or another ending of the file.
    """
    if file.suffix != SAFETENSORS:
        raise ValueError(f"expected out=FILE{SAFETENSORS}, got {file}")
    cfg = run_config(run)
    trained_method(run, cfg)  # what does not load is not handed on
    weights = weights_of(run)
    tensors = dict(weights.state)
    for number, draw in enumerate(weights.draws):
        tensors |= {f"draw_{number}/{name}": tensor for name, tensor in draw.items()}
    facts, config = _record(run / "facts.json"), read_text(run / CONFIG)
    texts = {
        "format": "pt",
        "clinfuse": __version__,
        "method": str(cfg.get("method_name")),
        "config": config,
        "config_sha256": sha256_of(config),
        "commit": str(facts.get("commit", "unknown")),
        "precision": str((cfg.get("trainer") or {}).get("precision", "unknown")),
    }
    if (run / CALIBRATION).is_file():
        texts["calibration"] = read_text(run / CALIBRATION)
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    return write_atomically(file, save(copies, metadata=texts))


def imported(file: Path, run: Path) -> Path:
    """A new run's folder from such a file; what can be done with a run's checkpoint can be with it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not written by ``export``, a configuration that names what ``conf`` does not or
            is not what was exported, weights that are of another, or a folder that holds files.
    """
    _, texts = read_safetensors(file)
    if "config" not in texts:
        raise ValueError(f"expected a file that clinfuse.export wrote, got no config in it: {file}")
    checked_config(texts["config"], file)
    if texts.get("config_sha256") not in (None, sha256_of(texts["config"])):
        raise ValueError(f"expected the configuration that was exported, got another: {file}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"expected a new or empty folder for the run, got files: {run}")
    partial = run.with_name(f".{run.name}.partial")
    try:
        write_config(partial, texts["config"])
        if "calibration" in texts:
            write_atomically(partial / CALIBRATION, texts["calibration"])
        (partial / EXPORTED).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, partial / EXPORTED)
        trained_method(partial)
        partial.replace(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return run


def _record(path: Path) -> dict[str, Any]:
    content = json.loads(read_text(path)) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    main()
