"""What a file claims to hold, held against what there is, before it is read.

A file of a few bytes may claim any size, and what is compressed may unpack to a thousand times its
own.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from nibabel.openers import ImageOpener

from clinfuse.functional.free_memory import free_memory

MOST_TEXT_BYTES = 1 << 24
"""What a NIfTI file may have before its voxels: its header, texts and extensions."""

MORE_BYTES = 1 << 20
"""What a compressed file may have behind what it says it has: some writers pad."""


def check_room(shape: Sequence[int], bytes_each: int, path: Path) -> None:
    """Refuse a volume that would not fit into the memory that is free.

    It is there as it is stored, and twice as float32: as read, and with its axes in order.

    Args:
        shape: in voxels.
        bytes_each: of a voxel, as stored.

    Raises:
        ValueError: more than is free.
    """
    needed, free = math.prod(shape) * (bytes_each + 8), free_memory()
    if needed > free:
        raise ValueError(
            f"expected a volume that fits into the {free / 1e9:.1f} GB of memory that are free, "
            f"got {' x '.join(map(str, shape))} voxels, which take {needed / 1e9:.3g} GB: {path}"
        )


def check_texts(path: Path) -> None:
    """Refuse a NIfTI file whose voxels begin far behind its header: who opens it reads till there.

    What is no NIfTI is left to whoever opens it.

    Raises:
        ValueError: they begin beyond ``MOST_TEXT_BYTES``.
        OSError, EOFError, zlib.error: it cannot be unpacked.
    """
    with ImageOpener(str(path)) as file:
        header = file.read(540)
    for order in "<>":
        for size, place, kind in ((348, 108, "f"), (540, 168, "q")):
            if len(header) < size or struct.unpack_from(f"{order}i", header)[0] != size:
                continue
            (begin,) = struct.unpack_from(f"{order}{kind}", header, place)
            if not begin <= MOST_TEXT_BYTES:
                raise ValueError(
                    f"expected voxels after at most {MOST_TEXT_BYTES} bytes of header, got them "
                    f"after {begin:g}: {path}"
                )


def unpacked(path: Path, claimed: int) -> bytes:
    """What a gzip file holds, compared with its checksum.

    Args:
        claimed: bytes that it says it holds; unpacking ends soon behind.

    Raises:
        ValueError: it holds more.
        EOFError, zlib.error: it is cut or damaged.
    """
    packed, parts, left = path.read_bytes(), list[bytes](), max(claimed, 0) + MORE_BYTES + 1
    while packed:
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        parts.append(member.decompress(packed, left))
        left -= len(parts[-1])
        if left == 0:
            raise ValueError(
                f"expected {claimed} bytes as the header says, got more than {MORE_BYTES} beyond "
                f"them: {path}"
            )
        if not member.eof:
            raise EOFError("it ends within what is compressed")
        packed = member.unused_data.lstrip(b"\0")
    return b"".join(parts)
