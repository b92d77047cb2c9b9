import hashlib
import logging
import os
import re
import resource
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from clinfuse.preparation.download import fetch, fetch_all

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
    version: tuple[str, str] | None = None  # a header that tells versions apart, and its value
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
        known = self.headers.get("If-Range")
        is_same = known is None or (state.version is not None and known == state.version[1])
        if wanted and state.does_ranges and is_same:
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
        if state.version:
            self.send_header(*state.version)
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
    with pytest.raises(ConnectionError, match="timed out"):
        fetch(server.url, SHA256, tmp_path / "scans.bin", timeout_s=0.3, tries=2, wait_s=0.01)


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


@pytest.mark.parametrize("cached", [False, True])
def test_the_first_copy_of_a_file_without_a_checksum_is_trusted_and_its_checksum_said(
    server, tmp_path, caplog, cached
):
    to, cache = tmp_path / "to" / "scans.bin", tmp_path / "cache" if cached else None
    fetch(server.url, None, to, cache)
    assert to.read_bytes() == CONTENT and SHA256 in caplog.text
    (record,) = (cache or to.parent).glob("*scans.bin.sha256")
    assert record.read_text() == f"{SHA256}  {server.url}\n"
    caplog.clear()
    fetch(server.url, None, to, cache)
    assert len(server.asked) == 1 and caplog.text == ""


@pytest.mark.parametrize("cached", [False, True])
def test_a_later_copy_that_differs_from_the_trusted_one_is_refused(server, tmp_path, cached):
    to, cache = tmp_path / "to" / "scans.bin", tmp_path / "cache" if cached else None
    fetch(server.url, None, to, cache)
    to.unlink()
    for copy in tmp_path.rglob(SHA256):
        copy.unlink()
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(
        ValueError, match=rf"sha256 {SHA256}, as of the first .*\.sha256 keeps, got"
    ):
        fetch(server.url, None, to, cache)
    assert not to.exists()
    server.content = CONTENT
    assert fetch(server.url, None, to, cache).read_bytes() == CONTENT


def test_a_trusted_copy_serves_other_places_from_the_cache(server, tmp_path):
    fetch(server.url, None, tmp_path / "one", tmp_path / "cache")
    fetch(server.url, None, tmp_path / "two", tmp_path / "cache")
    fetch(server.url, SHA256, tmp_path / "three", tmp_path / "cache")
    assert (tmp_path / "three").read_bytes() == CONTENT and len(server.asked) == 1


def test_a_file_that_was_there_is_trusted_like_a_first_download(server, tmp_path):
    (tmp_path / "scans.bin").write_bytes(CONTENT)
    fetch(server.url, None, tmp_path / "scans.bin", tmp_path / "cache")
    server.content = b"another"
    with pytest.raises(ValueError, match="as of the first download"):
        fetch(server.url, None, tmp_path / "two", tmp_path / "cache")


def test_a_record_that_holds_no_checksum_is_refused(server, tmp_path):
    (tmp_path / "scans.bin.sha256").write_text("<html>")
    with pytest.raises(
        ValueError, match=r"expected a sha256 .* another text: .*scans\.bin\.sha256"
    ):
        fetch(server.url, None, tmp_path / "scans.bin")


VERSIONS = [("ETag", '"{}"'), ("Last-Modified", "Sat, 0{} Jan 2022 00:00:00 GMT")]


@pytest.mark.parametrize(("header", "value"), VERSIONS)
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_part_is_gone_on_with_only_if_it_is_of_the_same_version(
    server, tmp_path, header, value, is_replaced
):
    to = tmp_path / "scans.bin"
    server.version, server.sends_at_most = (header, value.format(1)), 70_000
    with pytest.raises(ConnectionError):
        fetch(server.url, None, to, tries=1)
    server.sends_at_most = None
    if is_replaced:
        server.version, server.content = (header, value.format(2)), CONTENT[::-1]
    fetch(server.url, None, to)
    assert to.read_bytes() == server.content and server.asked[1] == "bytes=70000-"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scans.bin", "scans.bin.sha256"]


@pytest.mark.parametrize("version", [None, ("ETag", 'W/"1"')])
def test_without_a_checksum_or_a_version_a_part_is_not_gone_on_with(server, tmp_path, version):
    to = tmp_path / "scans.bin"
    part_of(to).write_bytes(b"of an earlier version")
    server.version = version
    fetch(server.url, None, to)
    assert to.read_bytes() == CONTENT and server.asked == [None]


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


def test_a_cohorts_files_are_fetched_and_its_archives_unpacked(server, tmp_path):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as archive:
        archive.writestr("1BA001/mr.txt", b"x")
    server.content = (tmp_path / "made.zip").read_bytes()
    url = server.url.replace("scans.bin", "Task1.zip?download=1")
    file = {"url": url, "sha256": hashlib.sha256(server.content).hexdigest()}
    (folder,) = fetch_all([file], "", tmp_path / "to", tmp_path / "cache")
    assert folder == tmp_path / "to" / "Task1"
    assert (folder / "1BA001" / "mr.txt").read_bytes() == b"x"


def test_a_cohort_appears_when_all_of_it_is_there_and_a_second_call_goes_on(server, tmp_path):
    to = tmp_path / "to"
    files = [{"url": server.url, "sha256": SHA256}, {"url": server.url.replace("scans", "more")}]
    with pytest.raises(ValueError, match="expected sha256"):
        fetch_all([files[0], {**files[1], "sha256": "0" * 64}], "", to)
    assert not to.exists()
    fetch_all(files, "", to)
    assert (to / "scans.bin").read_bytes() == (to / "more.bin").read_bytes() == CONTENT
    assert len(server.asked) == 3 and not list(tmp_path.glob(".*"))


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
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert file.url.startswith("https://")


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
