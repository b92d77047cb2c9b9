import json
import shlex

import pytest
import yaml

from clinfuse.reporting.card import limits, model_card, run_card, write_model_card, write_run_card
from clinfuse.reporting.rows import case_rows, write_rows
from clinfuse.reporting.run_folder import RunFolder

CONFIG = {
    "name": "trial", "preset": "stroke", "lesion_head": None, "seed": 3,
    "guidance": {"alpha": 1.0, "beta": 1.2, "gamma": "${gamma}"}, "gamma": 3.0,
    "method": {"members": 5},
    "data": {"prepare": None, "jitter": {"max_mm": 1.0}},
}  # fmt: skip
FACTS = {
    "commit": "abc123 (with changes)", "torch": "2.13", "processor": "2 cores", "seed": 3,
    "data": {
        "root": "studies", "splits_source": "splits.json",
        "cases": {"train": 12, "val": 2, "test": 4},
        "shapes_dhw": [[24, 256, 256]], "spacings_mm_dhw": [[5.0, 0.9, 0.9]], "ct_units": ["HU"],
        "mask_sources": {"brain": {"given": ["a"], "segmented": ["b", "c"]}},
        "cases_with_lesion": 0, "cases_with_own_reference": 0,
    },
}  # fmt: skip
CALIBRATION = {"level": 0.9, "misregistration_mm": 2.0, "case_ids": ["v", "w"]}

SCORES = {
    ("bone", "psnr"): (20.0, 24.0, 31.0),
    ("brain", "coverage"): (0.88, 0.9, 0.92),
    ("bone", "coverage"): (0.8, 0.85, 0.84),
    ("whole", "ence_raw"): (1.0, 1.5, 2.0),
    ("whole", "ence"): (0.2, 0.3, 0.4),
    ("whole", "ssim"): (0.9, 0.8, float("nan")),
}


def rows(scores, amplitudes=(0.0, 2.0)):
    return [
        row
        for mm in amplitudes
        for (roi, metric), values in scores.items()
        for case, value in zip("abc", values, strict=False)
        for row in case_rows(
            [(roi, metric, value)], case_id=case, method="ours", preset="stroke", seed=3,
            misregistration_mm=mm, mask_source="expert", steps=20,
        )
    ]  # fmt: skip


@pytest.fixture
def run_in(tmp_path):
    """Writes the records of a run, of which some may be changed, and reads them."""

    def written(scores=SCORES, amplitudes=(0.0, 2.0), **records):
        write_rows(tmp_path / "cases.csv", rows(scores, amplitudes))
        (tmp_path / ".hydra").mkdir(exist_ok=True)
        hydra = {
            "job": {"name": "train"},
            "overrides": {"task": ["preset=stroke", "logger=[csv,wandb]"]},
            "runtime": {"choices": {"method": "clinfuse", "experiment": None, "hydra/help": "x"}},
        }
        content = {
            ".hydra/config.yaml": CONFIG, ".hydra/hydra.yaml": {"hydra": hydra},
            "facts.json": FACTS, "calibration.json": CALIBRATION,
            "splits.json": {"train": [], "val": [], "test": ["a", "b", "c", "d"]},
            "cost.json": {
                "parameters": 1234567, "trained_parameters": 1234567, "training_steps": 2400,
                "training_seconds": 812.5,
            },
        } | records  # fmt: skip
        for name, record in content.items():
            if record is not None:
                dump = yaml.safe_dump if name.endswith("yaml") else json.dumps
                (tmp_path / name).write_text(dump(record))
        return RunFolder.read(tmp_path)

    return written


def section(card, heading):
    return card.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_a_model_card_says_what_it_is_how_it_was_trained_and_on_what(run_in):
    card = model_card(run_in(), "Guesses well.")
    assert card.startswith("# Model card: trial\n\nGuesses well.\n")
    for line in (
        "- preset: stroke, alpha 1.0, beta 1.2, gamma 3.0",
        "- network evaluations a sample: 20", "- samples a case: 5", "- weights: 1,234,567",
    ):  # fmt: skip
        assert f"\n{line}\n" in card
    assert "| test cases | 4 |" in section(card, "Data")
    assert "| split | by patient, splits.json |" in section(card, "Data")
    assert "| voxels (mm) | 5 × 0.9 × 0.9 |" in section(card, "Data")
    assert "| steps | 2400 |" in section(card, "Training")
    assert "| seconds, without validation | 812.5 |" in section(card, "Training")
    assert "no medical\ndevice" in section(card, "Intended use")
    assert "- commit: abc123 (with changes)" in section(card, "Versions")


def test_scores_have_intervals_by_misregistration_and_calibration_its_before_and_after(run_in):
    card = model_card(run_in())
    (line,) = [line for line in section(card, "Scores").split("\n") if "Bone PSNR" in line]
    _, name, at_0, at_2, _ = (part.strip() for part in line.split("|"))
    assert name == "Bone PSNR (dB)" and at_0 == at_2 and at_0.startswith("25.0 (20.0–31.0)")
    text = section(card, "Calibration")
    assert "Fitted on 2 validation cases with the CT moved by 2 mm, for intervals of 90%." in text
    assert "is 1.500 before calibration and 0.300 after." in text
    assert "| Brain coverage | 0.900" in text


def test_limits_are_those_of_this_run(run_in):
    assert list(limits(run_in())) == [
        "Trained and tested on one set of data: nothing here says how it does with other scanners, "
        "protocols or diseases.",
        "The scores are of 3 test patients.",
        "Only 3 of 4 test cases were scored.",
        "All voxels are of 5 × 0.9 × 0.9 mm: no other resolution was tested.",
        "No case has a fused image of its own to compare with: the reference of training and of "
        "whole-image scores is made from its sources.",
        "In the test the CT was moved by 0, 2 mm: nothing beyond was tested.",
        "In training it was moved by at most 1 mm, less than in the test.",
        "No case has a lesion.",
        "There was no lesion head: whether lesions are found in the fused image is not known.",
        "The brain was segmented by a tool in 2 cases, and scores within it trust that.",
        "Intervals of 90% hold for the average voxel of cases like those they were fitted on, and "
        "promise nothing for one voxel or one patient.",
        "In the test they covered least in the region bone with the CT moved by 0 mm: 83.0% of "
        "voxels.",
        "2 values are undefined, and in no mean, of Whole SSIM.",
        "The code differed from its commit, so that the commit alone does not repeat the run.",
    ]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (
            {".hydra/config.yaml": CONFIG | {"data": {"prepare": {"cases": 8}}}},
            "Trained and tested on generated heads: nothing here says how it does on patients.",
        ),
        (
            {"amplitudes": (0.0,)},
            "The CT was not moved against the MRI: misregistration was not tested.",
        ),
        ({"calibration.json": None}, "Its uncertainty is not calibrated."),
        ({"scores": {("bone", "psnr"): (20.0,)}}, "Its uncertainty is not stated."),
        (
            {"scores": {("bone", "psnr"): (20.0, 21.0)}},
            "The scores are of 2 test patients, too few for intervals.",
        ),
        (
            {"facts.json": {"data": {"split_by": "slice"}}},
            "Slices of one patient are in training and in test: the scores are too good.",
        ),
        (
            {"facts.json": {"data": {"spacings_mm_dhw": [[5, 1, 1], [2, 1, 1]]}}},
            "Voxels are of 2 sizes, 2 × 1 × 1 to 5 × 1 × 1 mm: no finer or coarser ones were "
            "tested.",
        ),
        (
            {"facts.json": {"data": {"mask_sources": {"bone": "segmented"}}}},
            "The bone was segmented by a tool, and scores within it trust that.",
        ),
    ],
)
def test_what_a_run_has_decides_what_is_said_of_it(records, sentence, run_in):
    assert sentence in list(limits(run_in(**records)))


def test_a_lesion_head_and_a_commit_as_it_is_are_no_limits(run_in):
    scores = SCORES | {("lesion", "dice"): (0.5, 0.6, 0.7)}
    run = run_in(scores=scores, **{"facts.json": FACTS | {"commit": "abc123"}})
    said = " ".join(limits(run))
    assert "no lesion head" not in said and "commit" not in said
    assert "| Lesion Dice | 0.600" in model_card(run)


def test_a_run_card_has_the_command_the_choices_the_cost_and_the_scores(run_in):
    card = run_card(run_in())
    command = card.split("```")[1].strip()
    assert shlex.split(command) == [
        "python", "-m", "clinfuse.train", "preset=stroke", "logger=[csv,wandb]",
    ]  # fmt: skip
    assert "- `logger=[csv,wandb]`" in card and "| method | clinfuse |" in card
    assert "hydra/" not in card and "experiment" not in card  # not chosen
    assert "| training steps | 2400 |" in section(card, "Cost")
    assert "Seed 3." in card and "| Bone PSNR (dB) | 25.0" in section(card, "Scores")


def test_scores_alone_make_cards_that_say_no_more(tmp_path):
    write_rows(tmp_path / "cases.csv", rows({("bone", "psnr"): (20.0, 24.0, 31.0)}))
    model, run = write_model_card(tmp_path), write_run_card(tmp_path)
    assert (model.name, run.name) == ("model_card.md", "run_card.md")
    for card in (model.read_text("utf-8"), run.read_text("utf-8")):
        assert "None" not in card and "null" not in card
        assert "25.0" in card and "## Cost" not in card and "## Calibration" not in card


def test_a_run_that_was_not_scored_has_no_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a scored run with cases"):
        write_model_card(tmp_path)


def test_records_of_something_else_are_refused_with_the_folder(tmp_path):
    (tmp_path / ".hydra").mkdir()
    write_rows(tmp_path / "cases.csv", [])
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: [a, list]\n")
    for write in (write_model_card, write_run_card):
        with pytest.raises(ValueError, match=f"expected the records of a run.*{tmp_path}"):
            write(tmp_path)
