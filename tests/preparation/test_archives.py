import gzip
import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.preparation import archives
from clinfuse.preparation.archives import unpack

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8).tobytes()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar.gz")])
def test_an_archive_is_unpacked_into_its_folder_once(pack, name, tmp_path):
    archive = pack(tmp_path / name, {"Task1/brain/x.txt": b"x", "readme": b"r"})
    to = unpack(archive, tmp_path / "out")
    assert (to / "Task1" / "brain" / "x.txt").read_bytes() == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "out"]
    (to / "readme").write_text("changed")
    unpack(archive, to)
    assert (to / "readme").read_text() == "changed"


@pytest.mark.parametrize(("pack", "name"), [(zipped, "a.zip"), (tarred, "a.tar.gz")])
@pytest.mark.parametrize(
    "evil",
    ["../evil", "/clinfuse_evil", "a/../../evil", "..\\evil", "C:/x", "C:x", "\\\\host\\x", ".."],
)
def test_an_archive_that_reaches_out_of_its_folder_is_refused_whole(pack, name, evil, tmp_path):
    archive = pack(tmp_path / name, {"fine.txt": b"x", evil: b"evil"})
    with pytest.raises(ValueError, match="expected files inside of the folder"):
        unpack(archive, tmp_path / "sub" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]


def test_links_in_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    for name in ("a.tar", "a.zip"):
        with pytest.raises(ValueError, match="got a link or device 'link'"):
            unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_nothing_but_files_and_folders_comes_out_of_a_tar(kind, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        special = tarfile.TarInfo("special")
        special.type, special.linkname = kind, "../outside"
        archive.addfile(special)
        through = tarfile.TarInfo("special/x")  # what a link would lead out of the folder
        archive.addfile(through)
    with pytest.raises(ValueError, match="got a link or device 'special'"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x7f", "a\u202eb"])
def test_names_that_would_write_on_the_terminal_are_refused(name, tmp_path):
    archive = tarred(tmp_path / "a.tar.gz", {name: b"x"})
    with pytest.raises(ValueError, match="expected names of printable characters") as caught:
        unpack(archive, tmp_path / "out")
    assert str(caught.value).isprintable()


def test_a_name_with_a_nul_ends_there_as_zip_has_it(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"kept.txt_..#..#evil": b"x"})
    archive.write_bytes(archive.read_bytes().replace(b"kept.txt_..#..#", b"kept.txt\0../../"))
    assert [path.name for path in unpack(archive, tmp_path / "out").iterdir()] == ["kept.txt"]


def test_an_archive_that_says_more_than_an_honest_one_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(archives, "ALWAYS_BYTES", 1_000_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(30_000_000))
    tarred(tmp_path / "b.tar.gz", {"zeros": bytes(30_000_000)})
    header = tarfile.TarInfo("sparse")  # a terabyte in 10 KB, told by its header alone
    header.size = 1 << 40
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(10_000)))
    for name in ("a.zip", "b.tar.gz", "c.tar.gz"):
        with pytest.raises(ValueError, match=r"at most \d+ bytes in .*, got at least \d+ in 1: "):
            unpack(tmp_path / name, tmp_path / "out")
    monkeypatch.setattr(archives, "ALWAYS_BYTES", 1 << 50)
    with pytest.raises(ValueError, match=r"expected room for at least \d+ unpacked bytes"):
        unpack(tmp_path / "c.tar.gz", tmp_path / "out")
    monkeypatch.setattr(archives, "MOST_FILES", 2)
    with pytest.raises(ValueError, match=r"in 2 files, got at least .* in 3"):
        unpack(zipped(tmp_path / "d.zip", dict.fromkeys("abc", b"")), tmp_path / "out")
    assert all(path.is_file() for path in tmp_path.iterdir())


@pytest.mark.parametrize("kind", archives._TEXTS)
def test_a_name_that_would_fill_the_memory_is_refused_before_it_is_read(kind, tmp_path):
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 100_000_000
    content = header.tobuf(tarfile.GNU_FORMAT) + bytes(header.size)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"got ValueError: names and notes of 100000000 bytes"):
            unpack(tmp_path / "a.tar.gz", tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_names_count_as_what_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALWAYS_BYTES", 1_000_000)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for number in range(20):
            member = tarfile.TarInfo(f"{number}")
            member.pax_headers = {"comment": "x" * 100_000}
            archive.addfile(member)
    with pytest.raises(ValueError, match=r"at most 1000000 bytes in .*, got at least \d+ in 10: "):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_locked_archive_is_refused_in_a_sentence(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"x": CONTENT})
    content = bytearray(archive.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1  # the flag of encryption
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a whole archive, got .*password.*a\.zip"):
        unpack(archive, tmp_path / "out")


NAMES = st.text(st.sampled_from("ab./\\:C\0\n~ü"), min_size=1, max_size=12).filter(
    lambda name: name[0] != "\0"  # zipfile writes no empty name
)


@given(names=st.lists(NAMES, min_size=1, max_size=4), pack=st.sampled_from([zipped, tarred]))
def test_whatever_members_are_called_nothing_is_written_elsewhere(names, pack, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    archive = pack(place / "a.bin", dict.fromkeys(names, b"x"))
    try:
        unpack(archive, place / "in" / "out")
    except (ValueError, OSError) as error:  # of the system: two names for one place
        assert str(place) in str(error)
        assert not any((place / "in").iterdir())
    outside = [path for path in place.rglob("*") if place / "in" / "out" not in path.parents]
    assert set(outside) <= {archive, place / "in", place / "in" / "out"}


@given(data=st.data())
def test_a_damaged_archive_is_unpacked_whole_or_refused_and_nothing_is_left(data, tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    pack = data.draw(st.sampled_from([zipped, tarred]))
    content = bytearray(pack(place / "a.bin", {"a/b": b"text" * 9, "c": b"x"}).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (place / "a.bin").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert unpack(place / "a.bin", place / "out").is_dir()
    except (ValueError, OSError) as error:
        assert str(place) in str(error) and "\n" not in str(error)
        assert [path.name for path in place.iterdir()] == ["a.bin"]


def test_broken_archives_leave_nothing_behind(tmp_path):
    whole = zipped(tmp_path / "a.zip", {"x": CONTENT}).read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[:1000] + b"!" + whole[1001:])
    (tmp_path / "b.tar.gz").write_bytes(tarred(tmp_path / "b", {"x": CONTENT}).read_bytes()[:9000])
    (tmp_path / "c.zip").write_text("no archive")
    for name in ("a.zip", "b.tar.gz", "c.zip"):
        with pytest.raises(ValueError, match=f"expected a .*archive.*{name}"):
            unpack(tmp_path / name, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="expected an archive"):
        unpack(tmp_path / "nowhere.zip", tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_an_archive_that_points_before_its_beginning_is_damaged_not_unwritable(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"x": b"text"})
    content = bytearray(archive.read_bytes())
    at = content.index(b"PK\x01\x02") + 42  # where the directory says the member begins
    content[at : at + 4] = (2**31).to_bytes(4, "little")
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=f"expected a whole archive, got .*{archive}"):
        unpack(archive, tmp_path / "out")
