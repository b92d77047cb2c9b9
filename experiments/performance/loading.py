"""What training items cost to load, and what is left of it in a training step.

python experiments/performance/loading.py [--out FOLDER] [--shapes 32x96x96 26x256x256]
    [--patch 16x64x64] [--items 4] [--steps 8] [--turns 2] [--phantoms FOLDER]

Four studies of a size are written as NIfTI files. Loaders of one process and one thread take turns
at them: ours with TorchIO's resampling and with splines, whole studies and windows, and TorchIO's
own ``SubjectsDataset`` with ``RandomAffine`` and a ``Queue`` of ``UniformSampler``, which reads the
files for every item, or holds all subjects in memory. All make an item of the same seven volumes,
moved as often and as far, by cubic splines (masks: linear in ours, nearest in TorchIO's); ours adds
gamma, noise, the pseudo-reference and the lesion's distance. Then the small network is trained on
phantoms with its loader and with one batch held. With ``--out`` it writes ``loading.json``.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
import torchio as tio
from lightning.pytorch.callbacks import Callback
from machine import machine
from measure import in_turns, peak_memory, shape_of
from ours import configuration
from torch.utils.data import DataLoader

from clinfuse.configuration import build_method
from clinfuse.data.augmentation import Augmentation
from clinfuse.data.jitter import RegistrationJitter
from clinfuse.data.paired_volumes import PairedVolumes
from clinfuse.data.phantoms import write_cohort
from clinfuse.data.preprocessed import preprocessed_study
from clinfuse.data.studies import load_study
from clinfuse.data.volumes import resize

IMAGES = ("mri", "ct", "clean_mri", "clean_ct")
MASKS = ("brain_mask", "bone_mask", "lesion_mask")
JITTER = RegistrationJitter(max_mm=4.0, max_deg=4.0, probability=0.9)
AUGMENTATION = Augmentation(affine=0.3)
CASES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--shapes", nargs="*", type=shape_of, default=[(32, 96, 96), (26, 256, 256)]
    )
    parser.add_argument("--patch", type=shape_of, default=(16, 64, 64))
    parser.add_argument("--items", type=int, default=4, help="of a turn; of four")
    parser.add_argument(
        "--steps", type=int, default=8, help="of a training's turn; 0 trains nothing"
    )
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--phantoms", type=Path, help="where they are kept for another run")
    asked = parser.parse_args()
    if asked.items < 1 or asked.items % CASES:
        raise SystemExit(
            f"expected items in fours, as TorchIO's queue is filled, got {asked.items}"
        )
    record: dict[str, Any] = {"machine": machine(), "loading": [], "training": []}
    with tempfile.TemporaryDirectory() as folder:
        base = write_cohort(asked.phantoms or Path(folder) / "phantoms", CASES, seed=1)
        for shape in asked.shapes:
            root = enlarged(base, Path(folder) / "x".join(map(str, shape)), shape)
            found = measured(root, shape, asked.patch, asked.items, asked.turns)
            record["loading"].append(found)
            show_loading(found)
        if asked.steps:
            record["training"] = trained(base, Path(folder) / "cache", asked.steps, asked.turns)
            show_training(record["training"])
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / "loading.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {path}")


def enlarged(base: Path, root: Path, shape: Sequence[int]) -> Path:
    """The cohort at another number of voxels over the same field of view, with fresh noise.

    A phantom that is drawn at a scanner's size takes a minute; a loader sees no difference.
    """
    random = np.random.default_rng(0)
    for folder in sorted(path for path in base.iterdir() if path.is_dir()):
        (root / folder.name).mkdir(parents=True)
        for name in (*IMAGES, *MASKS):
            if not (folder / f"{name}.nii.gz").is_file():
                continue
            image = nib.load(folder / f"{name}.nii.gz")
            array = np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)
            coarser = [old / new for old, new in zip(array.shape, shape, strict=True)]
            affine = image.affine @ np.diag([*reversed(coarser), 1.0])
            array = resize(array, shape)
            if name in MASKS:
                stored = (array > 0.5).astype(np.uint8)
            else:
                stored = array + random.normal(0, 3, array.shape).astype(np.float32)
            file = root / folder.name / f"{name}.nii.gz"
            nib.save(nib.Nifti1Image(stored.transpose(2, 1, 0), affine), file)
    return root


def measured(
    root: Path, shape: Sequence[int], patch: Sequence[int], items: int, turns: int
) -> dict[str, Any]:
    """Seconds of a study and of an item, by who loads it and from where."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    cases = sorted(path.name for path in root.iterdir())
    cache = root.parent / f"{root.name}_cache"
    studies = of_studies(root, cases, cache, turns)
    subjects = [subject_of(root / case) for case in cases]
    held = [subject_of(root / case) for case in cases]
    for subject in held:
        subject.load()

    def ours(window: Sequence[int] | None, moved_by: str) -> Callable[[], object]:
        data = PairedVolumes(
            root,
            jitter=JITTER,
            augmentation=AUGMENTATION,
            patch_shape=window,
            splits={"train": cases},
            draws_per_epoch=10_000,
            cache_dir=cache,
            moved_by=moved_by,
        )
        batches = endless(data.train_dataloader())
        return lambda: [next(batches) for _ in range(items)]

    def torchios(window: Sequence[int] | None, of: list[tio.Subject], each: int = 1) -> Any:
        batches = torchio_loader(of, window, each, items)
        return lambda: [next(batches) for _ in range(items)]

    calls = {
        "whole: ours, spline": ours(None, "spline"),
        "whole: ours, torchio": ours(None, "torchio"),
        "whole: TorchIO, from files": torchios(None, subjects),
        "whole: TorchIO, in memory": torchios(None, held),
        "window: ours, spline": ours(patch, "spline"),
        "window: ours, torchio": ours(patch, "torchio"),
        "window: TorchIO, from files": torchios(patch, subjects),
        "window: TorchIO, in memory": torchios(patch, held),
        "window: TorchIO, 4 of a volume": torchios(patch, subjects, 4),
    }
    spent = in_turns(calls, turns)
    seconds = {name: [second / items for second in each] for name, each in spent.items()}
    cold = {
        "whole: ours, spline": cold_item(root, cache, lambda: ours(None, "spline")),
        "window: ours, spline": cold_item(root, cache, lambda: ours(patch, "spline")),
    }
    return {
        "shape": list(shape),
        "patch": list(patch),
        "study": studies,
        "seconds_an_item": seconds,
        "first_items_cold": {name: second / items for name, second in cold.items()},
        "memory": memory_of(root, cases, cache),
    }


def of_studies(root: Path, cases: Sequence[str], cache: Path, turns: int) -> dict[str, float]:
    """Seconds to have a study: read, made and kept, found, and found where it is on disk alone."""

    def each(load: Callable[[Path], object]) -> Callable[[], object]:
        return lambda: [load(root / case) for case in cases]

    def kept(folder: Path) -> object:
        return preprocessed_study(folder, cache_dir=cache)

    begun = time.perf_counter()
    each(kept)()
    made = time.perf_counter() - begun
    spent = in_turns({"read": each(load_study), "found": each(kept)}, turns)
    forget(root, cache)
    begun = time.perf_counter()
    studies = [preprocessed_study(root / case, cache_dir=cache) for case in cases]
    found_cold = time.perf_counter() - begun
    looked_at = sum(float(study.mri.sum()) for study in studies)
    assert np.isfinite(looked_at)
    parts = {"made and kept": made, "found, cold": found_cold}
    parts |= {name: median(taken) for name, taken in spent.items()}
    return {name: second / len(cases) for name, second in parts.items()}


def memory_of(root: Path, cases: Sequence[str], cache: Path) -> dict[str, float]:
    """MiB that this process holds for the studies of the cohort, read and mapped."""
    found = {}
    for name, where in (("read", None), ("mapped", cache)):
        gc.collect()
        with peak_memory() as memory:
            studies = [preprocessed_study(root / case, cache_dir=where) for case in cases]
        found[name] = memory.mib
        del studies
    return found


def forget(*folders: Path) -> None:
    """Have the system drop what it keeps of the files in memory, where it can be asked."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_item(root: Path, cache: Path, make: Callable[[], Callable[[], object]]) -> float:
    """Seconds of a turn whose files the system has to read from disk."""
    gc.collect()  # no mapping keeps them
    forget(root, cache)
    call = make()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def subject_of(folder: Path) -> tio.Subject:
    images = {name: tio.ScalarImage(folder / f"{name}.nii.gz") for name in IMAGES}
    return tio.Subject(**images, **{n: tio.LabelMap(folder / f"{n}.nii.gz") for n in MASKS})


def torchio_loader(
    subjects: list[tio.Subject], patch: Sequence[int] | None, samples_per_volume: int, items: int
) -> Iterator[Any]:
    """What TorchIO's documentation would have one write for our draws.

    The queue is as long as a turn, so that every turn has to fill it.
    """
    similarity = tio.RandomAffine(
        scales=0.05, degrees=5, translation=4, isotropic=True, image_interpolation="bspline", p=0.3
    )
    jitter = tio.RandomAffine(
        scales=0, degrees=4, translation=4, image_interpolation="bspline", p=0.9,
        include=["ct", "bone_mask"],
    )  # fmt: skip
    transform = tio.Compose([tio.RandomFlip(axes=0), similarity, jitter])
    dataset = tio.SubjectsDataset(subjects, transform=transform)
    if patch is None:
        return endless(tio.SubjectsLoader(dataset, batch_size=1, shuffle=True))
    sampler = tio.data.UniformSampler(tuple(reversed(patch)))  # stored as (w, h, d)
    queue = tio.Queue(dataset, items, samples_per_volume, sampler)
    return endless(tio.SubjectsLoader(queue, batch_size=1))


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class Paced(Callback):
    """When each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def trained(root: Path, cache: Path, steps: int, turns: int) -> list[dict[str, Any]]:
    """Seconds of a training step of the small network, with its loader and with one batch held."""
    torch.set_num_threads(os.cpu_count() or 1)
    cfg = configuration()
    found = []
    cases = sorted(path.name for path in root.iterdir() if path.is_dir())

    def data_of(moved_by: str, workers: int) -> PairedVolumes:
        return PairedVolumes(
            root,
            jitter=JITTER,
            augmentation=AUGMENTATION,
            splits={"train": cases},
            draws_per_epoch=steps + 2,
            cache_dir=cache,
            num_workers=workers,
            moved_by=moved_by,
        )

    batch = next(iter(data_of("torchio", 0).train_dataloader()))
    held = DataLoader([batch] * (steps + 2), batch_size=None)
    kinds: dict[str, Any] = {"one batch held": held}
    for moved_by, workers in (("torchio", 1), ("spline", 1), ("torchio", 0), ("spline", 0)):
        kinds[f"{moved_by}, workers: {workers}"] = data_of(moved_by, workers)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(turns):
        for name, source in kinds.items():
            seconds[name] += step_seconds(cfg, source)
    for name, taken in seconds.items():
        ratio = median(taken) / median(seconds["one batch held"])
        found.append({"loader": name, "seconds_a_step": taken, "of one batch held": ratio})
    return found


def step_seconds(cfg: Any, source: Any) -> list[float]:
    """Of all steps of a short training but the first two."""
    torch.manual_seed(0)
    pace = Paced()
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[pace],
        logger=False,
        precision=cfg.trainer.precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    kind = "datamodule" if isinstance(source, PairedVolumes) else "train_dataloaders"
    trainer.fit(build_method(cfg), **{kind: source})
    return [after - before for before, after in zip(pace.ends[1:], pace.ends[2:], strict=False)]


def show_loading(found: dict[str, Any]) -> None:
    shape, patch = (" x ".join(map(str, found[name])) for name in ("shape", "patch"))
    study = found["study"]
    print(
        f"\n{shape}, windows of {patch}\n\n| a study | s | of reading it |\n| --- | ---: | ---: |"
    )
    for name, seconds in study.items():
        print(f"| {name} | {seconds:.4f} | {seconds / study['read']:.3f} |")
    held = found["memory"]
    print(
        f"\nmemory of {CASES} studies: {held['read']:.0f} MiB read, {held['mapped']:.1f} MiB mapped"
    )
    print("\n| an item | s | items/s | times ours |\n| --- | ---: | ---: | ---: |")
    middle = {name: median(taken) for name, taken in found["seconds_an_item"].items()}
    for name, seconds in middle.items():
        ours = middle[f"{name.split(':')[0]}: ours, spline"]
        print(f"| {name} | {seconds:.4f} | {1 / seconds:.2f} | {seconds / ours:.2f} |")
    for name, seconds in found["first_items_cold"].items():
        print(
            f"| {name}, cold | {seconds:.4f} | {1 / seconds:.2f} | {seconds / middle[name]:.2f} |"
        )


def show_training(found: list[dict[str, Any]]) -> None:
    print("\n| a training step | s | of one batch held |\n| --- | ---: | ---: |")
    for each in found:
        seconds = median(each["seconds_a_step"])
        print(f"| {each['loader']} | {seconds:.3f} | {each['of one batch held']:.3f} |")


if __name__ == "__main__":
    main()
