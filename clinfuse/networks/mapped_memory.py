"""Volumes larger than memory: what PyTorch makes of volumes lies in files, mapped into memory.

A network evaluates a large volume in windows (``windows``), but what lies between its evaluations,
noise, state, means, masks, is as large as the volume, some dozens of times. Written to a file that
is mapped, it costs no memory that could run out: the system keeps of it what it has room for.
"""

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from clinfuse.functional.free_memory import free_memory

SMALLEST = 2**22
"""Numbers from which a result is mapped: smaller ones come and go too often."""

KEPT = 24
"""Files that tensors have given back, at most, that are kept for the next ones."""

VOLUMES, VOLUMES_A_MEMBER = 40, 5
"""Volumes of single precision that fusing one holds at its most (experiments/performance)."""


@contextmanager
def mapped_where_large(voxels: int, members: int = 1) -> Iterator[Path | None]:
    """``volumes_mapped`` where fusing so large a volume would take half of the memory that is free.

    The other half is for the networks' windows (``memory_gb=auto``).

    Args:
        voxels: of the volume, or of all that are fused at once.
        members: of each.

    Yields:
        the folder whose files volumes are mapped to; None where they are not.
    """
    needed = 4 * voxels * (VOLUMES + VOLUMES_A_MEMBER * members)
    is_enough = _Mapped.folders or needed < free_memory() / 2
    with nullcontext() if is_enough else volumes_mapped(smallest=SMALLEST):
        yield _Mapped.folders[-1] if _Mapped.folders else None


@contextmanager
def volumes_mapped(folder: str | Path | None = None, smallest: int = SMALLEST) -> Iterator[None]:
    """Have every large tensor that this thread makes on the CPU within lie in a file of its own.

    Operators are the same, called with a place for their result, and so are the values, to the last
    bit. A file has no name from the moment it is mapped, so that none is ever left behind, and
    serves another tensor when its own is gone. Where files cannot be so (Windows) nothing happens.

    Args:
        folder: of the files, on a disk and not in memory; None is ``folder_on_disk``.
        smallest: numbers in a tensor from which it is mapped.

    Raises:
        OSError: from within, where the folder's disk has no room left.
    """
    if sys.platform == "win32":
        yield
        return
    rooms = _Rooms(folder_on_disk() if folder is None else Path(folder))
    _Mapped.folders.append(rooms.folder)
    try:
        with _Mapped(rooms, smallest):
            yield
    finally:
        _Mapped.folders.pop()
        rooms.close()


def folder_on_disk() -> Path:
    """The system's folder for passing files (TMPDIR), or if that is in memory another one.

    Some systems keep /tmp in memory, where files would take what they are to save.
    """
    folders = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    usable = [each for each in folders if each.is_dir() and os.access(each, os.W_OK)]
    return next((each for each in usable if not _is_in_memory(each)), folders[0])


def _is_in_memory(folder: Path) -> bool:
    kinds = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    place = folder.resolve()
    mount = next((each for each in (place, *place.parents) if each in kinds), None)
    return mount is not None and kinds[mount] in ("tmpfs", "ramfs")


@contextmanager
def within_memory() -> Iterator[None]:
    """Map nothing meanwhile: for a network's features, whose windows are chosen to fit."""
    _Mapped.paused += 1
    try:
        yield
    finally:
        _Mapped.paused -= 1


class _Mapped(TorchDispatchMode):
    """Hands each operator with a large result a mapped file to write it to."""

    folders: ClassVar[list[Path]] = []
    paused = 0

    def __init__(self, rooms: "_Rooms", smallest: int) -> None:
        super().__init__()
        self.rooms, self.smallest = rooms, smallest

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.paused or not _makes_new(func) or not _is_on_cpu(args, kwargs):
            return func(*args, **kwargs)
        expected = _expected(func, args, kwargs)
        if isinstance(expected, Tensor) and expected.numel() < self.smallest:
            return func(*args, **kwargs)
        write = _writing(func)
        if not isinstance(expected, Tensor) or write is None:
            return tree_map(self._moved, func(*args, **kwargs))
        out = self._mapped(expected)
        write(out, args, kwargs)
        return out

    def _moved(self, value: Any) -> Any:
        """A result that its operator could not be given a place for."""
        if not isinstance(value, Tensor) or value.numel() < self.smallest:
            return value
        return self._mapped(value).copy_(value)

    def _mapped(self, like: Tensor) -> Tensor:
        """Room for a tensor of such a shape, layout and kind, in a file without a name."""
        numbers = 1 + sum(
            (size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True)
        )
        room = self.rooms.lent(numbers * like.element_size())
        return room.view(like.dtype).as_strided(like.shape, like.stride())


class _Rooms:
    """Files without a name, mapped and lent to tensors, and lent again when these are gone.

    To make a file, and to have the system find its pages one by one as they are first touched,
    takes as long as many an operator that writes to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.free: list[mmap.mmap] = []
        self.is_closed = False

    def lent(self, size: int) -> Tensor:
        """So many bytes, which are free again with the last tensor that lies in them."""
        room = self._again(size) or self._new(size)
        lent = np.frombuffer(room, np.uint8, size)
        weakref.finalize(lent, self._take_back, room).atexit = False
        return torch.from_numpy(lent)

    def close(self) -> None:
        """Keep no room any more, neither those that are free nor those that will be."""
        self.is_closed = True
        self.free.clear()

    def _take_back(self, room: mmap.mmap) -> None:
        if not self.is_closed:
            self.free.append(room)
            del self.free[:-KEPT]

    def _again(self, size: int) -> mmap.mmap | None:
        for room in reversed(self.free[:]):
            if size <= len(room) <= 1.25 * size:
                with suppress(ValueError):  # another thread has it by now
                    self.free.remove(room)
                    return room
        return None

    def _new(self, size: int) -> mmap.mmap:
        try:
            return self._made(size)
        except OSError:
            if not self.free:
                raise
            self.free.clear()  # whose room may be what the disk lacks
            return self._made(size)

    def _made(self, size: int) -> mmap.mmap:
        handle, name = tempfile.mkstemp(prefix="clinfuse-", dir=self.folder)
        try:
            _reserve(handle, size, self.folder)
            return mmap.mmap(handle, size)
        finally:
            os.close(handle)
            os.unlink(name)


def _reserve(handle: int, size: int, folder: Path) -> None:
    """Give a file its size, and its room on the disk, whose lack would else end the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        wanted = f"{error.strerror} for {size / 1e9:.2g} GB of a volume that memory does not hold"
        raise OSError(error.errno, f"{wanted} (TMPDIR names another folder)", folder) from None


def _is_on_cpu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether all that an operator is given and makes is the CPU's."""
    given = [each.device for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    return all(each.type == "cpu" for each in [*given, torch.device(kwargs.get("device") or "cpu")])


def _expected(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The operator's result as shapes alone; None where only the values would say."""

    def shape_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return None if isinstance(value, torch.Generator) else value

    shapes, named = tree_map(shape_of, args), tree_map(shape_of, dict(kwargs))
    if "device" in {argument.name for argument in func._schema.arguments}:
        named["device"] = torch.device("meta")
    try:
        return func(*shapes, **named)
    except (RuntimeError, NotImplementedError, TypeError):
        return None


@lru_cache(maxsize=1024)
def _makes_new(func: Any) -> bool:
    """Whether an operator's results are new: neither views nor what it was given, changed."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is None for each in returns)


@lru_cache(maxsize=1024)
def _writing(func: Any) -> Callable[[Tensor, tuple[Any, ...], Mapping[str, Any]], object] | None:
    """How to have an operator write its result to a place; None where it can't."""
    aten = torch.ops.aten
    if func in (aten._to_copy.default, aten.clone.default):
        return lambda out, args, kwargs: out.copy_(args[0])
    if func in (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default):
        return lambda out, args, kwargs: None
    wanted = {each.name: str(each.type) for each in func._schema.arguments}
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        arguments = overload._schema.arguments
        places = [each.name for each in arguments if each.is_out]
        taken = {each.name: str(each.type) for each in arguments if not each.is_out}
        said_by_place = wanted.keys() - taken.keys()
        is_same = taken.items() <= wanted.items() and said_by_place <= _OF_PLACES
        if len(places) == 1 and is_same:
            return partial(_write, overload, places[0])
    return None


_OF_PLACES = {"dtype", "layout", "device", "pin_memory"}
"""What a place says by itself, and its operators are not told."""


def _write(
    overload: Any, place: str, out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    own = {each.name for each in overload._schema.arguments}
    told = {name: value for name, value in kwargs.items() if name in own}
    overload(*args, **told, **{place: out})
