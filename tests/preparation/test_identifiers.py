import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.preparation.identifiers import hashed, is_hashed, without_identity

NAMES = st.text(st.characters(categories=("L", "N")), min_size=3, max_size=20)


@given(NAMES, st.text(max_size=8))
def test_a_hash_is_short_stable_and_fit_for_a_file_name(patient, salt):
    assert re.fullmatch(r"P-[0-9a-f]{12}", hashed(patient, salt))
    assert hashed(patient, salt) == hashed(f" {patient} ", salt)


def test_hashes_of_other_patients_and_of_other_cohorts_differ():
    patients = [f"MRN-{number}" for number in range(2000)]
    salts = ("", "apis", "rire")
    assert len({hashed(patient, salt) for patient in patients for salt in salts}) == 6000
    assert hashed("bc", "a") != hashed("c", "ab")  # where the salt ends is part of it


def test_a_nameless_patient_is_refused():
    with pytest.raises(ValueError, match="got an empty one"):
        hashed("  ")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/scans/doe_jane/T1", "/scans/{}/T1"),
        ("DOE JANE, MRI", "{}, MRI"),
        ("seen by Jane's mother", "seen by {}'s mother"),
        ("a doerr and a janet", "a doerr and a janet"),  # other words
        ("Doe^Jane^^Dr", "{}^^Dr"),
    ],
)
def test_a_name_is_found_however_it_is_written(text, left):
    assert without_identity(text, ["Doe^Jane"]) == left.format(hashed("Doe^Jane"))


def test_numbers_and_dates_are_taken_out_and_measures_are_not():
    text = "MRN-0042 of 1961-02-03, 20240131, 2024.01.31: 5.00 mm, slice 42, 20241332"
    expected = f"{hashed('MRN-0042', 's')} of DATE, DATE, DATE: 5.00 mm, slice 42, 20241332"
    assert without_identity(text, ["MRN-0042", "", "42"], "s") == expected


@given(NAMES)
def test_no_identity_is_left(patient):
    text = without_identity(f"of {patient} and {patient}.", [patient])
    assert not re.search(rf"(?<![^\W_]){re.escape(patient)}(?![^\W_])", text)


def test_what_is_already_hashed_stays_as_it_is():
    code = hashed("Doe^Jane")
    assert without_identity(f"study {code}", ["Doe^Jane", "MRN-0042"]) == f"study {code}"


def test_what_is_a_hash_already_is_known():
    assert is_hashed(hashed("Jane Doe"))
    assert not is_hashed("Jane Doe") and not is_hashed("P-1234") and not is_hashed("P-" + "g" * 12)
