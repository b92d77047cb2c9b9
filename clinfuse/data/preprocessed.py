"""Studies in model space kept on disk, and mapped into memory: ``load_study`` is for once.

A kept study is a folder: ``images.npy`` and ``masks.npy``, uncompressed, and ``facts.json``. Its
name is a hash of everything that could make it another study: where the files are, their sizes and
times, how they are read, and the code that reads them. What is not whole is made anew.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from clinfuse import functional, roi
from clinfuse.data import studies, volumes
from clinfuse.data.made_once import one_at_a_time
from clinfuse.data.studies import STUDY_FILES, Study, load_study
from clinfuse.data.volumes import Box, read_grid
from clinfuse.functional.intensity import CtMap

log = logging.getLogger(__name__)

KINDS = {"images": np.dtype(np.float32), "masks": np.dtype(np.bool_)}
"""Files of volumes stacked one upon the other, and what is in them."""


def preprocessed_study(
    folder: Path | str,
    ct_map: CtMap = "piecewise",
    cache_dir: Path | str | None = None,
    resample_mm: Sequence[float | int] | None = None,
) -> Study:
    """``load_study``, whose volumes are mapped from ``cache_dir`` and take no memory of their own.

    A voxel is read from disk when it is looked at, and shared by all processes that do.

    Args:
        folder: as of ``load_study``, like what follows.
        ct_map: for CT in HU.
        cache_dir: keeps studies under ``preprocessed``, and segmented masks; None keeps nothing and
            holds the study in memory.
        resample_mm: voxel size (d, h, w) to resample to.

    Raises:
        FileNotFoundError, ValueError: as ``load_study``.
    """
    folder = Path(folder)
    if cache_dir is None:
        return load_study(folder, ct_map, None, resample_mm)
    how = (str(folder.resolve()), ct_map, resample_mm and [float(size) for size in resample_mm])
    place = Path(cache_dir) / "preprocessed" / f"{folder.name}-{_digest(how)}"
    if (study := _kept_at(place / _made_of(folder), folder)) is not None:
        return study
    with one_at_a_time(place.with_name(f".{place.name}.lock")):
        made_of = _made_of(folder)
        kept = place / made_of
        if (study := _kept_at(kept, folder)) is not None:  # made by another process meanwhile
            return study
        begun = time.monotonic()
        study = load_study(folder, ct_map, cache_dir, resample_mm)
        if _made_of(folder) != made_of:
            log.warning("%s changes while it is read: not kept", folder)
            return study
        _write(kept, study)
        log.debug("%s: preprocessed in %.1f s", folder.name, time.monotonic() - begun)
        for other in place.iterdir():
            if other != kept:  # of files or of code that there is no more
                shutil.rmtree(other, ignore_errors=True)
        return _mapped(kept, folder)


def _kept_at(kept: Path, folder: Path) -> Study | None:
    """The kept study; None where there is none, or none that is whole."""
    try:
        return _mapped(kept, folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s is made anew: %s: %s", folder.name, error, kept)
        return None


def _made_of(folder: Path) -> str:
    """Differs where a file of the study, or the code that reads it, does."""
    names = [f"{name}{end}" for name in STUDY_FILES for end in (".nii.gz", ".nii")]
    facts = []
    for name in [*names, "study.json"]:
        try:
            found = (folder / name).stat()
        except OSError:
            continue
        facts.append((name, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return _digest((facts, _code()))


@lru_cache(maxsize=1)
def _code() -> str:
    """Of everything that a study's voxels may depend on."""
    packages = [Path(module.__path__[0]) for module in (functional, roi)]
    files = [path for package in packages for path in sorted(package.rglob("*.py"))]
    files += [Path(__file__), Path(studies.__file__), Path(volumes.__file__)]
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return _digest((sources, torch.__version__, np.__version__, scipy.__version__))


def _digest(of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]


def _write(kept: Path, study: Study) -> None:
    """The folder appears whole or not at all."""
    named = {f.name: v for f in fields(study) if isinstance(v := getattr(study, f.name), Tensor)}
    facts: dict[str, Any] = {
        f.name: getattr(study, f.name)
        for f in fields(study)
        if f.name not in {*named, "grid", "finding_boxes", "mask_source"}
    }
    facts["mask_source"] = dict(study.mask_source)
    facts["finding_boxes"] = [[(s.start, s.stop) for s in box] for box in study.finding_boxes]
    facts["made_of"] = kept.name
    stacks: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    facts["volumes"] = {}
    for name, volume in named.items():
        kind = "masks" if volume.dtype == torch.bool else "images"
        twin = next((other for other in facts["volumes"] if named[other] is volume), None)
        if twin is None:
            start = sum(len(v) for v in stacks[kind])
            facts["volumes"][name] = [kind, start, start + len(volume)]
            stacks[kind].append(volume)
        else:
            facts["volumes"][name] = facts["volumes"][twin]
    kept.parent.mkdir(parents=True, exist_ok=True)
    scratch = kept.with_name(f".{kept.name}.{os.getpid()}")
    try:
        scratch.mkdir()
        for kind, stack in stacks.items():
            with (scratch / f"{kind}.npy").open("wb") as file:
                np.save(file, torch.cat(stack).numpy())
                file.flush()
                os.fsync(file.fileno())  # before the rename is: a crash leaves no hollow file
        (scratch / "facts.json").write_text(json.dumps(facts))
        shutil.rmtree(kept, ignore_errors=True)  # what could not be read
        scratch.replace(kept)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _mapped(kept: Path, folder: Path) -> Study:
    facts: dict[str, Any] = json.loads((kept / "facts.json").read_text())
    if facts.pop("made_of") != kept.name:
        raise ValueError(f"expected a study made of {kept.name}: {kept}")
    stacks = {kind: _stack(kept / f"{kind}.npy", kind) for kind in KINDS}
    if len({stack.shape[1:] for stack in stacks.values()}) != 1:
        raise ValueError(f"expected volumes on one grid: {kept}")
    where: Mapping[str, list[Any]] = facts.pop("volumes")
    parts: dict[tuple[Any, ...], Tensor] = {}
    for kind, start, stop in where.values():
        if not start < stop <= len(stacks[kind]):
            raise ValueError(f"expected {stop} {kind}, got {len(stacks[kind])}: {kept}")
        parts.setdefault((kind, start, stop), stacks[kind][start:stop])
    boxes: list[Box] = [(slice(*d), slice(*h), slice(*w)) for d, h, w in facts.pop("finding_boxes")]
    for name in ("spacing_mm", "mri_limits"):
        facts[name] = tuple(facts[name])
    mri = next(path for end in (".nii.gz", ".nii") if (path := folder / f"mri{end}").is_file())
    facts.update({name: parts[tuple(place)] for name, place in where.items()})
    return Study(**facts, finding_boxes=boxes, grid=read_grid(mri))


def _stack(path: Path, kind: str) -> Tensor:
    """Volumes mapped from a file, privately: what is written to them stays in this process."""
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != KINDS[kind] or array.ndim != 4:
        raise ValueError(f"expected 4 axes of {KINDS[kind]}, got {array.ndim} of {array.dtype}")
    return torch.from_numpy(array)
