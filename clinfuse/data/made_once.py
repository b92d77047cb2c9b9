"""What is slow to make of a study, kept on disk: whoever asks for it again reads it."""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clinfuse.types import FusionBatch

log = logging.getLogger(__name__)


class MadeOnce:
    """A function of batches whose answers are kept, one file each, named by what it was given.

    The name is a hash of sources, masks, voxel size and cases, so that an answer is never taken
    for another's, and what is asked for after a run was killed is made only if it had not been.

    Args:
        folder: of the files. Another function, or another state of it, needs another folder.
        make: volumes ``b 1 *dhw`` from a batch, depending on nothing else.
    """

    def __init__(
        self, folder: Path | str, make: Callable[[FusionBatch], Float[Tensor, "b 1 *dhw"]]
    ) -> None:
        self.folder, self.make = Path(folder), make

    def __call__(self, batch: FusionBatch) -> Float[Tensor, "b 1 *dhw"]:
        path = self.folder / f"{fingerprint_of(batch)}.npy"
        if not path.is_file():
            begun = time.monotonic()
            _write(path, self.make(batch).detach().float().cpu().numpy())
            log.info("%s in %.1f s: %s", batch.case_id, time.monotonic() - begun, path)
        return _read(path, batch.mri).to(batch.mri.device)


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is in a block with the same lock file; a killed one is not."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint_of(batch: FusionBatch) -> str:
    """Sixteen characters that differ where anything differs that a method may see."""
    seen = hashlib.sha256(repr((list(batch.case_id), list(batch.ct_map))).encode())
    for tensor in (batch.mri, batch.ct, batch.roi, batch.spacing_mm):
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        seen.update(f"{array.shape} {array.dtype}".encode())
        seen.update(array.tobytes())
    return seen.hexdigest()[:16]


def _read(path: Path, like: Tensor) -> Tensor:
    """What was kept, in the shape of a source; nothing in the file is run.

    Raises:
        ValueError: anything else.
    """
    try:
        array = np.load(path, allow_pickle=False)
        if array.dtype != np.float32 or array.shape != tuple(like.shape):
            raise ValueError(f"{array.dtype} of {array.shape}")
    except Exception as error:  # a damaged header may fail in any way
        raise ValueError(
            f"expected volumes as they were kept here, got {type(error).__name__}: {path} (delete "
            "it, and it is made anew)"
        ) from error
    return torch.from_numpy(array)


def _write(path: Path, array: np.ndarray) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    try:
        np.save(scratch, array)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
