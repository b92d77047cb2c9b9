"""Changes to bytes, and to what lies compressed within them."""

import gzip
import io
import zipfile
from collections.abc import Sequence

import numpy as np

WORDS = (
    *(b"", b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"99999999999999999999", b"[]"),
    *(b"{}", b'""', b"true", b"../../x", b"/etc/passwd", b"\x00", b"\xff\xfe", b"\n", b"\r", b","),
    *(b'"', b"[" * 2000, b"${oc.env:HOME}", b"_target_: os.system", b"!!python/name:os.system"),
    *(b"*a", b"&a", "ü∞".encode(), b"%s", b"$x"),
)
"""What formats of text mistake for something else."""

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32 - 1)
FLOATS = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3e38, -1.0)


def mutated(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """The content with one to four changes; inside what is compressed, most of the time.

    Args:
        content: of a valid file.
        others: contents to take pieces of.
    """
    if rng.random() < 0.75:
        if content[:2] == b"\x1f\x8b":
            return gzip.compress(mutated(gzip.decompress(content), others, rng), 1)
        if content[:2] == b"PK":
            return _within_zip(content, others, rng)
    if rng.random() < 0.02:
        return rng.bytes(int(rng.integers(0, 600)))
    for _ in range(int(rng.integers(1, 5))):
        change = CHANGES[int(rng.integers(len(CHANGES)))]
        content = change(content, others, rng)
    return content


def _within_zip(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    chosen = list(members)[int(rng.integers(len(members)))]
    members[chosen] = mutated(members[chosen], others, rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return changed.getvalue()


def _place(content: bytes, rng: np.random.Generator) -> int:
    """Anywhere; half of the time in the first 400 bytes, where headers are."""
    end = len(content) + 1
    return int(rng.integers(min(end, 400) if rng.random() < 0.5 else end))


def _flip(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    if not content:
        return content
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 9))):
        changed[_place(content[:-1], rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + int(rng.integers(1, 65)) :]


def _repeat(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at : at + int(rng.integers(1, 65))] * 2 + content[at:]


def _splice(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    other = others[int(rng.integers(len(others)))]
    start = _place(other, rng)
    at = _place(content, rng)
    piece = other[start : start + int(rng.integers(1, 200))]
    return content[:at] + piece + content[at + len(piece) * int(rng.integers(2)) :]


def _word(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    at = _place(content, rng)
    return content[:at] + WORDS[int(rng.integers(len(WORDS)))] + content[at:]


def _digit(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    places = [i for i, byte in enumerate(content[:4000]) if 48 <= byte <= 57]
    if not places:
        return content
    at = places[int(rng.integers(len(places)))]
    return content[:at] + str(int(rng.choice([0, 7, 9, 31, 100]))).encode() + content[at + 1 :]


def _value(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    kind = str(rng.choice(["<i2", "<i4", "<u4", ">i4", "<f4", "<f8"]))
    values = FLOATS if "f" in kind else NUMBERS
    value = np.array(values[int(rng.integers(len(values)))])
    with np.errstate(all="ignore"):
        piece = value.astype(kind).tobytes()
    at = _place(content, rng)
    return content[:at] + piece + content[at + len(piece) :]


def _swap(content: bytes, _: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Two pieces between commas or line ends change places: in JSON and CSV the values do."""
    for mark in (b"\n", b","):
        pieces = content.split(mark)
        if len(pieces) > 2 and rng.random() < 0.7:
            a, b = (int(i) for i in rng.integers(len(pieces), size=2))
            pieces[a], pieces[b] = pieces[b], pieces[a]
            return mark.join(pieces)
    return content


CHANGES = (_flip, _cut, _remove, _repeat, _splice, _word, _digit, _value, _swap)
