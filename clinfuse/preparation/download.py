"""Files fetched over HTTP, resumed and checked, and archives unpacked where they belong."""

import errno
import gzip
import hashlib
import http.client
import io
import logging
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from rich import get_console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

log = logging.getLogger(__name__)

CHUNK = 1 << 16
"""Bytes read at a time."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when it takes no more bytes."""

PASSING = (408, 429, 500, 502, 503, 504)
"""Answers of a server that may be another the next time."""


def fetch(
    url: str,
    sha256: str,
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
        sha256: of the file, in hexadecimal.
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
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"expected a sha256 of 64 hexadecimal digits, got {sha256!r}: {url}")
    if to.is_file():
        if _sha256(to) != sha256:
            raise ValueError(f"expected no file, or that of {url}, got one of other content: {to}")
        return to
    place = to if cache is None else cache / sha256
    if not (place.is_file() and _sha256(place) == sha256):
        place.unlink(missing_ok=True)
        _fetch(url, sha256, place, timeout_s, tries, wait_s)
    if place != to:
        _copy(place, to)
    return to


def fetch_all(
    files: Sequence[Mapping[str, str]], by_hand: str, to: Path, cache: Path | None = None
) -> list[Path]:
    """Fetch the files of a cohort into a folder, and unpack those that are archives.

    Args:
        files: each with ``url`` and ``sha256``, as ``conf/dataset`` lists them.
        by_hand: how to come by the cohort otherwise.

    Returns:
        The files, and folders for archives.

    Raises:
        ValueError: there are none that may be fetched; and as ``fetch`` and ``unpack``.
    """
    if not files:
        raise ValueError(f"expected files to fetch, got none for this cohort: {by_hand}")
    paths = []
    for file in files:
        name = PurePosixPath(urlparse(file["url"]).path).name
        path = fetch(file["url"], file["sha256"], to / name, cache)
        is_archive = name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))
        paths.append(unpack(path, to / name.split(".")[0]) if is_archive else path)
    return paths


def unpack(archive: Path, to: Path) -> Path:
    """The folder ``to`` with what a zip or tar archive holds; if it is there, it is left as it is.

    It is unpacked beside its place and then renamed: the folder is complete.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: no archive, or a broken one; a member that would lie outside of the folder, or
            is a link or a device. Nothing is left of it then.
        OSError: no room.
    """
    if to.is_dir():
        return to
    if not archive.is_file():
        raise FileNotFoundError(f"expected an archive, found nothing at {archive}")
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as members:
                for one in members.infolist():
                    _check_member(one.filename, not _is_zipped_link(one), archive)
                members.extractall(partial)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as members:
                for member in members:
                    _check_member(member.name, member.isfile() or member.isdir(), archive)
                members.extractall(partial, filter="data")
        else:
            raise ValueError(f"expected a zip or tar archive, got something else: {archive}")
        partial.replace(to)
    except (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"expected a whole archive, got {error}: {archive}") from error
    except OSError as error:
        raise _unwritable(error, to, "nothing is left of it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return to


def _fetch(
    url: str, sha256: str, to: Path, timeout_s: float | int, tries: int, wait_s: float | int
) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f"{to.name}.part")
    failed = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, timeout_s)
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
    found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise ValueError(f"expected sha256 {sha256}, got {found} (removed): {url}")
    part.replace(to)


def _receive(url: str, part: Path, timeout_s: float | int) -> None:
    """Append what ``part`` lacks of the file, or write all of it where the server sends all."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
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
        length = response.headers.get("Content-Length")
        whole = None if length is None else int(length) + (start if goes_on else 0)
        with part.open("ab" if goes_on else "wb") as file:
            _write(response, file, url, whole)
    if whole is not None and _size(part) < whole:
        raise ConnectionResetError(f"{_size(part)} of {whole} bytes")


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
        raise _unwritable(error, part, f"{_size(part)} bytes are kept") from error


def _unwritable(error: OSError, path: Path, left: str) -> OSError:
    refused = OSError(f"expected to write it, got {error.strerror} ({left}): {path}")
    refused.errno = error.errno
    return refused


def _copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{os.getpid()}.{to.name}")
    try:
        shutil.copyfile(source, partial)
        partial.replace(to)
    except OSError as error:
        raise _unwritable(error, to, f"it is whole in {source}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_member(name: str, is_plain: bool, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"expected files inside of the folder, got {name!r}: {archive}")
    if not is_plain:
        raise ValueError(f"expected files and folders, got a link or device {name!r}: {archive}")


def _is_zipped_link(member: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(member.external_attr >> 16)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
