"""Fuse one patient: ``python -m clinfuse.fuse run=RUN mri=A.nii.gz ct=B.nii.gz out=FOLDER``.

With ``preset=stroke,bone_tumor`` once under each of these presets, side by side in one report.
Scans that are DICOM folders are prepared first, as ``clinfuse.prepare`` does it.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import lightning
import pandas as pd
import SimpleITK as sitk
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from clinfuse.callbacks.calibration import read_calibration
from clinfuse.callbacks.recorder import case_view, summary_of
from clinfuse.configuration import (
    CONFIG_PATH,
    in_one_sentence,
    is_sampled_as_trained,
    memory_budget,
    quiet_libraries,
    register_resolvers,
    run_config,
    run_facts,
    trained_method,
    with_other_guidance,
)
from clinfuse.data.paired_volumes import study_item
from clinfuse.data.studies import STUDY_FILES, Study, load_pair, load_study
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.objective import lesion_probability
from clinfuse.networks.windows import limit_memory, windows_used
from clinfuse.preparation.derived_series import write_derived_series
from clinfuse.preparation.identifiers import hashed, is_hashed
from clinfuse.preparation.reading import read_scan
from clinfuse.preparation.scan import CaseFiles
from clinfuse.reporting.html import write_report
from clinfuse.reporting.views import CaseView
from clinfuse.types import ROI_NAMES, FusionBatch

register_resolvers()

VOLUMES = (
    "fused",
    "uncertainty",
    "epistemic",
    "aleatoric",
    "interval_low",
    "interval_high",
    "lesion_probability",
)
"""What a fusion can write, each as ``<name>.nii.gz``; only the first two it always does."""

_PRESETS = Path(CONFIG_PATH) / "preset"


@dataclass(frozen=True)
class Fusion:
    """The patient fused under one preset.

    Attributes:
        preset: its name.
        weights: alpha, beta and gamma as text, and whether they do anything.
        volumes: ``1 1 d h w`` each, by their names of ``VOLUMES``.
        view: for the report.
        facts: for the report, what it was sampled with.
        missing: sentences that say why a volume is not there.
    """

    preset: str
    weights: str
    volumes: Mapping[str, Tensor]
    view: CaseView
    facts: Mapping[str, str]
    missing: Sequence[str]


def main(cfg: DictConfig | None = None) -> None:
    """Write fused.nii.gz and uncertainty.nii.gz on the MRI's grid, and report.html.

    Beside them the uncertainty's parts, epistemic.nii.gz for a run of several models and
    aleatoric.nii.gz for one of several draws; lesion_probability.nii.gz for a run with a lesion
    head. A run that was calibrated also gives interval_low.nii.gz and interval_high.nii.gz, unless
    the command line asks for other guidance, steps or members than it was calibrated with.
    Of several presets each writes into a folder of its name, and report.html compares them.
    For scans that came as DICOM, dicom/ holds the fused volume as a derived series.

    Args:
        cfg: None reads the command line.
    """
    if cfg is None:
        sys.argv[1:] = [with_presets_listed(argument) for argument in sys.argv[1:]]
    fuse(cfg)


def with_presets_listed(argument: str) -> str:
    """``preset=a,b`` of a command line as ``presets=['a','b']``; anything else as it is.

    To Hydra several values are a sweep, ``preset`` is a group whose options it would merge into
    one, and an option it does not know would be passed over.
    """
    name, _, value = argument.partition("=")
    if name != "preset":
        return argument
    value = value.strip("[] ")
    names = [] if value in ("", "null") else [part.strip(" '\"") for part in value.split(",")]
    return f"presets=[{','.join(map(repr, names))}]"


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="fuse")
@in_one_sentence
def fuse(cfg: DictConfig) -> None:
    """What ``main`` does, past the command line."""
    quiet_libraries()
    missing = [name for name in ("run", "mri", "ct", "out") if OmegaConf.is_missing(cfg, name)]
    if missing:
        asked = " ".join(f"{name}=..." for name in missing)
        raise ValueError(f"expected run, mri, ct and out on the command line, missing {asked}")
    presets, run = presets_asked(cfg), run_config(cfg.run)
    settings = [with_preset(run, cfg, preset) for preset in presets or [""]]
    study = read_study(cfg, run)
    fusions = []
    for saved in settings:
        fusion = fused_under(saved, study, cfg)
        fusions.append(fusion)
        folder = Path(cfg.out) / (fusion.preset if len(settings) > 1 else "")
        write_volumes(folder, study, fusion.volumes)
        write_dicom(folder, cfg, fusion.preset)
        print(f"fused: {folder / 'fused.nii.gz'}")
    for windows in {fusion.facts["windows"] for fusion in fusions if "windows" in fusion.facts}:
        print(f"evaluated in windows: {windows}")
    for sentence in dict.fromkeys(sentence for fusion in fusions for sentence in fusion.missing):
        print(sentence)
    print(f"report: {report_of(fusions, study, cfg)}")


def presets_asked(cfg: DictConfig) -> list[str]:
    """The presets that the command line names; none is the run's own.

    Raises:
        ValueError: one that there is not, or one twice.
    """
    asked, known = [str(name) for name in cfg.presets], sorted(p.stem for p in _PRESETS.glob("*"))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"expected presets of {', '.join(known)}, got {', '.join(unknown)}")
    if len(set(asked)) < len(asked):
        raise ValueError(f"expected each preset once, got {', '.join(asked)}")
    return asked


def with_preset(run: DictConfig, cfg: DictConfig, preset: str) -> DictConfig:
    """A run's configuration under a preset, its own under ``""``.

    Guidance named on the command line overrides that of the preset.
    """
    own = {str(name): value for name, value in cfg.guidance.items() if value is not None}
    chosen = OmegaConf.load(_PRESETS / f"{preset}.yaml") if preset else {"preset": None}
    merged = OmegaConf.merge(chosen, {"guidance": own})
    assert isinstance(merged, DictConfig)
    return with_other_guidance(run, merged)


def read_study(cfg: DictConfig, saved: DictConfig) -> Study:
    """The files named on the command line as a study, mapped as the run's own data were.

    DICOM becomes a study folder first, ``out/study``: registered, resampled once, masked.

    Raises:
        ValueError: scans that cannot be prepared, or a run on 2-D pairs, beside what ``load_pair``
            raises.
    """
    if saved.get("spatial_dims", 3) != 3:  # runs of before it was there are on volumes
        raise ValueError(
            f"expected a run on volumes, got one on 2-D pairs, which clinfuse.evaluate fuses: "
            f"{cfg.run}"
        )
    files = {name: Path(cfg[name]) for name in STUDY_FILES if cfg.get(name)}
    name = shown_name(cfg)
    if not any(files[scan].is_dir() for scan in ("mri", "ct")):
        return load_pair(files, name, None, saved.data.ct_map, cfg.cache_dir)
    kept = Path(cfg.out) / "study"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.out, prefix=".preparing.") as folder:
        preparation = instantiate(cfg.preparation, _convert_="all")
        made = preparation(CaseFiles("study", name, files), Path(folder))
        said = "; ".join(made.quality.reasons)
        if made.is_refused:
            raise ValueError(f"expected scans that can be registered and masked, got: {said}")
        print(f"prepared: {made.quality.verdict}{said and ': '}{said}")
        shutil.rmtree(kept, ignore_errors=True)
        made.folder.replace(kept)
    return replace(load_study(kept, saved.data.ct_map, cfg.cache_dir), case_id=name)


def shown_name(cfg: DictConfig) -> str:
    """What the patient is called in what is written: a hash, unless names are to be kept.

    Of the patient that DICOM names, else of the MRI's file, or of its folder if the file is called
    ``mri``. What is a hash already stays.
    """
    path = Path(cfg.mri)
    if path.is_dir():
        name = read_scan(path, cfg.series.get("mri")).patient or path.name
    else:
        name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
        name = path.resolve().parent.name if name == "mri" else name
    return name if cfg.keep_ids or is_hashed(name) else hashed(name, cfg.salt)


def write_dicom(folder: Path, cfg: DictConfig, preset: str) -> None:
    """``fused.nii.gz`` as a derived DICOM series beside it, for scans that came as DICOM.

    The preset is in its description, by which a viewer tells several apart.
    """
    if not Path(cfg.mri).is_dir():
        return
    shutil.rmtree(folder / "dicom", ignore_errors=True)
    files = write_derived_series(
        folder / "dicom",
        sitk.ReadImage(folder / "fused.nii.gz"),
        Path(cfg.mri),
        cfg.series.get("mri"),
        description=f"fused, preset {preset}",
        keep_ids=cfg.keep_ids,
        salt=cfg.salt,
    )
    print(f"DICOM: {len(files)} slices in {folder / 'dicom'}")


def fused_under(saved: DictConfig, study: Study, cfg: DictConfig) -> Fusion:
    """The patient fused by a run so configured; its noise depends on the run's seed alone."""
    method = trained_method(cfg.run, saved)
    for setting in ("steps", "members"):
        if cfg[setting] is not None:
            setattr(method, setting, int(cfg[setting]))
    is_own = is_sampled_as_trained(saved, cfg.run) and cfg.steps is None and cfg.members is None
    calibration = read_calibration(cfg.run, method) if is_own else None
    lightning.seed_everything(saved.seed, verbose=False)
    item = study_item(study, torch.eye(4, dtype=torch.float64))
    item.reference = None  # what these scans should fuse to is not known
    item.case_id = ["patient"]  # so that what they are called does not draw other noise
    draws = sampled(method, item, cfg)
    windows = windows_used(method)
    item.case_id = [study.case_id]
    method.cpu()
    summary = summary_of(draws)
    fused, spread = summary.mean, summary.std
    volumes = {
        "fused": fused,
        "uncertainty": torch.zeros_like(fused) if spread is None else spread,
        "epistemic": summary.epistemic,
        "aleatoric": summary.aleatoric,
    }
    if calibration is not None and spread is not None:
        bounds = calibration.interval(fused, spread, method.registered_roi(item))
        volumes["interval_low"], volumes["interval_high"] = bounds
    models, members = draws.shape[:2]
    facts = {"draws": f"{members}" + (f" of each of {models} models" if models > 1 else "")}
    if (head := getattr(method, "lesion_head", None)) is not None:
        with torch.no_grad():
            probability = lesion_probability(head, fused, item.brain)
        is_calibrated = calibration is not None and calibration.temperature is not None
        if calibration is not None:
            probability = calibration.probability(probability)
        volumes["lesion_probability"] = probability
        facts["lesion probability"] = "calibrated" if is_calibrated else "not calibrated"
    weights = weights_text(saved, method, bool(item.lesion.any()))
    view = case_view(
        item,
        0,
        fused,
        spread,
        f"{saved.method_name}, preset {saved.preset}: {weights}",
        epistemic=summary.epistemic,
        aleatoric=summary.aleatoric,
        lesion_probability=volumes.get("lesion_probability"),
    )
    present = {name: volume for name, volume in volumes.items() if volume is not None}
    missing = [
        f"no {part} map: the run has one {what}"
        for what, part in (("model", "epistemic"), ("draw a model", "aleatoric"))
        if part not in present
    ]
    if windows:
        facts["windows"] = windows
    if missing:
        facts["left out"] = "; ".join(missing)
    return Fusion(saved.preset, weights, present, view, facts, missing)


def sampled(method: FusionMethod, item: FusionBatch, cfg: DictConfig) -> Tensor:
    """``model_draws`` for one study, ``m k 1 1 d h w``, on the trainer's device and precision."""
    trainer = instantiate(
        cfg.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    device = trainer.strategy.root_device
    limit_memory(method, memory_budget(cfg.memory_gb, device))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return method.to(device).model_draws(item.to(device)).cpu()


def weights_text(saved: DictConfig, method: FusionMethod, has_lesion: bool) -> str:
    """Alpha, beta and gamma, and which of them do nothing here."""
    guidance = saved.guidance
    text = f"α {guidance.alpha:g}, β {guidance.beta:g}, γ {guidance.gamma:g}"
    if not hasattr(method, "guidance") or guidance.eta == 0:
        return f"{text} (all off: not guided)"
    if getattr(method, "lesion_head", None) is None:
        return f"{text} (γ off: no lesion head)"
    return text if has_lesion else f"{text} (γ off: no lesion mask)"


def write_volumes(folder: Path, study: Study, volumes: Mapping[str, Tensor]) -> None:
    """Write ``<name>.nii.gz`` each; what an earlier fusion left of the others is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in VOLUMES:
        path = folder / f"{name}.nii.gz"
        if name in volumes:
            study.write(path, volumes[name][0])
        else:
            path.unlink(missing_ok=True)


def report_of(fusions: Sequence[Fusion], study: Study, cfg: DictConfig) -> Path:
    """report.html: the patient, and several presets side by side."""
    first, is_one = fusions[0], len(fusions) == 1
    facts: dict[str, Any] = {
        "run": str(cfg.run),
        "preset" if is_one else "presets": ", ".join(fusion.preset for fusion in fusions),
        **({"weights": first.weights} if is_one else {}),
        **shared_facts(fusions),
        "mri": str(cfg.mri) if cfg.keep_ids else study.case_id,
        "ct": f"{cfg.ct if cfg.keep_ids else study.case_id} ({study.ct_units})",
        "masks": ", ".join(f"{roi}: {source}" for roi, source in study.mask_source.items()),
        **run_facts(),
    }
    path, title = Path(cfg.out) / "report.html", f"Fusion of {study.case_id}"
    if is_one:
        return write_report(path, title, [first.view], {}, facts)
    item = study_item(study, torch.eye(4, dtype=torch.float64))
    return write_report(
        path,
        title,
        [replace(f.view, case_id=f"{study.case_id}, {f.preset}") for f in fusions],
        {
            f"|Change| of the fused image against {first.preset}, in model units": changes(
                fusions, item
            )
        },
        facts,
        presets={f.preset: replace(f.view, caption=f.weights) for f in fusions},
    )


def shared_facts(fusions: Sequence[Fusion]) -> dict[str, str]:
    """The facts of all fusions; one that differs says what it is under which preset."""
    facts = {}
    for name in fusions[0].facts:
        values = {fusion.preset: fusion.facts[name] for fusion in fusions}
        each = ", ".join(f"{preset}: {value}" for preset, value in values.items())
        facts[name] = each if len(set(values.values())) > 1 else fusions[0].facts[name]
    return facts


def changes(fusions: Sequence[Fusion], item: FusionBatch) -> pd.DataFrame:
    """How far each preset's fused image lies from the first one's, in model units.

    Mean by region, the largest, and the share of brain and bone that changed by more than the
    first one's uncertainty.
    """
    first, rows = fusions[0].volumes, []
    head = item.roi[:, :2].any(1, keepdim=True)
    regions = {
        name: mask for name, mask in zip(ROI_NAMES, item.roi.split(1, 1), strict=True) if mask.any()
    }
    for fusion in fusions:
        change = (fusion.volumes["fused"] - first["fused"]).abs()
        means = {f"mean in {name}": float(change[mask].mean()) for name, mask in regions.items()}
        beyond = float((change > first["uncertainty"])[head].float().mean())
        cells = {
            **{name: f"{mean:.5f}" for name, mean in means.items()},
            "largest": f"{float(change.max()):.3f}",
            "of brain and bone, beyond 1 s.d.": f"{beyond:.1%}",
        }
        if fusion is fusions[0]:
            cells = dict.fromkeys(cells, "–")
        rows.append({"preset": fusion.preset, "weights": fusion.weights, **cells})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
