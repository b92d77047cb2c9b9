"""Nobody's name is written anywhere unless that is asked for: files, logs and the terminal."""

import gzip
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from omegaconf import OmegaConf

from clinfuse.configuration import in_one_sentence, nameless_logs, without_names
from clinfuse.data.phantoms import make_phantom
from clinfuse.preparation.dicom.writing import write_scan
from clinfuse.preparation.identifiers import hashed

NAME, NUMBER, BORN, FOLDER = (
    "Quarterman^Zenobia",
    "MRN-77012345",
    "19610203",
    "quarterman_zenobia",
)
IDENTITIES = ("Quarterman", "quarterman", "Zenobia", "77012345", BORN, "1961-02-03")
SPACING_MM, SHAPE = (6.0, 4.0, 4.0), (24, 52, 52)


def settings(**given):
    return OmegaConf.create({"keep_ids": False, "salt": "", **given})


def test_paths_of_scans_become_the_settings_that_name_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "scans" / FOLDER
    shown = without_names(settings(mri=f"scans/{FOLDER}/mri.nii.gz", ct=str(place / "ct.nii.gz")))
    said = shown(f"got scans/{FOLDER}/mri.nii.gz and {place / 'ct.nii.gz'} and {place}/x.nii: end")
    assert said == "got <mri> and <ct> and <mri>/../x.nii: end"


def test_folders_of_a_cohort_become_the_hashes_that_their_studies_have(tmp_path):
    (tmp_path / "in" / "Zenobia_Quarterman" / "later").mkdir(parents=True)
    cfg = settings(input=str(tmp_path / "in"), output=str(tmp_path / "out"), salt="s")
    said = without_names(cfg)(
        f"case Zenobia_Quarterman: none at {tmp_path}/in/Zenobia_Quarterman/ct"
    )
    code = hashed("Zenobia_Quarterman", "s")
    assert said == f"case {code}: none at <input>/{code}/ct"


@pytest.mark.parametrize("cfg", [{}, {"keep_ids": True, "mri": "/a/b"}, {"keep_ids": "???"}])
def test_what_nobody_asked_to_hide_is_shown(cfg):
    assert without_names(OmegaConf.create(cfg))("at /a/b") == "at /a/b"


def test_everything_that_is_logged_meanwhile_is_nameless(caplog):
    shown = without_names(settings(mri="/a/Zenobia/mri.nii"))
    with nameless_logs(shown):
        logging.getLogger("nibabel").warning("cannot read %s", "/a/Zenobia/mri.nii")
    logging.getLogger("nibabel").warning("cannot read %s", "/a/Zenobia/mri.nii")
    assert [r.getMessage() for r in caplog.records] == [
        "cannot read <mri>", "cannot read /a/Zenobia/mri.nii"
    ]  # fmt: skip


def test_a_refusal_is_nameless_too(capsys):
    @in_one_sentence
    def fails(cfg):
        raise ValueError(f"expected a scan, found none: {cfg.mri}")

    with pytest.raises(SystemExit):
        fails(settings(mri="/a/Zenobia/mri.nii"))
    assert capsys.readouterr().err.splitlines()[0] == "clinfuse: expected a scan, found none: <mri>"


def write_patient(folder):
    """MRI and CT as DICOM that names the patient wherever it can, in a folder that does too."""
    head = make_phantom(3, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    for name, array in (("mri", head.mri), ("ct", head.ct_hu)):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING_MM[::-1])
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        for file in write_scan(folder / name, image, "MR" if name == "mri" else "CT", NUMBER):
            header = pydicom.dcmread(file)
            header.PatientName, header.PatientBirthDate = NAME, BORN
            header.ReferringPhysicianName = header.InstitutionName = NAME
            header.SeriesDescription = f"head of {NAME}"
            header.save_as(file)
    return folder


def written(*places):
    """Everything that lies there: names of files, and their contents, also compressed ones."""
    for place in places:
        for path in sorted(place.rglob("*")):
            yield path, str(path.relative_to(place)).encode()
            if path.is_file():
                content = path.read_bytes()
                yield path, gzip.decompress(content) if path.suffix == ".gz" else content


def assert_nameless(done, *places):
    for text in (done.stdout, done.stderr):
        assert not [name for name in IDENTITIES if name in text], text
    found = [(path, n) for path, b in written(*places) for n in IDENTITIES if n.encode() in b]
    assert found == []


@pytest.mark.slow
def test_a_patient_is_prepared_and_fused_and_named_nowhere(entry_point, smoke_run, tmp_path):
    scans, out, log = write_patient(tmp_path / FOLDER / FOLDER), tmp_path / "out", tmp_path / "log"
    common = ("masks=classical", f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={log}")
    cohort = (f"input={scans.parent}", f"output={out / 'studies'}", "salt=pepper")
    places = (out, log, tmp_path / "cache")
    done = entry_point("clinfuse.prepare", *common, *cohort)
    assert done.returncode == 0 and hashed(FOLDER, "pepper") in done.stdout + done.stderr
    assert_nameless(done, *places)
    asked = (f"run={smoke_run}", f"mri={scans / 'mri'}", f"ct={scans / 'ct'}", f"out={out / 'a'}")
    done = entry_point("clinfuse.fuse", *common, *asked, "members=1", "steps=1")
    assert done.returncode == 0, done.stderr
    assert (out / "a" / "dicom" / "slice_0001.dcm").is_file()
    assert_nameless(done, *places)

    for number, file in enumerate(sorted((scans / "ct").iterdir())):
        if number == 7:
            file.unlink()  # a slice is missing
    (scans / "mri" / "MR_0001.dcm").write_bytes(b"")
    for command in (
        ("clinfuse.prepare", *common, *cohort[:1], f"output={out / 'b'}"),
        ("clinfuse.fuse", *common, *asked[:3], f"out={out / 'c'}"),
        ("clinfuse.fuse", *common, *asked[:2], f"ct={scans}/nowhere", f"out={out / 'd'}"),
        ("clinfuse.fuse", *common, *asked[:1], f"mri={scans}", f"ct={scans}", f"out={out / 'e'}"),
    ):
        done = entry_point(*command)
        assert done.returncode == 1 and "clinfuse: expected" in done.stderr, done.stderr
        assert_nameless(done, *places)


@pytest.mark.slow
def test_names_of_files_are_not_kept_either(entry_point, smoke_run, tmp_path):
    folder, log = tmp_path / FOLDER, tmp_path / "log"
    folder.mkdir()
    head = make_phantom(3, seed=7, shape=SHAPE, spacing_mm=SPACING_MM)
    for name, array in (("mri", head.mri), ("ct", head.ct_hu)):
        image = nib.Nifti1Image(array.transpose(2, 1, 0), np.diag([4.0, 4.0, 6.0, 1.0]))
        image.header["descrip"] = NAME
        nib.save(image, folder / f"Zenobia_{name}.nii.gz")
    done = entry_point(
        "clinfuse.fuse", f"run={smoke_run}", f"mri={folder / 'Zenobia_mri.nii.gz'}",
        f"ct={folder / 'Zenobia_ct.nii.gz'}", f"out={tmp_path / 'out'}", "members=1", "steps=1",
        f"cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={log}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_nameless(done, tmp_path / "out", tmp_path / "cache", log)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("name", ["../../evil", "/evil", "a\\b", "..", "C:evil", "x\n\ny"])
def test_a_derived_series_stays_in_its_folder_whatever_the_scan_says_of_itself(name, tmp_path):
    from clinfuse.preparation.derived_series import write_derived_series

    image = sitk.GetImageFromArray(np.random.default_rng(0).random((6, 5, 4)).astype(np.float32))
    for file in write_scan(tmp_path / "in" / "scan", image * 100, "MR"):
        header = pydicom.dcmread(file)
        for field in ("PatientID", "PatientName", "SeriesDescription", "StudyID", "StationName"):
            setattr(header, field, name)
        with pytest.warns():  # of pydicom's: such an identifier is none
            header.StudyInstanceUID = header.FrameOfReferenceUID = name
            header.SeriesInstanceUID = name
        header.save_as(file)
    write_derived_series(tmp_path / "in" / "out", image, tmp_path / "in" / "scan", keep_ids=True)
    names = {path.name for path in (tmp_path / "in" / "out").iterdir()}
    assert names == {f"slice_{number:04d}.dcm" for number in range(1, 7)}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"scan", "out"}
    assert not list(Path("/").glob("evil*"))
