"""Sets of 2-D pairs as batches: patches for training, whole pictures for evaluation."""

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clinfuse.data.jitter import (
    CT_AIR,
    RegistrationJitter,
    about_another_centre,
    move,
    move_mask,
)
from clinfuse.data.paired_volumes import Draw, DrawSampler, collate_batches, rank_of
from clinfuse.data.perturbation import Condition, conditions_of, perturbed
from clinfuse.data.slices import (
    SMALLEST,
    Pair,
    PairKind,
    Slice,
    find_pairs,
    kind_named,
    patients_of,
    read_pair,
)
from clinfuse.data.splits import (
    SPLITS,
    Splits,
    check_splits,
    make_splits,
    read_splits,
    read_splits_file,
    write_splits,
)
from clinfuse.data.workers import begin_worker
from clinfuse.functional.surface import NO_SURFACE_MM
from clinfuse.functional.warp import rigid_matrix
from clinfuse.types import SliceBatch

log = logging.getLogger(__name__)

EVERYTHING = "all"
"""In a list of pairs: every pair of the set."""


def jitter_in_plane(jitter: RegistrationJitter, generator: torch.Generator) -> Float[Tensor, "3 3"]:
    """One draw of the jitter for a slice: a shift along h and w, and a turn within it.

    Uniform in ±``max_mm`` and ±``max_deg``. The generator advances equally whether or not it moves.
    """
    moves = torch.rand((), generator=generator, dtype=torch.float64) < jitter.probability
    uniform = 2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1
    if not moves:
        return torch.eye(3, dtype=torch.float64)
    return _in_plane(uniform[:2] * jitter.max_mm, float(uniform[2] * jitter.max_deg))


def fixed_in_plane(
    case_id: str, amplitude_mm: float | int, amplitude_deg: float | int, seed: int = 0
) -> Float[Tensor, "3 3"]:
    """A shift of exactly ``amplitude_mm`` in the slice and a turn of exactly ``amplitude_deg``.

    Direction and sense depend on seed and case alone: the same for every method and amplitude.
    """
    digest = hashlib.sha256(f"{seed}/{case_id}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    angle, sense = 2 * math.pi * random.random(), random.choice((-1.0, 1.0))
    direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    return _in_plane(amplitude_mm * direction, sense * amplitude_deg)


def slice_item(pair: Slice, misregistration: Float[Tensor, "3 3"]) -> SliceBatch:
    """A batch of one pair whose second source has moved, with its chroma and masks.

    What comes in from outside is black and grey. The reference is the slice's own, if it has one:
    nobody knows how a real pair should look when fused.
    """
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[1:, 1:] = misregistration  # of a volume of one slice, which stays in its plane
    spacing_mm = (1.0, *pair.spacing_mm)

    def moved(picture: Tensor, fill: float) -> Tensor:
        channels = [move(channel[None, None], matrix, spacing_mm, fill) for channel in picture]
        return torch.cat(channels)[None, :, 0]

    clean_roi = pair.roi[None]
    masks = [mask[None, None] for mask in pair.roi]
    brain, bone = (move_mask(mask, matrix, spacing_mm) for mask in masks[:2])
    mri, clean_ct = pair.mri[None], pair.ct[None]
    return SliceBatch(
        mri=mri,
        ct=moved(pair.ct, CT_AIR).clamp(-1, 1),
        roi=torch.cat((brain, bone, clean_roi[:, 2:]), 1),
        spacing_mm=torch.tensor([pair.spacing_mm]),
        case_id=[pair.case_id],
        clean_mri=mri,
        clean_ct=clean_ct,
        clean_roi=clean_roi,
        reference=None if pair.reference is None else pair.reference[None],
        lesion_distance_mm=torch.full_like(mri, NO_SURFACE_MM),
        misregistration=misregistration.float()[None],
        findings=torch.zeros_like(clean_roi[:, :1]),
        ct_map=["window_8bit"] if pair.is_ct else [],
        chroma=None if pair.chroma is None else moved(pair.chroma, 0.0).clamp(-0.5, 0.5),
    )


def random_patch(item: SliceBatch, shape: Sequence[int], generator: torch.Generator) -> SliceBatch:
    """A patch (h, w) around a random pixel that is not black in both sources.

    Smaller pictures are padded at their lower right with what lies outside. The misregistration is
    written about the patch's own centre.
    """
    size = item.mri.shape[2:]
    lacking = [max(patch - whole, 0) for whole, patch in zip(size, shape, strict=True)]
    shown = (item.mri.maximum(item.ct) > CT_AIR)[0, 0]
    places = (shown if shown.any() else torch.ones_like(shown)).nonzero()
    around = places[torch.randint(len(places), (), generator=generator)].tolist()
    start = [
        min(max(at - patch // 2, 0), max(whole - patch, 0))
        for at, patch, whole in zip(around, shape, size, strict=True)
    ]
    h, w = (slice(first, first + n) for first, n in zip(start, shape, strict=True))

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 4:
            return value
        sides = (0, lacking[1], 0, lacking[0])  # F.pad: the last axis first
        return F.pad(value, sides, value=_OUTSIDE.get(name, 0))[..., h, w].contiguous()

    patch = SliceBatch(**{name: cut(name, value) for name, value in vars(item).items()})
    assert item.misregistration is not None
    from_centre = [f + (n - whole) / 2 for f, n, whole in zip(start, shape, size, strict=True)]
    centre_mm = torch.tensor(from_centre).double() * item.spacing_mm[0]
    matrix = about_another_centre(item.misregistration[0].double(), centre_mm)
    patch.misregistration = matrix.float()[None]
    return patch


def collate_slices(items: Sequence[SliceBatch]) -> SliceBatch:
    """Batches of one as one batch.

    Raises:
        ValueError: pictures of different sizes, which need patches or a batch size of one.
    """
    chroma = [item.chroma for item in items if item.chroma is not None]
    batch = collate_batches(items)
    return SliceBatch(**vars(batch), chroma=torch.cat(chroma) if chroma else None)


class TrainingSlices(Dataset[SliceBatch]):
    """Pairs as random training items, indexed by ``Draw``."""

    def __init__(
        self,
        slices: Sequence[Slice],
        jitter: RegistrationJitter | None,
        patch_shape: Sequence[int] | None,
    ) -> None:
        self.slices, self.jitter, self.patch_shape = slices, jitter, patch_shape

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, draw: Draw) -> SliceBatch:
        generator = torch.Generator().manual_seed(draw.seed)
        jitter = self.jitter or RegistrationJitter(probability=0)
        item = slice_item(self.slices[draw.case], jitter_in_plane(jitter, generator))
        return item if self.patch_shape is None else random_patch(item, self.patch_shape, generator)


class MisregisteredSlices(Dataset[SliceBatch]):
    """Whole pairs, each moved by its own fixed direction and perturbed alike."""

    def __init__(
        self,
        slices: Sequence[Slice],
        condition: Condition,
        deg_per_mm: float | int,
        seed: int,
    ) -> None:
        self.slices, self.condition, self.seed = slices, condition, seed
        self.amplitude_deg = condition.turn_deg(deg_per_mm)

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> SliceBatch:
        pair, amplitude_mm = self.slices[index], self.condition.misregistration_mm
        moved = fixed_in_plane(pair.case_id, amplitude_mm, self.amplitude_deg, self.seed)
        item = perturbed(slice_item(pair, moved), self.condition, self.seed)
        assert isinstance(item, SliceBatch)
        return item


class PairedSlices(lightning.LightningDataModule):
    """A set of 2-D pairs, split by patient and never by slice.

    Args:
        root: the set's folder, or the one around it (``data.slices.find_pairs``); a number where
            YAML takes its name for one.
        kind: of ``data.slices.KINDS``: ct_mri, pet_mri, spect_mri, gfp_pc or vis_ir.
        batch_size: of training; evaluation takes one pair at a time.
        draws_per_epoch: training items in an epoch; default one for each training pair.
        jitter: misregistration of training draws, in the plane; None for none.
        patch_shape: (h, w) of random training patches; None trains on whole pictures.
        misregistration_mm: amplitudes of ``test_dataloader``, one loader each. Where pictures have
            no scale (gfp_pc, vis_ir) a millimetre is a pixel.
        val_misregistration_mm: the amplitude of ``val_dataloader``.
        misregistration_deg_per_mm: rotation that goes with each millimetre of shift.
        num_workers: processes that draw; the draws are the same for any number.
        seed: of draws.
        misregistration_seed: of fixed misregistration and of perturbations.
        splits: names or patients of train, val and test, or ``all``; a list that is left out is
            empty. Default those of ``splits_file``.
        splits_file: JSON with such lists. Default ``splits.json`` or ``split_info.json`` in the
            root; else the folders train, val and test, where the set has them; else 70/15/15 by
            patient with seed 42 (kept in this object and the run's record, never written to root).
        prepare: called with the root before anything is read, to fill it: phantoms.
        reference: makes of the clean registered sources (b 1 h w) what training and validation aim
            at, for methods that need it (``needs_reference``). Test pairs have none, so that no
            score compares with it.
        cache_dir: where references are kept; None makes them anew in every run.
        split: ``patient``, or ``community``: 70/15/15 of the slices, whoever they are of, as many
            papers do. Neighbouring slices of a patient then lie in train and in test, and the
            numbers are too good; it is here to place them, and says so.
        perturbations: as of ``PairedVolumes``, in the plane. Masks can go wrong only where there
            are any (ct_mri), and no pair has a lesion to withhold.
        perturbed_at_mm: the misregistration at which it is; a rotation is without a shift.
        train_on: as of ``PairedVolumes``.

    Raises:
        ValueError: for another ``split``, or ``community`` with lists of one's own; for lists, a
            patch or numbers that cannot be.
    """

    def __init__(
        self,
        root: Path | str | int,
        kind: str,
        batch_size: int = 1,
        draws_per_epoch: int | None = None,
        jitter: RegistrationJitter | None = None,
        patch_shape: Sequence[int] | None = None,
        misregistration_mm: Sequence[float | int] = (0.0,),
        val_misregistration_mm: float | int = 0.0,
        misregistration_deg_per_mm: float | int = 1.0,
        num_workers: int = 0,
        seed: int = 42,
        misregistration_seed: int = 0,
        splits: Mapping[str, Any] | None = None,
        splits_file: Path | str | None = None,
        prepare: Callable[[Path], Any] | None = None,
        split: str = "patient",
        reference: Callable[[Tensor, Tensor], Tensor] | None = None,
        cache_dir: Path | str | None = None,
        perturbations: Mapping[str, Any] | None = None,
        perturbed_at_mm: Any = 0.0,
        train_on: str = "train",
    ) -> None:
        super().__init__()
        if split not in ("patient", "community"):
            raise ValueError(f"expected split=patient or split=community, got {split!r}")
        if split == "community" and (splits is not None or splits_file is not None):
            raise ValueError("expected split=community without splits or splits_file, got both")
        _check_numbers(batch_size, draws_per_epoch, patch_shape, misregistration_mm)
        self.prepare, self.split, self.reference = prepare, split, reference
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.root, self.kind, self.pair_kind = Path(str(root)), kind, kind_named(kind)
        self.batch_size, self.draws_per_epoch = batch_size, draws_per_epoch
        self.jitter, self.patch_shape = jitter, patch_shape
        self.misregistration_mm = tuple(misregistration_mm)
        self.conditions = conditions_of(misregistration_mm, perturbations, perturbed_at_mm)
        if train_on not in ("train", "val"):
            raise ValueError(f"expected train_on of train or val, got {train_on!r}")
        self.train_on = train_on
        _check_there_are_masks(self.conditions, kind, self.pair_kind)
        self.val_misregistration_mm = val_misregistration_mm
        self.misregistration_deg_per_mm = misregistration_deg_per_mm
        self.misregistration_seed = misregistration_seed
        self.num_workers, self.seed = num_workers, seed
        self._asked_splits = None if splits is None else _lists(splits)
        self._asked_file = splits_file
        self._pairs: dict[str, Pair] | None = None
        self._splits: Splits | None = None
        self._splits_source = ""
        self._slices: dict[str, Slice] = {}

    @property
    def pairs(self) -> dict[str, Pair]:
        """The pairs of the set by name."""
        if self._pairs is None:
            self._pairs = {pair.name: pair for pair in find_pairs(self.root, self.pair_kind)}
        return self._pairs

    @property
    def splits(self) -> Splits:
        """Names of the pairs of train, val and test."""
        if self._splits is None:
            self._splits, self._splits_source = self._find_splits()
        return self._splits

    @property
    def patients(self) -> dict[str, str]:
        """The patient of each pair, as far as names say it: what statistics may take as one."""
        return patients_of(list(self.pairs.values()), self.pair_kind)

    def prepare_data(self) -> None:
        if self.prepare is not None:
            self.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in needed.get(stage or "", SPLITS):
            self.slices(split)
        if stage == "test":
            self._some("test")

    def slices(self, split: str) -> list[Slice]:
        """The pairs of one of train, val and test, read on first use and then kept in memory."""
        return [self._slice(name) for name in self.splits[split]]

    def train_dataloader(self) -> DataLoader:
        slices = self._some(self.train_on)
        if self.batch_size > 1 and self.patch_shape is None:
            self._check_sizes(slices)
        slices = self._with_references(slices)
        draws = self.draws_per_epoch or len(slices)
        return DataLoader(
            TrainingSlices(slices, self.jitter, self.patch_shape),
            batch_size=self.batch_size,
            sampler=DrawSampler(
                len(slices), draws, self.seed, self.batch_size, *rank_of(self.trainer)
            ),
            collate_fn=collate_slices,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader:
        slices = self._with_references(self.slices("val"))
        return self._misregistered(slices, Condition(self.val_misregistration_mm))

    def test_dataloader(self) -> list[DataLoader]:
        slices = self._some("test")
        return [self._misregistered(slices, condition) for condition in self.conditions]

    def describe(self) -> dict[str, Any]:
        """Facts of the set for the run's record."""
        patients, kind = self.patients, self.pair_kind
        segmented = "segmented" if kind.is_ct else "absent"
        return {
            "root": str(self.root),
            "kind": self.kind,
            "splits": self.splits,
            "splits_source": self._splits_source,
            "split_by": self.split if self.split == "patient" else "slice",
            "cases": {split: len(names) for split, names in self.splits.items()},
            "patients": {
                split: sorted({patients[name] for name in names})
                for split, names in self.splits.items()
            },
            "pixel_mm": kind.pixel_mm,
            "mask_sources": {"brain": segmented, "bone": segmented, "lesion": "absent"},
        }

    def write_splits(self, path: Path | str) -> None:
        """Record the lists as JSON that ``splits_file`` takes."""
        write_splits(path, self.splits, self._splits_source)

    def _slice(self, name: str) -> Slice:
        if name not in self._slices:
            self._slices[name] = read_pair(self.pairs[name], self.pair_kind)
        return self._slices[name]

    def _with_references(self, slices: Sequence[Slice]) -> list[Slice]:
        method = None if self.trainer is None else self.trainer.lightning_module
        if self.reference is None or not getattr(method, "needs_reference", True):
            return list(slices)
        missing = [pair for pair in slices if pair.reference is None]
        if missing:
            log.info("making the references of %d pairs, which takes seconds each", len(missing))
        for pair in missing:
            self._slices[pair.case_id] = replace(pair, reference=self._reference_of(pair))
        return [self._slices[pair.case_id] for pair in slices]

    def _reference_of(self, pair: Slice) -> Float[Tensor, "1 h w"]:
        assert self.reference is not None
        path = None
        if self.cache_dir is not None:
            sources = b"".join(source.numpy().tobytes() for source in (pair.mri, pair.ct))
            what = f"{self.reference!r} {tuple(pair.mri.shape)}".encode()
            key = hashlib.sha256(what + sources).hexdigest()[:24]
            path = self.cache_dir / "references" / f"{key}.npy"
            if path.is_file():
                return _kept(path)
        try:
            reference = self.reference(pair.mri[None], pair.ct[None])[0]
        except ValueError as error:
            raise ValueError(f"{error}: {self.pairs[pair.case_id].mri}") from error
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.npy")
            np.save(partial, reference.numpy())
            partial.replace(path)
        return reference

    def _some(self, split: str) -> list[Slice]:
        if not self.splits[split]:
            patients = len(set(self.patients.values()))
            raise ValueError(
                f"expected pairs to {split} with, got none of {len(self.pairs)} of {patients} "
                f"{'patient' if patients == 1 else 'patients'} "
                f"(splits: {self._splits_source}): {self.root}"
            )
        return self.slices(split)

    def _check_sizes(self, slices: Sequence[Slice]) -> None:
        """Refuse pictures that do not make a batch, before it is up to chance which meet."""
        first = slices[0]
        for other in slices:
            if other.mri.shape != first.mri.shape:
                sizes = " and ".join(
                    f"{tuple(s.mri.shape[:0:-1])} in {self.pairs[s.case_id].mri}"
                    for s in (first, other)
                )
                raise ValueError(
                    f"expected pictures of one size (w, h) in batches of {self.batch_size} without "
                    f"a patch_shape, got {sizes}"
                )

    def _misregistered(self, slices: Sequence[Slice], condition: Condition) -> DataLoader:
        return DataLoader(
            MisregisteredSlices(
                slices, condition, self.misregistration_deg_per_mm, self.misregistration_seed
            ),
            batch_size=1,
            collate_fn=collate_slices,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
        )

    def _find_splits(self) -> tuple[Splits, str]:
        if self.split == "community":
            log.warning(
                "%s is split by slice, as split=community asks: neighbouring slices of a patient "
                "train and test, and what is measured is too good",
                self.root,
            )
            return make_splits(sorted(self.pairs)), "made: 70/15/15 by slice, seed 42 (leaks)"
        patients = self._kept_together()
        lists, source = self._stated()
        if lists is None:
            found = make_splits(sorted(self.pairs), patients)
            source = "made: 70/15/15 by patient, seed 42"
            log.info("%s has no splits file: 70/15/15 by patient, seed 42", self.root)
        else:
            found = {split: self._names(lists.get(split, ()), source) for split in SPLITS}
        check_splits(found, patients, source)
        unused = sorted(set(self.pairs) - {name for split in SPLITS for name in found[split]})
        if unused:
            log.info("in no split and not used: %d pairs, %s first", len(unused), unused[0])
        return found, source

    def _kept_together(self) -> dict[str, str]:
        """The patient of each pair, as splits go by it; what cannot be kept apart is said."""
        pairs, patients = list(self.pairs.values()), self.patients
        unknown = [pair.name for pair in pairs if pair.case == pair.name]
        if self.pair_kind.case_pattern and unknown:
            log.warning(
                "%s: %d of %d names (%s first) do not say whose slice it is, so a split may leak",
                self.root, len(unknown), len(pairs), unknown[0],
            )  # fmt: skip
        if len(pairs) == 1 or len(set(patients.values())) > 1:
            return patients
        log.warning(
            "%s: all %d pairs are of one patient (cases %s), so any split leaks; it is by case",
            self.root, len(pairs), ", ".join(sorted({pair.case for pair in pairs})),
        )  # fmt: skip
        return {pair.name: pair.case for pair in pairs}

    def _stated(self) -> tuple[Mapping[str, Sequence[str]] | None, str]:
        """The lists of the configuration, of a file or of the folders; and where they are from."""
        if self._asked_splits is not None:
            return self._asked_splits, "the configuration"
        if self._asked_file is not None:
            return dict(read_splits_file(self._asked_file)), str(self._asked_file)
        pairs = list(self.pairs.values())
        has_folders = pairs[0].split is not None
        folder = pairs[0].mri.parents[2 if has_folders else 1]
        if has_folders:
            by_folder = {s: [p.name for p in pairs if p.split == s] for s in SPLITS}
            self._check_file_agrees(folder, by_folder)
            return dict(by_folder), f"the folders of {folder}"
        for place in (self.root, folder):
            if (read := read_splits(place)) is not None:
                return dict(read), str(place)
        return None, ""

    def _check_file_agrees(self, folder: Path, by_folder: Splits) -> None:
        """Refuse lists beside the folders train, val and test that say something else than they."""
        try:
            stated = read_splits(folder)
        except ValueError as error:  # counts, seeds: of which there is no standard
            log.info("the folders say what trains: %s", error)
            return
        for split, names in by_folder.items():
            listed = names if stated is None else self._names(stated[split], str(folder))
            if other := sorted(set(listed) ^ set(names)):
                raise ValueError(
                    f"expected lists that agree with the folders, got {other} in one of them alone "
                    f"for {split}: {folder}"
                )

    def _names(self, entries: Sequence[str], source: str) -> list[str]:
        """Pairs by their name, by either file's name, or all of a patient's."""
        known: dict[str, list[str]] = {EVERYTHING: list(self.pairs)}
        for name, pair in self.pairs.items():
            known.setdefault(pair.case, []).append(name)
        for name, pair in self.pairs.items():
            known |= {key: [name] for key in (name, pair.mri.name, pair.ct.name)}
        asked = [Path(entry).name for entry in entries]
        if absent := sorted(set(asked) - set(known)):
            raise FileNotFoundError(
                f"expected a pair or a patient for each entry of {source}, no {absent}: {self.root}"
            )
        return [name for entry in asked for name in known[entry]]


_OUTSIDE = {
    **dict.fromkeys(("mri", "ct", "clean_mri", "clean_ct"), CT_AIR),
    "lesion_distance_mm": NO_SURFACE_MM,
}
"""What lies beyond a picture's edge: black, and far from any lesion; no colour and no mask."""


def _check_numbers(
    batch_size: int,
    draws_per_epoch: int | None,
    patch_shape: Any,
    misregistration_mm: Any,
) -> None:
    for name, number in (("batch_size", batch_size), ("draws_per_epoch", draws_per_epoch)):
        if number is not None and not (isinstance(number, int) and number > 0):
            raise ValueError(f"expected {name} of at least 1, got {number!r}")
    is_shape = isinstance(patch_shape, Sequence) and len(patch_shape) == 2
    if patch_shape is not None and not (
        is_shape and all(isinstance(n, int) and n >= SMALLEST for n in patch_shape)
    ):
        raise ValueError(
            f"expected a patch_shape (h, w) of at least {SMALLEST} pixels a side, got {patch_shape}"
        )
    are_amplitudes = isinstance(misregistration_mm, Sequence) and all(
        isinstance(amplitude, float | int) and math.isfinite(amplitude)
        for amplitude in misregistration_mm
    )
    if not are_amplitudes:
        raise ValueError(
            f"expected misregistration_mm to be a list of numbers, got {misregistration_mm!r}"
        )


def _check_there_are_masks(conditions: Sequence[Condition], name: str, kind: PairKind) -> None:
    asked = [condition.perturbation for condition in conditions]
    if "without_lesion" in asked:
        raise ValueError("expected volumes for without_lesion: no 2-D pair has a lesion's mask")
    masks = sorted({perturbation for perturbation in asked if perturbation.startswith("mask_")})
    if masks and not kind.is_ct:
        raise ValueError(
            f"expected pairs with masks (kind ct_mri) for {', '.join(masks)}, got {name}"
        )


def _lists(splits: Any) -> dict[str, list[str]]:
    """Lists of the configuration, their entries as text; YAML may bring anything."""
    if not isinstance(splits, Mapping) or not set(splits) <= set(SPLITS):
        got = sorted(map(str, splits)) if isinstance(splits, Mapping) else splits
        raise ValueError(f"expected splits of lists train, val and test, got {got}")
    for split, entries in splits.items():
        are_names = isinstance(entries, Sequence) and not isinstance(entries, str)
        if not (are_names and all(isinstance(entry, str | int) for entry in entries)):
            raise ValueError(
                f"expected splits.{split} to be a list of names or patients, got {entries!r}"
            )
    return {split: [str(entry) for entry in entries] for split, entries in splits.items()}


def _kept(path: Path) -> Float[Tensor, "1 h w"]:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:  # a damaged header may fail in any way
        raise ValueError(
            f"expected a reference as it was kept here, got {type(error).__name__}: {path} "
            "(delete it, and it is made anew)"
        ) from error


def _in_plane(shift_mm: Float[Tensor, " 2"], degrees: float) -> Float[Tensor, "3 3"]:
    turn = torch.tensor([[math.radians(degrees)]], dtype=torch.float64)
    return rigid_matrix(turn, shift_mm[None].double())[0]
