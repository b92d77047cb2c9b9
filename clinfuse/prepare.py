"""Raw scans to study folders: ``python -m clinfuse.prepare dataset=template input=A output=B``."""

import errno
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from clinfuse.configuration import (
    CONFIG_PATH,
    in_one_sentence,
    quiet_libraries,
    register_resolvers,
    run_facts,
)
from clinfuse.data.splits import SPLITS, make_splits, read_splits, write_splits
from clinfuse.data.volumes import read_volume
from clinfuse.preparation.download import fetch_all
from clinfuse.preparation.pipeline import Preparation, Prepared
from clinfuse.preparation.scan import CaseFiles
from clinfuse.reporting.cohort import PreparedCase, panels_of, write_cohort_report

log = logging.getLogger(__name__)
register_resolvers()

REPORT = "quality.html"


@dataclass(frozen=True)
class Unusable:
    """A case that became no study, and why."""

    case_id: str
    reason: str


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="prepare")
@in_one_sentence
def main(cfg: DictConfig) -> None:
    """Write a study folder for each case, splits.json by patient, and quality.html.

    With ``download=true`` an input that is not there is fetched, if the cohort's licence and
    ``conf/dataset`` allow it.
    A case that cannot be used leaves nothing behind but a row of the report; the others go on, and
    in the end the exit status says that some are missing. A second run makes what is missing.
    """
    quiet_libraries()
    missing = [name for name in ("input", "output") if OmegaConf.is_missing(cfg, name)]
    if missing:
        asked = " ".join(f"{name}=..." for name in missing)
        raise ValueError(f"expected input and output on the command line, missing {asked}")
    source, output = Path(cfg.input), Path(cfg.output)
    if not source.exists():
        if cfg.dataset.source.files and not cfg.download:
            raise FileNotFoundError(
                f"expected {cfg.dataset.name} at input, found nothing at {source}; download=true "
                f"fetches it there, under its licence, {cfg.dataset.source.licence}"
            )
        download(cfg.dataset.source, source, Path(cfg.cache_dir))
    cases = instantiate(cfg.dataset.cases, _convert_="all")(source, output / ".converted")
    preparation = instantiate(cfg.preparation, _convert_="all")
    output.mkdir(parents=True, exist_ok=True)
    studies, unusable = prepare(cases, output, preparation)
    usable = [study for study in studies if not study.is_refused]
    if usable:
        splits_of(usable, output, cfg.split_seed)
    alone = sum(not study.has_ct for study in usable)
    facts = {
        "data set": cfg.dataset.name,
        "cases": f"{len(usable)} of {len(cases)} can be used",
        "without CT": f"{alone}, which fusion cannot train on" if alone else "none",
        "registration": str(cfg.registration.kind),
        "identifiers": "kept" if preparation.keep_ids else "hashed",
        **run_facts(),
    }
    rows = [prepared_row(study) for study in studies]
    rows += [PreparedCase(case.case_id, "fail", (case.reason,), {}, None) for case in unusable]
    path = write_cohort_report(output / REPORT, f"Quality of {cfg.dataset.name}", rows, facts)
    print(f"studies: {output} ({len(usable)} of {len(cases)} cases)")
    print(f"report: {path}")
    if alone:
        print(
            f"studies without CT: {alone} of {len(usable)}; fusion trains on pairs of MRI and CT, "
            "so data=studies refuses them"
        )
    if len(usable) < len(cases):
        raise ValueError(
            f"expected {len(cases)} cases that can be used, got {len(usable)}: the log above names "
            f"the others, and {path} shows them"
        )


def download(given: DictConfig, to: Path, cache: Path) -> None:
    """The files that ``conf/dataset`` lists for a cohort, into its folder.

    Raises:
        ValueError: there are none, or they cannot be fetched or written; what came is kept.
    """
    if given.files:
        log.info("%s is not there: it is fetched, under its licence, %s", to, given.licence)
    try:
        fetch_all(given.files, given.by_hand, to, cache)
    except OSError as error:
        raise ValueError(f"{error}; by hand: {given.by_hand}") from error


def prepare(
    cases: Sequence[CaseFiles], output: Path, preparation: Preparation
) -> tuple[list[Prepared], list[Unusable]]:
    """The cases one by one; what is wrong with one of them does not stop the others.

    Cases are called by their numbers and, like everything that is written, by their hashes unless
    names are kept.

    Raises:
        ValueError: the disk is full, which would stop them all.
    """
    studies: list[Prepared] = []
    unusable: list[Unusable] = []
    for number, case in enumerate(cases, 1):
        name = preparation.names(case)[0]
        known_as = f"{number} of {len(cases)}: {name}"
        try:
            study = preparation(case, output)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise ValueError(
                    f"expected room for the studies, the disk is full after {len(studies)} of "
                    f"{len(cases)}: {output}; make room and run the same command again"
                ) from error
            unusable.append(Unusable(name, preparation.said_of(case, error)))
            log.warning("%s cannot be used: %s", known_as, preparation.said_of(case, error))
            continue
        studies.append(study)
        state = study.quality.verdict + (", there already" if study.was_there else "")
        log.info("%s is %s: %s", known_as, study.folder, state)
    return studies, unusable


def splits_of(prepared: Sequence[Prepared], output: Path, seed: int) -> None:
    """splits.json by patient; one that is there already is kept, if it has the same cases."""
    there = read_splits(output)
    case_ids = [study.case_id for study in prepared]
    if there is not None and sorted(c for s in SPLITS for c in there[s]) == sorted(case_ids):
        return
    patients = {study.case_id: study.patient for study in prepared}
    splits = make_splits(case_ids, patients, seed)
    write_splits(output / "splits.json", splits, f"drawn by patient with seed {seed}")


def prepared_row(study: Prepared) -> PreparedCase:
    """A study for the report, its pictures made from its files."""
    names = ("mri", "ct", "brain_mask", "bone_mask", "lesion_mask")
    files = {name: study.folder / f"{name}.nii.gz" for name in names}
    volumes = {name: read_volume(path) for name, path in files.items() if path.is_file()}
    arrays = {n: v.array > 0.5 if n.endswith("mask") else v.array for n, v in volumes.items()}
    quality = study.quality
    return PreparedCase(
        case_id=study.case_id,
        verdict=quality.verdict,
        reasons=quality.reasons,
        facts=quality.facts,
        panels=panels_of(arrays, volumes["mri"].spacing_mm),
        histograms=quality.histograms,
        notes=quality.notes,
    )


if __name__ == "__main__":
    main()
