"""Is F worth segmenting? One network trained on each image: ``python -m clinfuse.downstream``."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import lightning
import torch
from hydra.utils import instantiate
from jaxtyping import Bool
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from clinfuse.configuration import (
    CONFIG_PATH,
    building,
    choice_was_made,
    commit,
    fingerprint,
    in_one_sentence,
    quiet_libraries,
    register_resolvers,
    rule,
    run_config,
    run_facts,
    runs_named,
    trained_method,
    weights_file,
)
from clinfuse.data.made_once import MadeOnce
from clinfuse.data.splits import read_splits
from clinfuse.functional.spacing import shared_spacing
from clinfuse.methods.base import FusionMethod
from clinfuse.methods.segmentation import IMAGES, Image, Segmentation, blinded
from clinfuse.metrics.segmentation import best_threshold, segmentation_scores
from clinfuse.reporting.atomic import write_atomically
from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.reporting.tables import headline, print_table, to_markdown
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)
register_resolvers()

SCORES = tuple(
    ("lesion", metric)
    for metric in (
        *("dice", "nsd", "hd95"),
        *("sensitivity", "false_positives", "f1", "centroid_distance"),
    )
)
"""Of ``segmentation_scores``, in the order of the table."""

CASES, RECORD = "cases.csv", "record.json"


class Study(NamedTuple):
    """One head as everything downstream sees it.

    Attributes:
        seen: what an image is made of, without the lesion.
        lesion: what is to be found in it.
    """

    seen: FusionBatch
    lesion: Bool[Tensor, "1 1 *dhw"]


@dataclass(frozen=True)
class Given:
    """What a segmentation is given, under the name that tables have for it.

    Attributes:
        name: of the image.
        image: makes it of a study.
        state: differs where the same name would give other images.
        preset: that a fusion was made with.
        steps: of its sampling.
    """

    name: str
    image: Image
    state: str = ""
    preset: str = "default"
    steps: int = 0


class Cohort:
    """The studies of a DataModule, each drawn once: the same ones for every image."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @cached_property
    def train(self) -> list[Study]:
        return list(map(_study, self.data.train_dataloader()))

    @cached_property
    def val(self) -> list[Study]:
        return list(map(_study, self.data.val_dataloader()))

    @cached_property
    def test(self) -> list[tuple[float, list[Study]]]:
        """Each amplitude with its studies."""
        loaders = zip(self.data.conditions, self.data.test_dataloader(), strict=True)
        return [(of.misregistration_mm, list(map(_study, loader))) for of, loader in loaders]


def _study(batch: FusionBatch) -> Study:
    return Study(blinded(batch), batch.truth()[2][:, 2:3])


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="downstream")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Segment every image that has not been; leave cases.csv and table.md over all of them."""
    quiet_libraries()
    runs = runs_named(cfg)
    out = Path(str(cfg.out))
    chosen, data = data_of(cfg, runs)
    trainer = trainer_of(cfg)
    images = [*(fused_by_run(run, data, trainer, out) for run in runs)]
    images = [*(unfused_or_rule(str(name)) for name in cfg.inputs), *images]
    if len({given.name for given in images}) < len(images) or not images:
        names = [given.name for given in images]
        raise ValueError(f"expected inputs and runs of different names, got {names}")
    settings = settings_of(cfg, chosen)
    records = {given.name: {**settings, "image": given.state} for given in images}
    for name, record in records.items():
        check_record(out / name, record)
    record_study(cfg, chosen, data, out)
    cohort = Cohort(data)
    for given in images:
        if not (out / given.name / CASES).is_file():
            segment(given, cohort, cfg, records[given.name], out / given.name)
        write_rows(out / CASES, read_rows(out / given.name / CASES))
    table = headline(read_rows(out / CASES), SCORES)
    print_table(table, "Lesions, found by the same network in")
    write_atomically(out / "table.md", to_markdown(table) + "\n")
    print(f"rows: {out / CASES}")


def data_of(cfg: DictConfig, runs: Sequence[str]) -> tuple[DictConfig, Any]:
    """The configuration and the cases of the first run, unless the command line chooses others.

    Raises:
        ValueError: 2-D pairs, which have no lesions, or misregistrations that are none.
    """
    is_chosen = choice_was_made("data") or choice_was_made("phantoms")
    chosen = cfg if is_chosen or not runs else run_config(runs[0])
    if chosen.get("spatial_dims", 3) != 3:
        raise ValueError(f"expected volumes with lesion masks, got 2-D pairs: {chosen.data.root}")
    amplitudes = list(cfg.misregistration_mm)
    if not amplitudes or not all(isinstance(a, int | float) for a in amplitudes):
        raise ValueError(f"expected misregistration_mm=[LIST OF NUMBERS], got {amplitudes}")
    if not len(cfg.seeds) or cfg.draws < 1:
        raise ValueError(
            f"expected a seed and a draw at least, got seeds={cfg.seeds} and draws={cfg.draws}"
        )
    data = instantiate(
        chosen.data,
        jitter=instantiate(cfg.jitter, _convert_="all"),
        augmentation=instantiate(cfg.augmentation, _convert_="all"),
        misregistration_mm=[float(amplitude) for amplitude in amplitudes],
        perturbations=None,
        batch_size=1,
        patch_shape=None,
        _convert_="all",
    )
    data.prepare_data()
    data.draws_per_epoch = cfg.draws * len(data.splits["train"])
    for split, needs in (("train", "learn from"), ("val", "choose a threshold by")):
        if not any(study.lesion.any() for study in data.studies(split)):
            raise ValueError(
                f"expected {split} cases with a lesion to {needs}, got none: {data.root}"
            )
    return chosen, data


def trainer_of(cfg: DictConfig, **settings: Any) -> lightning.Trainer:
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        **settings,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        _convert_="all",
    )
    return trainer


def unfused_or_rule(name: str) -> Given:
    """A source, both of them, or what a method without weights makes of them."""
    if name in IMAGES:
        return Given(name, IMAGES[name])
    try:
        return Given(name, rule(name).fuse)
    except ValueError as error:
        raise ValueError(f"expected inputs of {', '.join(IMAGES)} or rules: {error}") from error


def fused_by_run(run: str, data: Any, trainer: lightning.Trainer, out: Path) -> Given:
    """What a run makes of a study, frozen; each volume is fused once and kept in ``out/fused``.

    Raises:
        ValueError: the run was trained on test cases, or fuses nothing.
    """
    saved = run_config(run)
    check_unseen(run, saved, data)
    method = trained_method(run, saved)
    if not isinstance(method, FusionMethod):
        raise ValueError(f"expected a run that fuses, got one of method={saved.method_name}: {run}")
    weights = hashlib.sha256(weights_file(run).read_bytes()).hexdigest()
    sampling = [
        OmegaConf.to_container(saved[part], resolve=True)
        for part in ("method", "guidance")
        if part in saved
    ]
    state = fingerprint([weights, saved.get("preset"), *sampling])
    device = trainer.strategy.root_device

    def fuse(batch: FusionBatch) -> Tensor:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            return method.to(device).fuse(batch.to(device)).clamp(-1, 1).to(batch.mri)

    once = MadeOnce(out / "fused" / f"{saved.method_name}_{state}", fuse)
    return Given(saved.method_name, once, state, saved.preset, int(getattr(method, "steps", 0)))


def check_unseen(run: str, saved: DictConfig, data: Any) -> None:
    """That a run has not learned from test cases; what it has learned from of the others, said."""
    with building(run):
        own = instantiate(saved.data, _convert_="all")
    here, there = (Path(root).resolve() for root in (data.root, own.root))
    is_drawn_alike = saved.data.get("prepare") is not None and here.name == there.name
    if here != there and not is_drawn_alike:  # generated cohorts are named by what they are of
        return
    learned = set((read_splits(run) or own.splits)["train"])
    if seen := sorted(learned & set(data.splits["test"])):
        raise ValueError(
            f"expected test cases that the fusion has not learned from, got {', '.join(seen[:3])} "
            f"in the training of {run}"
        )
    if again := learned & set(data.splits["train"]):
        log.warning(
            "%d of %d training cases trained the fusion as well: it may fuse them better than the "
            "test cases, and the segmentation learns from volumes that are too good",
            len(again), len(data.splits["train"]),
        )  # fmt: skip


def settings_of(cfg: DictConfig, chosen: DictConfig) -> dict[str, Any]:
    """What decides the rows of every image."""
    data: Any = OmegaConf.to_container(chosen.data, resolve=True)
    speed = ("num_workers", "cache_dir", "moved_by")
    replaced = ("perturbations", "draws_per_epoch", "batch_size", "patch_shape")
    ours = ("segmentation", "draws", "jitter", "augmentation", "misregistration_mm", "seeds")
    apart = {*speed, *replaced, *ours}
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    settings = {name: plain[name] for name in ours}
    return {**settings, "data": {k: v for k, v in data.items() if k not in apart}}


def check_record(folder: Path, record: dict[str, Any]) -> None:
    """That what an image's folder holds was made with these settings.

    Raises:
        ValueError: it was made with others.
    """
    if not (folder / RECORD).is_file():
        return
    there = json.loads((folder / RECORD).read_text())
    if differing := [name for name, value in record.items() if there.get(name) != value]:
        raise ValueError(
            f"expected the {' and '.join(differing)} that {folder} was made with, got other: "
            f"name another folder (out=FOLDER) or remove this one"
        )


def record_study(cfg: DictConfig, chosen: DictConfig, data: Any, out: Path) -> None:
    """What tables ask of a folder of scores: its configuration, its split, its versions."""
    config = OmegaConf.merge(cfg, {"data": OmegaConf.to_container(chosen.data, resolve=True)})
    write_atomically(out / ".hydra" / "config.yaml", OmegaConf.to_yaml(config))
    data.write_splits(out / "splits.json")
    facts = {**run_facts(), "seed": cfg.seed, "data": data.describe()}
    write_atomically(out / "facts.json", json.dumps(facts, indent=1) + "\n")


def segment(
    given: Given, cohort: Cohort, cfg: DictConfig, record: dict[str, Any], folder: Path
) -> None:
    """Train a segmentation of one image for each seed, and write the rows of the test cases."""
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    trained = segmentations(given, cohort.train, cfg)
    chosen = thresholds(given, cohort.val, trained)
    for amplitude_mm, studies in cohort.test:
        for study in studies:
            case_id, found = study.seen.case_id[0], probabilities(given, study, trained)
            for seed, probability in found.items():
                predicted = probability > chosen[seed]["threshold"]
                (scores,) = segmentation_scores(predicted, study.lesion, study.seen.spacing_mm)
                rows += case_rows(
                    scores,
                    case_id=case_id,
                    patient_id=cohort.data.patients[case_id],
                    method=given.name,
                    preset=given.preset,
                    seed=seed,
                    misregistration_mm=amplitude_mm,
                    mask_source="none",
                    steps=given.steps,
                )
    seconds = round(time.monotonic() - begun, 1)
    record = {**record, "seconds": seconds, "chosen": chosen, "commit": commit()}
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    write_rows(folder / CASES, rows)
    print(f"{given.name}: {seconds:.0f} s, {chosen}", flush=True)


def segmentations(
    given: Given, studies: Sequence[Study], cfg: DictConfig
) -> dict[int, Segmentation]:
    """A trained segmentation for each seed, which alone decides its first weights and voxels."""
    built: dict[int, Segmentation] = {}
    for seed in map(int, cfg.seeds):
        lightning.seed_everything(seed, workers=True, verbose=False)
        built[seed] = instantiate(cfg.segmentation, seed=seed, _convert_="all")
    for study in studies:
        described = described_by(given, study, built)
        for segmentation in built.values():
            segmentation.look_at(described, study.lesion, study.seen.brain)
    for segmentation in built.values():
        trainer_of(cfg, precision="32-true").fit(segmentation)
        segmentation.eval()
    return built


def thresholds(
    given: Given, studies: Sequence[Study], trained: dict[int, Segmentation]
) -> dict[int, dict[str, float]]:
    """By seed, the threshold that validation cases ask for, and their Dice."""
    found = [(probabilities(given, study, trained), study.lesion) for study in studies]
    chosen = {}
    for seed in trained:
        threshold, score = best_threshold((of[seed], lesion) for of, lesion in found)
        chosen[seed] = {"threshold": threshold, "validation_dice": round(score, 4)}
    return chosen


@torch.no_grad()
def probabilities(
    given: Given, study: Study, trained: dict[int, Segmentation]
) -> dict[int, Tensor]:
    """By seed, the probability of lesion at every voxel of one study."""
    described = described_by(given, study, trained)
    return {seed: each(described, study.seen.brain) for seed, each in trained.items()}


def described_by(given: Given, study: Study, built: dict[int, Segmentation]) -> Tensor:
    """An image of a study as all segmentations of it read it: made once for all seeds."""
    first = next(iter(built.values()))
    return first.describe(given.image(study.seen), shared_spacing(study.seen.spacing_mm))


if __name__ == "__main__":
    main()
