"""Fuse one patient: ``python -m clinfuse.fuse run=RUN mri=A.nii.gz ct=B.nii.gz out=FOLDER``."""

from pathlib import Path

import hydra
import lightning
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clinfuse.callbacks.calibration import read_calibration
from clinfuse.callbacks.recorder import case_view, summarise
from clinfuse.configuration import (
    CONFIG_PATH,
    in_one_sentence,
    is_sampled_as_trained,
    quiet_libraries,
    register_resolvers,
    run_config,
    run_facts,
    trained_method,
    with_other_guidance,
)
from clinfuse.data.paired_volumes import study_item
from clinfuse.data.studies import STUDY_FILES, Study, load_pair
from clinfuse.methods.base import FusionMethod
from clinfuse.reporting.html import write_report
from clinfuse.types import FusionBatch

register_resolvers()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="fuse")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Write fused.nii.gz and uncertainty.nii.gz on the MRI's grid, and report.html.

    A run that was calibrated also gives interval_low.nii.gz and interval_high.nii.gz, unless the
    command line asks for other guidance, steps or members than it was calibrated with.
    """
    quiet_libraries()
    missing = [name for name in ("run", "mri", "ct", "out") if OmegaConf.is_missing(cfg, name)]
    if missing:
        asked = " ".join(f"{name}=..." for name in missing)
        raise ValueError(f"expected run, mri, ct and out on the command line, missing {asked}")
    saved = with_other_guidance(run_config(cfg.run), cfg)
    study = read_study(cfg, saved)
    method = trained_method(cfg.run, saved)
    for setting in ("steps", "members"):
        if cfg[setting] is not None:
            setattr(method, setting, int(cfg[setting]))
    lightning.seed_everything(saved.seed, verbose=False)
    item = study_item(study, torch.eye(4, dtype=torch.float64))
    fused, spread = summarise(sampled(method, item, cfg))

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    study.write(out / "fused.nii.gz", fused[0])
    uncertainty = torch.zeros_like(fused) if spread is None else spread
    study.write(out / "uncertainty.nii.gz", uncertainty[0])
    is_own = is_sampled_as_trained(saved, cfg.run) and cfg.steps is None and cfg.members is None
    calibration = read_calibration(cfg.run) if is_own else None
    if calibration is not None and spread is not None:
        bounds = calibration.interval(fused, spread, method.cpu().registered_roi(item))
        for name, bound in zip(("low", "high"), bounds, strict=True):
            study.write(out / f"interval_{name}.nii.gz", bound[0])
    item.reference = None  # what these scans should fuse to is not known
    view = case_view(item, 0, fused, spread, f"{saved.method_name}, preset {saved.preset}")
    facts = {
        "run": str(cfg.run),
        "preset": saved.preset,
        "mri": str(cfg.mri),
        "ct": f"{cfg.ct} ({study.ct_units})",
        "masks": ", ".join(f"{roi}: {source}" for roi, source in study.mask_source.items()),
        **run_facts(),
    }
    report = write_report(out / "report.html", f"Fusion of {study.case_id}", [view], {}, facts)
    print(f"fused: {out / 'fused.nii.gz'}\nreport: {report}")


def read_study(cfg: DictConfig, saved: DictConfig) -> Study:
    """The files named on the command line as a study, mapped as the run's own data were."""
    files = {name: cfg[name] for name in STUDY_FILES if cfg.get(name)}
    name = Path(cfg.mri).name.removesuffix(".gz").removesuffix(".nii")
    return load_pair(files, name, None, saved.data.ct_map, cfg.cache_dir)


def sampled(method: FusionMethod, item: FusionBatch, cfg: DictConfig) -> torch.Tensor:
    """The method's ensemble for one study, on the trainer's device and in its precision."""
    trainer = instantiate(
        cfg.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    device = trainer.strategy.root_device
    with trainer.precision_plugin.forward_context():
        return method.to(device).ensemble(item.to(device)).cpu()


if __name__ == "__main__":
    main()
