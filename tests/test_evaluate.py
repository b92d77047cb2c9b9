import json
import re
import shutil

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from clinfuse.configuration import lesion_head_of, save_config, trained_method
from clinfuse.data.splits import write_splits
from clinfuse.evaluate import OneTable, data_of, main, one_table, rule
from clinfuse.functional.psnr import psnr
from clinfuse.methods.rules import Maximum, Weighted
from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.train import main as train


@pytest.fixture(scope="module")
def evaluated(smoke_run, phantoms, tmp_path_factory):
    """A run, a sister run of another seed and two rules, scored together at three amplitudes."""
    folder = tmp_path_factory.mktemp("evaluation")
    sister = folder / "sister"
    shutil.copytree(smoke_run, sister)
    saved = OmegaConf.load(sister / ".hydra" / "config.yaml")
    saved.seed = 7
    save_config(saved, sister)
    overrides = (
        f"run=[{sister},{smoke_run}]", "baselines=[average,maximum]", "misregistration_mm=[0,2,4]",
    )  # fmt: skip
    main(phantoms.config(*overrides, name="evaluate", folder=folder))
    return folder


@pytest.fixture(scope="module")
def rows(evaluated):
    return pd.read_csv(evaluated / "cases.csv")


def test_an_evaluation_records_what_it_was_made_with(evaluated):
    facts = json.loads((evaluated / "facts.json").read_text())
    assert {"commit", "torch", "python"} <= facts.keys() and facts["data"]["root"]


def test_one_table_holds_every_method_at_every_amplitude(evaluated, rows):
    assert set(rows["method"]) == {"clinfuse", "average", "maximum"}
    assert set(rows["mask_source"]) == {"expert"}
    for _, scores in rows.groupby("method"):
        assert set(scores["misregistration_mm"]) == {0.0, 2.0, 4.0}
    measured = rows[rows["metric"].isin({"ssim", "fsim", "psnr"})]
    key = ["method", "seed", "misregistration_mm", "case_id"]
    assert set(measured.groupby(key).size()) == {7}
    assert (evaluated / "report.html").is_file()
    assert (evaluated / "figures" / "robustness.png").is_file()


def test_what_a_run_learned_of_its_uncertainty_is_applied_to_its_own_rows_alone(rows):
    for method, scores in rows.groupby("method"):
        of_spread = scores[scores["metric"].isin({"coverage", "width", "ence", "uce"})]
        if method == "clinfuse":
            assert set(of_spread["roi"]) == {"brain", "bone", "whole"}
            covered = of_spread[of_spread["metric"] == "coverage"]["value"]
            assert ((covered > 0.3) & (covered <= 1)).all()
        else:
            assert of_spread.empty and "ence_raw" not in set(scores["metric"])


def test_under_other_guidance_the_runs_calibration_is_not_applied_and_the_log_says_so(
    smoke_run, phantoms, tmp_path, caplog
):
    overrides = (f"run={smoke_run}", "guidance.eta=0.3", "misregistration_mm=[0]", "pictures=0")
    main(phantoms.config(*overrides, name="evaluate", folder=tmp_path))
    metrics = set(pd.read_csv(tmp_path / "cases.csv")["metric"])
    assert "ence_raw" in metrics and not metrics & {"ence", "coverage"}
    assert "other guidance than" in caplog.text


@pytest.fixture(scope="module")
def lesion_head(phantoms, tmp_path_factory):
    """Folder of a lesion head, trained for seconds: it finds something, right or wrong."""
    folder = tmp_path_factory.mktemp("lesion_head")
    overrides = ("method=lesion_head", "trainer.max_epochs=1", "test=false")
    train(phantoms.config(*phantoms.smoke, *overrides, folder=folder))
    return folder


@pytest.fixture
def lesion_run(smoke_run, tmp_path):
    """The run, had it been trained to care for the lesion above all, yet without a head."""
    folder = tmp_path / "lesion_run"
    shutil.copytree(smoke_run, folder)
    saved = OmegaConf.load(folder / ".hydra" / "config.yaml")
    saved.guidance.eta, saved.guidance.gamma = 1.0, 1000.0
    save_config(saved, folder)
    return folder


def test_a_lesion_head_guides_a_run_that_was_trained_without_one_and_scores_it(
    lesion_run, lesion_head, phantoms, tmp_path
):
    def scored(*overrides):
        folder = tmp_path / f"scored_{len(overrides)}"
        asked = (f"run={lesion_run}", "misregistration_mm=[2]", "pictures=0", *overrides)
        full = "trainer.precision=32-true"  # as here
        main(phantoms.config(*asked, full, name="evaluate", folder=folder))
        return pd.read_csv(folder / "cases.csv").set_index(["roi", "metric"])["value"]

    method = trained_method(lesion_run)
    assert method.lesion_head is None
    data = data_of(phantoms.config("misregistration_mm=[2]", name="evaluate"), [str(lesion_run)])
    data.setup("test")
    (batch,) = data.test_batches(2.0)

    def psnr_of_lesion_head(head):
        method.lesion_head = head
        mean = method.model_draws(batch).mean((0, 1)).clamp(-1, 1)
        return psnr(mean, batch.reference, torch.ones_like(batch.brain)).item()

    alone, guided = scored(), scored(f"lesion_head={lesion_head}")
    expected = [psnr_of_lesion_head(head) for head in (None, lesion_head_of(lesion_head))]
    assert [alone["whole", "psnr"], guided["whole", "psnr"]] == pytest.approx(expected, rel=1e-4)
    assert abs(expected[1] - expected[0]) > 0.1
    assert {"dice", "nsd", "hd95"} <= set(guided["lesion"].index)
    assert "dice" not in alone["lesion"].index

    # guided by it, the run is not sampled as it was calibrated
    of_intervals = {"ence", "coverage", "width"}
    assert of_intervals <= set(alone["brain"].index) and "ence_raw" in guided["brain"].index
    assert not of_intervals & set(guided["brain"].index)


def test_an_automatic_mask_is_drawn_by_the_lesion_head_for_every_method(
    smoke_run, lesion_head, phantoms, tmp_path
):
    def scores(mask_source):
        overrides = (
            f"run={smoke_run}", "baselines=[average]", f"lesion_head={lesion_head}",
            "misregistration_mm=[2]", "pictures=0", f"mask_source={mask_source}",
        )  # fmt: skip
        folder = tmp_path / mask_source
        main(phantoms.config(*overrides, name="evaluate", folder=folder))
        rows = pd.read_csv(folder / "cases.csv").query("metric != 'seconds'")
        assert set(rows["mask_source"]) == {mask_source}
        key = ["case_id", "roi", "metric"]
        return {name: of.set_index(key)["value"] for name, of in rows.groupby("method")}

    automatic, expert = scores("automatic"), scores("expert")
    pd.testing.assert_series_equal(automatic["average"], expert["average"])  # it looks at no mask
    assert (automatic["clinfuse"] - expert["clinfuse"]).abs().max() > 1e-4


def test_runs_of_two_seeds_both_count(rows):
    assert set(rows[rows["method"] == "clinfuse"]["seed"]) == {0, 7}


def test_a_run_keeps_its_preset_and_its_number_of_steps(rows):
    of_run = rows[rows["method"] == "clinfuse"]
    assert set(of_run["preset"]) == {"stroke"} and set(of_run["steps"]) == {2}


@pytest.mark.parametrize("name, method", [("average", Weighted(0.5)), ("maximum", Maximum())])
def test_every_method_is_scored_on_the_same_moved_cases(name, method, rows, smoke_run, phantoms):
    asked = ("misregistration_mm=[0,2,4]", f"run={smoke_run}")
    data = data_of(phantoms.config(*asked, name="evaluate"), [str(smoke_run)])
    data.setup("test")
    chosen = rows.query(f"method == '{name}' and roi == 'bone' and metric == 'psnr'")
    for amplitude in (0.0, 2.0, 4.0):
        (batch,) = data.test_batches(amplitude)
        expected = psnr(method.fuse(batch), batch.clean_ct, batch.clean_roi[:, 1:2]).item()
        (got,) = chosen.query(f"misregistration_mm == {amplitude}")["value"]
        assert got == pytest.approx(expected, rel=1e-4)


def test_scores_at_zero_millimetres_are_those_of_training(rows, smoke_run):
    trained = pd.read_csv(smoke_run / "cases.csv").query("metric != 'seconds'")
    key = ["case_id", "method", "misregistration_mm", "roi", "metric", "seed"]
    both = rows.merge(trained, on=key, suffixes=("", "_then"))
    assert len(both) == len(trained)
    # one process sampled with averaged weights in memory, the other read them: not bit for bit
    now, then = both["value"].to_numpy(), both["value_then"].to_numpy()
    assert now == pytest.approx(then, rel=1e-3, nan_ok=True)


def test_a_rule_is_scored_on_any_data_without_a_run(phantoms, tmp_path):
    overrides = (
        "method=mask_composite", "data=studies", f"data.root={phantoms.root}", "pictures=0",
        "misregistration_mm=[1]", "mask_source=none", "preset=bone_tumor",
    )  # fmt: skip
    main(phantoms.config(*overrides, name="evaluate", folder=tmp_path))
    rows = pd.read_csv(tmp_path / "cases.csv")
    assert set(rows["method"]) == {"mask_composite"} and set(rows["mask_source"]) == {"none"}
    assert set(rows["preset"]) == {"bone_tumor"} and set(rows["misregistration_mm"]) == {1.0}


def test_everything_that_can_go_wrong_is_scored_by_one_command(phantoms, tmp_path):
    overrides = (
        "baselines=[average,mask_composite]", "data=studies", f"data.root={phantoms.root}",
        "pictures=0", "misregistration_mm=[0,2]", "perturbations=all",
        "perturbations.rotation_deg=[0,2]", "perturbations.noise_std=null",
    )  # fmt: skip
    main(phantoms.config(*overrides, name="evaluate", folder=tmp_path))
    rows = read_rows(tmp_path / "cases.csv")
    amounts = {
        perturbation: sorted(of["amount"].unique())
        for perturbation, of in rows.groupby("perturbation")
    }
    assert amounts == {
        "": [0.0], "rotation_deg": [2.0], "mask_shift_mm": [2.0, 4.0],
        "mask_dilation_mm": [-2.0, 2.0, 4.0], "mask_holes": [0.2, 0.4], "without_lesion": [1.0],
    }  # fmt: skip
    assert rows.groupby("method").size().nunique() == 1
    bone = rows.query("roi == 'bone' and metric == 'psnr'").set_index(
        ["method", "misregistration_mm", "perturbation", "amount"]
    )["value"]
    plain = bone["average", 0.0, "", 0.0]
    assert bone["average", 0.0, "mask_holes", 0.4] == plain  # it looks at no mask
    fallen = bone["mask_composite", 0.0, "mask_holes", 0.4]
    assert (
        fallen < bone["mask_composite", 0.0, "mask_holes", 0.2] < bone["mask_composite", 0, "", 0]
    )
    assert bone["average", 0.0, "rotation_deg", 2.0] not in (plain, bone["average", 2.0, "", 0.0])
    assert (tmp_path / "figures" / "perturbations.pdf").is_file()
    report = (tmp_path / "report.html").read_text("utf-8")
    assert "Holes in masks" in report and "<dt>mask_holes</dt>" in report


def test_a_run_from_before_there_were_perturbations_is_scored_under_them(
    smoke_run, phantoms, tmp_path
):
    saved = OmegaConf.load(smoke_run / ".hydra" / "config.yaml")
    assert not {"perturbations", "perturbed_at_mm"} & set(saved.data)
    overrides = (
        f"run={smoke_run}", "misregistration_mm=[0]", "perturbations.noise_std=[0.3]", "pictures=0",
        "perturbed_at_mm=2",
    )  # fmt: skip
    main(phantoms.config(*overrides, name="evaluate", folder=tmp_path))
    rows = read_rows(tmp_path / "cases.csv")
    tried = rows[["misregistration_mm", "perturbation", "amount"]].drop_duplicates().to_numpy()
    assert tried.tolist() == [[0.0, "", 0.0], [2.0, "noise_std", 0.3]]


def test_shared_cases_come_together_as_one_worker_scores_them(phantoms, tmp_path, capsys):
    cases = [f"case_{number:03d}" for number in range(8)]
    asked = (
        "baselines=[maximum,average]", "data=studies", f"data.root={phantoms.root}", "pictures=0",
        "misregistration_mm=[0,2]", f"+data.splits.train={cases[:1]}", "trainer=default",
        f"+data.splits.val={cases[1:2]}", f"+data.splits.test={cases[4:]}",
    )  # fmt: skip

    def scored(out, *overrides):
        main(phantoms.config(*asked, f"out={out}", *overrides, name="evaluate", folder=tmp_path))
        return read_rows(out / "cases.csv") if (out / "cases.csv").is_file() else None

    alone, out = scored(tmp_path / "alone"), tmp_path / "shared"
    assert scored(out, "shared=true", "shard=1/2") is None
    assert "2 of 4 cases scored" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*/*.csv")}
    together = scored(out, "shared=true")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    measured = [
        rows[rows["metric"] != "seconds"].reset_index(drop=True) for rows in (alone, together)
    ]
    pd.testing.assert_frame_equal(*measured, check_exact=True)
    assert alone["case_id"].tolist() == together["case_id"].tolist()
    assert (out / "report.html").is_file() and (out / "facts.json").is_file()
    with pytest.raises(SystemExit):
        scored(out, "shared=true", "mask_source=none")
    assert "of the same settings and weights" in capsys.readouterr().err


def test_shared_cases_need_a_folder_that_all_name(phantoms, tmp_path, capsys):
    asked = ("method=average", "data=studies", f"data.root={phantoms.root}", "shared=true")
    assert "expected out=FOLDER" in refusal(phantoms, tmp_path, capsys, *asked)


def test_the_configured_rules_are_built_by_name_alone():
    assert isinstance(rule("maximum"), Maximum) and rule("weighted").mri_weight == 0.7


# Bad input.


def refusal(phantoms, folder, capsys, *overrides):
    with pytest.raises(SystemExit) as exit_:
        main(phantoms.config(*overrides, name="evaluate", folder=folder))
    assert exit_.value.code == 1
    sentence = capsys.readouterr().err.strip().splitlines()[0]
    assert sentence.startswith("clinfuse: expected ")
    assert {path.name for path in folder.iterdir()} == {".hydra"}
    return sentence


@pytest.mark.parametrize(
    "overrides, words",
    [
        ([], "run=RUN_FOLDER, method=NAME or baselines="),
        (["run=/no/such/run"], "found none in /no/such/run"),
        (["baselines=[avarage]"], "method of average.*got 'avarage'"),
        (["baselines=[clinfuse]"], "without weights, got clinfuse: name its run folder, run="),
        (["method=deterministic_unet"], "without weights, got deterministic_unet"),
        (["method=average", "data=studies", "data.root=HEADS", "mask_source=oracle"],
         "mask_source of .'expert', 'automatic', 'none'., got 'oracle'"),
        (["method=average", "data=studies", "data.root=HEADS", "mask_source=automatic"],
         "a lesion head for mask_source=automatic .lesion_head=FOLDER."),
        (["method=average", "data=studies", "data.root=/no/such/data"], "folder.*/no/such/data"),
        (["method=average", "data=studies", "data.root=HEADS", "lesion_head=/no/such/head"],
         "a lesion head .a run of .* found no folder at /no/such/head"),
        (["method=average", "data=studies"], "data.root=VALUE on the command line, got none"),
        (["method=average", "data=studies", "data.root=HEADS", "misregistration_mm=2"],
         r"misregistration_mm=\[LIST\], got 2"),
        (["method=average", "data=studies", "data.root=HEADS", "misregistration_mm=[]"],
         r"misregistration_mm=\[LIST\], got \[\]"),
        (["method=average", "data=studies", "data.root=HEADS", "misregistration_mm=[far]"],
         "numbers in misregistration_mm, got .'far'"),
        (["run=5"], "found none in 5"),
        (["method=average", "data=studies", "data.root=HEADS", "perturbations.noise_std=0.1"],
         "a list of amounts for noise_std, got 0.1"),
        (["method=average", "data=studies", "data.root=HEADS", "perturbations.mask_holes=[2]"],
         r"shares of a mask in \[0, 1\) for mask_holes, got 2"),
        (["method=average", "data=studies", "data.root=HEADS", "perturbations=all",
          "mask_source=none"], "mask_source=expert where .*without_lesion.* got mask_source=none"),
        (["method=average", "data=phantom_slices", "perturbations.without_lesion=[1]"],
         "volumes for without_lesion"),
    ],
    ids=["nothing", "no_run", "misspelt", "untrained", "untrained_method", "mask",
         "mask_without_head", "data", "head", "no_root", "no_list", "empty_list", "no_number",
         "number_for_a_run", "no_amounts", "no_share", "withheld_twice", "no_lesion"],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_a_sentence(
    overrides, words, phantoms, tmp_path, capsys
):
    overrides = [override.replace("HEADS", str(phantoms.root)) for override in overrides]
    assert re.search(words, refusal(phantoms, tmp_path, capsys, *overrides))


def test_a_run_on_volumes_is_not_scored_on_slices(smoke_run, phantoms, tmp_path, capsys):
    overrides = (f"run={smoke_run}", "data=phantom_slices", "misregistration_mm=[0]")
    sentence = refusal(phantoms, tmp_path, capsys, *overrides)
    assert f"images of 2 axes, as the data has, got one trained on 3: {smoke_run}" in sentence


def test_a_bad_study_among_the_test_cases_is_named_and_nothing_is_written(
    phantoms, tmp_path, capsys
):
    cohort = tmp_path / "cohort"
    shutil.copytree(phantoms.root, cohort)
    case = phantoms.data().splits["test"][0]
    (cohort / case / "mri.nii.gz").unlink()
    overrides = ("method=average", "data=studies", f"data.root={cohort}")
    sentence = refusal(phantoms, tmp_path / "out", capsys, *overrides)
    assert "mri.nii.gz" in sentence and case in sentence


@pytest.fixture
def evaluations(tmp_path):
    """Two folders as ``-m method=average,maximum`` leaves them, of two cases."""
    for job, method in enumerate(("average", "maximum")):
        scores = [("whole", "ssim", 0.5 + 0.1 * job), ("whole", "qabf", 0.4)]
        facts = {"preset": "default", "seed": 0, "misregistration_mm": 0.0}
        facts |= {"mask_source": "expert", "steps": 0}
        rows = [r for c in "ab" for r in case_rows(scores, case_id=c, method=method, **facts)]
        write_rows(tmp_path / str(job) / "cases.csv", rows)
        lists = {"train": ["c"], "val": [], "test": ["a", "b"]}
        write_splits(tmp_path / str(job) / "splits.json", lists, "here")
    return tmp_path


def test_a_multirun_over_methods_ends_in_one_table(evaluations, capsys):
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(evaluations)}}})
    OneTable().on_multirun_end(config)
    assert "All together" in capsys.readouterr().out
    rows = read_rows(evaluations / "cases.csv")
    assert rows.groupby("method").size().to_dict() == {"average": 4, "maximum": 4}
    table = (evaluations / "table.md").read_text()
    assert "average" in table and "0.600" in table and "Qabf" in table


def test_a_table_of_different_test_cases_is_refused(evaluations, caplog):
    lists = {"train": [], "val": [], "test": ["a"]}
    write_splits(evaluations / "1" / "splits.json", lists, "elsewhere")
    with pytest.raises(ValueError, match="expected evaluations of the same test cases"):
        one_table(evaluations)
    OneTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(evaluations)}}}))
    assert "same test cases" in caplog.text and not (evaluations / "table.md").exists()


def test_a_table_of_one_method_twice_is_refused(evaluations):
    shutil.copytree(evaluations / "0", evaluations / "2")
    with pytest.raises(ValueError, match="each method once, got average"):
        one_table(evaluations)


def test_the_command_line_runs_the_table_after_a_multirun(entry_point, tmp_path):
    done = entry_point(
        "clinfuse.evaluate", "-m", "method=average,maximum", "data=phantom_slices",
        "phantom_slices.patients=3", "phantom_slices.slices=1", "phantom_slices.shape=[48,48]",
        "misregistration_mm=[0]", f"cache_dir={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/all",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(read_rows(tmp_path / "all" / "cases.csv")["method"]) == {"average", "maximum"}
    assert f"table: {tmp_path}/all/table.md" in done.stdout
