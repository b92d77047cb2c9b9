"""What VIF, Qabf and FMI cost on one 256 x 256 pair, beside what they are tested against.

OMP_NUM_THREADS=1 python experiments/performance/fusion_metrics.py DATA [TURNS]

DATA holds the set CT-MRI of the Harvard whole brain atlas; the pair is its middle one, fused by
``average`` and by ``maximum``. Time is that of the processor, so that what else the machine does
counts for little; ours and the others' take turns. piq (VIF) works in single precision on the whole
pair; the definitions of Qabf and FMI, window by window as the tests have them, on a part of it, and
their time is scaled by the number of windows. Needs piq, scipy and the tests' folder.

The first FMI of a process is compiled, or read from where numba keeps what it has compiled; with
NUMBA_CACHE_DIR set to an empty folder, as on a new machine.
"""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch

from clinfuse.data.slices import KINDS, find_pairs, read_pair
from clinfuse.functional.eight_bit import eight_bit
from clinfuse.metrics.fusion import WITH_SOURCES

PART = np.s_[..., 96:144, 96:144]
"""Of the pair, through the brain and the skull's edge."""

TOGETHER = ("vif", "qabf", "fmi_pixel")


def main(data: str, turns: str = "15") -> None:
    torch.set_num_threads(1)
    kind = KINDS["ct_mri"]
    pairs = find_pairs(Path(data), kind)
    pair = read_pair(pairs[len(pairs) // 2], kind)
    mri, ct = pair.mri[None], pair.ct[None]
    first = seconds(partial(WITH_SOURCES["fmi_pixel"], mri, mri, ct))
    print(f"the first fmi_pixel of this process: {first:.2f} s")
    for rule, fused in (("average", (mri + ct) / 2), ("maximum", torch.maximum(mri, ct))):
        images = (fused, mri, ct)
        ours = {name: partial(metric, *images) for name, metric in WITH_SOURCES.items()}
        theirs, share = references(images)
        spent: dict[tuple[str, str], list[float]] = {}
        for turn in range(int(turns) + 1):
            for name in ours:
                spent.setdefault(("ours", name), []).append(seconds(ours[name]))
                if name in theirs and turn < 4:
                    spent.setdefault(("theirs", name), []).append(seconds(theirs[name]))
        print(f"\n{rule}, {tuple(fused.shape[2:])} pixels, {torch.__version__}\n")
        print("| metric | ms, median | least | reference | ratio |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in ours:
            own = [1e3 * t for t in spent["ours", name][1:]]
            line = f"| {name} | {median(own):.1f} | {min(own):.1f} |"
            if name in theirs:
                other = 1e3 * median(spent["theirs", name][1:]) / share[name]
                line += f" {other:.0f} | {other / median(own):.0f} |"
            else:
                line += " | |"
            print(line)
        both = [[1e3 * t for t in spent["ours", name][1:]] for name in TOGETHER]
        middle, least = (sum(map(of, both)) for of in (median, min))
        print(f"| {', '.join(TOGETHER)} together | {middle:.1f} | {least:.1f} | | |")


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def references(
    images: tuple[torch.Tensor, ...],
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Others' implementations by metric, and what share of the pair they are run on."""
    levels = [eight_bit(image) for image in images]
    part = [level[PART][0, 0].double().numpy() for level in levels]
    sys.path.insert(0, "tests/functional")
    fmi, qabf = (importlib.import_module(f"test_{name}") for name in ("fmi", "qabf"))
    if "piq" not in sys.modules:
        spec = importlib.util.find_spec("piq")
        assert spec is not None, "expected piq to be installed: pip install --no-deps piq"
        package = ModuleType("piq")  # its own __init__ wants torchvision
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["piq"] = package
    piq_vif = importlib.import_module("piq.vif").vif_p
    share = part[0].size / levels[0].numel()
    return {
        "vif": lambda: [piq_vif(levels[0], level, data_range=255.0) for level in levels[1:]],
        "qabf": lambda: qabf.by_definition(*part, fold=False),
        "fmi_pixel": lambda: fmi.by_definition(*(p[None] for p in part)),
    }, {"vif": 1.0, "qabf": share, "fmi_pixel": share}


if __name__ == "__main__":
    main(*sys.argv[1:])
