"""``clinfuse.prepare`` from the command line: cohorts of one's own, good and bad."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import SimpleITK as sitk
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from clinfuse.configuration import CONFIG_PATH
from clinfuse.data.paired_volumes import PairedVolumes
from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.identifiers import hashed
from clinfuse.prepare import download, main

SPACING_MM, SHAPE = (6.0, 4.0, 4.0), (24, 52, 52)


def write(path, array):
    image = sitk.GetImageFromArray(array.astype(np.float32))
    image.SetSpacing(SPACING_MM[::-1])
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, path)


def write_patient(folder, number, ct=True):
    phantom = make_phantom(number, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    write(folder / "mri.nii.gz", phantom.mri)
    write(folder / "lesion_mask.nii.gz", phantom.lesion)
    if ct:
        write(folder / "ct.nii.gz", phantom.ct_hu)


def prepared(entry_point, folder):
    """The command, run in a cohort's folder: its scans lie on each other as they are."""
    asked = (
        "masks=classical",
        "registration=none",
        f"input={folder / 'in'}",
        f"output={folder / 'out'}",
        f"hydra.run.dir={folder / 'log'}",
    )
    return entry_point("clinfuse.prepare", *asked, cwd=folder)


def configured(*overrides):
    """The configuration of a command."""
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("prepare", ["masks=classical", *overrides])


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, entry_point):
    """Three patients, one of them scanned twice, and one whose CT is no scan."""
    folder = tmp_path_factory.mktemp("cohort")
    write_patient(folder / "in" / "Ann", 0)
    write_patient(folder / "in" / "Bob", 1)
    write_patient(folder / "in" / "Cy" / "first", 2)
    write_patient(folder / "in" / "Cy" / "later", 3)
    write_patient(folder / "in" / "Dot", 4)
    (folder / "in" / "Dot" / "ct.nii.gz").write_bytes(b"not a scan")
    return folder, prepared(entry_point, folder)


def test_usable_cases_become_studies_and_the_exit_status_tells_of_the_other(cohort):
    folder, run = cohort
    studies = {path.name for path in (folder / "out").iterdir() if path.name.startswith("P-")}
    assert studies == {hashed(name) for name in ("Ann", "Bob", "Cy_first", "Cy_later")}
    assert run.returncode == 1 and "4 of 5 cases" in run.stdout
    said = [line for line in run.stderr.splitlines() if line.startswith("clinfuse: ")]
    assert len(said) == 1 and "expected 5 cases that can be used, got 4" in said[0]
    assert "Traceback" not in run.stderr
    log, dot = run.stdout + run.stderr, hashed("Dot")
    assert f"5 of 5: {dot} cannot be used" in log and f"<input>/{dot}/ct.nii.gz" in log
    assert not [name for name in ("Ann", "Bob", "Cy_", "Dot") if name in log]


def test_the_report_has_every_case_and_names_none(cohort):
    folder, _ = cohort
    report = (folder / "out" / "quality.html").read_text()
    for name in ("Ann", "Bob", "Cy_first", "Cy_later", "Dot"):
        assert hashed(name) in report
    for name in ("Ann", "Bob", "Cy", "Dot"):
        assert f"/{name}/" not in report and f">{name}<" not in report
    assert report.index(hashed("Dot")) < report.index(hashed("Ann"))  # the doubtful first


def test_the_sessions_of_a_patient_are_in_one_split(cohort):
    folder, _ = cohort
    splits = json.loads((folder / "out" / "splits.json").read_text())
    of_case = {case: split for split in ("train", "val", "test") for case in splits[split]}
    assert len(of_case) == 4
    assert of_case[hashed("Cy_first")] == of_case[hashed("Cy_later")]


def test_a_second_run_makes_what_was_missing_and_leaves_the_rest(cohort, entry_point):
    folder, _ = cohort
    out = folder / "out"
    before = {path: path.stat().st_mtime_ns for path in out.glob("P-*/*")}
    write_patient(folder / "in" / "Dot", 4)
    run = prepared(entry_point, folder)
    assert run.returncode == 0, run.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "5 of 5 cases" in run.stdout and (out / hashed("Dot") / "study.json").is_file()
    splits = json.loads((out / "splits.json").read_text())
    assert any(hashed("Dot") in splits[split] for split in ("train", "val", "test"))


def test_the_studies_load_without_another_flag(cohort):
    folder, _ = cohort
    data = PairedVolumes(folder / "out")
    data.setup()
    assert sum(map(len, data.splits.values())) >= 4
    batch = next(iter(data.train_dataloader()))
    assert batch.mri.shape == (1, 1, *SHAPE) and batch.bone.any() and batch.brain.any()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((), "expected input and output on the command line, missing input=... output=..."),
        (("input=nowhere", "output=out"), "expected files to fetch, got none for this cohort"),
        (("input=empty", "output=out"), "expected cases as PATIENT/mri.* and PATIENT/ct.*"),
        (("input=half", "output=out"), "expected ct, found ['lesion_mask', 'mri']"),
    ],
)
def test_a_wrong_command_ends_in_one_sentence_and_writes_nothing(
    in_folder, capsys, overrides, sentence
):
    (in_folder / "empty").mkdir()
    write_patient(in_folder / "half" / "Eve", 0, ct=False)
    with pytest.raises(SystemExit, match="1"):
        main(configured(*overrides))
    assert sentence in capsys.readouterr().err.splitlines()[0]
    assert not (in_folder / "out").exists()


def test_studies_without_a_ct_are_counted_in_the_end_and_refused_by_training(in_folder, capsys):
    phantom = make_phantom(0, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    case = "sub-strokecase0001_ses-0001"
    for name in ("flair", "dwi", "adc"):
        write(in_folder / "in" / f"{case}_{name}.nii.gz", phantom.mri)
    write(in_folder / "in" / f"{case}_msk.nii.gz", phantom.lesion)
    main(configured("dataset=isles22", "input=in", "output=out"))
    assert "studies without CT: 1 of 1; fusion trains on pairs" in capsys.readouterr().out
    assert "1, which fusion cannot train on" in (in_folder / "out" / "quality.html").read_text()
    data = PairedVolumes(in_folder / "out")
    with pytest.raises(FileNotFoundError, match=rf"expected ct\.nii\.gz, found none in .*{case}"):
        data.setup()


def test_a_mistyped_input_fetches_nothing_that_was_not_asked_for(tmp_path, entry_point):
    wanted = ("dataset=isles22", f"input={tmp_path / 'mistyped'}", f"output={tmp_path / 'out'}")
    done = entry_point("clinfuse.prepare", *wanted, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "found nothing at" in done.stderr and "download=true fetches it" in done.stderr
    assert not (tmp_path / "mistyped").exists() and not (tmp_path / "out").exists()


def test_a_file_that_no_server_has_is_refused_in_one_sentence_with_the_way_by_hand(tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/Task1.zip"
        given = {"licence": "free", "by_hand": "go there", "files": [{"url": url, "sha256": None}]}
        with pytest.raises(ValueError, match=f"got HTTP 404: {url}; by hand: go there"):
            download(OmegaConf.create(given), tmp_path / "to", tmp_path / "cache")
        server.shutdown()
    assert not (tmp_path / "to").exists()
