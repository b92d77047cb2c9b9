"""``make bench``: every benchmark that takes minutes, in one record, one table and one picture.

python experiments/performance/bench.py [--out experiments/performance/results] [--only PART ...]
    [--shapes 32x96x96] [--turns 2] [--run NAME=RUN,... ...] [--compile]

Parts: steps, growth, precision, fusion, metrics, loading. What each measures stands in the file of
its name, which also runs by itself; ``equal_time.py``, which trains, and the 1000-step reference of
``fusion.py`` take longer and are run by hand. Writes ``bench.json`` and ``bench.png``. With
``--only``, the other parts of a record that is there already stay, each with the machine, commit
and load that it was measured under.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fusion
import growth
import precision
import steps
from machine import machine
from measure import shape_of, show
from picture import draw

HERE = Path(__file__).resolve().parent
PARTS = ("steps", "growth", "precision", "fusion", "metrics", "loading")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(32, 96, 96)])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--run", nargs="+", default=[f"method={fusion.UNTRAINED}"])
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes")
    asked = parser.parse_args()
    path, started = asked.out / "bench.json", time.perf_counter()
    is_whole = set(asked.only) == set(PARTS)
    record = {} if is_whole or not path.is_file() else json.loads(path.read_text())
    for part in asked.only:
        print(f"\n== {part} ({time.perf_counter() - started:.0f} s so far)", flush=True)
        facts, begun = machine(), time.perf_counter()
        found = measured(part, asked)
        if found is not None:
            record[part] = rounded({"machine": facts, **found})
            record[part]["seconds"] = round(time.perf_counter() - begun)
            asked.out.mkdir(parents=True, exist_ok=True)
            kept = {each: record[each] for each in PARTS if each in record}
            path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\nrecord: {path}\npicture: {draw(record, path.with_suffix('.png'))}")


def measured(part: str, asked: argparse.Namespace) -> dict[str, Any] | None:
    """What one part found, printed as well; None where it is not there."""
    if part == "steps":
        pairs, throughput = steps.measured(asked.shapes, asked.turns)
        pairs += steps.guided((16, 64, 64), asked.turns)
        show(pairs)
        return {"pairs": [p.as_json() for p in pairs], "throughput": throughput}
    if part == "growth":
        rows = growth.measured(turns=asked.turns)
        growth.show_growth(rows)
        return {"growth": rows}
    if part == "precision":
        found = precision.measured((32, 96, 96), asked.turns, None, asked.compile)
        precision.show_variants(found)
        return {"variants": [variant.as_json() for variant in found]}
    if part == "fusion":
        rows = fusion.measured(asked.run, [(32, 64, 64), (26, 256, 256)])
        fusion.show_fusion(rows)
        return {"fusion": rows}
    return by_itself(part)


def by_itself(part: str) -> dict[str, Any] | None:
    """What a benchmark that is a script of its own writes into the folder it is given."""
    script = HERE / f"{part}.py"
    if not script.is_file():
        print(f"left out: no {script.name}")
        return None
    briefly = ["--steps", "0"] if part == "loading" else []  # without a training beside the loader
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(script), "--out", folder, *briefly], check=True)
        found: dict[str, Any] = json.loads((Path(folder) / f"{part}.json").read_text())
        return found


def rounded(value: Any) -> Any:
    """Floats to four digits that count, so that a record says no more than was measured."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
