"""From the files of a case to a study folder: read, checked, registered, resampled once, masked."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from clinfuse import __version__
from clinfuse.preparation.cohorts.inventory import write_image
from clinfuse.preparation.grids import is_on, on_grid
from clinfuse.preparation.identifiers import hashed, without_identity
from clinfuse.preparation.masks import Files, MaskProvider, Masks, plausibility
from clinfuse.preparation.quality import Quality, quality
from clinfuse.preparation.reading import (
    check_not_swapped,
    check_not_uniform,
    looks_like_ct,
    mixed_up,
    read_scan,
)
from clinfuse.preparation.registration import Registration, write_transform
from clinfuse.preparation.scan import CaseFiles, Scan

MASKS = ("brain_mask", "bone_mask", "lesion_mask")

FACTS = "study.json"
"""What a study folder says of itself."""

REFUSED = "refused"
"""Where, under the output, studies go that should not be used: to be looked at."""

AIR_HU = -1000.0
"""What a CT in HU shows where it has no view."""


@dataclass(frozen=True)
class Prepared:
    """A study folder and what is to be thought of it.

    Attributes:
        case_id: name of the folder.
        patient: as ``study.json`` has it.
        folder: of the study.
        quality: verdict, reasons and facts.
        was_there: whether an earlier run had made it.
    """

    case_id: str
    patient: str
    folder: Path
    quality: Quality
    was_there: bool

    @property
    def is_refused(self) -> bool:
        """Whether it was put aside, not to be used."""
        return self.folder.parent.name == REFUSED

    @property
    def has_ct(self) -> bool:
        """Whether it is a pair: some cohorts hand out MRI alone."""
        return (self.folder / "ct.nii.gz").is_file()


@dataclass(frozen=True)
class Preparation:
    """How scans become studies.

    Attributes:
        register: maps (MRI, CT) to a ``Registration``; ``kind`` can be asked of it.
        masks: makes brain and bone where the case does not bring them.
        spacing_mm: voxel size (d, h, w) of the study, over the MRI's field of view; None for the
            MRI's own grid, on which it is not interpolated at all.
        keep_ids: whether patients and cases keep their names; else they are hashed.
        salt: of the hashes.
        series: for ``mri`` and ``ct``, which DICOM series of a folder with several.
        accept: studies, by what their folders are called, to use though their verdict is a fail.
    """

    register: Callable[..., Registration]
    masks: MaskProvider
    spacing_mm: Sequence[float | int] | None = None
    keep_ids: bool = False
    salt: str = ""
    series: Mapping[str, str | int] = field(default_factory=dict)
    accept: Sequence[str] = ()

    def names(self, case: CaseFiles) -> tuple[str, str]:
        """What case and patient are called in what is written."""
        if self.keep_ids:
            return case.case_id, case.patient
        return hashed(case.case_id, self.salt), hashed(case.patient, self.salt)

    def said_of(self, case: CaseFiles, text: object) -> str:
        """A sentence that may be shown: without the patient's name, unless names are kept."""
        if self.keep_ids:
            return str(text)
        return without_identity(str(text), (case.case_id, case.patient), self.salt)

    def __call__(self, case: CaseFiles, output: Path) -> Prepared:
        """The case's study folder under ``output``, made unless it is there already.

        It appears whole or not at all: it is written beside its place and then renamed. One made
        from the same files with the same settings is left as it is. One whose verdict is a fail
        goes into ``REFUSED``, unless it is accepted.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: scans that cannot be used, or a study made from others or otherwise.
            OSError: it cannot be written, as on a full disk.
        """
        name, patient = self.names(case)
        is_accepted, fingerprint = name in self.accept, self._fingerprint(case)
        places = [output / name] + ([] if is_accepted else [output / REFUSED / name])
        for folder in places:
            if (known := read_facts(folder)) is None:
                continue
            if known["fingerprint"] != fingerprint:
                raise ValueError(
                    "expected a study made from these files with these settings, got one made "
                    f"from others: remove it to have it made anew: {folder}"
                )
            return Prepared(name, patient, folder, quality_in(known, folder), True)
        with whole_folder(output / f".{name}.partial") as partial:
            facts = {"patient": patient, **self._fill(partial, case), "fingerprint": fingerprint}
            (partial / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
            judged = quality_in(facts, partial)
            folder = places[-1] if judged.verdict == "fail" else places[0]
            folder.parent.mkdir(exist_ok=True)
            partial.replace(folder)
        return Prepared(name, patient, folder, judged, False)

    def _fill(self, folder: Path, case: CaseFiles) -> dict[str, Any]:
        """Volumes and the CT's transform into the folder of the study; its facts."""
        scans = {
            name: read_scan(path, self.series.get(name))
            for name, path in case.files.items()
            if name not in MASKS
        }
        for scan in scans.values():
            check_not_uniform(scan)
        grid, has_ct = grid_of(scans["mri"].image, self.spacing_mm), "ct" in scans
        ways = dict.fromkeys(scans, sitk.Transform(3, sitk.sitkIdentity))
        found = self._registered(case, scans) if has_ct else None
        if found is not None:
            ways["ct"] = found.transform
            write_transform(found.transform, folder / "ct_to_mri.tfm")
        images = {name: on_study(scan.image, grid, ways[name]) for name, scan in scans.items()}
        for name, image in images.items():
            write_image(image, folder / f"{name}.nii.gz")
        own = {}
        for name in (name for name in MASKS if name in case.files):
            drawn_on = case.drawn_on.get(name, "mri")
            mask = read_mask(case.files[name], scans[drawn_on])
            own[name] = write_image(
                on_grid(mask, grid, ways[drawn_on], is_label=True), folder / f"{name}.nii.gz"
            )
        masks, provenance, doubts = {n: sitk.ReadImage(p) for n, p in own.items()}, {}, []
        if has_ct:
            is_complete = {"brain_mask", "bone_mask"} <= set(own)
            made = (Files() if is_complete else self.masks)(images["mri"], images["ct"], own)
            of_tool = {"brain_mask": made.brain, "bone_mask": made.bone}
            masks = {**of_tool, **masks}
            provenance = {n: dict(made.provenance[n.removesuffix("_mask")]) for n in masks}
            for name in set(of_tool) - set(own):
                write_image(masks[name], folder / f"{name}.nii.gz")
            doubts = plausibility(
                Masks(masks["brain_mask"], masks["bone_mask"], masks.get("lesion_mask"), provenance)
            )
            doubts += mixed_up(scans["mri"], scans["ct"])
        for name in own:  # of the file as it was brought, not as it lies on this grid
            provenance[name] = {"tool": "file", "sha256": sha256(case.files[name])}
        notes = [f"{name}: {note}" for name, scan in scans.items() for note in scan.notes]
        judged = quality(
            mri=images["mri"],
            ct=images.get("ct"),
            masks=masks,
            scans=scans,
            notes=[self.said_of(case, note) for note in (*case.notes, *notes)],
            registration=found,
            plausibility=doubts,
            sources={name: str(made["tool"]) for name, made in provenance.items()},
        )
        return {
            "made_by": f"clinfuse {__version__}",
            "images": sorted(scans),
            "registration": None if found is None else found.facts(),
            "masks": provenance,
            "quality": judged.as_json(),
        }

    def _registered(self, case: CaseFiles, scans: Mapping[str, Scan]) -> Registration:
        """Where the CT lies, judged, even if the cohort says that it lies where it should."""
        check_not_swapped(scans["mri"], scans["ct"])
        given = {"kind": "none", "engine": "simpleitk"} if case.is_registered else {}
        return self.register(scans["mri"].image, scans["ct"].image, **given)

    def _fingerprint(self, case: CaseFiles) -> str:
        """Of what the study is made from and how: files by size and time, settings by value."""
        files = {
            name: [
                (str(p.relative_to(path.parent)), p.stat().st_size, p.stat().st_mtime_ns)
                for p in ([path] if path.is_file() else sorted(path.rglob("*")))
                if p.is_file()
            ]
            for name, path in case.files.items()
        }
        how = [
            sorted(getattr(self.register, "keywords", {}).items()),
            repr(self.masks),
            list(self.spacing_mm or ()),
            sorted(self.series.items()),
            sorted(case.drawn_on.items()),
            case.is_registered,
            self.names(case),
        ]
        return hashlib.sha256(json.dumps([files, how]).encode()).hexdigest()[:16]


def read_facts(folder: Path) -> dict[str, Any] | None:
    """What a study folder says of itself; None where it does not exist.

    Raises:
        ValueError: a folder that no preparation has made.
    """
    if not folder.exists():
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        facts = json.loads((folder / FACTS).read_text())
        if "fingerprint" in facts and "quality" in facts:
            return dict(facts)
    raise ValueError(f"expected a place for a study, got something else of that name: {folder}")


def quality_in(facts: Mapping[str, Any], folder: Path) -> Quality:
    """What a study folder says of its quality.

    Raises:
        ValueError: something else.
    """
    try:
        return Quality.from_json(facts["quality"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"expected a study's quality as prepare writes it, got something else "
            f"({type(error).__name__}; remove the study to have it made anew): {folder}"
        ) from error


def grid_of(mri: sitk.Image, spacing_mm: Sequence[float | int] | None) -> sitk.Image:
    """The grid of a study: the MRI's, or voxels of ``spacing_mm`` over the MRI's field of view.

    Args:
        mri: on its own grid, which need not be upright.
        spacing_mm: (d, h, w), d being the stored axis nearest to head-foot; met as nearly as
            whole voxels allow.

    Raises:
        ValueError: for what are no three positive sizes.
    """
    if spacing_mm is None:
        return mri
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"expected three positive voxel sizes (d, h, w), got {list(spacing_mm)}")
    canonical = sitk.DICOMOrient(mri, "RAS")
    old, n = np.array(canonical.GetSpacing()), np.array(canonical.GetSize())
    size = np.maximum(np.round(n * old / np.array(spacing_mm[::-1])), 1).astype(int)
    new = n * old / size
    grid = sitk.Image(size.tolist(), sitk.sitkUInt8)
    grid.SetDirection(canonical.GetDirection())
    grid.SetSpacing(new.tolist())
    first = (new / old - 1) / 2  # the fields of view coincide, not the first voxels' centres
    grid.SetOrigin(canonical.TransformContinuousIndexToPhysicalPoint(first.tolist()))
    return grid


def on_study(image: sitk.Image, grid: sitk.Image, way: sitk.Transform) -> sitk.Image:
    """A scan on the study's grid; the very same values if it lies there already."""
    if is_on(image, grid, way):
        return image
    nothing = AIR_HU if looks_like_ct(image) else sitk.GetArrayViewFromImage(image).min()
    return on_grid(image, grid, way, fill=float(nothing))


def read_mask(path: Path, drawn_on: Scan) -> sitk.Image:
    """A mask as uint8, on the image that it was drawn on.

    Raises:
        ValueError: it has another grid than that image.
    """
    mask = read_scan(path).image > 0.5
    if not is_on(mask, drawn_on.image):
        raise ValueError(
            f"expected a mask on the grid of {drawn_on.source}, of {drawn_on.image.GetSize()} "
            f"voxels, got one of {mask.GetSize()}, or elsewhere: {path}"
        )
    return sitk.Cast(mask, sitk.sitkUInt8)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill and to rename when it is full; if that fails nothing is left of it."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of a file's content; of all files in a folder."""
    parts = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()
