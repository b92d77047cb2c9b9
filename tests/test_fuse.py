import json
import shutil
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from omegaconf import OmegaConf
from torch import nn

from clinfuse.configuration import run_config, save_config, trained_method
from clinfuse.data.phantoms import make_phantom, ras_affine
from clinfuse.fuse import (
    Fusion,
    changes,
    main,
    sampled,
    shared_facts,
    shown_name,
    voxels_of,
    with_preset,
    with_presets_listed,
)
from clinfuse.methods.roi_diffusion import RoiDiffusion
from clinfuse.networks import mapped_memory
from clinfuse.preparation.identifiers import hashed
from clinfuse.preparation.reading import read_scan
from clinfuse.reporting.views import CaseView

SHAPE, SPACING_MM = (13, 27, 31), (7.0, 6.0, 6.5)
NAMES = ("mri", "ct", "brain_mask", "bone_mask", "lesion_mask")


def test_voxels_are_counted_without_a_word_and_what_cannot_be_read_has_none(tmp_path, caplog):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), None)
    image.set_sform(None, 0)  # of which the reader warns
    nib.save(image, tmp_path / "mri.nii")
    (tmp_path / "broken.nii").write_text("not a volume")
    assert voxels_of(tmp_path / "absent.nii", tmp_path / "mri.nii") == 60
    assert voxels_of(tmp_path / "broken.nii") == voxels_of(tmp_path / "absent.nii") == 0
    assert not caplog.records


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """One head of odd sizes, its files in RAS and again in LAS, in folders of these names."""
    head = make_phantom(7, 0, SHAPE, SPACING_MM, "adc")
    arrays = (head.mri, head.ct_hu, head.brain, head.bone, head.lesion)
    folder = tmp_path_factory.mktemp("patient")
    for orientation in ("RAS", "LAS"):
        (folder / orientation).mkdir()
        for name, array in zip(NAMES, arrays, strict=True):
            stored = array.astype(np.uint8 if array.dtype == bool else np.float32)
            image = nib.Nifti1Image(stored.transpose(2, 1, 0), ras_affine(SHAPE, SPACING_MM))
            target = axcodes2ornt(orientation)
            image = image.as_reoriented(ornt_transform(io_orientation(image.affine), target))
            nib.save(image, folder / orientation / f"{name}.nii.gz")
    return folder


def arguments(run, files, out, **instead):
    paths = {name: files / f"{name}.nii.gz" for name in NAMES} | instead
    named = {name: path for name, path in paths.items() if path is not None}
    return [f"run={run}", f"out={out}", *(f"{name}={path}" for name, path in named.items())]


@pytest.fixture(scope="module")
def fused(smoke_run, phantoms, patient, tmp_path_factory):
    """The patient fused from either orientation."""
    folder = tmp_path_factory.mktemp("fused")
    for orientation in ("RAS", "LAS"):
        overrides = arguments(smoke_run, patient / orientation, folder / orientation)
        main(phantoms.config(*overrides, name="fuse", folder=folder / "hydra"))
    return folder


@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
def test_results_lie_on_the_grid_that_the_mri_came_on(orientation, fused, patient):
    mri = nib.load(patient / orientation / "mri.nii.gz")
    assert {path.name for path in (fused / orientation).iterdir()} == {
        "fused.nii.gz", "uncertainty.nii.gz", "epistemic.nii.gz", "aleatoric.nii.gz",
        "interval_low.nii.gz", "interval_high.nii.gz", "report.html",
    }  # fmt: skip
    names = ("fused", "uncertainty", "epistemic", "aleatoric", "interval_low", "interval_high")
    for name in names:
        image = nib.load(fused / orientation / f"{name}.nii.gz")
        assert image.shape == mri.shape == SHAPE[::-1]
        np.testing.assert_allclose(image.affine, mri.affine)
        assert "".join(nib.aff2axcodes(image.affine)) == orientation
        assert np.isfinite(image.get_fdata()).all()


def test_the_storage_order_changes_nothing_about_the_patient(fused):
    for name in ("fused", "uncertainty"):
        ras, las = (nib.load(fused / o / f"{name}.nii.gz") for o in ("RAS", "LAS"))
        np.testing.assert_array_equal(nib.as_closest_canonical(las).get_fdata(), ras.get_fdata())
        assert not np.array_equal(las.get_fdata(), ras.get_fdata())


def test_the_calibrated_interval_lies_around_the_fused_value_and_is_no_point(fused):
    low, mean, high = (
        nib.load(fused / "RAS" / f"{name}.nii.gz").get_fdata()
        for name in ("interval_low", "fused", "interval_high")
    )
    assert (low <= mean + 1e-6).all() and (mean <= high + 1e-6).all()
    assert low.min() >= -1 and high.max() <= 1
    assert np.mean(high - low > 1e-3) > 0.5


def test_a_run_without_calibration_gives_no_interval(smoke_run, phantoms, patient, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    (run / "calibration.json").unlink()
    overrides = arguments(run, patient / "RAS", tmp_path / "out")
    main(phantoms.config(*overrides, name="fuse", folder=tmp_path / "hydra"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fused.nii.gz", "uncertainty.nii.gz", "epistemic.nii.gz", "aleatoric.nii.gz",
        "report.html",
    }  # fmt: skip


def test_the_fused_volume_is_in_model_space_and_looks_like_the_head(fused, patient):
    image = nib.load(fused / "RAS" / "fused.nii.gz").get_fdata()
    assert image.min() >= -1 and image.max() <= 1
    bone, brain = (
        nib.load(patient / "RAS" / f"{n}_mask.nii.gz").get_fdata() > 0 for n in ("bone", "brain")
    )
    air = ~(bone | brain)
    assert image[bone].mean() > image[air].mean() + 0.3
    mri = nib.load(patient / "RAS" / "mri.nii.gz").get_fdata()
    assert np.corrcoef(image[brain], mri[brain])[0, 1] > 0.5


def test_uncertainty_is_a_spread_over_members(fused):
    spread = nib.load(fused / "RAS" / "uncertainty.nii.gz").get_fdata()
    assert spread.min() >= 0 and spread.max() > 0
    assert len(np.unique(spread)) > 1000


def test_steps_members_and_guidance_can_be_asked_for_and_masks_left_out(
    smoke_run, phantoms, patient, tmp_path
):
    # 16 slices of air-padded phantom are too coarse to segment: the brain and bone masks stay
    overrides = arguments(smoke_run, patient / "LAS", tmp_path / "out", lesion_mask=None)
    overrides += ["members=1", "steps=1", "presets=[bone_tumor]"]
    main(phantoms.config(*overrides, name="fuse", folder=tmp_path / "hydra"))
    total, epistemic = (
        nib.load(tmp_path / "out" / f"{name}.nii.gz").get_fdata()
        for name in ("uncertainty", "epistemic")
    )
    np.testing.assert_array_equal(total, epistemic)  # one member of each model has no spread
    assert epistemic.max() > 0
    assert not list((tmp_path / "out").glob("interval*"))
    assert not list((tmp_path / "out").glob("*leatoric*"))
    report = (tmp_path / "out" / "report.html").read_text()
    assert "bone_tumor" in report and "lesion: absent" in report


# Models, draws and the lesion head.


def volume(path):
    return nib.load(path).get_fdata()


def fuse_into(out, run, phantoms, patient, *overrides):
    named = arguments(run, patient / "RAS", out)
    main(phantoms.config(*named, *overrides, name="fuse", folder=out.parent / "hydra"))
    return out


@pytest.fixture
def run_of_one_model(smoke_run, tmp_path):
    """The run as if it had kept no snapshots of its training."""
    folder = tmp_path / "run_of_one_model"
    shutil.copytree(smoke_run, folder)
    for path in (folder / "checkpoints").glob("draw_*"):
        path.unlink()
    return folder


def test_one_member_of_one_model_has_no_spread(run_of_one_model, phantoms, patient, tmp_path):
    overrides = [*arguments(run_of_one_model, patient / "RAS", tmp_path / "out"), "members=1"]
    main(phantoms.config(*overrides, name="fuse", folder=tmp_path / "hydra"))
    assert (volume(tmp_path / "out" / "uncertainty.nii.gz") == 0).all()


def test_one_model_has_no_epistemic_map_and_says_so_and_removes_an_old_one(
    run_of_one_model, phantoms, patient, tmp_path, capsys
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "epistemic.nii.gz").write_text("of another run")
    out = fuse_into(tmp_path / "out", run_of_one_model, phantoms, patient)
    assert not (out / "epistemic.nii.gz").exists()
    np.testing.assert_array_equal(
        volume(out / "aleatoric.nii.gz"), volume(out / "uncertainty.nii.gz")
    )
    said = [line for line in capsys.readouterr().out.splitlines() if "epistemic" in line]
    assert said == ["no epistemic map: the run has one model"]
    assert "Epistemic (s.d.)" not in (out / "report.html").read_text()


def test_the_uncertainty_of_several_models_is_split_by_the_law_of_total_variance(
    smoke_run, phantoms, patient, tmp_path, monkeypatch, capsys
):
    seen = []

    def model_draws(self, batch):
        draws = self.ensemble(batch)
        seen.append(torch.stack([draws, 0.5 * draws - 0.1, draws.flip(-1)]))
        return seen[-1]

    monkeypatch.setattr(RoiDiffusion, "model_draws", model_draws)
    out = fuse_into(tmp_path / "out", smoke_run, phantoms, patient)
    names = ("fused", "uncertainty", "epistemic", "aleatoric")
    fused, total, epistemic, aleatoric = (
        volume(out / f"{name}.nii.gz").transpose(2, 1, 0) for name in names
    )
    draws = seen[0][:, :, 0, 0].double().numpy()  # (d, h, w), RAS as the files here
    images = draws.clip(-1, 1)
    np.testing.assert_allclose(epistemic, images.mean(1).std(0, ddof=1), atol=1e-5)
    np.testing.assert_allclose(aleatoric**2, images.var(1, ddof=1).mean(0), atol=1e-5)
    np.testing.assert_allclose(total**2, epistemic**2 + aleatoric**2, atol=1e-5)
    np.testing.assert_allclose(fused, draws.mean((0, 1)).clip(-1, 1), atol=1e-5)
    assert "epistemic" not in capsys.readouterr().out
    report = (out / "report.html").read_text()
    assert "Epistemic (s.d.)" in report and "Aleatoric (s.d.)" in report


class Bright(nn.Module):
    """A lesion head for which what is bright is lesion."""

    def forward(self, fused):
        return torch.sigmoid(4 * fused)


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_a_lesion_head_gives_its_probability_calibrated_where_the_run_is(
    temperature, smoke_run, phantoms, patient, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    fitted = json.loads((run / "calibration.json").read_text())
    (run / "calibration.json").write_text(json.dumps({**fitted, "temperature": temperature}))

    def with_head(folder, cfg):
        method = trained_method(folder, cfg)
        method.lesion_head = Bright()
        return method

    monkeypatch.setattr("clinfuse.fuse.trained_method", with_head)
    out = fuse_into(tmp_path / "out", run, phantoms, patient)
    logit = 4 * volume(out / "fused.nii.gz") / (temperature or 1)
    probability = volume(out / "lesion_probability.nii.gz")
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), atol=1e-5)
    report = (out / "report.html").read_text()
    assert ("<dd>calibrated</dd>" in report) == (temperature is not None)
    assert "Lesion probability on fused" in report and "γ off" not in report


def test_a_method_that_does_not_sample_is_fused_without_gradients(phantoms):
    cfg = phantoms.config("run=x", "mri=x", "ct=x", "out=x", name="fuse")
    draws = sampled(phantoms.method("deterministic_unet"), phantoms.batch(), cfg)
    assert draws.shape[:4] == (1, 1, 1, 1) and not draws.requires_grad


# Presets.


def test_presets_side_by_side_are_each_what_they_are_alone(
    entry_point, smoke_run, phantoms, patient, tmp_path
):
    own, out = run_config(smoke_run).preset, tmp_path / "out"
    named = arguments(smoke_run, patient / "RAS", out)
    hydra = f"hydra.run.dir={tmp_path / 'hydra'}"
    done = entry_point("clinfuse.fuse", *named, f"preset={own},bone_tumor", hydra)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {own, "bone_tumor", "report.html"}
    assert {path.name for path in (out / "bone_tumor").iterdir()} == {
        "fused.nii.gz", "uncertainty.nii.gz", "epistemic.nii.gz", "aleatoric.nii.gz",
    }  # fmt: skip
    assert (out / own / "interval_low.nii.gz").is_file()  # calibrated with its own preset alone
    alone = fuse_into(tmp_path / "alone", smoke_run, phantoms, patient, "presets=[bone_tumor]")
    fused = volume(out / "bone_tumor" / "fused.nii.gz")
    np.testing.assert_allclose(volume(alone / "fused.nii.gz"), fused, atol=1e-5)
    assert np.abs(fused - volume(out / own / "fused.nii.gz")).max() > 1e-4
    report = (out / "report.html").read_text()
    assert "Presets side by side" in report and f"bone_tumor − {own}" in report
    assert "α 0.5, β 2, γ 2 (γ off: no lesion head)" in report
    assert "Presets side by side" not in (alone / "report.html").read_text()


@pytest.mark.parametrize(
    "asked, listed",
    [
        ("preset=stroke,bone_tumor", "presets=['stroke','bone_tumor']"),
        ("preset=[stroke, bone_tumor]", "presets=['stroke','bone_tumor']"),
        ("preset='stroke'", "presets=['stroke']"),
        ("preset=null", "presets=[]"),
        ("preset=", "presets=[]"),
        ("guidance.alpha=1,2", "guidance.alpha=1,2"),
        ("--help", "--help"),
    ],
)
def test_presets_of_a_command_line_become_a_list(asked, listed):
    assert with_presets_listed(asked) == listed


@pytest.mark.parametrize(
    "asked, words",
    [
        ("[stroke,strike]", ["bone_tumor, brain_tumor, default, metastasis, stroke, got strike"]),
        ("[strike]", ["got strike"]),
        ("[stroke,stroke]", ["once"]),
    ],
)
def test_a_preset_that_there_is_not_is_refused_before_anything_is_written(
    asked, words, smoke_run, phantoms, patient, tmp_path, capsys
):
    overrides = arguments(smoke_run, patient / "LAS", tmp_path / "out")
    sentence = refusal(phantoms, tmp_path, capsys, [*overrides, f"presets={asked}"])
    assert all(word in sentence for word in words), sentence


def test_from_the_command_line_an_unknown_preset_is_one_sentence(
    entry_point, smoke_run, patient, tmp_path
):
    named = arguments(smoke_run, patient / "RAS", tmp_path / "out")
    hydra = f"hydra.run.dir={tmp_path / 'hydra'}"
    done = entry_point("clinfuse.fuse", *named, "preset=strike", hydra)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("clinfuse: expected presets of bone_tumor, ")
    assert not (tmp_path / "out").exists()


def test_guidance_on_the_command_line_goes_before_the_preset_and_that_before_the_run(
    smoke_run, phantoms
):
    run = run_config(smoke_run)
    cfg = phantoms.config("guidance.beta=0.3", name="fuse")
    assert with_preset(run, cfg, "").preset == run.preset
    merged = with_preset(run, cfg, "bone_tumor")
    assert merged.preset == "bone_tumor"
    assert (merged.guidance.alpha, merged.guidance.beta) == (0.5, 0.3)
    assert merged.guidance.eta == run.guidance.eta


def test_changes_are_means_over_regions_against_the_first_preset(phantoms):
    item = phantoms.batch(case=7)
    first = torch.zeros_like(item.mri)
    second = first - 0.25 * item.bone.float() + 0.5 * (item.brain & ~item.bone)
    view = CaseView("a", *3 * [first[0, 0].numpy()], (1.0, 1.0, 1.0))
    spread = torch.full_like(first, 0.3)
    table = changes(
        [
            Fusion(name, "", {"fused": fused, "uncertainty": spread}, view, {}, [])
            for name, fused in (("one", first), ("two", second))
        ],
        item,
    )
    assert table["mean in bone"].tolist() == ["–", "0.25000"]
    assert table["largest"].tolist() == ["–", "0.500"]
    brain = (item.brain & ~item.bone).sum() / (item.brain | item.bone).sum()
    assert table["of brain and bone, beyond 1 s.d."][1] == f"{float(brain):.1%}"


def test_a_fact_that_differs_between_presets_names_them():
    air = np.full((2, 2, 2), -1.0)
    view = CaseView("a", air, air, air, (1.0, 1.0, 1.0))
    fusions = [
        Fusion(name, "", {}, view, {"draws": "5", "lesion probability": kind}, [])
        for name, kind in (("one", "calibrated"), ("two", "not calibrated"))
    ]
    told = "one: calibrated, two: not calibrated"
    assert shared_facts(fusions) == {"draws": "5", "lesion probability": told}
    assert shared_facts(fusions[:1]) == fusions[0].facts


# Cohorts.


@pytest.fixture(scope="module")
def studies(phantoms, tmp_path_factory):
    """Three study folders of the smoke experiment's heads, and one whose CT is missing."""
    folder = tmp_path_factory.mktemp("studies")
    for case in ("case_000", "case_001", "case_002"):
        shutil.copytree(phantoms.root / case, folder / case)
    shutil.copytree(phantoms.root / "case_003", folder / "case_001_broken")
    (folder / "case_001_broken" / "ct.nii.gz").unlink()
    return folder


def fuse_cohort(out, run, phantoms, studies, *overrides):
    """Fuses what can be fused, and returns the status that it ended with."""
    asked = (f"run={run}", f"studies={studies}", f"out={out}", "members=1", "steps=1", *overrides)
    with pytest.raises(SystemExit) as exit_:
        main(phantoms.config(*asked, name="fuse", folder=out.parent / "hydra"))
    return exit_.value.code


def contents(out):
    """What a cohort's folder holds but for what its workers keep for themselves, and of theirs."""
    own = {".work", "fusion.json"}  # the second has the first worker's free memory
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): path.read_bytes() for path in files if not own & {*path.parts}
    }


@pytest.fixture(scope="module")
def cohort(smoke_run, phantoms, studies, tmp_path_factory):
    out = tmp_path_factory.mktemp("cohort") / "out"
    assert fuse_cohort(out, smoke_run, phantoms, studies) == 1
    return out


def test_a_cohort_is_fused_into_a_folder_a_case_and_a_broken_one_keeps_no_other(cohort):
    assert {path.name for path in cohort.iterdir()} == {
        "case_000", "case_001", "case_002", "cases.csv", "fusion.json", ".work",
    }  # fmt: skip
    names = {"fused.nii.gz", "uncertainty.nii.gz", "epistemic.nii.gz", "report.html"}
    for case in ("case_000", "case_001", "case_002"):
        assert {path.name for path in (cohort / case).iterdir()} == names
    table = pd.read_csv(cohort / "cases.csv", keep_default_na=False).set_index("case_id")
    assert dict(table["state"]) == {
        "case_000": "fused", "case_001": "fused", "case_002": "fused", "case_001_broken": "failed",
    }  # fmt: skip
    assert "expected ct.nii.gz, found none in" in table.loc["case_001_broken", "reason"]
    assert table.loc["case_002", "folder"] == str(cohort / "case_002")


def test_a_case_of_a_cohort_is_what_it_is_by_itself(cohort, smoke_run, phantoms, studies, tmp_path):
    alone = tmp_path / "out"
    files = {name: studies / "case_001" / f"{name}.nii.gz" for name in NAMES}
    asked = [f"{name}={path}" for name, path in files.items() if path.is_file()]
    asked += [f"run={smoke_run}", f"out={alone}", "members=1", "steps=1"]
    main(phantoms.config(*asked, name="fuse", folder=tmp_path / "hydra"))
    for name in ("fused", "uncertainty", "epistemic"):
        together = (cohort / "case_001" / f"{name}.nii.gz").read_bytes()
        assert (alone / f"{name}.nii.gz").read_bytes() == together


def test_fixed_shares_together_are_byte_for_byte_what_one_worker_makes(
    cohort, smoke_run, phantoms, studies, tmp_path, capsys
):
    out, one = tmp_path / "out", contents(cohort)
    status = fuse_cohort(out, smoke_run, phantoms, studies, "shard=0/2")
    said = capsys.readouterr()
    assert status == 1 and "1 of 4 cases fused" in said.out  # and of its two, one is broken
    assert "clinfuse: failed: case_001_broken: expected ct.nii.gz" in said.err
    before = {path: path.stat().st_mtime_ns for path in out.glob("case_*/*")}
    assert fuse_cohort(out, smoke_run, phantoms, studies, "shard=1/2") == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before
    two = contents(out)
    table = two.pop("cases.csv").decode().replace(str(out), str(cohort))
    assert table.encode() == one["cases.csv"]
    assert two == {name: content for name, content in one.items() if name != "cases.csv"}


def test_a_damaged_checkpoint_begins_no_cohort(smoke_run, phantoms, studies, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(smoke_run, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    assert fuse_cohort(out, run, phantoms, studies) == 1
    assert f"expected a readable checkpoint, got RuntimeError: {last}" in capsys.readouterr().err
    assert not out.exists()


def test_a_cohorts_folder_takes_no_other_fusion_and_no_folder_of_anothers(
    cohort, smoke_run, phantoms, studies, tmp_path, capsys
):
    before = contents(cohort)
    assert fuse_cohort(cohort, smoke_run, phantoms, studies, "presets=[bone_tumor]") == 1
    assert "a folder that is new, or of the same settings and weights" in capsys.readouterr().err
    assert contents(cohort) == before
    (tmp_path / "out" / "case_000").mkdir(parents=True)
    assert fuse_cohort(tmp_path / "out", smoke_run, phantoms, studies) == 1
    assert "expected a new folder, or one of this fusion" in capsys.readouterr().err
    assert fuse_cohort(studies, smoke_run, phantoms, studies) == 1
    assert "expected another folder for out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_is_killed_is_followed_by_others_who_leave_what_it_has_done(
    cohort, smoke_run, phantoms, studies, tmp_path
):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "clinfuse.fuse", f"run={smoke_run}", f"studies={studies}",
        f"out={out}", "members=1", "steps=1", f"cache_dir={phantoms.cache_dir}",
        f"hydra.run.dir={tmp_path / 'hydra'}",
    ]  # fmt: skip
    first = subprocess.Popen(command)
    while not (out / "case_000").is_dir():
        assert first.poll() is None
        time.sleep(0.005)
    first.kill()
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("case_*/*")}
    assert before
    others = [subprocess.Popen(command) for _ in range(2)]
    assert [other.wait() for other in others] == [1, 1]  # of the broken one
    assert {path: path.stat().st_mtime_ns for path in before} == before
    made, one = contents(out), contents(cohort)
    assert {name: content for name, content in made.items() if name != "cases.csv"} == {
        name: content for name, content in one.items() if name != "cases.csv"
    }


# Bad input.


def changed(path, folder, change):
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj).astype(np.float32), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), folder / path.name)
    return folder / path.name


def shifted(array, affine):
    affine[1, 3] += 3
    return array, affine


def holed(array, affine):
    array[2:4, 5, 5] = np.nan
    return array, affine


def cut(path, folder):
    (folder / path.name).write_bytes(path.read_bytes()[:3000])
    return folder / path.name


FAULTS = {
    "missing": ("ct", lambda path, _: path.with_name("nothing.nii.gz"), ["nothing at <ct>"]),
    "another_grid": (
        "ct", lambda p, f: changed(p, f, shifted), ["one grid", "affine", "-75.0", "-78.0"],
    ),
    "empty_mask": (
        "brain_mask", lambda p, f: changed(p, f, lambda a, m: (0 * a, m)),
        ["brain mask", "all-zero"],
    ),
    "nan": ("mri", lambda p, f: changed(p, f, holed), ["2 that are NaN", "<mri>"]),
    "four_axes": (
        "mri", lambda p, f: changed(p, f, lambda a, m: (np.stack([a, a], -1), m)),
        ["3-D", "13, 2)"],
    ),
    "truncated": ("ct", cut, ["truncated or corrupt", "<ct>"]),
}  # fmt: skip


def refusal(phantoms, folder, capsys, overrides):
    with pytest.raises(SystemExit) as exit_:
        main(phantoms.config(*overrides, name="fuse", folder=folder / "hydra"))
    assert exit_.value.code == 1
    sentence = capsys.readouterr().err.strip().splitlines()[0]
    assert sentence.startswith("clinfuse: expected ")
    assert not (folder / "out").exists()
    return sentence


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_refused_before_anything_is_written(
    fault, smoke_run, phantoms, patient, tmp_path, capsys
):
    name, spoil, words = FAULTS[fault]
    spoilt = spoil(patient / "LAS" / f"{name}.nii.gz", tmp_path)
    overrides = arguments(smoke_run, patient / "LAS", tmp_path / "out", **{name: spoilt})
    sentence = refusal(phantoms, tmp_path, capsys, overrides)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("left_out", ["run", "mri", "ct", "out"])
def test_what_was_not_named_is_asked_for(left_out, smoke_run, phantoms, patient, tmp_path, capsys):
    overrides = arguments(smoke_run, patient / "LAS", tmp_path / "out")
    overrides = [o for o in overrides if not o.startswith(f"{left_out}=")]
    assert left_out in refusal(phantoms, tmp_path, capsys, overrides)


@pytest.mark.parametrize("kept, words", [((), ".hydra/config.yaml"), ((".hydra",), "last.ckpt")])
def test_a_folder_without_a_trained_run_is_refused(
    kept, words, smoke_run, phantoms, patient, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    for name in kept:
        shutil.copytree(smoke_run / name, run / name)
    overrides = arguments(run, patient / "LAS", tmp_path / "out")
    sentence = refusal(phantoms, tmp_path, capsys, overrides)
    assert words in sentence and str(run) in sentence


def test_a_run_on_2d_pairs_is_refused(smoke_run, phantoms, patient, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    pairs = phantoms.config("data=paired_slices", "data.root=pairs", "data.kind=ct_mri")
    save_config(pairs, run)
    overrides = arguments(run, patient / "LAS", tmp_path / "out")
    sentence = refusal(phantoms, tmp_path, capsys, overrides)
    assert "2-D pairs" in sentence and str(run) in sentence


def test_from_the_command_line_a_missing_scan_is_one_sentence(
    entry_point, smoke_run, patient, tmp_path
):
    overrides = arguments(smoke_run, patient / "RAS", tmp_path / "out", mri="nowhere.nii.gz")
    done = entry_point("clinfuse.fuse", *overrides, f"hydra.run.dir={tmp_path / 'hydra'}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("clinfuse: expected a NIfTI file")
    assert "nothing at <mri>" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dicom_patient(tmp_path_factory):
    """MRI and CT of one head as DICOM, the CT on a grid of its own, both of a named patient."""
    folder = tmp_path_factory.mktemp("dicom")
    head = make_phantom(7, 0, (24, 52, 52), (6.0, 4.0, 4.0), "t2")
    for name, array in (("mri", head.mri), ("ct", head.ct_hu)):
        write_series(folder / name, array, "MR" if name == "mri" else "CT")
    return folder


def write_series(folder, array, modality):
    """A minimal series through ITK: what any scanner's export holds at least."""
    image = sitk.GetImageFromArray(array.round().astype(np.int16))
    image.SetSpacing((4.0, 4.0, 6.0))
    folder.mkdir()
    series, frame = (f"1.2.826.0.1.3680043.2.1125.{n}.{ord(modality[0])}" for n in (1, 2))
    for k in range(image.GetDepth()):
        plane = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        sop = {"MR": "1.2.840.10008.5.1.4.1.1.4", "CT": "1.2.840.10008.5.1.4.1.1.2"}[modality]
        for tag, value in {
            "0008|0016": sop, "0008|0018": f"{series}.{k + 1}", "0008|0060": modality,
            "0010|0010": "Doe^Jane", "0010|0020": "MRN-0042", "0008|0020": "20240131",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.9", "0020|000e": series,
            "0020|0052": frame, "0020|0013": str(k + 1), "0028|1053": "1", "0028|1052": "0",
            "0020|0032": "\\".join(f"{x:g}" for x in position),
            "0020|0037": "1\\0\\0\\0\\1\\0", "0018|0050": "6",
        }.items():  # fmt: skip
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Execute(plane)


def test_dicom_is_prepared_fused_and_handed_back_as_dicom(
    dicom_patient, smoke_run, phantoms, tmp_path, capsys
):
    out = tmp_path / "out"
    overrides = [
        f"run={smoke_run}", f"mri={dicom_patient / 'mri'}", f"ct={dicom_patient / 'ct'}",
        f"out={out}", "masks=classical",
    ]  # fmt: skip
    for _ in range(2):  # a second time over the first one's files
        main(phantoms.config(*overrides, name="fuse", folder=tmp_path / "hydra"))
    said = capsys.readouterr().out
    assert "prepared: " in said and "DICOM: 24 slices" in said
    fused, mri = sitk.ReadImage(out / "fused.nii.gz"), read_scan(dicom_patient / "mri")
    derived = read_scan(out / "dicom")
    np.testing.assert_allclose(derived.image.GetOrigin(), mri.image.GetOrigin(), atol=1e-3)
    assert derived.image.GetSize() == mri.image.GetSize()
    values = [
        sitk.GetArrayFromImage(sitk.DICOMOrient(image, "RAS")) for image in (fused, derived.image)
    ]
    np.testing.assert_allclose(*values, atol=1e-4)
    header = pydicom.dcmread(next((out / "dicom").iterdir()))
    assert header.SeriesDescription == "clinfuse fused, preset stroke RESEARCH USE ONLY"
    assert header.PatientID == hashed("MRN-0042") and not header.StudyDate
    assert header.FrameOfReferenceUID == mri.frame_of_reference_uid
    assert (out / "study" / "brain_mask.nii.gz").is_file()
    # ITK's DICOM writer leaves the process in the locale C, in which text is ASCII by default
    report, facts = (
        (out / name).read_text(encoding="utf-8") for name in ("report.html", "study/study.json")
    )
    assert hashed("MRN-0042") in report and str(dicom_patient) not in report
    for name in ("Doe^Jane", "Doe Jane", "MRN-0042", "2024-01-31"):  # no words of base64
        assert name not in report and name not in facts


def test_dicom_that_does_not_belong_together_is_refused_and_nothing_is_written(
    dicom_patient, smoke_run, phantoms, tmp_path, capsys
):
    out = tmp_path / "out"
    overrides = [
        f"run={smoke_run}", f"mri={dicom_patient / 'ct'}", f"ct={dicom_patient / 'mri'}",
        f"out={out}", "masks=classical",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(phantoms.config(*overrides, name="fuse", folder=tmp_path / "hydra"))
    assert "got them swapped" in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "keep_ids", "shown"),
    [
        ("/scans/Doe_Jane/mri.nii.gz", False, hashed("Doe_Jane")),
        ("/scans/Doe_Jane/mri.nii.gz", True, "Doe_Jane"),
        ("/studies/P-0123456789ab/mri.nii.gz", False, "P-0123456789ab"),
        ("/scans/T1.weighted.nii", True, "T1.weighted"),
    ],
)
def test_a_report_names_the_patient_by_a_hash_unless_names_are_kept(path, keep_ids, shown):
    cfg = OmegaConf.create({"mri": path, "keep_ids": keep_ids, "salt": "", "series": {}})
    assert shown_name(cfg) == shown


def test_a_volume_too_large_for_the_memory_is_fused_in_windows_and_it_is_said(
    smoke_run, phantoms, tmp_path, capsys, monkeypatch
):
    long = make_phantom(7, 0, (9, 24, 132), (7.0, 6.0, 1.5), "adc")
    for name, array in (("mri", long.mri), ("ct", long.ct_hu)):
        affine = ras_affine((9, 24, 132), (7.0, 6.0, 1.5))
        image = nib.Nifti1Image(array.astype(np.float32).transpose(2, 1, 0), affine)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    no_masks = dict.fromkeys(NAMES[2:])
    asked = arguments(smoke_run, tmp_path, tmp_path / "out", **no_masks)
    main(phantoms.config(*asked, "memory_gb=0.03", name="fuse", folder=tmp_path / "hydra"))
    said = capsys.readouterr().out
    assert "evaluated in windows: " in said and "network=local says the same" in said
    assert nib.load(tmp_path / "out" / "fused.nii.gz").shape == (132, 24, 9)
    values = nib.load(tmp_path / "out" / "fused.nii.gz").get_fdata()
    monkeypatch.setattr(mapped_memory, "free_memory", lambda: 1)
    monkeypatch.setattr(mapped_memory, "SMALLEST", 2**12)
    main(phantoms.config(*asked, "memory_gb=0.03", name="fuse", folder=tmp_path / "hydra"))
    said = capsys.readouterr().out
    assert "volumes lay in files in " in said and "memory would not hold them" in said
    assert "memory would not hold them" in (tmp_path / "out" / "report.html").read_text()
    assert np.array_equal(nib.load(tmp_path / "out" / "fused.nii.gz").get_fdata(), values)
    for amount, sentence in (
        ("1e-6", "expected memory_gb of at least"),
        ("-1", "expected memory_gb=auto, null or a number above 0, got -1"),
    ):
        with pytest.raises(SystemExit):
            main(phantoms.config(*asked, f"memory_gb={amount}", name="fuse", folder=tmp_path))
        assert sentence in capsys.readouterr().err
