"""Archives unpacked where they belong: whole or not at all, and nowhere else."""

import errno
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

MOST_TIMES, ALWAYS_BYTES = 100, 1 << 30
"""An archive may unpack to so many times its own size, and to so many bytes in any case."""

OF_THE_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.EMFILE, errno.ENFILE),
)
"""What the system says that is no fault of the archive."""

MOST_FILES = 1_000_000
"""And to so many files and folders."""


MOST_TEXT_BYTES = 1 << 20
"""Of a member of a tar archive: its name, and what else is said of it."""


def unpack(archive: Path, to: Path) -> Path:
    """The folder ``to`` with what a zip or tar archive holds; if it is there, it is left as it is.

    It is unpacked beside its place and then renamed: the folder is complete. What it would unpack
    to is added up before anything is written.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: no archive, or a broken one; a member that would lie outside of the folder, or
            is a link or a device; more bytes than an honest archive of its size or than there is
            room for. Nothing is left of it then.
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
                _check_size((one.file_size for one in members.infolist()), archive, partial)
                for one in members.infolist():
                    _check_member(one.filename, not _is_zipped_special(one), archive)
                members.extractall(partial)
        else:
            with _opened_tar(archive) as members:
                _check_size((_bytes_of(member) for member in members), archive, partial)
                for member in members:
                    _check_member(member.name, member.isfile() or member.isdir(), archive)
                if hasattr(tarfile, "data_filter"):  # not in Python 3.11.0 to 3.11.3
                    members.extraction_filter = tarfile.data_filter
                members.extractall(partial)
        partial.replace(to)
    except Exception as error:  # reading a damaged archive may fail in any way
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise unwritable(error, to, "nothing is left of it") from error
        if isinstance(error, ValueError) and str(archive) in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"expected a whole archive, got {reason}: {archive}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return to


def unwritable(error: OSError, path: Path, left: str) -> OSError:
    """One sentence on a file that the system would not take, with the system's number.

    Args:
        left: what is left of it.
    """
    refused = OSError(f"expected to write it, got {error.strerror} ({left}): {path}")
    refused.errno = error.errno
    return refused


class _Modest(tarfile.TarInfo):
    """A member whose texts, which are read as a whole before it is known, are not too long."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Modest":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _TEXTS and member.size > MOST_TEXT_BYTES:
            raise ValueError(f"names and notes of {member.size} bytes")
        return member


_TEXTS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def _opened_tar(archive: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(archive, tarinfo=_Modest)
    except tarfile.ReadError as error:
        raise ValueError(f"expected a zip or tar archive, got something else: {archive}") from error


def _bytes_of(member: tarfile.TarInfo) -> int:
    """Of its content and its texts."""
    return member.size + member.offset_data - member.offset


def _check_size(sizes: Iterable[int], archive: Path, partial: Path) -> None:
    """Add up what is to be unpacked, and stop as soon as it is too much."""
    most = max(MOST_TIMES * archive.stat().st_size, ALWAYS_BYTES)
    room, total = shutil.disk_usage(partial).free, 0
    for count, size in enumerate(sizes, 1):
        total += size
        if total > most or count > MOST_FILES:
            raise ValueError(
                f"expected an archive that unpacks to at most {most} bytes in {MOST_FILES} files, "
                f"got at least {total} in {count}: {archive}"
            )
        if total > room:
            raise ValueError(
                f"expected room for at least {total} unpacked bytes, got {room} free: {archive}"
            )


def _check_member(name: str, is_plain: bool, archive: Path) -> None:
    if not name.isprintable():
        raise ValueError(f"expected names of printable characters, got {name!r}: {archive}")
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"expected files inside of the folder, got {name!r}: {archive}")
    if not is_plain:
        raise ValueError(f"expected files and folders, got a link or device {name!r}: {archive}")


def _is_zipped_special(member: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(member.external_attr >> 16)
    return kind not in (0, stat.S_IFREG, stat.S_IFDIR)
