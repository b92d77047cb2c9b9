"""Study folders as batches: jittered training draws, and evaluation at fixed misregistration."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clinfuse.data import jitter as torchio_moves
from clinfuse.data import spline
from clinfuse.data.augmentation import Augmentation, with_noise
from clinfuse.data.jitter import Mover, RegistrationJitter, fixed_misregistration
from clinfuse.data.perturbation import Condition, conditions_of, perturbed
from clinfuse.data.preprocessed import preprocessed_study
from clinfuse.data.splits import (
    SPLITS,
    Splits,
    check_splits,
    make_splits,
    read_splits,
    write_splits,
)
from clinfuse.data.studies import Study, patient_of, study_folders
from clinfuse.data.study_items import (
    NO_AUGMENTATION,
    Drawn,
    drawn,
    item_of,
    padded,
    random_window,
    study_item,
)
from clinfuse.data.workers import begin_worker
from clinfuse.functional.intensity import CtMap
from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


PseudoReference = Literal["own", "average", "maximum"]
"""What training aims at: what the study ships, else the composite; or an ablation of method, §3."""

PSEUDO_REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": lambda mri, ct: (mri + ct) / 2,
    "maximum": torch.maximum,
}
"""Of the clean registered pair."""


NO_JITTER = RegistrationJitter(0, 0, 0)


@dataclass(frozen=True)
class Draw:
    """One training draw: which study, and the seed of everything random in it."""

    case: int
    seed: int


class DrawSampler(Sampler[Draw]):
    """The draws of an epoch, a pure function of (seed, epoch, index).

    Cases come in shuffled passes that continue across epochs, so that however many draws an epoch
    has, no case is drawn twice more often than another. Lightning calls ``set_epoch``: a resumed
    epoch repeats its draws exactly, and ``begin_at`` leaves out those that were trained on.

    Args:
        cases: to draw from.
        draws_per_epoch: of all ranks together.
        seed: of the draws.
        batch_size: of one rank.
        rank: of the process, among those that train together. Each has its part of every batch,
            in their order: 2 ranks with batches of 3 see what one with batches of 6 does.
        ranks: how many they are.

    Raises:
        ValueError: an epoch whose last batch cannot be shared out evenly.
    """

    def __init__(
        self,
        cases: int,
        draws_per_epoch: int,
        seed: int,
        batch_size: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.cases, self.draws_per_epoch, self.seed = cases, draws_per_epoch, seed
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        if draws_per_epoch % (batch_size * ranks) % ranks:
            raise ValueError(
                f"expected draws_per_epoch that {ranks} processes can share out evenly, got "
                f"{draws_per_epoch} in batches of {batch_size}"
            )
        self.epoch = 0
        self._begun = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin_at(self, epoch: int, batches: int) -> None:
        """Go on after some batches of an epoch; later epochs are whole."""
        self.epoch, self._begun = epoch, (epoch, batches)

    def __len__(self) -> int:
        """Of a whole epoch."""
        return self.draws_per_epoch // self.ranks

    def __iter__(self) -> Iterator[Draw]:
        epoch, batches = self._begun
        for index in self._indices(batches if self.epoch == epoch else 0):
            turn, place = divmod(self.epoch * self.draws_per_epoch + index, self.cases)
            order = np.random.default_rng([self.seed, turn]).permutation(self.cases)
            yield Draw(int(order[place]), _seed_of(self.seed, self.epoch, index))

    def _indices(self, batches: int) -> Iterator[int]:
        """This rank's own, but for the first batches."""
        together = self.batch_size * self.ranks
        for first in range(batches * together, self.draws_per_epoch, together):
            share = min(together, self.draws_per_epoch - first) // self.ranks
            yield from range(first + self.rank * share, first + (self.rank + 1) * share)


def rank_of(trainer: lightning.Trainer | None) -> tuple[int, int]:
    """Which of how many processes that train together this one is."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


@dataclass(frozen=True)
class TrainingDraw:
    """A training item, drawn and not made yet.

    Attributes:
        drawn: of a study, or the part of it that the item needs.
        patch_shape: what the item is padded to; None for nothing.
        reference: what it aims at.
        seed: of the noise on a device that is not the CPU.
        random: state of the generator on the CPU after everything else was drawn.
    """

    drawn: Drawn
    patch_shape: Sequence[int] | None
    reference: PseudoReference
    seed: int
    random: Tensor

    def item(self, by: Mover) -> FusionBatch:
        """The item, made on the device of its volumes; ``by`` is what resamples there."""
        item, varied = item_of(self.drawn, by), self.drawn.varied
        if self.reference != "own":
            assert item.clean_mri is not None and item.clean_ct is not None
            item.reference = PSEUDO_REFERENCES[self.reference](item.clean_mri, item.clean_ct)
        if self.patch_shape is not None:
            item = padded(item, self.patch_shape)
        generator = self._generator(item.mri.device)
        item.mri = with_noise(item.mri[0], varied.mri_noise, generator)[None]
        item.ct = with_noise(item.ct[0], varied.ct_noise, generator)[None]
        return item

    def _generator(self, device: torch.device) -> torch.Generator:
        if device.type != "cpu":
            return torch.Generator(device).manual_seed(self.seed)
        generator = torch.Generator()
        generator.set_state(self.random)
        return generator


@dataclass(frozen=True)
class DrawnBatch:
    """Training draws on their way to the device that makes items of them."""

    draws: Sequence[TrainingDraw]

    def to(self, device: torch.device | str) -> "DrawnBatch":
        """The same on another device; Lightning moves batches by this method."""
        return DrawnBatch([replace(draw, drawn=draw.drawn.on(device)) for draw in self.draws])

    def made(self) -> FusionBatch:
        """The batch."""
        return collate_batches([draw.item(spline.move) for draw in self.draws])


class TrainingDraws(Dataset[TrainingDraw]):
    """Studies as random training draws, indexed by ``Draw``: which part, moved how."""

    def __init__(
        self,
        studies: Sequence[Study],
        jitter: RegistrationJitter | None,
        augmentation: Augmentation | None,
        patch_shape: Sequence[int] | None = None,
        reference: PseudoReference = "own",
    ) -> None:
        self.studies, self.jitter, self.augmentation = studies, jitter, augmentation
        self.patch_shape, self.reference = patch_shape, reference

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, draw: Draw) -> TrainingDraw:
        generator = torch.Generator().manual_seed(draw.seed)
        study = self.studies[draw.case]
        varied = (self.augmentation or NO_AUGMENTATION).draw(generator)
        misregistration = (self.jitter or NO_JITTER).draw(generator)
        window = None
        if self.patch_shape is not None:
            window = random_window(study, varied, self.patch_shape, generator)
        return TrainingDraw(
            drawn(study, misregistration, varied, window),
            self.patch_shape,
            self.reference,
            draw.seed,
            generator.get_state(),
        )


class Misregistered(Dataset[FusionBatch]):
    """Whole studies, unaugmented, each moved by its own fixed direction and perturbed alike."""

    def __init__(
        self,
        studies: Sequence[Study],
        condition: Condition,
        deg_per_mm: float | int,
        seed: int,
    ) -> None:
        self.studies, self.condition, self.seed = studies, condition, seed
        self.amplitude_deg = condition.turn_deg(deg_per_mm)

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> FusionBatch:
        study, amplitude_mm = self.studies[index], self.condition.misregistration_mm
        moved = fixed_misregistration(study.case_id, amplitude_mm, self.amplitude_deg, self.seed)
        return perturbed(study_item(study, moved), self.condition, self.seed)


def collate_batches(items: Sequence[FusionBatch]) -> FusionBatch:
    """Batches of one as one batch.

    Raises:
        ValueError: cases of different sizes, which need patches or a batch size of one.
    """
    shapes = {tuple(item.mri.shape[2:]) for item in items}
    if len(shapes) > 1:
        raise ValueError(
            f"expected cases of one size in a batch, got {sorted(shapes)}: "
            "set patch_shape, or a batch size of 1"
        )
    values: dict[str, Any] = {}
    for field in fields(FusionBatch):
        parts = [getattr(item, field.name) for item in items]
        if field.name in ("case_id", "ct_map"):
            values[field.name] = [name for part in parts for name in part]
        else:
            values[field.name] = None if parts[0] is None else torch.cat(parts)
    return FusionBatch(**values)


def made_by_torchio(draws: Sequence[TrainingDraw]) -> FusionBatch:
    """A batch of training draws, resampled by TorchIO."""
    return collate_batches([draw.item(torchio_moves.move) for draw in draws])


def made_by_splines(draws: Sequence[TrainingDraw]) -> FusionBatch:
    """A batch of training draws, resampled by ``spline.move``."""
    return collate_batches([draw.item(spline.move) for draw in draws])


def made_on_device(draws: Sequence[TrainingDraw]) -> DrawnBatch:
    """What the device that trains makes a batch of: all that it needs, and nothing else."""
    return DrawnBatch([replace(draw, drawn=draw.drawn.apart()) for draw in draws])


COLLATING: Mapping[str, Callable[[Sequence[TrainingDraw]], FusionBatch | DrawnBatch]] = {
    "torchio": made_by_torchio,
    "spline": made_by_splines,
    "device": made_on_device,
}
"""What moves training draws: TorchIO, or the same splines in less time, or those on the device that
trains. What is drawn is the same, and volumes differ by rounding."""


class PairedVolumes(lightning.LightningDataModule):
    """A cohort of MRI-CT study folders, split by patient.

    Args:
        root: folder of study folders, perhaps with ``splits.json``.
        batch_size: of training; evaluation takes one case at a time.
        draws_per_epoch: training items in an epoch; default one for each training case.
        jitter: misregistration of training draws; None for none.
        augmentation: variation of training draws; None for none.
        patch_shape: (d, h, w) of random training patches; None trains on whole studies.
        ct_map: how HU become model space.
        misregistration_mm: amplitudes of ``test_dataloader``, one loader each.
        perturbations: what else is to be wrong in test cases, one thing at a time: amounts by name
            of ``data.perturbation.PERTURBATIONS``, one loader each after those of
            misregistration (``conditions`` lists them all).
        perturbed_at_mm: the misregistration at which it is; a rotation is without a shift.
        training_reference: what training draws aim at; tests compare with the study's own.
        train_on: the split that training draws from. ``val`` is for weights of a rule, which are
            optimised on validation patients; no network is trained there.
        val_misregistration_mm: the amplitude of ``val_dataloader``.
        misregistration_deg_per_mm: rotation that goes with each millimetre of shift.
        num_workers: processes that draw; the draws are the same for any number.
        seed: of draws.
        misregistration_seed: of fixed misregistration and of perturbations. Apart from ``seed``, so
            that runs of several seeds are evaluated on the same inputs.
        splits: case ids of train, val and test; default those of the root, else 70/15/15 by
            patient with seed 42 (kept in this object and the run's record, never written to root).
        prepare: called with the root before anything is read, to fill it: phantoms. It leaves
            alone what is there already.
        cache_dir: where segmented masks and studies in model space are kept; studies are then
            mapped into memory and not held there. None reads and segments at every start.
        resample_mm: voxel size (d, h, w) to resample to on loading.
        moved_by: what moves training draws. With "device" the training loader gives
            ``DrawnBatch``, which Lightning brings to the device and ``on_after_batch_transfer``
            makes batches of there. Evaluation is TorchIO's, always.
    """

    def __init__(
        self,
        root: Path | str,
        batch_size: int = 1,
        draws_per_epoch: int | None = None,
        jitter: RegistrationJitter | None = None,
        augmentation: Augmentation | None = None,
        patch_shape: Sequence[int] | None = None,
        ct_map: CtMap = "piecewise",
        misregistration_mm: Sequence[float | int] = (0.0, 1.0, 2.0, 3.0, 4.0),
        val_misregistration_mm: float | int = 2.0,
        misregistration_deg_per_mm: float | int = 1.0,
        num_workers: int = 0,
        seed: int = 42,
        misregistration_seed: int = 0,
        splits: Mapping[str, Sequence[str]] | None = None,
        prepare: Callable[[Path], Any] | None = None,
        cache_dir: Path | str | None = None,
        resample_mm: Sequence[float | int] | None = None,
        perturbations: Mapping[str, Any] | None = None,
        perturbed_at_mm: Any = 0.0,
        training_reference: PseudoReference = "own",
        train_on: str = "train",
        moved_by: str = "spline",
    ) -> None:
        super().__init__()
        if train_on not in ("train", "val"):
            raise ValueError(f"expected train_on of train or val, got {train_on!r}")
        self.train_on = train_on
        if training_reference not in get_args(PseudoReference):
            raise ValueError(
                f"expected training_reference of {get_args(PseudoReference)}, "
                f"got {training_reference!r}"
            )
        self.training_reference = training_reference
        if moved_by not in COLLATING:
            raise ValueError(f"expected moved_by of {list(COLLATING)}, got {moved_by!r}")
        self.moved_by = moved_by
        self.conditions = conditions_of(misregistration_mm, perturbations, perturbed_at_mm)
        self.root, self.batch_size, self.draws_per_epoch = Path(root), batch_size, draws_per_epoch
        self.jitter, self.augmentation, self.patch_shape = jitter, augmentation, patch_shape
        self.ct_map, self.cache_dir, self.resample_mm = ct_map, cache_dir, resample_mm
        self.misregistration_mm = tuple(misregistration_mm)
        self.val_misregistration_mm = val_misregistration_mm
        self.misregistration_deg_per_mm = misregistration_deg_per_mm
        self.misregistration_seed = misregistration_seed
        self.num_workers, self.seed, self.prepare = num_workers, seed, prepare
        self._asked_splits = splits
        self._splits: Splits | None = None
        self._splits_source = ""
        self._patients: dict[str, str] | None = None
        self._studies: dict[str, Study] = {}

    @property
    def splits(self) -> Splits:
        """Case ids of train, val and test."""
        if self._splits is None:
            self._splits, self._splits_source = self._find_splits()
        return self._splits

    @property
    def patients(self) -> dict[str, str]:
        """The patient of each study folder of the root, by its name."""
        if self._patients is None:
            folders = study_folders(self.root)
            self._patients = {folder.name: patient_of(folder) for folder in folders}
        return self._patients

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in needed.get(stage or "", SPLITS):
            self.studies(split)

    def studies(self, split: str) -> list[Study]:
        """The studies of one of train, val and test, read on first use and then kept."""
        return [self.study(case) for case in self.splits[split]]

    def study(self, case_id: str) -> Study:
        """One study by its folder's name."""
        if case_id not in self._studies:
            self._studies[case_id] = preprocessed_study(
                self.root / case_id, self.ct_map, self.cache_dir, self.resample_mm
            )
        return self._studies[case_id]

    def train_dataloader(self) -> DataLoader:
        studies = self.studies(self.train_on)
        if not studies:
            raise ValueError(f"expected cases in {self.train_on}, got none: {self.root}")
        draws = self.draws_per_epoch or len(studies)
        return DataLoader(
            TrainingDraws(
                studies, self.jitter, self.augmentation, self.patch_shape, self.training_reference
            ),
            batch_size=self.batch_size,
            sampler=DrawSampler(
                len(studies), draws, self.seed, self.batch_size, *rank_of(self.trainer)
            ),
            collate_fn=COLLATING[self.moved_by],
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=begin_worker,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.made() if isinstance(batch, DrawnBatch) else batch

    def val_dataloader(self) -> DataLoader:
        return self.val_batches(self.val_misregistration_mm)

    def test_dataloader(self) -> list[DataLoader]:
        return [self._misregistered("test", condition) for condition in self.conditions]

    def val_batches(self, amplitude_mm: float | int) -> DataLoader:
        """Validation cases one by one, moved by ``amplitude_mm``."""
        return self._misregistered("val", Condition(amplitude_mm))

    def test_batches(
        self, amplitude_mm: float | int, perturbation: str = "", amount: float | int = 0.0
    ) -> DataLoader:
        """Test cases one by one, moved by ``amplitude_mm`` and perturbed."""
        return self._misregistered("test", Condition(amplitude_mm, perturbation, amount))

    def describe(self) -> dict[str, Any]:
        """Facts of the cohort for the run's record; studies not read yet are read."""
        studies = [study for split in SPLITS for study in self.studies(split)]
        sources = {
            roi: {
                source: [s.case_id for s in studies if s.mask_source[roi] == source]
                for source in sorted({s.mask_source[roi] for s in studies})
            }
            for roi in ("brain", "bone", "lesion")
        }
        return {
            "root": str(self.root),
            "splits": {split: list(cases) for split, cases in self.splits.items()},
            "splits_source": self._splits_source,
            "cases": {split: len(cases) for split, cases in self.splits.items()},
            "shapes_dhw": sorted({tuple(s.mri.shape[1:]) for s in studies}),
            "spacings_mm_dhw": sorted({tuple(round(x, 3) for x in s.spacing_mm) for s in studies}),
            "ct_units": sorted({s.ct_units for s in studies}),
            "ct_maps": sorted({s.ct_map for s in studies}),
            "mask_sources": sources,
            "cases_with_lesion": sum(s.has_lesion for s in studies),
            "cases_with_findings": sum(bool(s.finding_boxes) for s in studies),
            "cases_with_clean_pair": sum(s.has_clean_pair for s in studies),
            "cases_with_own_reference": sum(s.has_own_reference for s in studies),
        }

    def write_splits(self, path: Path | str) -> None:
        """Record the case lists as ``splits.json`` that ``read_splits`` understands."""
        write_splits(path, self.splits, self._splits_source)

    def _misregistered(self, split: str, condition: Condition) -> DataLoader:
        return DataLoader(
            Misregistered(
                self.studies(split),
                condition,
                self.misregistration_deg_per_mm,
                self.misregistration_seed,
            ),
            batch_size=1,
            collate_fn=collate_batches,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
        )

    def _find_splits(self) -> tuple[Splits, str]:
        patients = self.patients
        if self._asked_splits is not None:
            found = {split: list(self._asked_splits.get(split, ())) for split in SPLITS}
            source = "the configuration"
        elif (read := read_splits(self.root)) is not None:
            found, source = read, str(self.root)
        else:
            found = make_splits(sorted(patients), patients)
            source = "made: 70/15/15 by patient, seed 42"
            log.info("%s has no splits file: 70/15/15 by patient, seed 42", self.root)
        absent = sorted(case for split in SPLITS for case in found[split] if case not in patients)
        if absent:
            raise FileNotFoundError(f"expected a folder for each case of {source}, no {absent}")
        check_splits(found, patients, source)
        unused = sorted(set(patients) - {case for split in SPLITS for case in found[split]})
        if unused:
            log.info("in no split and not used: %s", ", ".join(unused))
        return found, source


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
