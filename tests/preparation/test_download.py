import hashlib
import io
import logging
import os
import re
import resource
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clinfuse.preparation.download import fetch, fetch_all, unpack

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8).tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
REGISTRY = Path(__file__).resolve().parents[2] / "conf" / "dataset"


@dataclass
class Server:
    """A server of one file that can be told to misbehave, and that remembers what it was asked."""

    content: bytes = CONTENT
    does_ranges: bool = True
    sends_at_most: int | None = None  # of each answer, then it hangs up
    falls_silent: bool = False  # instead of hanging up
    refuses: list[int] = field(default_factory=list)  # codes of the next answers
    asked: list[str | None] = field(default_factory=list)  # Range of each request
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    server: "LocalServer"

    def do_GET(self) -> None:
        state = self.server.state
        wanted = self.headers.get("Range")
        state.asked.append(wanted)
        if state.refuses:
            self.send_error(state.refuses.pop(0))
            return
        start = 0
        if wanted and state.does_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1))
            if start >= len(state.content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.content)}")
                self.end_headers()
                return
            self.send_response(206)
            last = len(state.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        else:
            self.send_response(200)
        body = state.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: state.sends_at_most])
        if state.falls_silent:
            self.wfile.flush()
            self.server.over.wait(10)

    def log_message(self, *_: object) -> None:
        pass


class LocalServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()
        self.state = Server(url=f"http://127.0.0.1:{self.server_port}/data/scans.bin")


@pytest.fixture
def server() -> Iterator[Server]:
    local = LocalServer()
    thread = threading.Thread(target=local.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield local.state
    local.over.set()
    local.shutdown()
    thread.join()
    local.server_close()


def part_of(to: Path) -> Path:
    return to.with_name(f"{to.name}.part")


def test_a_file_is_fetched_whole_and_nothing_else_is_left(server, tmp_path):
    to = tmp_path / "new" / "scans.bin"
    assert fetch(server.url, SHA256, to) == to
    assert to.read_bytes() == CONTENT
    assert list(to.parent.iterdir()) == [to]


def test_a_file_that_is_there_is_not_asked_for_again(server, tmp_path):
    fetch(server.url, SHA256, tmp_path / "scans.bin")
    fetch(server.url, SHA256, tmp_path / "scans.bin")
    assert server.asked == [None]


def test_a_file_of_other_content_is_neither_taken_nor_overwritten(server, tmp_path):
    to = tmp_path / "scans.bin"
    to.write_text("mine")
    with pytest.raises(ValueError, match="got one of other content"):
        fetch(server.url, SHA256, to)
    assert to.read_text() == "mine" and server.asked == []


def test_what_an_earlier_call_left_is_gone_on_with(server, tmp_path):
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(CONTENT[:100_000])
    fetch(server.url, SHA256, to)
    assert server.asked == ["bytes=100000-"]
    assert to.read_bytes() == CONTENT and not part_of(to).exists()


def test_a_server_that_ignores_ranges_is_asked_for_all_of_it(server, tmp_path):
    server.does_ranges = False
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(CONTENT[:100_000])
    fetch(server.url, SHA256, to)
    assert to.read_bytes() == CONTENT and len(server.asked) == 1


def test_a_part_that_is_all_of_it_is_not_fetched_again(server, tmp_path):
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(CONTENT)
    fetch(server.url, SHA256, to)
    assert to.read_bytes() == CONTENT and server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(CONTENT + b"more")
    fetch(server.url, SHA256, to, wait_s=0.01)
    assert to.read_bytes() == CONTENT and server.asked[-1] is None


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(server, tmp_path):
    server.sends_at_most = 70_000
    fetch(server.url, SHA256, tmp_path / "scans.bin", tries=2, wait_s=0.01)
    assert (tmp_path / "scans.bin").read_bytes() == CONTENT
    assert server.asked == [None, *(f"bytes={70_000 * n}-" for n in (1, 2, 3, 4))]


def test_a_server_that_is_busy_is_asked_again(server, tmp_path):
    server.refuses = [503, 429]
    fetch(server.url, SHA256, tmp_path / "scans.bin", wait_s=0.01)
    assert len(server.asked) == 3


def test_a_server_that_stays_busy_is_given_up_and_what_came_is_kept(server, tmp_path):
    server.refuses = [503] * 9
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(CONTENT[:50])
    with pytest.raises(ConnectionError, match=r"HTTP Error 503.* 3 times.*50 bytes are kept"):
        fetch(server.url, SHA256, to, tries=3, wait_s=0.01)
    assert len(server.asked) == 3 and not to.exists()
    assert part_of(to).read_bytes() == CONTENT[:50]


def test_a_file_that_is_not_on_the_server_is_asked_for_once(server, tmp_path):
    server.refuses = [404]
    with pytest.raises(ConnectionError, match="expected the file, got HTTP 404: http"):
        fetch(server.url, SHA256, tmp_path / "scans.bin")
    assert len(server.asked) == 1 and list(tmp_path.iterdir()) == []


def test_a_server_that_falls_silent_is_not_waited_for_forever(server, tmp_path):
    server.sends_at_most, server.falls_silent = 0, True
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="timed out"):
        fetch(server.url, SHA256, tmp_path / "scans.bin", timeout_s=0.3, tries=2, wait_s=0.01)
    assert time.monotonic() - began < 5


def test_no_server_at_all_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match="refused") as given_up:
        fetch("http://127.0.0.1:1/scans.bin", SHA256, tmp_path / "a", tries=1)
    assert "\n" not in str(given_up.value)


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_of_the_wrong_checksum_is_removed(server, tmp_path, cached):
    server.content = CONTENT[:-1] + b"x"
    to, cache = tmp_path / "to" / "scans.bin", tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"expected sha256 {SHA256}, got [0-9a-f]+ \(removed\)"):
        fetch(server.url, SHA256, to, cache if cached else None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_cache_serves_other_places_without_a_server(server, tmp_path):
    fetch(server.url, SHA256, tmp_path / "one", tmp_path / "cache")
    fetch("http://127.0.0.1:1/scans.bin", SHA256, tmp_path / "two", tmp_path / "cache")
    assert (tmp_path / "two").read_bytes() == CONTENT and len(server.asked) == 1


def test_a_damaged_copy_in_the_cache_is_fetched_anew(server, tmp_path):
    cache = tmp_path / "cache"
    fetch(server.url, SHA256, tmp_path / "one", cache)
    (cache / SHA256).write_bytes(CONTENT[:-1])
    fetch(server.url, SHA256, tmp_path / "two", cache)
    assert (tmp_path / "two").read_bytes() == CONTENT and len(server.asked) == 2


def test_a_full_disk_leaves_the_part_alone_that_a_later_call_goes_on_with(server, tmp_path):
    to = tmp_path / "scans.bin"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(OSError, match=r"expected to write it, got .* bytes are kept") as full:
            fetch(server.url, SHA256, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(full.value) and len(server.asked) == 1
    assert list(tmp_path.iterdir()) == [part_of(to)]
    kept = part_of(to).stat().st_size
    assert 0 < kept <= 150_000
    fetch(server.url, SHA256, to)
    assert to.read_bytes() == CONTENT and server.asked[1] == f"bytes={kept}-"


def test_what_is_fetched_is_said_in_the_log(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fetch(server.url, SHA256, tmp_path / "scans.bin")
    assert f"fetching scans.bin from byte 0 of {len(CONTENT)}" in caplog.text


@pytest.mark.parametrize(
    ("url", "sha256"),
    [("ftp://host/file", SHA256), ("/etc/passwd", SHA256), ("http://host/file", "abc")],
)
def test_what_is_no_url_or_no_checksum_is_refused(url, sha256, tmp_path):
    with pytest.raises(ValueError, match="expected a"):
        fetch(url, sha256, tmp_path / "file")


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


def test_a_cohorts_files_are_fetched_and_its_archives_unpacked(server, tmp_path):
    server.content = zipped(tmp_path / "made.zip", {"1BA001/mr.txt": b"x"}).read_bytes()
    url = server.url.replace("scans.bin", "Task1.zip?download=1")
    file = {"url": url, "sha256": hashlib.sha256(server.content).hexdigest()}
    (folder,) = fetch_all([file], "", tmp_path / "to", tmp_path / "cache")
    assert folder == tmp_path / "to" / "Task1"
    assert (folder / "1BA001" / "mr.txt").read_bytes() == b"x"


def test_a_cohort_that_may_not_be_fetched_says_how_to_come_by_it(tmp_path):
    with pytest.raises(ValueError, match="got none for this cohort: register at its page"):
        fetch_all([], "register at its page", tmp_path)


@pytest.mark.parametrize("path", sorted(REGISTRY.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_registry_says_where_each_cohort_comes_from_and_on_what_terms(path):
    dataset = OmegaConf.load(path)
    assert dataset.name == path.stem
    assert dataset.cases._target_ == f"clinfuse.preparation.cohorts.{path.stem}.cases"
    assert set(dataset.source) == {"page", "licence", "needs_registration", "by_hand", "files"}
    assert dataset.source.licence and dataset.source.by_hand
    assert not (dataset.source.needs_registration and dataset.source.files)
    for file in dataset.source.files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256) and file.url.startswith("https://")


@pytest.mark.parametrize("path", sorted(REGISTRY.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_registrys_importers_take_the_arguments_they_are_given(path, tmp_path):
    cases = instantiate(OmegaConf.load(path).cases, _convert_="all")
    with pytest.raises(FileNotFoundError, match=r"expected cases as .*, found none in"):
        cases(tmp_path, tmp_path / "work")


def test_nothing_is_written_where_there_is_no_right_to(server, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="expected to write it, got Permission denied"):
        fetch(server.url, SHA256, tmp_path / "scans.bin")
