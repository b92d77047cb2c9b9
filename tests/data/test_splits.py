import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.data.splits import (
    check_splits,
    make_splits,
    read_splits,
    read_splits_file,
    write_splits,
)

CASES = [f"case_{i:03d}" for i in range(60)]


def test_sixty_patients_are_dealt_42_9_9():
    splits = make_splits(CASES)
    assert {name: len(cases) for name, cases in splits.items()} == {
        "train": 42,
        "val": 9,
        "test": 9,
    }


@given(
    patients=st.lists(st.integers(0, 30), min_size=1, max_size=60), seed=st.integers(0, 2**32 - 1)
)
def test_every_case_is_in_one_list_and_every_patient_too(patients, seed):
    cases = [f"c{i}" for i in range(len(patients))]
    of = {case: f"p{who}" for case, who in zip(cases, patients, strict=True)}
    splits = make_splits(cases, of, seed=seed)
    assert sorted(case for group in splits.values() for case in group) == sorted(cases)
    people = [{of[case] for case in group} for group in splits.values()]
    assert sum(map(len, people)) == len(set().union(*people))
    assert splits["train"]
    if len(set(patients)) >= 3:
        assert splits["val"] and splits["test"]


def test_the_deal_depends_on_the_seed_and_not_on_the_order_of_cases():
    assert make_splits(CASES) == make_splits(CASES[::-1])
    assert make_splits(CASES) != make_splits(CASES, seed=43)


def test_fractions_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        make_splits(CASES, fractions=(0.7, 0.2, 0.2))


def test_both_ways_of_writing_splits_are_read(tmp_path):
    splits = {"train": ["a", "b"], "val": ["c"], "test": []}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "splits.json").write_text(json.dumps({**splits, "seed": 42}))
    (tmp_path / "text" / "splits").mkdir(parents=True)
    for name, cases in splits.items():
        text = "\n".join(cases) + "\n\n"
        (tmp_path / "text" / "splits" / f"{name}.txt").write_text(text)
    assert read_splits(tmp_path / "json") == read_splits(tmp_path / "text") == splits


def test_a_cohort_without_splits_has_none(tmp_path):
    assert read_splits(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"train": ["a"], "val": []', "JSON"),
        ('{"train": ["a"], "val": []}', "test"),
        ("[1, 2]", "list"),
        ('{"train": ["a"], "val": ["b"], "test": ["a"]}', "'a' in train .* and test"),
        ('{"train": ["a", "a"], "val": ["b"], "test": []}', r"\['a'\] twice in train"),
    ],
)
def test_a_splits_file_that_cannot_be_right_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_splits(tmp_path)
    assert str(tmp_path / "splits.json") in str(error.value)


def test_a_missing_list_is_named(tmp_path):
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_text("a\n")
    with pytest.raises(FileNotFoundError, match=re.escape("['val.txt', 'test.txt']")):
        read_splits(tmp_path)


def test_one_patient_scanned_twice_may_not_train_and_test():
    splits = {"train": ["monday"], "val": [], "test": ["friday"]}
    check_splits(splits)
    with pytest.raises(ValueError, match=r"'anna' in train \(as 'monday'\) and test"):
        check_splits(splits, {"monday": "anna", "friday": "anna"})


def test_split_info_is_read_like_splits_which_comes_first(tmp_path):
    splits = {"train": ["a", "b"], "val": ["c"], "test": []}
    (tmp_path / "split_info.json").write_text(json.dumps({"splits": splits, "made_by": "hand"}))
    assert read_splits(tmp_path) == splits
    write_splits(tmp_path / "splits.json", {**splits, "test": ["d"]}, "here")
    assert read_splits(tmp_path) == {**splits, "test": ["d"]}


def test_written_splits_are_read_again_and_say_where_they_came_from(tmp_path):
    splits = make_splits(CASES)
    write_splits(tmp_path / "run" / "splits.json", splits, "made by patient")
    assert read_splits_file(tmp_path / "run" / "splits.json") == splits
    assert json.loads((tmp_path / "run" / "splits.json").read_text())["source"] == "made by patient"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["splits.json"]
    with pytest.raises(FileNotFoundError, match="expected a JSON file with lists"):
        read_splits_file(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 5000,
        b'{"train": ' + b"9" * 5000 + b"}",
        b'{"\xff": []}',
        b'{"' + b"x" * 5000 + b'": [], "train": []}',
    ],
)
def test_whatever_else_a_file_holds_it_is_refused_in_one_short_sentence(content, tmp_path):
    path = tmp_path / "splits.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"expected JSON with lists .*{path}") as caught:
        read_splits(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_lists_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "splits").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "splits" / f"{split}.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"expected lists of cases as text.*{tmp_path}"):
        read_splits(tmp_path)
