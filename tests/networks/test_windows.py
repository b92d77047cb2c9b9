import itertools
import logging
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinfuse.networks.fusion_unet import FusionUNet
from clinfuse.networks.rigid_registration import SynthesisRegistration
from clinfuse.networks.source_denoiser import SourceDenoiser
from clinfuse.networks.windows import (
    VoxelNorm,
    Windowed,
    Windows,
    blended,
    limit_memory,
    part_of,
    smallest_window,
    windows_used,
    windows_within,
    with_local_norms,
)
from tests.networks.test_fusion_unet import awake


@given(
    grid=st.tuples(*[st.integers(1, 60)] * 3),
    sides=st.tuples(*[st.integers(3, 8)] * 3),
    silent=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_voxel_start_in_step_and_blend_to_one(grid, sides, silent):
    windows = Windows([4 * side for side in sides], 4 * silent, silent, stride=4)
    cut = list(windows.cut(grid))
    for window in cut:
        for part, n, side in zip(window, grid, windows.shape, strict=True):
            assert part.start % 4 == 0 and part.stop <= n
            assert part.stop - part.start == min(side, n - part.start) and part.stop > part.start
    volume = torch.rand(2, 3, *grid)
    same = blended(lambda window: volume[(..., *window)], grid, windows)
    torch.testing.assert_close(same, volume)


def test_a_windows_rim_towards_a_neighbour_has_no_say_and_the_volumes_own_rim_has():
    windows = Windows([32], 16, 4)
    first, *_, last = windows.cut([80])
    weight = windows.weight(first, [80])
    assert (weight[:20] == 1).all() and (weight[-4:] == 0).all()  # 20: the next one's own rim
    assert (weight[20:-4].diff() < 0).all()
    assert (windows.weight(last, [80])[:4] == 0).all()


def test_without_windows_the_whole_is_evaluated_once():
    asked = []
    blended(lambda window: asked.append(window) or torch.zeros(1, 1, 4, 5), [4, 5], None)
    assert asked == [(slice(0, 4), slice(0, 5))]


def evaluated(windows, grid):
    return sum(math.prod(p.stop - p.start for p in window) for window in windows.cut(grid))


def test_windows_fit_the_memory_and_none_that_do_have_less_to_evaluate():
    grid, stride, silent = (8, 26, 30), 2, 1
    assert windows_within(None, 1.0, grid, stride, silent=silent) is None
    assert windows_within(6.3e-6, 1.0, grid, stride, silent=silent) is None  # 6240 voxels
    sides = [range(6, n + 1, stride) for n in grid]
    every = {
        shape: evaluated(Windows(shape, 4 * silent, silent, stride), grid)
        for shape in itertools.product(*sides)
    }
    for most in (6000, 3000, 1000, 300, 216):
        shape = tuple(windows_within(most / 1e9, 1.0, grid, stride, silent=silent).shape)
        assert math.prod(shape) <= most
        assert every[shape] == min(all_of for s, all_of in every.items() if math.prod(s) <= most)
        twice = windows_within(2 * most / 1e9, 1.0, grid, stride, batch=2, silent=silent)
        assert tuple(twice.shape) == shape


def test_an_axis_stays_whole_rather_than_be_evaluated_nearly_twice():
    grid = (64, 128, 128)
    cubes = evaluated(Windows((56, 56, 56), 32, 8, 8), grid)  # as large as 62 voxels a side
    chosen = windows_within(62**3 / 1e9, 1.0, grid, 8)
    assert chosen.shape[0] == 64 and evaluated(chosen, grid) < cubes / 2


def test_a_memory_too_small_for_any_window_is_said_with_what_would_do():
    with pytest.raises(ValueError, match=r"at least 0\.11 for windows of 48 voxels.*got 0\.05"):
        windows_within(0.05, 1000.0, (64, 128, 128), 8)


def test_a_voxel_norm_reads_its_own_voxel_alone():
    norm = VoxelNorm(6)
    x = torch.randn(2, 6, 3, 4, 5)
    out = norm(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(2, 3, 4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().mean(1), torch.ones(2, 3, 4, 5), atol=1e-2, rtol=0)
    torch.testing.assert_close(out[..., 1:2, 2:3, 3:4], norm(x[..., 1:2, 2:3, 3:4]))
    torch.testing.assert_close(norm(1000 * x), out, atol=1e-2, rtol=0)


def test_no_group_norm_is_left_in_a_local_network():
    network = FusionUNet(3, 1, 1, channels=(8, 16), encoder_channels=4, local=True)
    kinds = {type(module).__name__ for module in network.modules()}
    assert "VoxelNorm" in kinds and not kinds & {"GroupNorm", "SpatialAttentionBlock"}
    registration = with_local_norms(SynthesisRegistration(3, features=(8,) * 6))
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in registration.modules())


def test_attention_is_not_local():
    with pytest.raises(ValueError, match="attention sees the whole volume"):
        FusionUNet(3, 1, 1, channels=(8, 16), local=True, cross_attention=True)


def windowed_and_whole(local, windows):
    """A random network's answers to half a volume of noise beside half a volume of air."""
    torch.manual_seed(0)
    network = awake(FusionUNet(3, 1, 1, channels=(8, 16), encoder_channels=4, local=local)).eval()
    shape = (12, 40, 260)
    mri, ct = torch.rand(2, 1, 1, *shape) * 2 - 1
    mri[..., 130:] = -1
    roi = (torch.rand(1, 3, *shape) > 0.5).float()
    state, level = torch.randn(2, 1, *shape), torch.full((2,), 0.5)
    outs = []
    with torch.no_grad():
        for chosen in (None, windows):
            network.windows = lambda grid, stride, batch, silent=8, chosen=chosen: chosen
            outs.append(network(state, network.encode(mri, ct, roi), level))
    whole, windowed = outs
    return ((whole - windowed).abs().max() / (whole.max() - whole.min())).item()


def test_a_local_network_says_in_windows_what_it_says_of_the_whole():
    beyond_reach = Windows([6, 20, 100], 72, 34, stride=2)
    assert windowed_and_whole(True, beyond_reach) < 1e-5
    assert windowed_and_whole(False, beyond_reach) > 1e-2
    usual = Windows([6, 20, 64], 32, 8, stride=2)
    assert windowed_and_whole(True, usual) < 1e-2


def test_a_source_denoiser_says_the_same_in_windows():
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 10, 96, 200) * 2 - 1
    denoiser = awake(SourceDenoiser(3, features=4))
    with torch.no_grad():
        whole = denoiser(volume)
        denoiser.memory_gb = 5 * 30 * 30 * denoiser.bytes_per_voxel / 1e9
        torch.testing.assert_close(denoiser(volume), whole, atol=1e-5, rtol=1e-5)
    assert (whole - volume).abs().max() > 0.01


OUT_OF_MEMORY = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
    "a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8796093022208 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
}


class Greedy(Windowed):
    """Gives a volume twice over, where no more than ``most`` voxels are asked for at once."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.asked = most, error, []
        self.bytes_per_voxel = 100.0

    def forward(self, volume):
        def evaluate(window):
            part = part_of(volume, window)
            self.asked.append(tuple(part.shape[2:]))
            if math.prod(part.shape[2:]) > self.most:
                raise self.error
            return 2 * part

        return self.answer(evaluate, volume.shape[2:], 4, len(volume), silent=2)


@pytest.mark.parametrize("who", OUT_OF_MEMORY)
def test_where_memory_runs_out_the_window_is_halved_until_it_fits_and_it_is_said(who, caplog):
    volume, network = torch.randn(2, 1, 32, 80, 80), Greedy(20_000, OUT_OF_MEMORY[who])
    limit_memory(network, None)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        answer = network(volume)
        torch.testing.assert_close(answer, 2 * volume)
        refused = [shape for shape in network.asked if math.prod(shape) > network.most]
        assert refused[0] == (32, 80, 80) and len(refused) == len(caplog.records)
        sizes = [math.prod(shape) for shape in [*refused, network.used.shape]]
        assert all(2 * after <= before for before, after in itertools.pairwise(sizes))
        assert sizes[-1] > network.most / 3  # and no smaller than it has to be
        assert caplog.messages[0].startswith("memory ran out in Greedy at 32 x 80 x 80 voxels of")
        assert "halved until they fitted the memory that was left" in windows_used(network)

        used, network.asked = network.used, []
        network(volume)  # what did not fit once is not tried again
        assert max(map(math.prod, network.asked)) <= math.prod(used.shape)
        direct = Greedy(math.inf, None)
        limit_memory(direct, network.memory_gb)  # the same windows, asked for
        assert torch.equal(direct(volume), answer) and direct.used == used
        assert "halved" not in windows_used(direct)
    limit_memory(network, None)
    assert windows_used(network) == "" and network.halvings == 0


def test_where_not_even_the_smallest_window_fits_it_is_said_what_would_do():
    volume, network = torch.randn(3, 1, 32, 80, 80), Greedy(1000, OUT_OF_MEMORY["a CPU"])
    assert smallest_window((32, 80, 80), 4, 2) == [12, 12, 12]
    gigabytes = 12**3 * 100 * 3 / 1e9
    with (
        torch.no_grad(),
        pytest.raises(MemoryError, match=rf"12 x 12 x 12 voxels .* {gigabytes:.2g} GB.*members="),
    ):
        network(volume)
    assert network.asked[-1] == (12, 12, 12)


def test_what_windows_cannot_mend_is_left_as_it_was():
    volume, network = torch.randn(1, 1, 32, 80, 80), Greedy(20_000, RuntimeError("sizes differ"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="sizes differ"):
        network(volume)
    network.error = OUT_OF_MEMORY["a GPU"]
    with pytest.raises(torch.OutOfMemoryError):  # gradients: all windows keep what the whole does
        network(volume)
    assert network.asked == 2 * [(32, 80, 80)] and network.halvings == 0


UNDER_A_LIMIT = """
import resource, sys
import numpy as np
import nibabel as nib
from pathlib import Path
from clinfuse import fuse
from clinfuse.networks.windows import Windowed
from tests.conftest import Phantoms

run, out = Path(sys.argv[1]), Path(sys.argv[2])
study = next((run.parent / "smoke_cache").glob("phantoms_*")) / "case_000"
scans = []
for name in ("mri", "ct", "brain_mask", "bone_mask", "lesion_mask"):
    image = nib.load(study / f"{name}.nii.gz")
    large = np.asarray(image.dataobj).repeat(8, 0).repeat(4, 1)
    affine = image.affine @ np.diag([1 / 8, 1 / 4, 1, 1])
    nib.save(nib.Nifti1Image(large, affine), out / f"{name}.nii.gz")
    scans.append(f"{name}={out / name}.nii.gz")


def fused(name, memory_gb):
    asked = (f"run={run}", *scans, f"out={out / name}", f"memory_gb={memory_gb}", "members=4")
    fuse.main(Phantoms(out / "cache").config(*asked, name="fuse", folder=out / "hydra"))
    return nib.load(out / name / "fused.nii.gz").get_fdata()


def megabytes(what):
    (line,) = (l for l in Path("/proc/self/status").read_text().splitlines() if what in l)
    return int(line.split()[1]) / 1024


windows, halve, answered = Windowed.windows, Windowed._halve, []

def recorded(self, *asked, **named):
    answered.append(windows(self, *asked, **named))
    return answered[-1]

def halved(self, *asked):
    answered.pop()
    return halve(self, *asked)

fused("small", 0.1)
windowed = megabytes("VmPeak")
fused("whole", "null")
print("whole takes", megabytes("VmPeak") - windowed, "MB more", flush=True)
limit = int((windowed + (megabytes("VmPeak") - windowed) / 2) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
Windowed.windows, Windowed._halve = recorded, halved
under = fused("under", "null")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sequence = iter(answered)
Windowed.windows, Windowed._halve = lambda self, *_, **__: next(sequence), halve
direct = fused("direct", "null")
print("windows", sum(w is not None for w in answered), "same", np.array_equal(under, direct))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_volume_is_fused_whole_as_far_as_a_limit_of_memory_lets_it(smoke_run, tmp_path):
    command = [sys.executable, "-c", UNDER_A_LIMIT, str(smoke_run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "memory ran out in " in done.stderr + done.stdout
    assert "halved until they fitted the memory that was left" in done.stdout
    *_, last = done.stdout.splitlines()
    _, count, _, is_same = last.split()
    assert int(count) > 0 and is_same == "True"
