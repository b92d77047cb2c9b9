import io
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from clinfuse.reporting.rows import case_rows
from clinfuse.reporting.tables import (
    CALIBRATION_SCORES,
    HEADLINE_SCORES,
    STATISTICS,
    amplitudes_mm,
    better,
    bootstrap_interval,
    conspicuity_table,
    footnote,
    headline,
    headline_scores,
    holm,
    is_headline,
    paired_differences,
    print_table,
    score_cells,
    score_label,
    summary,
    to_markdown,
)

SEEN = ("conspicuity", "conspicuity_min")
SCORES = {("bone", "psnr"): 20.0, ("brain", "ssim"): 0.8, ("lesion", "hd95"): 3.0}


def rows_of(method, values, roi="bone", metric="psnr", mm=0.0, seed=0, patients=None, **changes):
    key = {"preset": "stroke", "mask_source": "expert", "steps": 0, **changes}
    return [
        row
        for number, value in enumerate(values)
        for row in case_rows(
            [(roi, metric, value)],
            case_id=f"case_{number}",
            patient_id=None if patients is None else patients[number],
            method=method,
            seed=seed,
            misregistration_mm=mm,
            **key,
        )
    ]


@pytest.fixture
def rows():
    """Two methods, two amplitudes, three scores, six cases; one undefined HD95 of each method."""
    random = np.random.default_rng(1)
    made = []
    for method, offset in (("ours", 0.05), ("average", 0.0)):
        for mm in (2.0, 0.0):
            for (roi, metric), level in SCORES.items():
                values = level * (1 + offset - 0.02 * mm + 0.03 * random.standard_normal(6))
                values[3 if metric == "hd95" and mm == 2.0 else slice(0)] = math.nan
                made += rows_of(method, values, roi, metric, mm)
    return made


def test_perturbed_cases_are_in_no_table_and_never_averaged_with_others(rows):
    wrong = [row | {"perturbation": "noise_std", "amount": 0.1, "value": 0.0} for row in rows]
    wrong += [row | {"perturbation": "noise_std", "amount": 0.2, "value": 0.0} for row in rows]
    both = rows + wrong
    pd.testing.assert_frame_equal(headline(both), headline(rows))
    of_one = paired_differences(both, "ours", resamples=50)
    pd.testing.assert_frame_equal(of_one, paired_differences(rows, "ours", resamples=50))
    seen = [row | {"roi": "lesion", "metric": m} for row in both for m in SEEN]
    plain = [row for row in seen if "perturbation" not in row or not row["perturbation"]]
    pd.testing.assert_frame_equal(conspicuity_table(seen), conspicuity_table(plain))
    means = summary(both, resamples=50).query("roi == 'bone'").set_index("method")["mean"]
    assert set(means.index) == {
        f"{method} (perturbation {wrong})"
        for method in ("ours", "average")
        for wrong in ("none", "noise_std 0.1", "noise_std 0.2")
    }
    assert (means["ours (perturbation noise_std 0.2)"] == 0).all()


def test_summary_agrees_with_pandas(rows):
    ours = summary(rows).set_index(["method", "misregistration_mm", "roi", "metric"])
    groups = pd.DataFrame(rows).groupby(["method", "misregistration_mm", "roi", "metric"])["value"]
    theirs = groups.agg(mean="mean", n="count", undefined=lambda v: v.isna().sum())
    pd.testing.assert_frame_equal(
        ours[["mean", "n", "undefined"]].sort_index(), theirs.sort_index(), check_dtype=False
    )
    assert ours.loc[("ours", 2.0, "lesion", "hd95"), ["n", "undefined"]].tolist() == [5, 1]


def test_the_interval_agrees_with_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).lognormal(size=12)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    ours = bootstrap_interval(values, resamples=20000)
    # Monte Carlo error of a 2.5% quantile from 20000 draws is about 0.02 standard errors.
    np.testing.assert_allclose(ours, theirs, atol=0.06 * values.std() / math.sqrt(12))


def test_a_wider_confidence_gives_a_wider_interval_and_the_seed_repeats_it():
    values = np.arange(10.0)
    low, high = bootstrap_interval(values, confidence=0.5)
    wide_low, wide_high = bootstrap_interval(values, confidence=0.99)
    assert wide_low < low < values.mean() < high < wide_high
    assert (low, high) == bootstrap_interval(values, confidence=0.5)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [1.0, 2.0, math.inf]])
def test_too_little_to_resample_has_no_interval(values):
    assert np.isnan(bootstrap_interval(np.array(values, dtype=float))).all()


def test_slices_of_two_patients_have_no_interval_however_many_they_are():
    patients = ["a", "b"] * 20
    assert np.isnan(bootstrap_interval(np.arange(40.0), patients=patients)).all()
    low, high = bootstrap_interval(np.arange(40.0), patients=[*patients[:39], "c"])
    assert low < high


def test_patients_are_resampled_with_all_their_slices_as_scipy_resamples_them():
    random = np.random.default_rng(2)
    sizes = random.integers(3, 12, 9)
    patients = np.repeat(np.arange(9), sizes)
    values = random.normal(size=9)[patients] + 0.2 * random.normal(size=len(patients))
    sums = np.bincount(patients, values)
    theirs = stats.bootstrap(  # whole patients are drawn, and the mean is over all their slices
        (sums, sizes), lambda s, n, axis: s.sum(axis) / n.sum(axis), paired=True,
        n_resamples=20000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    ours = bootstrap_interval(values, resamples=20000, patients=[f"p{i}" for i in patients])
    np.testing.assert_allclose(ours, theirs, atol=0.06 * values.std() / math.sqrt(9))
    # slices of one patient are alike, so as if independent they would promise far too much
    naive = bootstrap_interval(values, resamples=20000)
    assert np.ptp(naive) < 0.6 * np.ptp(ours)


def test_patients_of_one_case_each_have_the_interval_of_cases():
    values = np.random.default_rng(3).normal(size=8)
    assert bootstrap_interval(values) == bootstrap_interval(values, patients=list("hgfedcba"))


def test_seeds_of_one_case_are_averaged_before_cases_are():
    twice = rows_of("ours", [10.0, 20.0]) + rows_of("ours", [30.0], seed=1)
    [line] = summary(twice).to_dict("records")
    assert (line["mean"], line["n"]) == (20.0, 2)  # (10 + 30) / 2 and 20, not 60 / 3
    assert math.isnan(line["low"]) and line["patients"] == 2  # of two no interval


def test_a_score_that_no_case_defines_is_nan_and_counted():
    [line] = summary(rows_of("ours", [math.nan] * 3)).to_dict("records")
    assert math.isnan(line["mean"]) and (line["n"], line["undefined"]) == (0, 3)


def test_rows_that_answer_different_questions_are_not_averaged():
    mixed = rows_of("ours", [1.0, 2.0]) + rows_of("ours", [5.0, 6.0], mask_source="none", steps=6)
    means = summary(mixed + rows_of("average", [0.0])).set_index("method")["mean"].to_dict()
    assert means == {
        "ours (mask source expert, steps 0)": 1.5,
        "ours (mask source none, steps 6)": 5.5,
        "average": 0.0,
    }


def test_amplitudes_rise_and_methods_keep_their_order(rows):
    table = headline(rows)
    assert list(table.index) == ["ours", "average"]
    assert amplitudes_mm(table, "bone", "psnr") == [0.0, 2.0]
    assert summary(rows)["misregistration_mm"].iloc[0] == 0.0


def test_headline_holds_the_numbers_of_the_summary(rows):
    table = headline(rows, scores=tuple(SCORES))
    assert is_headline(table) and not is_headline(summary(rows))
    long = summary(rows)
    assert table.size == long[list(STATISTICS)].size
    for line in long.to_dict("records"):
        for name in STATISTICS:
            column = (line["roi"], line["metric"], line["misregistration_mm"], name)
            assert table.loc[line["method"], column] == line[name]


def test_a_method_without_a_score_has_a_gap_and_is_not_best():
    table = headline(rows_of("ours", [1.0, 2.0]) + rows_of("other", [3.0, 4.0], "brain", "ssim"))
    [cell] = score_cells(table, "bone", "psnr")["other"]
    assert (cell.mean, cell.interval, cell.is_best) == ("\N{EN DASH}", "", False)
    assert score_cells(table, "bone", "psnr")["ours"][0].is_best


def test_best_is_the_smallest_distance_and_the_largest_of_the_others(rows):
    table = headline(rows, scores=tuple(SCORES))
    for (roi, metric), numbers in (
        (score, table[score].xs("mean", axis=1, level=1)) for score in SCORES
    ):
        winners = numbers.idxmin() if metric == "hd95" else numbers.idxmax()
        cells = score_cells(table, roi, metric)
        for column, winner in enumerate(winners):
            best = [method for method, line in cells.items() if line[column].is_best]
            assert best == [winner]


def test_means_that_print_alike_are_best_together():
    table = headline(rows_of("a", [20.01, 20.01]) + rows_of("b", [20.04, 20.04]))
    cells = score_cells(table, "bone", "psnr")
    assert [cells[m][0].is_best for m in "ab"] == [True, True]


def test_second_is_the_next_number_however_many_are_best():
    levels = {"a": 20.01, "b": 20.04, "c": 19.0, "d": 19.02, "e": 5.0}
    cells = score_cells(headline([r for m, v in levels.items() for r in rows_of(m, [v])]),
                        "bone", "psnr")  # fmt: skip
    assert [cells[m][0].is_best for m in "abcde"] == [True, True, False, False, False]
    assert [cells[m][0].is_second for m in "abcde"] == [False, False, True, True, False]
    distances = [r for m, v in levels.items() for r in rows_of(m, [v], "lesion", "hd95")]
    cells = score_cells(headline(distances, [("lesion", "hd95")]), "lesion", "hd95")
    assert [m for m in "abcde" if cells[m][0].is_best] == ["e"]
    assert [m for m in "abcde" if cells[m][0].is_second] == ["c", "d"]


def test_where_all_are_best_none_is_second():
    cells = score_cells(headline(rows_of("a", [1.0]) + rows_of("b", [1.0])), "bone", "psnr")
    assert [(cells[m][0].is_best, cells[m][0].is_second) for m in "ab"] == [(True, False)] * 2


def test_a_cells_half_width_is_half_of_its_interval(rows):
    [(low, high)] = (
        summary(rows)
        .query("method == 'ours' and roi == 'brain' and misregistration_mm == 0")[["low", "high"]]
        .to_numpy()
    )
    [cell, _] = score_cells(headline(rows), "brain", "ssim")["ours"]
    assert cell.half_width == f"{(high - low) / 2:.3f}"


@pytest.mark.parametrize("metric, arrow", [("psnr", "↑"), ("hd95", "↓"), ("coverage", "")])
def test_an_arrow_points_to_the_better_values(metric, arrow):
    assert better(metric) == arrow


def test_one_method_alone_is_not_best():
    table = headline(rows_of("a", [20.0, 21.0, 22.0]))
    [cell] = score_cells(table, "bone", "psnr")["a"]
    assert not cell.is_best and not cell.is_second
    assert "bold" not in footnote(table)


def test_a_perfect_copy_has_infinite_psnr_and_is_best():
    table = headline(rows_of("copy", [math.inf, math.inf]) + rows_of("other", [30.0, 31.0]))
    [cell] = score_cells(table, "bone", "psnr")["copy"]
    assert (cell.mean, cell.interval, cell.is_best) == ("∞", "", True)


def test_cells_that_miss_cases_say_so(rows):
    table = headline(rows, scores=tuple(SCORES))
    full, missing = score_cells(table, "lesion", "hd95")["ours"]
    assert (full.note, missing.note) == ("", "n 5, 1 undefined")
    assert "n = 6 cases" in footnote(table) and "2 undefined" in footnote(table)
    assert "interval over cases" in footnote(table)


OF_FOUR = ["a", "a", "a", "b", "b", "c", "c", "d"]


def test_a_mean_over_slices_says_of_how_many_patients_they_are():
    made = rows_of("ours", [1.0, 2, 3, 4, 5, 6, 7, 8], patients=OF_FOUR)
    made += rows_of("other", [*[math.nan] * 3, 4, 5, 6, 7, 8], patients=OF_FOUR)
    table = headline(made)
    assert "n = 8 images of 4 patients" in footnote(table)
    assert "interval over patients" in footnote(table)
    ours, other = (score_cells(table, "bone", "psnr")[m][0] for m in ("ours", "other"))
    assert (ours.mean, ours.note) == ("4.5", "") and ours.interval
    assert other.note == "n 5 of 3 patients, 3 undefined"
    fewer = rows_of("other", [math.nan, *range(7)], patients=OF_FOUR)
    [cell] = score_cells(headline(made + fewer), "bone", "psnr")["other"]
    assert cell.note == "n 7, 1 undefined"  # still of all four


def test_a_mean_over_slices_of_two_patients_has_no_interval_and_says_why():
    table = headline(rows_of("ours", np.arange(40.0), patients=["20", "28"] * 20))
    [cell] = score_cells(table, "bone", "psnr")["ours"]
    assert (cell.mean, cell.interval) == ("19.5", "")
    assert "n = 40 images of 2 patients" in footnote(table)
    assert "without intervals, which need 3 patients" in footnote(table)
    assert "interval over" not in footnote(table)


def test_differences_and_p_values_agree_with_scipy(rows):
    table = paired_differences(rows, "ours", scores=[("bone", "psnr"), ("lesion", "hd95")])
    wide = pd.DataFrame(rows).pivot(
        index=["roi", "metric", "misregistration_mm", "case_id"], columns="method", values="value"
    )
    assert len(table) == 4 and set(table["method"]) == {"average"}
    for line in table.to_dict("records"):
        pairs = wide.loc[(line["roi"], line["metric"], line["misregistration_mm"])].dropna()
        assert line["n"] == len(pairs)
        assert line["difference"] == pytest.approx((pairs["ours"] - pairs["average"]).mean())
        assert line["p"] == stats.wilcoxon(pairs["ours"], pairs["average"]).pvalue
        assert line["low"] < line["difference"] < line["high"]


def test_slices_are_paired_but_patients_are_tested():
    """Three slices of a, two of b and c, one of d: mean differences 2, -1, 3 and 4 of a patient."""
    difference = np.array([1.0, 2, 3, -2, 0, 2, 4, 4])
    base = np.random.default_rng(0).normal(20, 5, 8)
    made = rows_of("ours", base + difference, patients=OF_FOUR)
    [line] = paired_differences(made + rows_of("average", base, patients=OF_FOUR), "ours").to_dict(
        "records"
    )
    assert line["difference"] == pytest.approx(14 / 8) and line["n"] == 4
    assert line["p"] == pytest.approx(stats.wilcoxon([2, -1, 3, 4]).pvalue) == 0.25
    # of 16 ways to sign ranks 1 to 4, four are as uneven as 1 against 9
    expected = bootstrap_interval(difference, patients=OF_FOUR)
    assert (line["low"], line["high"]) == pytest.approx(expected)


def test_the_rank_biserial_correlation_is_of_scipys_rank_sums():
    random = np.random.default_rng(4)
    ours, other = random.normal(0.3, 1, 11), random.normal(0, 1, 11)
    other[2] = ours[2]  # no difference has no rank: ten are left, whose ranks sum to 55
    made = rows_of("ours", ours) + rows_of("other", other)
    [line] = paired_differences(made, "ours").to_dict("records")
    sum_above = stats.wilcoxon(np.delete(ours - other, 2), alternative="greater").statistic
    assert line["rank_biserial"] == pytest.approx((sum_above - (55 - sum_above)) / 55)
    alike = rows_of("ours", [1.0, 2.0]) + rows_of("twin", [1.0, 2.0])
    assert paired_differences(alike, "ours")["rank_biserial"].item() == 0


def test_holm_agrees_with_a_table_worked_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then never falling.
    p = np.array([0.01, 0.04, math.nan, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, math.nan, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])


def test_holm_corrects_over_baselines_within_a_score_and_amplitude():
    random = np.random.default_rng(0)
    values = random.normal(20, 1, 10)
    many = rows_of("ours", values + 1) + rows_of("a", values) + rows_of("b", values + 0.9)
    many += rows_of("ours", values + 1, mm=1.0) + rows_of("a", values, mm=1.0)
    table = paired_differences(many, "ours").set_index(["method", "misregistration_mm"])
    assert table.loc[("a", 0.0), "p_holm"] == pytest.approx(2 * table.loc[("a", 0.0), "p"])
    assert table.loc[("a", 1.0), "p_holm"] == table.loc[("a", 1.0), "p"]


def test_methods_that_agree_everywhere_are_not_different():
    table = paired_differences(rows_of("ours", [1.0, 2.0]) + rows_of("twin", [1.0, 2.0]), "ours")
    assert table[["difference", "p", "p_holm"]].iloc[0].tolist() == [0.0, 1.0, 1.0]


def test_comparing_with_a_method_that_did_not_run_is_refused(rows):
    with pytest.raises(ValueError, match="diff_fccf"):
        paired_differences(rows, "diff_fccf")


def test_markdown_has_a_block_a_score_with_the_best_in_bold(rows):
    text = to_markdown(headline(rows))
    lines = text.splitlines()
    assert lines[0] == "| Bone PSNR (dB) | 0 mm | 2 mm |"
    best = summary(rows).query("roi == 'bone' and misregistration_mm == 0")["mean"].max()
    assert f"**{best:.1f}**" in lines[2]
    assert sum(line.startswith("| ---") for line in lines) == 2  # whole SSIM has no rows
    assert lines[-1] == footnote(headline(rows))


def test_one_amplitude_is_printed_as_methods_by_scores(rows):
    table = headline([row for row in rows if row["misregistration_mm"] == 2])
    lines = to_markdown(table).splitlines()
    assert lines[0] == "| method | Bone PSNR (dB) | Brain SSIM |"
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["ours", "average"]
    for line, method in zip(lines[2:4], ("ours", "average"), strict=True):
        for text, score in zip(line.split("|")[2:4], HEADLINE_SCORES, strict=False):
            assert score_cells(table, *score)[method][0].mean in text
    assert lines[-1].endswith("The CT was moved by 2 mm.")
    still = headline([row for row in rows if row["misregistration_mm"] == 0])
    assert footnote(still).endswith("The CT was not moved.")
    assert "The CT was" not in footnote(headline(rows))


def test_one_method_is_printed_as_scores_by_amplitudes(rows):
    table = headline([row for row in rows if row["method"] == "ours"])
    lines = to_markdown(table).splitlines()
    assert lines[0] == "| ours | 0 mm | 2 mm |"
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["Bone PSNR (dB)", "Brain SSIM"]
    assert score_cells(table, "brain", "ssim")["ours"][1].mean in lines[3].split("|")[3]


def test_a_score_that_no_method_defines_is_no_headline():
    made = rows_of("ours", [20.0, 21.0]) + rows_of("ours", [math.nan] * 2, "whole", "ssim")
    table = headline(made)
    assert headline_scores(table) == [("bone", "psnr")] and "none undefined" in footnote(table)


def test_markdown_of_any_frame_keeps_its_index_and_escapes_bars():
    frame = pd.DataFrame({"a|b": [1.23456, math.nan]}, index=pd.Index(["x", "y"], name="case"))
    assert to_markdown(frame).splitlines() == [
        "| case | a\\|b |",
        "| --- | ---: |",
        "| x | 1.235 |",
        "| y | \N{EN DASH} |",
    ]


@pytest.mark.parametrize("width", [40, 160])
def test_the_terminal_shows_means_and_intervals_where_they_fit(rows, width):
    console = Console(file=io.StringIO(), width=width)
    print_table(headline(rows), "Scores", console)
    text = console.file.getvalue()
    cell = score_cells(headline(rows), "bone", "psnr")["ours"][0]
    assert "Scores" in text and "Bone PSNR (dB)" in text and cell.mean in text
    assert (cell.interval in text) == (width == 160)


def test_the_terminal_prints_any_frame_as_it_stands(rows):
    console = Console(file=io.StringIO(), width=120)
    print_table(pd.DataFrame({"method": ["[bold]x"], "value": [0.5]}), "Plain", console)
    assert "[bold]x" in console.file.getvalue() and "0.5" in console.file.getvalue()


def test_labels_carry_units():
    labels = [score_label(*s) for s in (*SCORES, ("lesion", "dice"), ("whole", "spread_error"))]
    assert labels == [
        "Bone PSNR (dB)", "Brain SSIM", "Lesion HD95 (mm)", "Lesion Dice", "Whole spread error",
    ]  # fmt: skip


def test_a_run_without_headline_scores_has_an_empty_table():
    table = headline(rows_of("ours", [1.0], "lesion", "dice"))
    assert is_headline(table) and table.empty
    assert to_markdown(table) == footnote(table) + "\n" and "n = 0" in footnote(table)
    print_table(table)


def test_no_coverage_is_best():
    key = {"preset": "stroke", "mask_source": "expert", "steps": 0, "seed": 0}
    key |= {"case_id": "a", "misregistration_mm": 0.0}
    rows = []
    for method, level in (("a", 0.9), ("b", 1.0)):
        rows += case_rows([("bone", "coverage", level)], method=method, **key)
    cells = score_cells(headline(rows, CALIBRATION_SCORES), "bone", "coverage")
    assert [cells[m][0].is_best for m in "ab"] == [False, False]


def seen(method, medians, lowest, roi="lesion", mm=0.0, **changes):
    return rows_of(method, medians, roi, "conspicuity", mm, **changes) + rows_of(
        method, lowest, roi, "conspicuity_min", mm, **changes
    )


def test_conspicuity_shows_the_median_case_and_the_worst_of_all_findings():
    made = seen("ours", [0.9, 1.0, 0.8, math.nan], [0.9, 0.7, 0.75, math.nan], mm=2.0)
    made += seen("ours", [1.0] * 4, [0.4, 1.0, 0.3, 0.5], "findings")
    made += seen("average", [0.5, 0.4, math.nan, math.nan], [0.5, 0.1, math.nan, math.nan])
    made += rows_of("ours", [20.0]) + seen("ours", [0.6], [0.5])
    table = conspicuity_table(made)
    assert list(table.columns) == [
        "finding", "CT moved (mm)", "method", "cases", "median", "lowest", "worst case",
    ]  # fmt: skip
    assert table.to_numpy().tolist() == [
        ["lesion on MRI", 0.0, "ours", 1, 0.6, 0.5, "case_0"],
        ["lesion on MRI", 0.0, "average", 2, pytest.approx(0.45), 0.1, "case_1"],
        ["lesion on MRI", 2.0, "ours", 3, 0.9, 0.7, "case_1"],
        ["only on CT", 0.0, "ours", 4, 1.0, 0.3, "case_2"],
    ]
    assert not is_headline(table) and "| ours | 3 | 0.9 | 0.7 | case_1 |" in to_markdown(table)


def test_conspicuity_averages_seeds_and_shows_the_worst_of_them():
    made = seen("ours", [1.0, 0.5], [0.8, 0.5]) + seen("ours", [0.6, 0.5], [0.2, 0.5], seed=1)
    [line] = conspicuity_table(made).to_dict("records")
    assert (line["median"], line["lowest"], line["worst case"]) == (0.65, 0.2, "case_0")


def test_a_kind_that_no_case_has_is_left_out_and_a_method_without_a_value_stays():
    none = seen("ours", [math.nan], [math.nan], "findings")
    assert conspicuity_table(none).empty and conspicuity_table(rows_of("ours", [1.0])).empty
    made = none + seen("ours", [math.nan], [math.nan]) + seen("average", [0.5], [0.5])
    ours, average = conspicuity_table(made).to_dict("records")
    assert (ours["method"], ours["cases"]) == ("ours", 0)
    assert all(pd.isna(ours[name]) for name in ("median", "lowest", "worst case"))
    assert average["cases"] == 1 and {ours["finding"], average["finding"]} == {"lesion on MRI"}
