"""Archives unpacked where they belong: whole or not at all, and nowhere else."""

import gzip
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath


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
                if hasattr(tarfile, "data_filter"):  # not in Python 3.11.0 to 3.11.3
                    members.extraction_filter = tarfile.data_filter
                members.extractall(partial)
        else:
            raise ValueError(f"expected a zip or tar archive, got something else: {archive}")
        partial.replace(to)
    except (zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"expected a whole archive, got {error}: {archive}") from error
    except OSError as error:
        raise unwritable(error, to, "nothing is left of it") from error
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


def _check_member(name: str, is_plain: bool, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"expected files inside of the folder, got {name!r}: {archive}")
    if not is_plain:
        raise ValueError(f"expected files and folders, got a link or device {name!r}: {archive}")


def _is_zipped_link(member: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(member.external_attr >> 16)
