"""Does a volume fused in windows equal the volume fused whole? Is there a seam?

python experiments/performance/windows.py RUN [--shape 32,192,192] [--spacing 4,1.1,1.1]
    [--memory 0.15] [--steps 4] [--members 2] [--out FOLDER]

One phantom is fused by the run as a whole, in windows that fit MEMORY (10^9 bytes of features),
and, to show what the blending is for, in the same windows side by side without any overlap; always
from the same noise. Printed is how far every member's F differs, as a share of the range of model
space; and how far with the motion of the CT that was found in the whole, to tell what comes of the
windows' own answers from what comes of the fourth digit of a motion. FOLDER/windows.png shows a
slice of all three, and the differences a hundred times as large.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clinfuse.configuration import quiet_libraries, register_resolvers, trained_method
from clinfuse.data.paired_volumes import study_item
from clinfuse.data.phantoms import make_phantom, write_study
from clinfuse.data.studies import load_study
from clinfuse.networks import windows
from clinfuse.networks.rigid_registration import (
    Registration,
    SynthesisRegistration,
    registration_error_mm,
)
from clinfuse.networks.windows import Windowed, Windows, limit_memory, windows_used
from clinfuse.reporting.figures import figure_png
from clinfuse.types import DATA_RANGE, FusionBatch

GAIN = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--shape", default="32,192,192")
    parser.add_argument("--spacing", default="4,1.1,1.1")
    parser.add_argument("--memory", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--out", default="experiments/performance/results")
    asked = parser.parse_args()
    register_resolvers()
    quiet_libraries()
    method = trained_method(asked.run)
    method.steps, method.members = asked.steps, asked.members
    batch = phantom(
        [int(n) for n in asked.shape.split(",")], [float(mm) for mm in asked.spacing.split(",")]
    )
    with torch.no_grad():
        with motions() as found:
            whole, _ = fused(method, batch, None)
        with motions() as again:
            blended, used = fused(method, batch, asked.memory)
        with motions(found):
            alike, _ = fused(method, batch, asked.memory)
        overlapping = windows.windows_within
        windows.windows_within = side_by_side
        cut, _ = fused(method, batch, asked.memory)
        windows.windows_within = overlapping
    print(f"windows of {used}")
    if found:
        brain = batch.brain.to(batch.mri.dtype)
        apart_mm = registration_error_mm(found[0], again[0], brain, batch.spacing_mm)
        print(f"the motions found are {float(apart_mm):.5f} mm apart in the brain")
    shown = (
        ("blended", blended),
        ("blended, CT moved as in the whole", alike),
        ("side by side", cut),
    )
    for name, other in shown:
        difference = (other - whole).abs() / DATA_RANGE
        rare = difference.flatten().kthvalue(int(0.999 * difference.numel())).values
        print(
            f"{name}: at most {difference.max():.3%} of the range, mean {difference.mean():.4%}, "
            f"99.9th percentile {rare:.3%}, {int((difference > 0.01).sum())} voxels above 1 %"
        )
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "windows.png").write_bytes(figure_png(picture(whole, blended, cut)))
    print(out / "windows.png")


@contextmanager
def motions(found: Sequence[Tensor] = ()) -> Iterator[list[Tensor]]:
    """The motions that registration finds within, or those that it has to find."""
    forward, asked = SynthesisRegistration.forward, list(found)
    kept: list[Tensor] = []

    def registered(self: SynthesisRegistration, *sources: Tensor) -> Registration:
        answer = forward(self, *sources)
        if asked:
            answer.motion = asked[len(kept) % len(asked)]
        kept.append(answer.motion)
        return answer

    SynthesisRegistration.forward = registered
    try:
        yield kept
    finally:
        SynthesisRegistration.forward = forward


def phantom(shape: list[int], spacing_mm: list[float]) -> FusionBatch:
    """One head, as a study on disk would be read."""
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), make_phantom(3, 5, shape, spacing_mm, "t2"), 5)
        return study_item(load_study(folder), torch.eye(4, dtype=torch.float64))


def fused(method, batch: FusionBatch, memory_gb: float | None) -> tuple[Tensor, str]:
    """Members, ``k d h w``, and the windows in words."""
    limit_memory(method, memory_gb)
    begun = time.perf_counter()
    members = method.ensemble(batch)[:, 0, 0]
    print(f"memory_gb {memory_gb}: {time.perf_counter() - begun:.1f} s", flush=True)
    networks = [m for m in method.modules() if isinstance(m, Windowed)]
    assert (memory_gb is None) == (windows_used(method) == ""), [m.used for m in networks]
    return members, windows_used(method)


def side_by_side(memory_gb, bytes_per_voxel, grid, stride, batch=1, silent=8) -> Windows | None:
    """The same windows without overlap: what blending is there to mend."""
    found = overlapping_windows(memory_gb, bytes_per_voxel, grid, stride, batch, silent)
    return found and Windows(found.shape, 0, 0, stride)


overlapping_windows = windows.windows_within


def picture(whole: Tensor, blended: Tensor, cut: Tensor) -> Figure:
    """A slice of the first member three ways, and two differences."""
    s = whole.shape[1] // 2
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    shown = [("whole", whole), ("in windows, blended", blended), ("side by side", cut)]
    axes = figure.subplots(1, 5)
    for axis, (name, volume) in zip(axes, shown, strict=False):
        axis.imshow(volume[0, s].flip(0), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
    for axis, (name, volume) in zip(axes[3:], shown[1:], strict=True):
        axis.imshow((GAIN * (volume - whole))[0, s].flip(0), cmap="RdBu_r", vmin=-1, vmax=1)
        axis.set_title(f"{name.removeprefix('in windows, ')}: {GAIN} × difference")
    for axis in axes:
        axis.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
