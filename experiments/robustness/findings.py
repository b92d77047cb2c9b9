"""Which dense findings an anchor takes from a noisy CT, against those of the CT without noise.

python experiments/robustness/findings.py RUN [--noise 0 0.05 0.1 0.2] [--mm 0 2]

Over the test cases of a run: voxels found that are findings of the clean CT, found that are none,
and not found.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from clinfuse.configuration import quiet_libraries, register_resolvers, trained_method
from clinfuse.data.augmentation import with_noise
from clinfuse.data.paired_volumes import PairedVolumes
from clinfuse.networks.registered_blend import dense_findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--noise", type=float, nargs="+", default=[0, 0.05, 0.1, 0.2])
    parser.add_argument("--mm", type=float, nargs="+", default=[0, 2])
    asked = parser.parse_args()
    register_resolvers()
    quiet_libraries()
    anchor_of = trained_method(asked.run).eval().anchor
    root = json.loads((asked.run / "facts.json").read_text())["data"]["root"]
    data = PairedVolumes(root)
    data.setup()
    print("| CT moved, mm | noise, s.d. | found | false | missed |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for mm in asked.mm:
        for noise in asked.noise:
            counts = torch.zeros(3, dtype=torch.long)
            for batch in data.test_batches(mm):
                draw = torch.Generator().manual_seed(0)
                noisy = replace(batch, ct=with_noise(batch.ct[0], noise, draw)[None])
                true = torch.zeros_like(batch.brain)
                if batch.findings is not None:
                    true = batch.findings
                with torch.no_grad():
                    anchor = anchor_of(noisy)
                    found = dense_findings(anchor.ct, anchor.roi[:, 1:2] > 0.5, noisy)
                found = torch.zeros_like(true) if found is None else found
                counts += torch.stack(
                    [(found & true).sum(), (found & ~true).sum(), (true & ~found).sum()]
                )
            print(f"| {mm:g} | {noise:g} |", " | ".join(map(str, counts.tolist())), "|", flush=True)


if __name__ == "__main__":
    main()
