"""Files fetched over HTTP, resumed and checked.

Where nobody states a checksum the first download is trusted: its checksum is written down, and a
later one has to agree with it.
"""

import errno
import hashlib
import http.client
import io
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from rich import get_console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from clinfuse.preparation.archives import unpack, unwritable

log = logging.getLogger(__name__)

CHUNK = 1 << 16
"""Bytes read at a time."""

DIGITS = "[0-9a-f]{64}"
"""Of a sha256."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when it takes no more bytes."""

PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may be another the next time."""


def fetch(
    url: str,
    sha256: str | None,
    to: Path,
    cache: Path | None = None,
    timeout_s: float | int = 30.0,
    tries: int = 4,
    wait_s: float | int = 1.0,
) -> Path:
    """The file at ``to``, fetched unless it is there or in the cache, whole and of that checksum.

    It is fetched beside its place, as ``.part``, which a later call goes on with (from the start,
    if the server does not do ranges), and gets its name only when its checksum is right.

    Args:
        url: http or https.
        sha256: of the file, in hexadecimal. None takes that of the first download, which the log
            says and a file ``.sha256`` in the cache, or beside ``to``, keeps. A part of such a file
            is gone on with only where the server tells its versions apart.
        cache: keeps a copy by checksum, for other places and other times; None keeps none.
        timeout_s: of a connection, and of a silence in it.
        tries: in a row that bring no byte before it is given up.
        wait_s: before the second try; doubles with each.

    Raises:
        ValueError: not a URL or a checksum; a file of another checksum at ``to`` already, which is
            left alone; one from the server, which is removed.
        ConnectionError: the server cannot be reached, has no such file, or goes silent; what came
            is kept.
        OSError: no room; what came is kept.
    """
    if urlparse(url).scheme not in ("http", "https"):
        raise ValueError(f"expected a URL of http or https, got {url!r}")
    if sha256 is not None and not re.fullmatch(DIGITS, sha256):
        raise ValueError(f"expected a sha256 of 64 hexadecimal digits, got {sha256!r}: {url}")
    record = _record(url, to, cache)
    known = sha256 or _recorded(record)
    if to.is_file():
        found = _sha256(to)
        if known is None:
            _trust(url, found, record)
        elif found != known:
            raise ValueError(f"expected no file, or that of {url}, got one of other content: {to}")
        return to
    place = to if cache is None else cache / (known or record.stem)
    if not (place.is_file() and _sha256(place) == known):
        place.unlink(missing_ok=True)
        part = place.with_name(f"{place.name}.part")
        _receive_all(url, part, known is not None, timeout_s, tries, wait_s)
        found = _sha256(part)
        if known is None:
            _trust(url, found, record)
        elif found != known:
            part.unlink()
            stated = "" if sha256 else f", as of the first download, which {record} keeps"
            raise ValueError(f"expected sha256 {known}{stated}, got {found} (removed): {url}")
        place = to if cache is None else cache / found
        part.replace(place)
    if place != to:
        _copy(place, to)
    return to


def fetch_all(
    files: Sequence[Mapping[str, Any]], by_hand: str, to: Path, cache: Path | None = None
) -> list[Path]:
    """Fetch the files of a cohort into a new folder, and unpack those that are archives.

    It appears when all of them are there; until then they are in a hidden one beside it, which a
    later call goes on with.

    Args:
        files: each with ``url`` and ``sha256`` (None where nobody states it), as ``conf/dataset``
            lists them.
        by_hand: how to come by the cohort otherwise.

    Returns:
        The files, and folders for archives.

    Raises:
        ValueError: there are none that may be fetched; and as ``fetch`` and ``unpack``.
    """
    if not files:
        raise ValueError(f"expected files to fetch, got none for this cohort: {by_hand}")
    partial = to.with_name(f".{to.name}.partial")
    names = []
    for file in files:
        name = PurePosixPath(urlparse(file["url"]).path).name
        path = fetch(file["url"], file.get("sha256"), partial / name, cache)
        if name.endswith((".zip", ".tar", ".tar.gz", ".tgz")):
            name = name.split(".")[0]
            unpack(path, partial / name)
        names.append(name)
    partial.replace(to)
    return [to / name for name in names]


def _record(url: str, to: Path, cache: Path | None) -> Path:
    """Where the checksum of the first download is kept."""
    if cache is None:
        return to.with_name(f"{to.name}.sha256")
    name = PurePosixPath(urlparse(url).path).name
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}_{name}.sha256"


def _recorded(record: Path) -> str | None:
    if not record.is_file():
        return None
    known = record.read_text(errors="replace").split()
    if not known or not re.fullmatch(DIGITS, known[0]):
        raise ValueError(f"expected a sha256 of 64 hexadecimal digits, got another text: {record}")
    return known[0]


def _trust(url: str, sha256: str, record: Path) -> None:
    partial = record.with_name(f".{os.getpid()}.{record.name}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"{sha256}  {url}\n")
        partial.replace(record)
    except OSError as error:
        raise unwritable(error, record, "the file itself is kept") from error
    finally:
        partial.unlink(missing_ok=True)
    log.warning(
        "nobody states the checksum of %s: this first copy is trusted, and later ones must have "
        "its sha256 too, %s (kept in %s; in conf/dataset it holds on other machines)",
        url, sha256, record,
    )  # fmt: skip


def _receive_all(
    url: str,
    part: Path,
    is_known: bool,
    timeout_s: float | int,
    tries: int,
    wait_s: float | int,
) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    version = part.with_name(f"{part.name}.version")
    if not is_known and not version.is_file():
        part.unlink(missing_ok=True)  # the rest might be of another file
    failed = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, version, timeout_s)
            break
        except (http.client.HTTPException, OSError) as error:
            _stop_if_final(error, url, part)
            failed = failed + 1 if _size(part) <= before else 1
            if failed >= tries:
                raise ConnectionError(
                    f"expected the file, got {error} {tries} times: {url} ({_size(part)} bytes are "
                    f"kept in {part})"
                ) from error
            log.info("%s: %s; trying again", url, error)
            time.sleep(wait_s * 2 ** (failed - 1))
    version.unlink(missing_ok=True)


def _receive(url: str, part: Path, version: Path, timeout_s: float | int) -> None:
    """Append what ``part`` lacks of the file, or write all of it where the server sends all.

    ``version`` keeps what the server calls the version that ``part`` is of, where it does.
    """
    start = _size(part)
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and version.is_file():
        headers["If-Range"] = version.read_text()
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if error.code != 416 or start == 0:
            raise
        if total and int(total.group(1)) == start:
            return  # all of it was there
        part.unlink()
        raise ConnectionResetError("a file that is shorter than what there is of it") from error
    with response:
        sent_from = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        goes_on = response.status == 206 and sent_from and int(sent_from.group(1)) == start
        if response.status == 206 and not goes_on:
            part.unlink(missing_ok=True)
            raise ConnectionResetError("a range that was not asked for")
        if not goes_on:
            _note_version(response.headers, version)
        length = response.headers.get("Content-Length")
        whole = None if length is None else int(length) + (start if goes_on else 0)
        with part.open("ab" if goes_on else "wb") as file:
            _write(response, file, url, whole)
    if whole is not None and _size(part) < whole:
        raise ConnectionResetError(f"{_size(part)} of {whole} bytes")


def _note_version(headers: Message, version: Path) -> None:
    """Keep a strong entity tag, else the date: what If-Range compares (RFC 9110, 13.1.5)."""
    tag = headers.get("ETag") or ""
    mark = headers.get("Last-Modified") if not tag or tag.startswith("W/") else tag
    if mark:
        version.write_text(mark)
    else:
        version.unlink(missing_ok=True)


def _write(
    response: http.client.HTTPResponse, file: io.BufferedWriter, url: str, whole: int | None
) -> None:
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    silent = not get_console().is_terminal
    with Progress(*columns, transient=True, disable=silent) as progress:
        name = PurePosixPath(urlparse(url).path).name
        log.info("fetching %s from byte %d of %s", name, file.tell(), whole or "?")
        bar = progress.add_task(name, total=whole, completed=file.tell())
        while chunk := response.read(CHUNK):
            file.write(chunk)
            progress.advance(bar, len(chunk))


def _stop_if_final(error: Exception, url: str, part: Path) -> None:
    """Raise what another try would not change."""
    if isinstance(error, urllib.error.HTTPError) and error.code not in PASSING:
        raise ConnectionError(f"expected the file, got HTTP {error.code}: {url}") from error
    if isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EACCES, errno.EROFS):
        raise unwritable(error, part, f"{_size(part)} bytes are kept") from error


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{os.getpid()}.{to.name}")
    try:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
        partial.replace(to)
    except OSError as error:
        raise unwritable(error, to, f"it is whole in {source}") from error
    finally:
        partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
