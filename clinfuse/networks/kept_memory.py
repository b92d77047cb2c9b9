"""Memory that is freed and wanted again at once, kept at hand in between."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor

from clinfuse.networks.mapped_memory import mapped_where_large
from clinfuse.types import FusionBatch

Fuse = Callable[[Any, FusionBatch], Tensor]

LARGEST = 2**24
"""Voxels of a batch: in the pieces that larger ones leave, the next block does not fit."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_inside = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have the process keep what is freed within, and give it back to the system at the end.

    glibc hands large blocks back as soon as they are freed, and the system clears every page when
    it is asked for them again. A network's features are such blocks: by that, an evaluation on a
    CPU takes half as long again, or twice. Afterwards all is as glibc has it in a process that has
    freed large blocks before. Elsewhere than on Linux with glibc nothing happens.
    """
    global _inside
    glibc = _glibc()
    if glibc is None or _inside:
        yield
        return
    _set(glibc, _KEEP)
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        _set(glibc, _USUAL)
        glibc.malloc_trim(0)


def memory_by_size(fuse: Fuse) -> Fuse:
    """A method that fuses, in memory as its batch's size wants it.

    ``freed_memory_kept`` for what is small enough for that, and volumes in files where memory would
    not hold them (``mapped_where_large``).
    """

    @wraps(fuse)
    def fused(method: Any, batch: FusionBatch) -> Tensor:
        voxels = batch.mri.numel()
        if voxels <= LARGEST:
            with freed_memory_kept():
                return fuse(method, batch)
        with mapped_where_large(voxels, getattr(method, "members", 1)):
            return fuse(method, batch)

    return fused


def _set(glibc: Any, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        glibc.mallopt(parameter, value)


@lru_cache(maxsize=1)
def _glibc() -> Any:
    """The C library, if it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    wanted = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in wanted) else None
