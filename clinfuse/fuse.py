"""Fuse one patient: ``python -m clinfuse.fuse run=RUN mri=A.nii.gz ct=B.nii.gz out=FOLDER``.

With ``preset=stroke,bone_tumor`` once under each of these presets, side by side in one report.
Scans that are DICOM folders are prepared first, as ``clinfuse.prepare`` does it.

A cohort: ``python -m clinfuse.fuse run=RUN studies=FOLDER out=FOLDER``, by one process or by any
number of the same command at once, which may stop and start.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from clinfuse.callbacks.ranks import alone
from clinfuse.callbacks.recorder import case_view, summary_of
from clinfuse.configuration import (
    CONFIG_PATH,
    fingerprint,
    in_one_sentence,
    is_sampled_as_trained,
    memory_budget,
    quiet_libraries,
    register_resolvers,
    run_config,
    run_facts,
    trained_method,
    weights_file,
    with_other_guidance,
)
from clinfuse.data.paired_volumes import study_item
from clinfuse.data.studies import STUDY_FILES, Study, load_pair, load_study, study_folders
from clinfuse.data.volumes import count_voxels
from clinfuse.data.worklist import Worklist, begun_alike, digest_of, share_of
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.objective import lesion_probability
from clinfuse.metrics.calibration import Calibration
from clinfuse.networks.mapped_memory import mapped_where_large
from clinfuse.networks.windows import limit_memory, windows_used
from clinfuse.preparation.derived_series import write_derived_series
from clinfuse.preparation.identifiers import hashed, is_hashed
from clinfuse.preparation.reading import read_scan
from clinfuse.preparation.scan import CaseFiles
from clinfuse.reporting.atomic import write_atomically
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

FUSION = "fusion.json"
"""What a cohort was begun with, in its folder."""

_PRESETS = Path(CONFIG_PATH) / "preset"


@dataclass(frozen=True)
class Fuser:
    """A run under one preset, ready to fuse.

    Attributes:
        saved: its configuration.
        method: with its weights.
        calibration: where it holds for how the method samples here.
    """

    saved: DictConfig
    method: FusionMethod
    calibration: Calibration | None


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
    scans = ("studies",) if cfg.studies is not None else ("mri", "ct")
    missing = [name for name in ("run", *scans, "out") if OmegaConf.is_missing(cfg, name)]
    if missing:
        asked = " ".join(f"{name}=..." for name in missing)
        raise ValueError(
            f"expected run, mri, ct (or studies) and out on the command line, missing {asked}"
        )
    presets, run = presets_asked(cfg), run_config(cfg.run)
    if run.get("spatial_dims", 3) != 3:  # runs of before it was there are on volumes
        raise ValueError(
            f"expected a run on volumes, got one on 2-D pairs, which clinfuse.evaluate fuses: "
            f"{cfg.run}"
        )
    settings = [with_preset(run, cfg, preset) for preset in presets or [""]]
    if cfg.studies is not None:
        fuse_cohort(settings, cfg)
    else:
        fuse_patient(settings, cfg)


def fuse_patient(settings: Sequence[DictConfig], cfg: DictConfig) -> None:
    """One patient's files, under each of the settings, into ``out``."""
    study = read_study(cfg, settings[0])
    fusions = []
    for saved in settings:
        fusion = fused_by(fuser_of(saved, cfg), study, cfg)
        fusions.append(fusion)
        folder = Path(cfg.out) / (fusion.preset if len(settings) > 1 else "")
        write_volumes(folder, study, fusion.volumes)
        write_dicom(folder, cfg, fusion.preset)
        print(f"fused: {folder / 'fused.nii.gz'}")
    for fact, text in (("windows", "evaluated in windows:"), ("volumes", "volumes lay")):
        for said in {fusion.facts[fact] for fusion in fusions if fact in fusion.facts}:
            print(f"{text} {said}")
    for sentence in dict.fromkeys(sentence for fusion in fusions for sentence in fusion.missing):
        print(sentence)
    sources = {scan: str(cfg[scan]) if cfg.keep_ids else study.case_id for scan in ("mri", "ct")}
    print(f"report: {report_of(fusions, study, Path(cfg.out), cfg, sources)}")


def fuse_cohort(settings: Sequence[DictConfig], cfg: DictConfig) -> None:
    """Every study folder into a folder of its name; ``cases.csv`` says what has become of each.

    Each case is fused as it would be by itself. Ends with status 1 where some could not be.
    """
    folders = {folder.name: folder for folder in study_folders(cfg.studies)}
    out, share = Path(cfg.out), share_of(cfg.shard, os.environ)
    if out.resolve() == Path(cfg.studies).resolve():
        raise ValueError(f"expected another folder for out than the studies', got both: {out}")
    fusers = [fuser_of(saved, cfg) for saved in settings]  # what is damaged begins no record
    agree(settings, folders, cfg)
    worklist = Worklist(out, list(folders), share)

    def make(case: str, scratch: Path) -> None:
        study = study_in(folders[case], settings[0], cfg)
        fusions = [fused_by(fuser, study, cfg) for fuser in fusers]
        for fusion in fusions:
            folder = scratch / (fusion.preset if len(fusions) > 1 else "")
            write_volumes(folder, study, fusion.volumes)
        report_of(fusions, study, scratch, cfg, dict.fromkeys(("mri", "ct"), case))
        print(f"fused: {out / case}", flush=True)

    worklist.go(make)
    with worklist.alone():
        done, failed = worklist.done, worklist.failed
        print(f"cases: {write_summary(worklist, done, failed)}")
    print(f"{len(done)} of {len(folders)} cases fused")
    if waiting := len(folders) - len(done) - len(failed):
        print(f"{waiting} are other workers', or wait for one")
    for case, reason in failed.items():
        print(f"clinfuse: failed: {case}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


def agree(settings: Sequence[DictConfig], folders: Mapping[str, Path], cfg: DictConfig) -> None:
    """Have all workers fuse alike: by the same run and settings, as the first one began.

    Its precision and its memory's size, where they are its machine's, are for all: volumes that are
    cut into other windows are not the same to the last digit.

    Raises:
        ValueError: ``out`` is of another fusion.
    """
    out = Path(cfg.out)
    weights = weights_file(cfg.run)
    digest = digest_of([weights, *sorted(weights.parent.glob("draw_*"))])
    asked = [[OmegaConf.to_yaml(saved) for saved in settings], digest, cfg.steps, cfg.members]
    own = {
        "key": fingerprint(asked),
        "run": str(cfg.run),
        "commit": run_facts()["commit"],
        "precision": cfg.trainer.precision,
        "memory_gb": memory_budget(cfg.memory_gb, trainer_of(cfg).strategy.root_device),
    }
    if any((out / case).is_dir() for case in folders) and not (out / FUSION).is_file():
        raise ValueError(f"expected a new folder, or one of this fusion, got another's: {out}")
    begun = begun_alike(out / FUSION, own)
    cfg.trainer.precision, cfg.memory_gb = begun["precision"], begun["memory_gb"]


def write_summary(worklist: Worklist, done: Sequence[str], failed: Mapping[str, str]) -> Path:
    """``cases.csv``: each case, what has become of it, where it is, and why it failed."""
    rows = [
        {
            "case_id": case,
            "state": "fused" if case in done else "failed" if case in failed else "waiting",
            "folder": str(worklist.folder / case) if case in done else "",
            "reason": failed.get(case, ""),
        }
        for case in worklist.cases
    ]
    text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
    return write_atomically(worklist.folder / "cases.csv", text)


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
        ValueError: scans that cannot be prepared, beside what ``load_pair`` raises.
    """
    files = {name: Path(cfg[name]) for name in STUDY_FILES if cfg.get(name)}
    name = shown_name(cfg)
    if not any(files[scan].is_dir() for scan in ("mri", "ct")):
        with mapped_where_large(voxels_of(files["mri"])):
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
    return replace(study_in(kept, saved, cfg), case_id=name)


def study_in(folder: Path, saved: DictConfig, cfg: DictConfig) -> Study:
    """A study folder, mapped as the run's own data were."""
    with mapped_where_large(voxels_of(folder / "mri.nii.gz", folder / "mri.nii")):
        return load_study(folder, saved.data.ct_map, cfg.cache_dir)


def voxels_of(*paths: Path) -> int:
    """Of the first NIfTI file that there is; 0 where it can't be read, which its reader says."""
    for path in filter(Path.is_file, paths):
        with suppress(ValueError, OSError):
            return count_voxels(path)
    return 0


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


def fuser_of(saved: DictConfig, cfg: DictConfig) -> Fuser:
    """The run so configured, with the steps and members that the command line asks for."""
    method = trained_method(cfg.run, saved)
    for setting in ("steps", "members"):
        if cfg[setting] is not None:
            setattr(method, setting, int(cfg[setting]))
    is_own = is_sampled_as_trained(saved, cfg.run) and cfg.steps is None and cfg.members is None
    return Fuser(saved, method, read_calibration(cfg.run, method) if is_own else None)


def fused_by(fuser: Fuser, study: Study, cfg: DictConfig) -> Fusion:
    """The patient fused; the noise depends on the run's seed alone."""
    members = getattr(fuser.method, "members", 1)
    with mapped_where_large(study.mri.numel(), members) as folder:
        fusion = _fused_by(fuser, study, cfg)
    if folder is None:
        return fusion
    where = f"in files in {folder}, since memory would not hold them"
    return replace(fusion, facts={**fusion.facts, "volumes": where})


def _fused_by(fuser: Fuser, study: Study, cfg: DictConfig) -> Fusion:
    saved, method, calibration = fuser.saved, fuser.method, fuser.calibration
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
    trainer = trainer_of(cfg)
    device = trainer.strategy.root_device
    limit_memory(method, memory_budget(cfg.memory_gb, device))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return method.to(device).model_draws(item.to(device)).cpu()


def trainer_of(cfg: DictConfig) -> lightning.Trainer:
    """What says on which device to fuse, and how precisely."""
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **alone(cfg.trainer.devices),
        _convert_="all",
    )
    return trainer


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


def report_of(
    fusions: Sequence[Fusion],
    study: Study,
    out: Path,
    cfg: DictConfig,
    sources: Mapping[str, str],
) -> Path:
    """report.html: the patient, and several presets side by side.

    Args:
        fusions: under each preset.
        study: what was fused.
        out: the report's folder.
        cfg: of the command line.
        sources: what the report calls the MRI and the CT.
    """
    first, is_one = fusions[0], len(fusions) == 1
    facts: dict[str, Any] = {
        "run": str(cfg.run),
        "preset" if is_one else "presets": ", ".join(fusion.preset for fusion in fusions),
        **({"weights": first.weights} if is_one else {}),
        **shared_facts(fusions),
        "mri": sources["mri"],
        "ct": f"{sources['ct']} ({study.ct_units})",
        "masks": ", ".join(f"{roi}: {source}" for roi, source in study.mask_source.items()),
        **run_facts(),
    }
    path, title = out / "report.html", f"Fusion of {study.case_id}"
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
