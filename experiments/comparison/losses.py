"""Does a trained method beat the rule that it generalises on the loss that it optimises?

python experiments/comparison/losses.py SET FOLDER OUT.csv

SET and FOLDER as for run.py, whose runs it reads. Each pair of a run and a rule fuses the test
cases of the set; a row has the loss of a case, as the configuration of the run states it, and Qabf.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from clinfuse.configuration import register_resolvers, rule, run_config, trained_method
from clinfuse.functional.qabf import qabf
from clinfuse.functional.spacing import shared_spacing
from clinfuse.methods.aims import aims_of
from clinfuse.methods.resnet_fusion import ResNetFusion
from clinfuse.types import FusionBatch

PAIRS = (
    ("trainable_wavelet", "wavelet"),
    ("resnet_fusion", "average"),
    ("weighted_by_roi", "weighted"),
    ("ttt_fusion", "average"),
)
"""A trained method and the rule that it generalises."""


def main(which: str, folder: str, out: str) -> None:
    register_resolvers()
    rows = []
    for trained, simple in PAIRS:
        run = Path(folder) / which / trained
        method = trained_method(run).eval()
        data = instantiate(run_config(run).data, misregistration_mm=[0.0], _convert_="all")
        data.prepare_data()
        data.setup("test")
        for batch in data.test_dataloader()[0]:
            for name, fusing in ((trained, method), (simple, rule(simple))):
                with torch.no_grad():
                    fused = fusing.fuse(batch)
                    loss = optimised(method, fused, batch)
                rows.append(
                    {
                        "trained": trained,
                        "method": name,
                        "case_id": batch.case_id[0],
                        "patient": data.patients[batch.case_id[0]],
                        "loss": f"{loss.item():.6f}",
                        "qabf": f"{qabf(fused, batch.mri, batch.ct).item():.6f}",
                    }
                )
        print(trained, flush=True)
    with Path(out).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def optimised(method: Any, fused: torch.Tensor, batch: FusionBatch) -> torch.Tensor:
    """The loss that a run was trained by, of any fused image."""
    aims = aims_of(batch)
    loss: torch.Tensor = method.loss(fused, *aims, shared_spacing(batch.spacing_mm)).total
    if isinstance(method, ResNetFusion):
        loss = loss + method.perceptual * method.perceptual_distance(fused, *aims)
    return loss


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
