import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from clinfuse.reporting.collection import Scored
from clinfuse.reporting.paper import (
    LEVEL,
    LONG_COLUMNS,
    MOST_COLUMNS,
    long_table,
    markdown,
    ours_last,
    paper_table,
    provenance,
)
from clinfuse.reporting.rows import as_rows, case_rows
from clinfuse.reporting.tables import HEADLINE_SCORES, KEPT_SCORES, LESION_SCORES

PSNR, HD95 = ("bone", "psnr"), ("lesion", "hd95")


def rows_of(method, values, score=PSNR, mm=0.0, seed=0, patients=None):
    key = {"preset": "stroke", "mask_source": "expert", "steps": 0, "misregistration_mm": mm}
    return [
        row
        for number, value in enumerate(values)
        for row in case_rows(
            [(*score, value)],
            case_id=f"case_{number}",
            patient_id=None if patients is None else patients[number],
            method=method,
            seed=seed,
            **key,
        )
    ]


@pytest.fixture
def rows():
    """Twelve patients: ours beats ``worse``, ties with ``near``, and loses to ``better``."""
    random = np.random.default_rng(0)
    base = random.normal(20, 3, 12)
    made = rows_of("ours", base)
    made += rows_of("worse", base - random.uniform(0.5, 2, 12))
    made += rows_of("near", base + 0.3 * (-1.0) ** np.arange(12) * random.uniform(1, 1.1, 12))
    return made + rows_of("better", base + random.uniform(0.5, 2, 12))


def test_perturbed_cases_are_in_no_table_of_a_paper(rows):
    wrong = [row | {"perturbation": "mask_holes", "amount": 0.2, "value": 0.0} for row in rows]
    both = wrong + rows
    pd.testing.assert_frame_equal(
        long_table(both, [PSNR], "ours"), long_table(rows, [PSNR], "ours")
    )
    assert ours_last(both, "worse").equals(ours_last(rows, "worse"))
    assert provenance(both, []) == provenance(rows, [])
    tables = [paper_table(r, "quality", "Quality", [PSNR], "ours") for r in (both, rows)]
    assert markdown(tables[0]) == markdown(tables[1])


def of_method(rows, method):
    return np.array([row["value"] for row in rows if row["method"] == method])


def test_statistics_are_those_of_scipy_and_of_holm_by_hand(rows):
    long = long_table(rows, [PSNR], "ours").set_index("method")
    p = {
        name: stats.wilcoxon(of_method(rows, "ours") - of_method(rows, name)).pvalue
        for name in ("worse", "near", "better")
    }
    # All 12 differences of one sign: 2 of 2^12 signs are as uneven. Holm: the smallest of three
    # times three, the next times two and no smaller, the last as it is.
    assert p["worse"] == p["better"] == 2**-11
    by_hand = {"worse": 3 * 2**-11, "better": 3 * 2**-11, "near": p["near"]}
    for name in p:
        assert long.loc[name, "p"] == p[name]
        assert long.loc[name, "p_holm"] == pytest.approx(by_hand[name])
        assert long.loc[name, "mean"] == pytest.approx(of_method(rows, name).mean())
        expected = (of_method(rows, "ours") - of_method(rows, name)).mean()
        assert long.loc[name, "difference"] == pytest.approx(expected)
    assert tuple(long.reset_index().columns) == LONG_COLUMNS


def test_statistics_of_many_methods_and_gaps_are_those_of_scipy_and_statsmodels():
    random = np.random.default_rng(1)
    values = {name: random.normal(level, 1, 15) for level, name in enumerate("oabcdef")}
    values["c"][[2, 9]] = math.nan
    made = [row for name, column in values.items() for row in rows_of(name, column)]
    long = long_table(made, [PSNR], "o").set_index("method")
    others = list("abcdef")
    paired = {name: (values["o"] - values[name])[~np.isnan(values[name])] for name in others}
    p = [stats.wilcoxon(paired[name]).pvalue for name in others]
    np.testing.assert_allclose(long.loc[others, "p"], p, rtol=1e-12)
    corrected = multipletests(p, method="holm")[1]
    np.testing.assert_allclose(long.loc[others, "p_holm"], corrected, rtol=1e-12)
    assert long.loc["c", ["n", "pairs", "undefined"]].tolist() == [13, 13, 2]
    interval = stats.bootstrap(  # another sample of resamples: alike to a twentieth of the width
        [values["a"]], np.mean, method="percentile", n_resamples=20_000, random_state=random
    ).confidence_interval
    width = interval.high - interval.low
    assert long.loc["a", "low"] == pytest.approx(interval.low, abs=width / 20)
    assert long.loc["a", "high"] == pytest.approx(interval.high, abs=width / 20)


def test_a_win_a_tie_and_a_loss_are_told_apart(rows):
    marks = long_table(rows, [PSNR], "ours").set_index("method")["mark"].to_dict()
    assert marks == {"ours": "", "worse": "win", "near": "tie", "better": "loss"}


def test_of_a_distance_the_smaller_is_the_win(rows):
    distances = [{**row, "roi": "lesion", "metric": "hd95"} for row in rows]
    marks = long_table(distances, [HD95], "ours").set_index("method")["mark"].to_dict()
    assert marks == {"ours": "", "worse": "loss", "near": "tie", "better": "win"}


def test_a_twin_is_a_tie_and_what_has_no_pair_is_untested():
    made = rows_of("ours", [1.0, 2, 3]) + rows_of("twin", [1.0, 2, 3])
    made += rows_of("failing", [math.nan] * 3)
    long = long_table(made, [PSNR], "ours").set_index("method")
    assert long.loc["twin", ["p", "p_holm", "mark"]].tolist() == [1.0, 1.0, "tie"]
    assert long.loc["failing", "mark"] == "" and math.isnan(long.loc["failing", "p"])
    assert long.loc["failing", ["n", "undefined"]].tolist() == [0, 3]


def test_the_sign_follows_what_was_tested_not_one_outlier():
    base = np.arange(20.0)
    better = base - np.linspace(1, 2, 20)
    better[7] = base[7] + 500  # the mean is in favour of the other, nineteen patients are not
    made = rows_of("ours", base) + rows_of("other", better)
    line = long_table(made, [PSNR], "ours").set_index("method").loc["other"]
    assert line["difference"] < 0 and line["p_holm"] < LEVEL and line["mark"] == "win"


def test_coverage_has_an_aim_of_its_own_and_no_winner():
    made = rows_of("ours", np.full(9, 0.9), ("bone", "coverage"))
    made += rows_of("other", np.linspace(0.5, 0.6, 9), ("bone", "coverage"))
    long = long_table(made, [("bone", "coverage")], "ours")
    assert (long["mark"] == "").all() and long["p_holm"].min() < LEVEL


def test_undefined_values_are_counted_and_said_wherever_they_are():
    values = [1.0, math.nan, 3.0, 5.0, 4.0]
    made = rows_of("ours", [2.0, 3, 4, 5, 6], HD95) + rows_of("other", values, HD95)
    line = long_table(made, [HD95], "ours").set_index("method").loc["other"]
    assert line[["n", "patients", "undefined", "pairs"]].tolist() == [4, 4, 1, 4]
    assert line["mean"] == 13 / 4
    table = paper_table(made, "lesion", "Lesions", LESION_SCORES, "ours")
    assert "mean over 5 test cases of 5 patients" in table.caption[0]
    assert table.notes[0] == "Undefined values, left out of means: 1 (Lesion HD95 (mm) 1)."
    assert "| other | **3.2** ± " in markdown(table) and ", n 4, 1 undefined |" in markdown(table)
    some = paper_table(rows_of("other", values, HD95), "lesion", "Lesions", LESION_SCORES)
    assert "mean over the 4 of 5 test cases of 5 patients that have a value" in some.caption[0]


def test_without_ours_nothing_is_tested_and_a_wrong_one_is_refused(rows):
    long = long_table(rows, [PSNR])
    assert (long["mark"] == "").all() and long["p"].isna().all()
    assert not any("Wilcoxon" in part for part in paper_table(rows, "a", "A", [PSNR]).caption)
    with pytest.raises(ValueError, match=r"one of \['better', .*'worse'\] as ours, got 'clinfuse'"):
        long_table(rows, [PSNR], "clinfuse")


def test_a_score_that_ours_lacks_is_shown_untested(rows):
    made = rows + rows_of("near", [0.5, 0.6], ("lesion", "dice"))
    assert long_table(made, LESION_SCORES, "ours")["mark"].tolist() == [""]


def test_the_table_has_a_row_for_each_method_score_and_amplitude(rows):
    moved = rows + [{**row, "misregistration_mm": 2.0, "value": row["value"] - 1} for row in rows]
    moved += [{**row, "roi": "whole", "metric": "ssim"} for row in rows]
    long = long_table(moved, HEADLINE_SCORES, "ours")
    assert long.groupby(["roi", "metric"], sort=False).size().to_dict() == {
        ("bone", "psnr"): 8, ("whole", "ssim"): 4,
    }  # fmt: skip
    assert not long.duplicated(["method", "roi", "metric", "misregistration_mm"]).any()


def test_ours_stands_last_and_the_others_as_they_came(rows):
    assert list(ours_last(rows, "ours")["method"].unique()) == ["worse", "near", "better", "ours"]
    assert list(ours_last(rows, None)["method"].unique()) == ["ours", "worse", "near", "better"]


def test_markdown_shows_the_best_the_second_the_interval_and_the_sign(rows):
    table = paper_table(ours_last(rows, "ours"), "quality", "Quality", [PSNR], "ours")
    text = markdown(table)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    long = long_table(rows, [PSNR], "ours").set_index("method")
    half = {m: f"{(long.loc[m, 'high'] - long.loc[m, 'low']) / 2:.1f}" for m in long.index}
    mean = {m: f"{long.loc[m, 'mean']:.1f}" for m in long.index}
    assert lines["method"] == "| method | Bone PSNR (dB) ↑ |"
    assert lines["better"] == f"| better | **{mean['better']}** ± {half['better']} − |"
    assert lines["worse"] == f"| worse | {mean['worse']} ± {half['worse']} + |"
    assert lines["near"].endswith(" = |")
    seconds = {m for m in mean if mean[m] == sorted(set(mean.values()))[-2]}
    assert {m for m, line in lines.items() if "<ins>" in line} == seconds
    assert "ours is better/not different/worse: Bone PSNR (dB) 1/1/1." in text


def test_text_that_is_markdown_shows_as_it_stands():
    made = rows_of("a|b*c*", [1.0, 2, 3]) + rows_of("<i>", [1.0, 2, 3])
    text = markdown(paper_table(made, "quality", "Quality", [PSNR]))
    assert "| a\\|b\\*c\\* |" in text and "| \\<i\\> |" in text


def test_too_few_patients_for_any_difference_are_said():
    """Of four patients p is at least 2 / 2^4 = 0.125; of twelve it may be 0.0005."""
    few = rows_of("ours", [1.0, 2, 3, 4]) + rows_of("other", [0.0, 0, 0, 0])
    table = paper_table(few, "quality", "Quality", [PSNR], "ours")
    assert table.notes[-1] == (
        "Too few patients for any difference to be shown: "
        "Bone PSNR (dB) (4 patients, 1 comparison)."
    )
    many = rows_of("ours", np.arange(1.0, 13)) + rows_of("other", np.zeros(12))
    notes = paper_table(many, "quality", "Quality", [PSNR], "ours").notes
    assert not any("Too few" in note for note in notes)


def test_slices_count_as_images_of_their_patients():
    made = [
        row
        for method, level in (("ours", 1.0), ("other", 0.0))
        for row in rows_of(method, level + np.arange(8.0), KEPT_SCORES[0], patients="aabbaabb")
    ]
    table = paper_table(made, "kept", "Kept", KEPT_SCORES, "ours")
    assert (
        "8 test cases of 2 patients, without intervals, which need 3 patients" in table.caption[0]
    )
    assert "±" not in markdown(table)


def test_many_scores_are_laid_out_as_panels_that_a_page_has_room_for():
    made = [
        row
        for method in "ab"
        for score in KEPT_SCORES
        for row in rows_of(method, [0.1, 0.2, 0.3], score)
    ]
    table = paper_table(made, "kept", "Kept", KEPT_SCORES)
    sizes = [len(panel.columns) for panel in table.panels]
    assert sum(sizes) == len(KEPT_SCORES) and max(sizes) <= MOST_COLUMNS
    moved = [{**row, "misregistration_mm": mm} for row in made for mm in (0.0, 2.0)]
    titles = [panel.title for panel in paper_table(moved, "kept", "Kept", KEPT_SCORES).panels]
    assert titles[:2] == ["Qabf ↑", "VIF ↑"] and len(titles) == len(KEPT_SCORES)


def test_scores_that_no_row_defines_make_no_table(rows):
    assert paper_table(rows, "lesion", "Lesions", LESION_SCORES, "ours") is None


def folder(name, commit=None, **known):
    facts = [{"torch": "2.13.0", "commit": commit}] if commit else []
    return Scored(name, pd.DataFrame(), facts=facts, has_commit=bool(commit), **known)


def test_the_caption_states_data_split_seeds_versions_and_every_commit(rows):
    parts = [
        folder(
            "a", "0123abcd", root="/data/x", split="made: by patient", data={"CT map": "window"}
        ),
        folder("b", "4567cdef (with changes)", root="/mnt/x", split="made: by patient"),
        folder("c"),
    ]
    twice = rows + [{**row, "seed": 1} for row in rows if row["method"] == "ours"]
    assert provenance(twice, parts) == [
        "Data: /data/x and /mnt/x; CT map window.",
        "Split: made: by patient.",
        "Seeds, averaged within a case: 0 and 1 of ours; 0 of worse, near and better.",
        "Versions: torch 2.13.0.",
        "Commits: 0123abcd and 4567cdef (with changes), and none recorded of the scoring in c.",
    ]
    assert provenance(rows, [folder("a", "0123abcd")])[-1] == "Commit: 0123abcd."
    assert provenance(as_rows(rows), [folder("c")]) == [
        "Data: not recorded.", "Split: not recorded.", "Seed: 0.", "Versions: not recorded.",
        "Commits: not recorded.",
    ]  # fmt: skip
