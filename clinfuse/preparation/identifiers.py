"""Names that may be written: hashes in place of patients, and text that names none."""

import hashlib
import re
from collections.abc import Iterable

DATE = re.compile(r"(?<!\d)(?:19|20)\d\d([-./]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?!\d)")
"""Year, month, day as in 20240131 or 2024-01-31."""

SHORTEST_NAME = 3
"""Shorter names and parts of names ("7", "Li") would be found all over an ordinary text."""


def hashed(patient: str, salt: str = "") -> str:
    """A code such as ``P-3f9a1c07b2d4`` for a patient: the same for the same name and salt.

    It is the start of a SHA-256, so that a report or a file name shows no one's name, and so that
    the scans of one patient stay together. It does not protect from someone who has the salt and a
    list of possible patients: hashing them all tells which one it is, and hospital numbers are few
    enough to try every one. A salt that only the cohort's keeper knows does; it also keeps the
    codes of two cohorts from being joined.

    Args:
        patient: as the files name the patient; spaces around it do not count.
        salt: of the cohort.

    Raises:
        ValueError: an empty name, which all nameless patients would share.
    """
    patient = patient.strip()
    if not patient:
        raise ValueError("expected a patient's name or number to hash, got an empty one")
    return "P-" + hashlib.sha256(f"{salt}\0{patient}".encode()).hexdigest()[:12]


def is_hashed(name: str) -> bool:
    """Whether a name has the form of a hash already."""
    return re.fullmatch(r"P-[0-9a-f]{12}", name) is not None


def without_identity(text: str, identities: Iterable[str], salt: str = "") -> str:
    """The text with patients replaced by their hashes and dates by "DATE".

    A name is found whatever its case and whatever stands between its parts, so that ``Doe^Jane``
    is found in ``/scans/doe_jane/``; the parts of a name, where DICOM tells them apart, also alone.
    What has fewer than three letters or digits is not looked for.

    Args:
        identities: names and numbers of patients, as ``Series.identities`` has them.
        salt: of the cohort.
    """
    for identity in sorted(filter(str.strip, identities), key=len, reverse=True):
        for words in _appearances(identity):
            pattern = r"[\W_]*".join(map(re.escape, words))
            text = re.sub(
                rf"(?<![^\W_]){pattern}(?![^\W_])", hashed(identity, salt), text, flags=re.I
            )
    return DATE.sub("DATE", text)


def _appearances(identity: str) -> list[list[str]]:
    """Sequences of words that give the patient away: the whole, then what DICOM calls its parts."""
    whole = re.findall(r"[^\W_]+", identity)
    parts = [re.findall(r"[^\W_]+", part) for part in re.split(r"[\^=]", identity)]
    wanted = [whole, *parts] if len(parts) > 1 else [whole]
    return [words for words in wanted if len("".join(words)) >= SHORTEST_NAME]
