"""Image files as ITK reads them, their headers looked at first.

ITK believes a header: it takes what memory it claims, and some headers end the process.
"""

import re
import zlib
from contextlib import suppress
from pathlib import Path

import SimpleITK as sitk

from clinfuse.functional.claims import check_room, check_texts

LONGEST_LINE, LONGEST_VALUE, LONGEST_HEADER = 500, 250, 1 << 20
"""Characters of a line of NRRD, of a value of MetaImage, and of all of these: far more than any."""


def read_image(path: Path) -> sitk.Image:
    """An image file, as SimpleITK has it.

    Raises:
        ValueError: there is no memory for it, or a header as in ``check_header``.
        RuntimeError: it cannot be read.
    """
    check_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    check_room(reader.GetSize(), reader.GetNumberOfComponents(), path)  # bytes, at least
    return reader.Execute()


def check_header(path: Path) -> None:
    """Refuse a header on which ITK would end the process, or would read beyond all measure.

    Raises:
        ValueError: such a header.
    """
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        with suppress(OSError, EOFError, zlib.error):  # which ITK says in its words
            check_texts(path)
    elif path.is_file() and name.endswith((".nrrd", ".nhdr")):
        _check_nrrd(path)
    elif path.is_file() and name.endswith((".mha", ".mhd")):
        _check_metaimage(path)


def _check_nrrd(path: Path) -> None:
    """Refuse header lines on which ITK's reader of NRRD, in saying what is wrong, ends the process.

    It quotes a field into a buffer of about a thousand characters. Remarks and ``key:=value``,
    which may be long, it does not quote.
    """
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1).rstrip(b"\r\n"):
            if len(line) >= LONGEST_LINE and not re.match(rb"#|content:|[^:]{1,200}:=", line):
                raise ValueError(
                    f"expected fields of less than {LONGEST_LINE} characters in the header, got "
                    f"a longer one: {path}"
                )
            while len(line) >= LONGEST_LINE:
                line = file.readline(LONGEST_LINE)


def _check_metaimage(path: Path) -> None:
    """Refuse what overflows ITK's reader of MetaImage: more axes than ten, texts of 256 characters.

    Its fields have one line each, so that none is taken for the value of another.
    """
    with path.open("rb") as file:
        start = file.read(LONGEST_HEADER)
    for line in re.split(rb"[\r\n]+", start):
        field = re.fullmatch(rb"\s*([^=:]*[^=:\s])\s*[=:]\s*(\S.*)", line, re.DOTALL)
        name, value = field.groups() if field else (b"", b"")
        if name == b"ElementDataFile":
            return
        if name == b"NDims" and not re.fullmatch(rb"[1-9]\s*", value):
            raise ValueError(f"expected NDims from 1 to 9, got {value[:20]!r}: {path}")
        if line.strip() and (not name or len(value) > LONGEST_VALUE):
            break
    raise ValueError(
        f"expected a header of fields NAME = VALUE with at most {LONGEST_VALUE} characters up to "
        f"ElementDataFile, got another: {path}"
    )
