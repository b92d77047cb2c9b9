import pytest

from clinfuse.reporting.collection import Scored, merged
from clinfuse.reporting.rows import as_rows, case_rows


def scored(folder, method="average", cases="abc", seed=0, **known):
    key = {"preset": "default", "mask_source": "expert", "steps": 0, "misregistration_mm": 0.0}
    scores = [("bone", "psnr", 20.0), ("whole", "ssim", 0.5)]
    rows = [r for c in cases for r in case_rows(scores, case_id=c, method=method, seed=seed, **key)]
    return Scored(folder, as_rows(rows), **known)


def test_rows_of_all_folders_stand_together_in_order():
    rows = merged([scored("1", "maximum"), scored("0"), scored("2", seed=1)])
    assert list(rows["method"].unique()) == ["maximum", "average"]
    assert len(rows) == 18 and "folder" not in rows and set(rows["seed"]) == {0, 1}


def test_scores_of_other_conditions_of_a_method_stand_beside_its_own():
    plain = scored("0")
    wrong = plain.rows.assign(perturbation="noise_std", amount=0.1)
    rows = merged([plain, Scored("1", wrong), scored("2", "maximum")])
    assert rows.groupby(["method", "perturbation"]).size().to_dict() == {
        ("average", ""): 6, ("average", "noise_std"): 6, ("maximum", ""): 6,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"each method once, got average .* in 1 and 3"):
        merged([plain, Scored("1", wrong), Scored("3", wrong)])


def test_a_folder_without_lists_is_judged_by_its_rows():
    lists = {"test_cases": ["a", "b", "c"]}
    assert len(merged([scored("0", **lists), scored("1", "maximum"), scored("2", "x", **lists)]))


@pytest.mark.parametrize(
    "other, words",
    [
        (scored("1", "maximum", cases="abd"),
         "the same test cases, got others in 1 than in 0: c, d in one of them alone"),
        (scored("1", "maximum", test_cases=["a", "b", "c", *"wxyz"]),
         "the same test cases, got others in 1 than in 0: w, x, y and 1 more in one"),
        (scored("1", "maximum", data={"CT map": "window"}),
         "the same CT map in all of a table, got piecewise in 0 and window in 1"),
        (scored("1"), "each method once, got average with the same preset and seed in 0 and 1"),
    ],
    ids=["cases", "lists", "range", "twice"],
)  # fmt: skip
def test_what_may_not_stand_in_one_table_is_refused_with_both_folders(other, words):
    first = scored("0", test_cases=["c", "b", "a"], data={"CT map": "piecewise"})
    with pytest.raises(ValueError, match=words):
        merged([first, scored("between", "weighted"), other])
