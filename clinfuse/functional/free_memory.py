"""How much memory there is to take."""

from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_NAMES = {
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    1: (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}
"""Of Linux's control groups, by version: limit, use, and what of that is files, to be dropped."""


def free_memory(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that this process can take before it is ended or the system runs out.

    What the system has free, or less where a container or a batch system (Slurm) allows less.

    Args:
        groups: where the system shows its control groups.
        own: which of them this process is in.
    """
    available: int = psutil.virtual_memory().available
    return max(min([available, *_left_to_groups(groups, own)]), 0)


def _left_to_groups(groups: Path, own: Path) -> Iterator[int]:
    """What is left to each group that the process is in, and to those that these are in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        version = 2 if controllers == "" else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        root = groups if version == 2 else groups / "memory"
        group = root / place.strip("/")
        for each in (group, *group.parents):
            if (left := _left(each, version)) is not None:
                yield left
            if each == root:
                break


def _left(group: Path, version: int) -> int | None:
    """Bytes; None for a group without a limit, or whose files are not to be seen."""
    limit, used, of_files = _NAMES[version]
    try:
        most = int((group / limit).read_text())
        now = int((group / used).read_text())
        parts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return most - now + sum(int(parts.get(name, 0)) for name in of_files)
