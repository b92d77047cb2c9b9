import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

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
@pytest.mark.parametrize("evil", ["../evil", "/clinfuse_evil", "a/../../evil", "..\\evil", "C:/x"])
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
