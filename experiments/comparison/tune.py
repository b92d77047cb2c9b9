"""What the climb's settings do on the validation patient: Qabf, VIF, SF and seconds.

python experiments/comparison/tune.py RUN [EVERY]

RUN is one of experiment=pictures, trained without its validation pairs, of which every EVERY-th is
fused (default 3) by the anchor alone and under several settings of guidance.kept_*. Prints a table.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from hydra.utils import instantiate
from torch import Tensor

from clinfuse.configuration import register_resolvers, run_config, trained_method
from clinfuse.data.paired_slices import slice_item
from clinfuse.functional.contrast import spatial_frequency
from clinfuse.functional.qabf import qabf
from clinfuse.functional.vif import vif
from clinfuse.losses.most_kept import MostKept
from clinfuse.types import FusionBatch

SETTINGS = (  # steps of the sampler, of the climb, its rate, and the highest noise level it is at
    (4, 15, 0.05, 1.0),
    (4, 15, 0.03, 1.0),
    (2, 30, 0.05, 1.0),
    (4, 30, 0.04, 0.6),
    (4, 30, 0.03, 0.6),
)


def main(run: str, every: str = "3") -> None:
    register_resolvers()
    method = trained_method(run).eval()
    data = instantiate(run_config(run).data, _convert_="all")
    still = torch.eye(3, dtype=torch.float64)
    pairs = [slice_item(pair, still) for pair in data.slices("val")[1 :: int(every)]]
    print(f"{len(pairs)} pairs\n\n| | Qabf | VIF | SF | s |\n| --- | ---: | ---: | ---: | ---: |")
    show("`maximum`", lambda batch: torch.maximum(batch.mri, batch.ct), pairs)
    show("the anchor alone", lambda batch: method.anchor(batch).mean.clamp(-1, 1), pairs)
    for steps, climb, rate, start in SETTINGS:
        kept = MostKept(method.guidance.kept.information, climb, rate)
        method.steps = steps
        method.guidance = replace(method.guidance, kept=kept, kept_start=start)
        show(f"{steps} levels, {climb} steps of {rate} from {start} on", method.fuse, pairs)
    climb = MostKept(0.3, 60, 0.05)
    show("`most_kept`", lambda batch: climb(batch.mri, batch.ct), pairs)


@torch.no_grad()
def show(name: str, fuse: Callable[[FusionBatch], Tensor], pairs: list) -> None:
    start, rows = time.perf_counter(), []
    for batch in pairs:
        fused = fuse(batch)
        sources = (fused, batch.mri, batch.ct)
        rows.append([qabf(*sources), vif(*sources), spatial_frequency(fused)])
    seconds = (time.perf_counter() - start) / len(pairs)
    q, v, s = torch.tensor(rows).mean(0).tolist()
    print(f"| {name} | {q:.3f} | {v:.3f} | {s:.1f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
