"""Folders as runs and evaluations leave them, to the files of a paper."""

import importlib.metadata
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats

from clinfuse.data.splits import write_splits
from clinfuse.reporting.rows import case_rows, read_rows, write_rows
from clinfuse.tables import (
    TABLES_PATH,
    axis_of,
    collect,
    main,
    readable,
    tables_of_sweep,
    write_tables,
)

CASES = [f"case_{number}" for number in range(8)]
VOLUMES = {
    "_target_": "clinfuse.data.paired_volumes.PairedVolumes",
    "root": "studies",
    "ct_map": "piecewise",
    "misregistration_deg_per_mm": 1.0,
}
GENERATED = {"_target_": "clinfuse.data.phantoms.write_cohort", "cases": 60, "workers": 2}
PAIRS = {"_target_": "clinfuse.data.paired_slices.PairedSlices", "root": "atlas", "kind": "ct_mri"}
LISTS = {"train": ["x"], "val": ["y"], "test": CASES}
FACTS = {"torch": "2.13.0", "python": "3.11.7", "commit": "0123abcd", "seed": 0}
FILES = {"cases.csv", "table.csv", "table.md", "table.tex"}
FIGURES = {"robustness.png", "robustness.pdf"}


def recorded(folder, cfg, overrides=(), cwd="."):
    """What Hydra leaves in a folder."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(cfg), folder / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.create(list(overrides)), folder / ".hydra" / "overrides.yaml")
    hydra = {"hydra": {"runtime": {"cwd": str(cwd)}}}
    OmegaConf.save(OmegaConf.create(hydra), folder / ".hydra" / "hydra.yaml")
    return folder


def scores(folder, method, level, cases=CASES, lists=LISTS, seed=0, amplitudes=(0.0, 2.0)):
    """cases.csv and splits.json: scores that rise with the case, and one HD95 that is undefined."""
    rows = []
    for number, case in enumerate(cases):
        for mm in amplitudes:
            value = level - mm + 0.1 * number + 0.01 * math.sin(7 * number + level)
            lost = math.nan if number == 3 else 30 - value
            rows += case_rows(
                [("bone", "psnr", value), ("lesion", "hd95", lost)],
                case_id=case, method=method, preset="default", seed=seed, misregistration_mm=mm,
                mask_source="expert", steps=0,
            )  # fmt: skip
    write_rows(folder / "cases.csv", rows)
    if lists is not None:
        write_splits(folder / "splits.json", lists, "made: by patient")
    return folder


def run(folder, method, level, data=VOLUMES, facts=FACTS, **changes):
    """A training that was scored."""
    recorded(folder, {"method_name": method, "test": True, "data": data})
    (folder / "facts.json").write_text(json.dumps(facts))
    return scores(folder, method, level, **changes)


def evaluation(folder, method, level, data=VOLUMES, asked=None, overrides=(), cwd=".", **changes):
    """An evaluation of a rule, or of the run ``asked``."""
    cfg = {"run": asked, "baselines": [], "data": data}
    return scores(recorded(folder, cfg, overrides, cwd), method, level, **changes)


def tables(folder, *patterns, ours=None, **asked):
    out = folder / "out"
    return write_tables(collect([str(p) for p in patterns], out), out, ours, **asked)


def configured(*overrides):
    with initialize_config_dir(TABLES_PATH, version_base="1.3"):
        return compose("tables", overrides)


def test_the_command_line_makes_a_table_of_any_mix_of_folders(entry_point, tmp_path):
    run(tmp_path / "runs" / "clinfuse" / "2026", "clinfuse", 25.0)
    sweep = tmp_path / "runs" / "sweep"
    evaluation(sweep / "0", "average", 20.0)
    evaluation(sweep / "1", "50% [a]_b", 24.99)
    recorded(sweep / "2", {"method_name": "diff_fccf", "test": True, "data": VOLUMES})
    out = tmp_path / "out"
    done = entry_point(
        "clinfuse.tables", f"from=[{tmp_path}/runs/cl*/*,{sweep},{tmp_path}/no*]", f"out={out}",
        "name=main", f"hydra.run.dir={tmp_path}/log",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"clinfuse: missing: {tmp_path}/no* matches no folder",
        f"clinfuse: left out: {sweep}/2 has no cases.csv: it failed, was stopped, or still runs",
    ]
    assert {path.name for path in out.iterdir()} == FILES | FIGURES
    assert f"md: {out}/table.md" in done.stdout and "fontTools" not in done.stdout

    rows = read_rows(out / "cases.csv")
    assert rows.groupby("method").size().to_dict() == dict.fromkeys(
        ["50% [a]_b", "average", "clinfuse"], 32
    )
    long = pd.read_csv(out / "table.csv")
    assert len(long) == 3 * 2 * 2
    of_bone = rows.query("metric == 'psnr' and misregistration_mm == 2").pivot(
        index="case_id", columns="method", values="value"
    )
    line = long.query("method == 'average' and metric == 'psnr' and misregistration_mm == 2")
    assert line["p"].item() == stats.wilcoxon(of_bone["clinfuse"], of_bone["average"]).pvalue
    assert line["mark"].item() == "win"
    undefined = long[long["metric"] == "hd95"]
    assert set(undefined["undefined"]) == {1} and set(undefined["n"]) == {7}

    markdown, latex = (out / "table.md").read_text(), (out / "table.tex").read_text()
    assert "Data: studies; kind of data volumes; CT map piecewise" in markdown
    assert "mean over 8 test cases of 8 patients" in markdown
    assert "Split: made: by patient. Seed: 0. Versions: python 3.11.7, torch 2.13.0." in markdown
    assert "Commit: 0123abcd, and none recorded of the scoring in " in markdown
    assert f"{tmp_path}/no* matches no folder" in markdown and f"- `{sweep}/0`" in markdown
    assert r"50\% {[}a{]}\_b &" in latex and r"\label{tab:main-quality}" in latex
    assert f"% left out: {sweep}/2 has no cases.csv" in latex and "tab:main-lesion" in latex


def test_nothing_to_collect_ends_in_a_sentence_and_a_status(tmp_path, capsys):
    recorded(tmp_path / "failed", {"data": VOLUMES})
    asked = f"from=[{tmp_path}/failed,{tmp_path}/none]"
    with pytest.raises(SystemExit) as exit_:
        main(configured(asked, f"out={tmp_path}/out"))
    assert exit_.value.code == 1 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err.splitlines()[2]
    assert error.startswith("clinfuse: expected folders with cases.csv, got none: missing: ")
    assert f"{tmp_path}/none matches no folder" in error
    assert f"left out: {tmp_path}/failed has no cases.csv" in error


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (["out=a"], "expected either from=[FOLDERS] or experiment=NAME"),
        (["from=a", "experiment=b"], "expected either from=[FOLDERS] or experiment=NAME"),
        (["from=a"], "expected out=FOLDER for the tables, got none"),
        (["experiment=b", "scale=x"], "expected a sweep with sweep.json, found none"),
    ],
)
def test_what_must_be_on_the_command_line_is_asked_for(asked, sentence, capsys):
    with pytest.raises(SystemExit):
        main(configured(*asked))
    assert sentence in capsys.readouterr().err


# Sweeps.


def swept(folder, jobs, table):
    """A sweep over the steps of a sampler whose runs at 2 and 20 steps are there."""
    folder.mkdir(parents=True)
    content = {"group": "steps", "jobs": jobs, "table": table, "command": "made by this"}
    (folder / "sweep.json").write_text(json.dumps(content))
    for steps in (20, 2):
        cfg = {"method_name": "clinfuse", "data": VOLUMES, "method": {"steps": steps}}
        job = recorded(folder / f"steps={steps}", cfg, [f"method.steps={steps}", "scale=small"])
        scores(job, f"method.steps={steps}", 20.0 + steps)
    return folder


def test_a_sweep_names_its_methods_its_curves_and_the_jobs_that_were_never_begun(tmp_path, capsys):
    folder = swept(
        tmp_path / "sweep",
        [[f"method.steps={steps}"] for steps in (2, 20, 50)],
        {
            "names": {"method.steps=": "steps "},
            "axis": {"key": "method.steps", "name": "steps"},
            "ours": "steps 20",
            "scores": ["bone/psnr"],
        },
    )
    written = {path.name for path in tables_of_sweep(folder)}
    assert written == FILES | FIGURES | {"curves.png", "curves.pdf"}
    missing = f"missing: {folder} has no run of method.steps=50: it was never begun"
    assert missing in capsys.readouterr().err
    text = (folder / "table" / "table.md").read_text()
    assert missing in text and "- `made by this`" in text and "| steps 2 |" in text
    long = pd.read_csv(folder / "table" / "table.csv")
    assert set(long["method"]) == {"steps 2", "steps 20"}
    assert set(long.query("method == 'steps 2'")["mark"]) == {"win"}
    elsewhere = tables_of_sweep(folder, tmp_path / "elsewhere")  # its own table is no job
    assert pd.read_csv(elsewhere[1]).equals(long)


def test_a_label_is_said_as_a_reader_would():
    names = {"method.guidance.eta=": "η ", "method.guidance.eta_u=": "η_u ", "ablation=": ""}
    assert readable("method.guidance.eta=0.1,method.guidance.eta_u=0.01", names) == (
        "η 0.1, η_u 0.01"
    )
    assert readable("ablation=no_guidance", names) == "no guidance"


def test_the_axis_of_a_sweep_is_what_its_runs_settings_say(tmp_path):
    folder = swept(tmp_path / "sweep", [], {})
    collected = collect([str(folder)], tmp_path / "out")
    axis = axis_of(collected.scored, "method.steps", "steps")
    assert {method: number for method, (_, number) in axis.values.items()} == {
        "method.steps=2": 2.0,
        "method.steps=20": 20.0,
    }
    assert axis_of(collected.scored, "method.eta", "η").values == {}


# What is collected, and what is named.


@pytest.mark.parametrize(
    "cfg, reason",
    [
        ({"test": True, "data": VOLUMES}, "has no cases.csv: it failed, was stopped, or still"),
        ({"test": False, "data": VOLUMES}, "was not to be scored (test=false)"),
        ({"data": VOLUMES, "method": {"_target_": "clinfuse.methods.lesion_head.LesionHead"}},
         "is a lesion head, which fuses nothing"),
    ],
    ids=["failed", "untested", "head"],
)  # fmt: skip
def test_a_run_without_scores_is_named_and_the_rest_goes_on(cfg, reason, tmp_path):
    recorded(tmp_path / "0", cfg)
    run(tmp_path / "1", "clinfuse", 25.0)
    collected = collect([str(tmp_path)], tmp_path / "out")
    assert [part.folder for part in collected.scored] == [str(tmp_path / "1")]
    assert [left.folder for left in collected.left_out] == [str(tmp_path / "0")]
    assert reason in str(collected.left_out[0])


@pytest.mark.parametrize("file", ["cases.csv", "splits.json", "facts.json", ".hydra/config.yaml"])
def test_a_folder_that_cannot_be_read_is_named_and_the_rest_goes_on(file, tmp_path):
    run(tmp_path / "0", "average", 20.0)
    run(tmp_path / "1", "clinfuse", 25.0)
    (tmp_path / "0" / file).write_text("{half: [")
    collected = collect([str(tmp_path)], tmp_path / "out")
    assert [part.folder for part in collected.scored] == [str(tmp_path / "1")]
    assert file.rsplit("/")[-1] in str(collected.left_out[0])


def test_folders_of_other_commands_are_no_failed_runs(tmp_path):
    recorded(tmp_path / "prepare", {"input": "a", "output": "b"})
    run(tmp_path / "run", "clinfuse", 25.0)
    collected = collect([str(tmp_path)], tmp_path / "out")
    assert len(collected.scored) == 1 and not collected.left_out


def test_a_sweeps_jobs_are_read_once_in_order_and_not_its_own_rows_of_them_all(tmp_path):
    for job in (10, 9):
        evaluation(tmp_path / "sweep" / str(job), f"method_{job}", 20.0 + job)
    scores(tmp_path / "sweep", "method_9", 1.0, lists=None)
    overlapping = [str(tmp_path / "**"), str(tmp_path / "sweep" / "9")]
    collected = collect(overlapping, tmp_path / "out")
    assert [part.rows["method"][0] for part in collected.scored] == ["method_9", "method_10"]


def test_runs_beside_the_evaluation_that_scored_them_are_not_scored_twice(tmp_path):
    """As ``make demo`` leaves them: the evaluation's folder holds its runs."""
    run(tmp_path / "demo" / "clinfuse", "clinfuse", 25.0)
    evaluation(tmp_path / "demo", "clinfuse", 25.0, asked=str(tmp_path / "demo" / "clinfuse"))
    collected = collect([str(tmp_path / "demo")], tmp_path / "out")
    assert [part.folder for part in collected.scored] == [str(tmp_path / "demo")]


def test_rows_without_any_record_are_a_table_whose_caption_says_so(tmp_path):
    scores(tmp_path / "kept", "average", 20.0, lists=None)
    tables(tmp_path, tmp_path / "kept")
    assert "Data: not recorded. Split: not recorded." in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize("overrides, ct_map", [([], "window"), (["data=studies"], "piecewise")])
def test_an_evaluation_is_of_its_runs_data_unless_its_command_chose_others(
    overrides, ct_map, tmp_path
):
    run(tmp_path / "runs" / "a", "clinfuse", 25.0, data={**VOLUMES, "ct_map": "window"})
    asked = {"asked": ["runs/a"], "overrides": ["run=runs/a", *overrides], "cwd": tmp_path}
    evaluation(tmp_path / "scored", "clinfuse", 25.0, **asked)
    (part,) = collect([str(tmp_path / "scored")], tmp_path / "out").scored
    assert part.data["CT map"] == ct_map
    assert [facts["commit"] for facts in part.facts] == ["0123abcd"] and not part.has_commit


def test_of_an_evaluation_whose_run_is_elsewhere_the_data_are_unknown(tmp_path):
    evaluation(tmp_path / "scored", "clinfuse", 25.0, asked="/other/machine/run")
    (part,) = collect([str(tmp_path / "scored")], tmp_path / "out").scored
    assert part.data == {} and part.root is None and part.split == "made: by patient"


# What may not stand in one table.


@pytest.mark.parametrize(
    "other, words",
    [
        ({"lists": {**LISTS, "test": [*CASES[:7], "case_9"]}}, "same test cases, got others in"),
        ({"cases": CASES[:7], "lists": None}, "case_7 in one of them alone"),
        ({"data": {**VOLUMES, "ct_map": "window"}}, "same CT map .* got piecewise in .* window in"),
        ({"data": {**VOLUMES, "prepare": GENERATED}}, "kind of data .* volumes in .* generated"),
        ({"data": PAIRS}, "same kind of data .* got volumes in .* and 2-D pairs in"),
        ({"data": {**VOLUMES, "misregistration_deg_per_mm": 0.0}}, "same turn for each mm"),
        ({"data": {**VOLUMES, "resample_mm": [4, 2, 2]}, "method": "clinfuse"}, "each method once"),
        ({"facts": {**FACTS, "data": {"ct_units": ["8-bit"]}}}, "units of CT .* HU in .* 8-bit"),
        ({"method": "clinfuse"}, "each method once, got clinfuse .* in .*/0 and .*/1"),
    ],
    ids=["split", "cases", "range", "cohort", "pairs", "turn", "unknown", "units", "twice"],
)  # fmt: skip
def test_what_is_not_comparable_is_refused_with_its_folders_and_nothing_is_written(
    other, words, tmp_path
):
    run(tmp_path / "0", "clinfuse", 25.0, facts={**FACTS, "data": {"ct_units": ["HU"]}})
    run(tmp_path / "1", other.pop("method", "average"), 20.0, **other)
    with pytest.raises(ValueError, match=f"expected .*{words}") as refused:
        tables(tmp_path, tmp_path / "?")
    assert f"{tmp_path}/0" in str(refused.value) and f"{tmp_path}/1" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_an_ablation_varies_may_differ_and_its_table_says_all_of_it(tmp_path):
    for number, ct_map in enumerate(("piecewise", "window_40_400")):
        run(tmp_path / str(number), ct_map, 20.0, data={**VOLUMES, "ct_map": ct_map})
    with pytest.raises(ValueError, match="the same CT map"):
        tables(tmp_path, tmp_path / "?")
    tables(tmp_path, tmp_path / "?", may_differ=["CT map"])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "CT map piecewise and window_40_400" in text


def test_phantoms_of_another_cohort_and_pairs_of_another_kind_are_refused(tmp_path):
    made = [{**VOLUMES, "prepare": {**GENERATED, "cases": n, "workers": n}} for n in (60, 24)]
    kinds = [{**PAIRS, "kind": kind} for kind in ("ct_mri", "spect_mri")]
    for number, data in enumerate([*made, *kinds]):
        run(tmp_path / str(number), f"method_{number}", 20.0, data=data)
    with pytest.raises(ValueError, match=r"same cohort .* got cases 60 in .* and cases 24 in"):
        tables(tmp_path, tmp_path / "[01]")
    with pytest.raises(ValueError, match=r"same kind of pairs .* got ct_mri in .* spect_mri in"):
        tables(tmp_path, tmp_path / "[23]")


def test_one_cohort_on_two_machines_is_one_whatever_its_root_and_commit(tmp_path):
    run(tmp_path / "0", "average", 20.0)
    there = {**FACTS, "commit": "4567cdef", "torch": "2.12.0"}
    run(tmp_path / "1", "clinfuse", 25.0, data={**VOLUMES, "root": "/mnt/studies"}, facts=there)
    tables(tmp_path, tmp_path / "?", ours="clinfuse")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Data: studies and /mnt/studies;" in text and "torch 2.13.0 and 2.12.0" in text
    assert "Commits: 0123abcd and 4567cdef." in text


def test_seeds_are_averaged_within_a_case_and_stated(tmp_path):
    for seed in (0, 1):
        run(tmp_path / str(seed), "clinfuse", 25.0 + seed, seed=seed)
    tables(tmp_path, tmp_path / "?", ours="clinfuse")
    long = pd.read_csv(tmp_path / "out" / "table.csv")
    means = [read_rows(tmp_path / s / "cases.csv").query("metric == 'psnr'")["value"] for s in "01"]
    expected = np.mean([part[::2].mean() for part in means])
    assert long.loc[0, "mean"] == pytest.approx(expected) and long.loc[0, "n"] == len(CASES)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Seeds: 0 and 1, averaged within a case." in text


# What is written.


def test_ours_without_rows_is_refused_unless_its_run_may_be_what_failed(tmp_path, capsys):
    run(tmp_path / "0", "average", 20.0)
    with pytest.raises(ValueError, match=r"expected one of average as ours .*ours=null.*clinfus$"):
        tables(tmp_path, tmp_path / "0", ours="clinfus")
    tables(tmp_path, tmp_path / "0", tmp_path / "none", ours="clinfuse")
    assert "no scores of clinfuse, so nothing is tested" in capsys.readouterr().err
    assert "Wilcoxon" not in (tmp_path / "out" / "table.md").read_text()


def test_scores_are_chosen_by_group_and_singly(tmp_path):
    run(tmp_path / "0", "average", 20.0)
    tables(tmp_path, tmp_path / "0", scores=["lesion/hd95"], name="main")
    assert set(pd.read_csv(tmp_path / "out" / "table.csv")["metric"]) == {"hd95"}
    assert r"\label{tab:main-scores}" in (tmp_path / "out" / "table.tex").read_text()
    tables(tmp_path, tmp_path / "0", scores=["quality", "kept"])
    assert set(pd.read_csv(tmp_path / "out" / "table.csv")["metric"]) == {"psnr"}
    with pytest.raises(ValueError, match=r"quality, kept, .* bone/psnr, .*, got bone/pnsr"):
        tables(tmp_path, tmp_path / "0", scores=["bone/pnsr"])
    with pytest.raises(ValueError, match="rows of kept, got none"):
        tables(tmp_path, tmp_path / "0", scores=["kept"])


def test_a_table_made_again_has_nothing_left_of_the_one_before(tmp_path):
    run(tmp_path / "0", "average", 20.0)
    run(tmp_path / "1", "maximum", 21.0, amplitudes=(0.0,))
    tables(tmp_path, tmp_path / "0")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | FIGURES
    tables(tmp_path, tmp_path / "1")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert set(read_rows(tmp_path / "out" / "cases.csv")["method"]) == {"maximum"}


def test_a_table_in_the_folder_it_is_collected_from_is_not_collected_itself(tmp_path):
    run(tmp_path / "runs" / "0", "average", 20.0)
    for _ in range(2):
        collected = collect([str(tmp_path / "runs")], tmp_path / "runs" / "out")
        write_tables(collected, tmp_path / "runs" / "out")
    assert len(collected.scored) == 1


def test_a_runs_own_folder_is_not_written_over(tmp_path):
    folder = run(tmp_path / "0", "average", 20.0)
    before = (folder / "cases.csv").read_bytes()
    with pytest.raises(ValueError, match="a folder of its own as out"):
        write_tables(collect([str(folder)], folder), folder)
    assert (folder / "cases.csv").read_bytes() == before


def test_a_dollar_in_a_name_does_not_stop_the_figure(tmp_path):
    run(tmp_path / "0", "$_{$ costs", 20.0)
    tables(tmp_path, tmp_path / "0", ours="$_{$ costs")
    assert (tmp_path / "out" / "robustness.pdf").read_bytes().startswith(b"%PDF-")


def test_perturbed_cases_have_a_figure_beside_the_tables_that_are_without_them(tmp_path):
    perturbed = {"perturbations.csv", "perturbations.png", "perturbations.pdf"}
    for method, level in (("average", 20.0), ("$ours", 25.0)):
        run(tmp_path / method, method, level)
    tables(tmp_path, tmp_path / "average", tmp_path / "$ours", ours="$ours")
    plain = (tmp_path / "out" / "table.csv").read_text()
    assert not perturbed & {path.name for path in (tmp_path / "out").iterdir()}

    for method in ("average", "$ours"):
        rows = read_rows(tmp_path / method / "cases.csv")
        rows = rows[rows["misregistration_mm"] == 0]
        wrong = rows.assign(perturbation="noise_std", amount=0.1, value=rows["value"] - 5)
        write_rows(tmp_path / method / "cases.csv", wrong)
    tables(tmp_path, tmp_path / "average", tmp_path / "$ours", ours="$ours")
    assert perturbed <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "table.csv").read_text() == plain
    assert len(read_rows(tmp_path / "out" / "cases.csv")) == 2 * 3 * 16
    numbers = pd.read_csv(tmp_path / "out" / "perturbations.csv").query("axis == 'noise_std'")
    mean = numbers.query("metric == 'psnr'").set_index(["method", "amount"])["mean"]
    assert mean["$ours", 0.0] - mean["$ours", 0.1] == pytest.approx(5)

    shutil.rmtree(tmp_path / "$ours")
    scores(tmp_path / "average2", "average", 20.0)
    tables(tmp_path, tmp_path / "average2")
    assert not perturbed & {path.name for path in (tmp_path / "out").iterdir()}  # stale ones go


def test_a_real_run_states_its_cohort_its_split_and_its_versions(smoke_run, tmp_path):
    tables(tmp_path, smoke_run, ours="clinfuse")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "kind of data generated volumes; cohort cases 8, seed 0, shape 16 × 32 × 32" in text
    assert "CT map piecewise" in text and "units of CT HU" in text
    assert "Split: the lists that came with the data." in text
    commit = json.loads((smoke_run / "facts.json").read_text())["commit"]
    assert f"torch {importlib.metadata.version('torch')}" in text and f"Commit: {commit}." in text


@pytest.mark.slow
def test_a_real_evaluation_is_collected_with_its_data(entry_point, tmp_path):
    done = entry_point(
        "clinfuse.evaluate", "-m", "method=average,maximum", "data=phantom_slices",
        "phantom_slices.patients=3", "phantom_slices.slices=1", "phantom_slices.shape=[48,48]",
        "misregistration_mm=[0]", f"cache_dir={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/all",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tables(tmp_path, tmp_path / "all", ours="maximum")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "kind of data generated 2-D pairs; cohort kind ct_mri, patients 3, slices 1" in text
    assert "shape 48 × 48" in text and "| method | Qabf ↑ | VIF ↑ |" in text
    shutil.rmtree(tmp_path / "all" / "1")
    assert len(collect([str(tmp_path / "all")], tmp_path / "out").scored) == 1
