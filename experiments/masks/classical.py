"""How near the classical masks come to the true ones of phantoms, at two voxel sizes.

python experiments/masks/classical.py [CASES [TABLE_HU]] > experiments/masks/cases.csv
python experiments/masks/classical.py --overlays experiments/masks/overlays.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from clinfuse.data.phantoms import make_phantom
from clinfuse.roi import masks
from clinfuse.roi.masks import bone_mask, brain_mask

GRIDS = {
    "0.9 x 0.9 x 5 mm": ((30, 256, 256), (5.0, 0.9, 0.9)),
    "1 mm": ((144, 216, 184), (1.0, 1.0, 1.0)),
}
SEED = 11


def main(cases: str = "10", table_hu: str | None = None) -> None:
    if table_hu is not None:  # 300 takes everything dense for bone, as it was before
        masks.TABLE_HU = float(table_hu)
    print("case_id,voxels,mask,true_ml,found_ml,missed_ml,added_ml,dice")
    for voxels in GRIDS:
        for case in range(int(cases)):
            phantom, found = segmented(case, voxels)
            voxel_ml = np.prod(phantom.spacing_mm) / 1000
            for name in ("brain", "bone"):
                true, mask = getattr(phantom, name), found[name]
                counts = [m.sum() for m in (true, mask, true & ~mask, mask & ~true)]
                volumes = [f"{count * voxel_ml:.1f}" for count in counts]
                dice = 2 * (true & mask).sum() / (true.sum() + mask.sum())
                row = [phantom.case_id, voxels, name, *volumes, f"{dice:.4f}"]
                print(",".join(row), flush=True)


def segmented(case: int, voxels: str):
    """A phantom whose CT has its noise, and its masks as the classical ones are made."""
    shape, spacing_mm = GRIDS[voxels]
    phantom = make_phantom(case, SEED, shape, spacing_mm)
    bone = bone_mask(phantom.ct_hu, spacing_mm, is_hu=True)
    brain = brain_mask(phantom.ct_hu, bone, spacing_mm)
    return phantom, {"brain": brain, "bone": bone}


def overlays(path: str) -> None:
    """Outlines of the masks found (colour) on the true ones (white), six slices of one phantom."""
    phantom, found = segmented(0, "0.9 x 0.9 x 5 mm")
    slices = np.linspace(4, len(phantom.ct_hu) - 7, 6).astype(int)
    figure, axes = plt.subplots(1, 6, figsize=(12, 2.3))
    for ax, k in zip(axes, slices, strict=True):
        ax.imshow(phantom.ct_hu[k], cmap="gray", vmin=-100, vmax=1000, origin="lower")
        for name, colour in (("bone", "cyan"), ("brain", "red")):
            for mask, line in ((getattr(phantom, name), "white"), (found[name], colour)):
                if mask[k].any():
                    ax.contour(mask[k], [0.5], colors=line, linewidths=0.5)
        ax.set_axis_off()
    figure.tight_layout(pad=0.1)
    figure.savefig(Path(path), dpi=100)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--overlays"]:
        overlays(sys.argv[2])
    else:
        main(*sys.argv[1:])
