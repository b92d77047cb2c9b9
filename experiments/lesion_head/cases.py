"""Each case's lesion and how much of it the head finds in the reference.

python experiments/lesion_head/cases.py RUN > cases.csv
"""

import sys

import torch
from hydra.utils import instantiate

from clinfuse.configuration import lesion_head_of, quiet_libraries, register_resolvers, run_config
from clinfuse.functional.surface import dice, nsd
from clinfuse.methods.objective import lesion_probability


@torch.no_grad()
def main(run: str) -> None:
    register_resolvers()
    quiet_libraries()
    cfg, head = run_config(run), lesion_head_of(run)
    data = instantiate(cfg.data, misregistration_mm=[0.0], _convert_="all")
    data.prepare_data()
    contrasts = cfg.phantoms.contrasts
    print("split,case_id,contrast,lesion_voxels,found_voxels,dice,nsd_2mm")
    for split in ("val", "test"):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()[0]
        for batch in loader:
            found = lesion_probability(head, batch.reference, batch.brain) > 0.5
            scores = dice(found, batch.lesion), nsd(found, batch.lesion, batch.spacing_mm, 2.0)
            voxels = [int(mask.sum()) for mask in (batch.lesion, found)]
            case_id = batch.case_id[0]
            row = [split, case_id, contrasts[int(case_id[-3:]) % len(contrasts)], *voxels]
            print(",".join(map(str, row + [f"{score.item():.4f}" for score in scores])))


if __name__ == "__main__":
    main(sys.argv[1])
