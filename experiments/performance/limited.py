"""Does a scan of some size fuse within so much memory, by the command that users run?

python experiments/performance/limited.py RUN [SETTING ...] [--shape 300x512x512] [--gib 8]
    [--keep FOLDER] [--out FOLDER]

A phantom brought to the shape (d x h x w) is written as NIfTI files, masks and all, and fused by
``python -m clinfuse.fuse run=RUN mri=... SETTING ...`` in a Linux control group that is ended by
the system where it takes more. That needs root; without it one is told so, and nothing is run. The
files and what was fused from them stay in KEEP. Said, and written to FOLDER/limited.json: how long
it took, and the most that was the processes' own and no file's, looked at every half second. What
the group took in all is next to its limit whenever much is read and written: pages of files fill
what is left, and are dropped when it is wanted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch
from cases import phantom_with_lesion
from machine import machine
from measure import shape_of, written

from clinfuse.data.phantoms import ras_affine
from clinfuse.functional.intensity import ct_from_model
from clinfuse.types import ROI_NAMES

GROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("settings", nargs="*", default=["members=2"])
    parser.add_argument("--shape", type=shape_of, default=(300, 512, 512))
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--keep", type=Path, default=Path("runs/limited"))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with group_of(round(asked.gib * 2**30)) as group:
        row = fused_in(group, asked.run, asked.settings, pair_of(asked.shape, asked.keep))
    settings = [each for each in asked.settings if os.sep not in each]  # no path of one machine
    row = {"shape": list(asked.shape), "gib": asked.gib, "settings": settings, **row}
    print(
        f"{written(asked.shape)} within {asked.gib:g} GiB: exit {row['exit']} after "
        f"{row['seconds']:.0f} s, at most {row['private_gib']:.2f} GiB of its own"
    )
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine(), "limited": row}
        (asked.out / "limited.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(row["exit"])


def pair_of(shape: Sequence[int], keep: Path) -> dict[str, Path]:
    """Files of one phantom by the name that ``clinfuse.fuse`` has for them; written once."""
    folder = keep / written(shape).replace(" ", "")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("mri", "ct", *(f"{name}_mask" for name in ROI_NAMES))
    files = {name: folder / f"{name}.nii" for name in names}
    if all(path.is_file() for path in files.values()):
        return files
    batch = phantom_with_lesion(shape)
    affine = ras_affine(shape, batch.spacing_mm[0].tolist())
    volumes = {
        "mri": (batch.mri + 1) * 500,
        "ct": ct_from_model(batch.ct, batch.ct_map[0]),
        **dict(zip(names[2:], batch.roi.split(1, 1), strict=True)),
    }
    for name, volume in volumes.items():
        dtype = np.uint8 if volume.dtype == torch.bool else np.int16
        stored = volume[0, 0].numpy().transpose(2, 1, 0).astype(dtype)
        nib.save(nib.Nifti1Image(stored, affine), files[name])
    return files


@contextmanager
def group_of(limit: int) -> Iterator[Path]:
    """A control group of so many bytes, of whichever version the system has."""
    is_first = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if is_first else GROUPS) / f"clinfuse_{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_first else "memory.max")).write_text(str(limit))
        if not is_first:
            with suppress(OSError):  # there is none without swap
                (group / "memory.swap.max").write_text("0")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise SystemExit(
            f"expected a Linux whose control groups may be written (root), got: {error}"
        ) from None
    try:
        yield group
    finally:
        group.rmdir()


def fused_in(group: Path, run: Path, settings: list[str], files: dict[str, Path]) -> dict[str, Any]:
    """Exit code, seconds and GiB of one call of the command."""
    out = files["mri"].parent / "fused"
    command = [sys.executable, "-m", "clinfuse.fuse", f"run={run}", f"out={out}", *settings]
    command += [f"{name}={path}" for name, path in files.items()]
    begun, private = time.perf_counter(), 0
    # the shell enters the group and becomes the command, so that no import is left uncounted
    entering = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
    with subprocess.Popen(entering) as process:
        while process.poll() is None:
            private = max(private, own_bytes(process.pid))
            time.sleep(0.5)
    return {
        "exit": process.returncode if process.returncode >= 0 else 128 - process.returncode,
        "seconds": time.perf_counter() - begun,
        "private_gib": private / 2**30,
    }


def own_bytes(pid: int) -> int:
    """What a process and those that it started hold in no file."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
                total += 1024 * int(next(x.split()[1] for x in lines if x.startswith("RssAnon:")))
    return total


if __name__ == "__main__":
    main()
