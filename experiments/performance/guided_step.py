"""What guidance costs: one step of the sampler, unguided and guided, side by side.

python experiments/performance/guided_step.py RUN LESION_HEAD [TURNS]

Turns of each kind alternate, so that what else the machine does falls on all alike; the median over
turns is compared. Every term of Eq. 2, the fidelity terms, Eq. 4 and U are on. A step is one of the
walk: the walk's time over its steps, after one turn to warm up.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from clinfuse.configuration import (
    lesion_head_of,
    quiet_libraries,
    register_resolvers,
    run_config,
    trained_method,
)
from clinfuse.data.paired_volumes import study_item
from clinfuse.data.phantoms import make_phantom, write_study
from clinfuse.data.studies import load_study


def main(run: str, lesion_head: str, turns: str = "2") -> None:
    register_resolvers()
    quiet_libraries()
    cfg = run_config(run)
    method = trained_method(run, cfg)
    method.lesion_head = lesion_head_of(lesion_head)
    batch, own = phantom_batch(), method.guidance
    kinds = {
        "unguided": replace(own, eta=0.0, eta_u=0.0),
        "x0, of the mean (default)": replace(own, gradient="x0", of_mean=True),
        "full, of the mean": replace(own, gradient="full", of_mean=True),
    }
    with torch.no_grad():
        anchor = method.anchor(batch)
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(int(turns) + 1):
            for name, method.guidance in kinds.items():
                start = time.perf_counter()
                method.sample(batch, anchor)
                times[name].append((time.perf_counter() - start) / method.steps)
    step = {name: median(taken[1:]) for name, taken in times.items()}
    print("| a step | s | of an unguided one |\n| --- | ---: | ---: |")
    for name, seconds in step.items():
        print(f"| {name} | {seconds:.2f} | {seconds / step['unguided']:.2f} |")


def phantom_batch():
    """One phantom with a lesion, as a study on disk would be read."""

    case = next(c for c in range(20) if make_phantom(c, seed=5).lesion.sum() > 200)
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), make_phantom(case, seed=5), 5)
        return study_item(load_study(Path(folder)), torch.eye(4, dtype=torch.float64))


if __name__ == "__main__":
    main(*sys.argv[1:])
