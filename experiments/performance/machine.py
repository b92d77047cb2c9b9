"""What a benchmark ran on: processor, cores, threads, versions, commit. ``python machine.py``."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from clinfuse.configuration import fastest_precision, run_facts


def machine() -> dict[str, str | int | float]:
    """For the record that every benchmark writes."""
    facts = {
        **run_facts(),
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "cores allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_gib(), 1),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(terse=True),
        "precision": fastest_precision(),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return facts


def processor() -> str:
    """The model's name, and family and model number, which the names of virtual ones leave out."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return platform.processor() or platform.machine()
    lines = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in lines}
    name = facts.get("model name", platform.machine())
    numbers = [facts[key] for key in ("cpu family", "model") if key in facts]
    return f"{name} (family and model {'/'.join(numbers)})" if numbers else name


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


if __name__ == "__main__":
    print(json.dumps(machine(), indent=1))
