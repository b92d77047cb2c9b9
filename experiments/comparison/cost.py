"""What each method costs: weights, training, seconds and memory for one test case.

python experiments/comparison/cost.py SET FOLDER OUT.csv

SET and FOLDER as for run.py, whose runs it measures. Every method fuses the set's first test case
twice in a process of its own, on the threads that OMP_NUM_THREADS allows; the second time counts.
Memory is by how much fusing raises the process's largest resident size over that of a process that
has loaded the method and the case (on a GPU, the most that was allocated there).
"""

import csv
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from run import METHODS, RULES, SLICE_RULES

from clinfuse.configuration import register_resolvers, rule, run_config, trained_method

COLUMNS = (
    *("method", "parameters", "trained_parameters", "training_steps", "training_seconds"),
    *("evaluations", "seconds", "megabytes", "case", "shape", "threads", "device"),
)


def main(which: str, folder: str, out: str) -> None:
    runs = [Path(folder) / which / name for name in METHODS[which]]
    rules = RULES if which == "phantom" else SLICE_RULES
    rows = []
    for name in (*rules, *runs):
        command = [sys.executable, __file__, "--one", str(runs[0]), str(name)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(answer.stdout.splitlines()[-1])
        if isinstance(name, Path):
            row |= json.loads((name / "cost.json").read_text())
        rows.append({"method": Path(name).name} | row)
        print(rows[-1], flush=True)
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval=0)
        writer.writeheader()
        writer.writerows(rows)


def one(run_of_data: str, name: str) -> dict:
    """Seconds and memory of one method, in this process."""
    from hydra.utils import instantiate

    register_resolvers()
    data = instantiate(run_config(run_of_data).data, misregistration_mm=[0.0], _convert_="all")
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()[0]))
    method = (trained_method(name) if "/" in name else rule(name)).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        method, batch = method.to(device), batch.to(torch.device(device))
    before, seconds = memory(device), 0.0
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            method.fuse(batch)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return {
        "evaluations": method.steps,
        "seconds": round(seconds, 4),
        "megabytes": round((memory(device) - before) / 1e6),
        "case": batch.case_id[0],
        "shape": "x".join(str(n) for n in batch.mri.shape[2:]),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def memory(device: str) -> int:
    """The most bytes so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:])))
    elif len(sys.argv) == 4:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
