import math

import pandas as pd
import pytest

from clinfuse.reporting import rows as rows_module
from clinfuse.reporting.rows import (
    CASE_COLUMNS,
    as_rows,
    case_rows,
    read_rows,
    unperturbed,
    write_rows,
)

KEY = {
    "case_id": "007",
    "patient_id": "07",
    "method": "wavelet",
    "preset": "default",
    "seed": 0,
    "misregistration_mm": 2.0,
    "perturbation": "",
    "amount": 0.0,
    "mask_source": "None",
    "steps": 0,
}


def row(**changes):
    return {**KEY, "roi": "bone", "metric": "psnr", "value": 21.5, **changes}


def test_what_is_written_is_what_is_read(tmp_path):
    written = [row(), row(case_id="NA", value=0.1 + 0.2), row(roi="brain", value=-math.inf)]
    write_rows(tmp_path / "run" / "cases.csv", written)
    read = read_rows(tmp_path / "run" / "cases.csv")
    assert tuple(read.columns) == CASE_COLUMNS
    assert read.to_dict("records") == written


def test_pandas_alone_reads_the_file_in_the_contract_s_columns(tmp_path):
    write_rows(tmp_path / "cases.csv", [row(), row(roi="lesion", metric="hd95", value=math.nan)])
    header, _, undefined = (tmp_path / "cases.csv").read_text().splitlines()
    assert header == ",".join(CASE_COLUMNS)
    assert undefined.endswith("lesion,hd95,nan")
    assert pd.read_csv(tmp_path / "cases.csv")["value"].isna().tolist() == [False, True]


@pytest.mark.parametrize("text", ["", "nan", "NaN"])
def test_an_undefined_value_is_nan_however_it_is_spelt(tmp_path, text):
    line = ",".join(str(v) for v in list(row().values())[:-1])
    (tmp_path / "cases.csv").write_text(",".join(CASE_COLUMNS) + f"\n{line},{text}\n")
    assert math.isnan(read_rows(tmp_path / "cases.csv")["value"].item())


def test_a_row_with_the_same_key_replaces_the_old_one(tmp_path):
    path = tmp_path / "cases.csv"
    write_rows(path, [row(value=1.0), row(case_id="008", value=2.0)])
    write_rows(path, [row(value=3.0), row(misregistration_mm=3, value=4.0)])
    values = read_rows(path).set_index(["case_id", "misregistration_mm"])["value"].to_dict()
    assert values == {("007", 2.0): 3.0, ("008", 2.0): 2.0, ("007", 3.0): 4.0}


def test_the_last_of_two_rows_with_one_key_wins_even_after_rounding_errors():
    frame = as_rows([row(misregistration_mm=0.3, value=1.0), row(misregistration_mm=0.1 * 3)])
    assert frame["value"].tolist() == [21.5]
    noisy = {"perturbation": "noise_std"}
    frame = as_rows([row(**noisy, amount=0.3, value=1.0), row(**noisy, amount=0.1 * 3)])
    assert frame["value"].tolist() == [21.5]


def test_every_part_of_the_key_keeps_rows_apart():
    wrong = {"perturbation": "noise_std", "amount": 0.1}
    others = [row(**wrong), row(**{**wrong, "amount": 0.2})]
    others += [row(**{**wrong, "perturbation": "mask_holes"})]
    others += [
        row(**{name: value})
        for name, value in {
            "case_id": "8",  # another case of the same patient
            "method": "average",
            "preset": "stroke",
            "seed": 1,
            "misregistration_mm": 1.0,
            "mask_source": "expert",
            "steps": 6,
            "roi": "brain",
            "metric": "ssim",
        }.items()
    ]
    assert len(as_rows([row(), *others])) == 13


def test_scores_of_a_case_become_rows():
    made = case_rows([("bone", "psnr", 21.5), ("lesion", "dice", math.nan)], **KEY)
    assert made[0] == row()
    assert math.isnan(made[1]["value"]) and made[1]["metric"] == "dice"


def test_a_case_without_a_patient_is_one_of_its_own(tmp_path):
    key = {name: value for name, value in KEY.items() if name != "patient_id"}
    [alone] = case_rows([("bone", "psnr", 21.5)], **key)
    assert alone["patient_id"] == "007"
    before = [name for name in CASE_COLUMNS if name != "patient_id"]  # files of earlier versions
    pd.DataFrame([alone])[before].to_csv(tmp_path / "cases.csv", index=False)
    assert read_rows(tmp_path / "cases.csv").to_dict("records") == [alone]


def test_rows_from_before_there_were_perturbations_are_of_none(tmp_path):
    before = [name for name in CASE_COLUMNS if name not in ("perturbation", "amount")]
    pd.DataFrame([row()])[before].to_csv(tmp_path / "cases.csv", index=False)
    assert read_rows(tmp_path / "cases.csv").to_dict("records") == [row()]
    write_rows(tmp_path / "cases.csv", [row(perturbation="mask_holes", amount=0.2)])
    by_pandas = pd.read_csv(tmp_path / "cases.csv")  # which reads an empty text as NaN
    by_pandas[["case_id", "patient_id"]] = [["007", "07"]] * 2
    by_pandas["mask_source"] = "None"
    assert as_rows(by_pandas).equals(read_rows(tmp_path / "cases.csv"))
    assert unperturbed(by_pandas).to_dict("records") == [row()]


def test_an_amount_of_nothing_is_refused_and_so_is_one_column_without_the_other():
    with pytest.raises(ValueError, match=r"amount 0 where perturbation is empty, got .*'007'"):
        as_rows([row(amount=0.1)])
    for lacking in ("perturbation", "amount"):
        incomplete = {name: value for name, value in row().items() if name != lacking}
        with pytest.raises(ValueError, match=rf"missing \['{lacking}'\]"):
            as_rows([incomplete])


def test_a_case_of_two_patients_is_refused():
    with pytest.raises(ValueError, match=r"one patient for case '007', got \['07', '08'\]"):
        as_rows([row(), row(method="average", patient_id="08")])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"colour": 1}, "colour"),
        ({"value": "high"}, "value"),
        ({"seed": 0.5}, "seed"),
        ({"misregistration_mm": "nan"}, "misregistration_mm"),
        ({"perturbation": "noise_std", "amount": "inf"}, "amount"),
        ({"case_id": None}, "case_id"),
        ({"method": ""}, "method"),
        ({"patient_id": ""}, "patient_id"),
    ],
)
def test_a_bad_row_is_refused_and_the_file_kept(tmp_path, bad, message):
    write_rows(tmp_path / "cases.csv", [row()])
    before = (tmp_path / "cases.csv").read_bytes()
    with pytest.raises(ValueError, match=message):
        write_rows(tmp_path / "cases.csv", [row(**bad)])
    assert (tmp_path / "cases.csv").read_bytes() == before


def test_a_missing_column_is_named():
    incomplete = row()
    del incomplete["steps"]
    with pytest.raises(ValueError, match=r"missing \['steps'\]"):
        as_rows([incomplete])


def test_files_without_rows_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match=r"empty\.csv"):
        read_rows(tmp_path / "empty.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv"):
        read_rows(tmp_path / "other.csv")


def test_no_rows_make_an_empty_file_with_a_header(tmp_path):
    write_rows(tmp_path / "cases.csv", [])
    assert read_rows(tmp_path / "cases.csv").empty
    assert (tmp_path / "cases.csv").read_text() == ",".join(rows_module.CASE_COLUMNS) + "\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b"\n", b",1,2,3,4,5,6,7,8,9\n"),  # in the second line more cells
        lambda text: text + b'a,"b',
        lambda text: b"\xff\xfe" + text,
        lambda text: text.replace(b"case_id", b"x" * 3000),
        lambda text: text + b"\n" * 3 + text,
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence_that_names_it(damage, tmp_path):
    path = tmp_path / "cases.csv"
    write_rows(path, [row(metric="psnr")])
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(damage(first + b"\n" + rest))
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and len(said) < 1000
