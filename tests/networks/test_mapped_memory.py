import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clinfuse.networks import mapped_memory
from clinfuse.networks.mapped_memory import (
    folder_on_disk,
    mapped_where_large,
    volumes_mapped,
    within_memory,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc says where a tensor lies")

SMALLEST = 2**12


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VOLUME = drawn(2, 3, 8, 16, 16)


def in_files(tensor):
    """Whether a tensor lies in a file that is mapped, and the name that this had."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, _, _, _, _, *name = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in ends.split("-"))
        if start <= place < stop:
            return name[0] if name else ""
    raise AssertionError("not mapped at all")


OPERATORS = {
    "add": lambda x: x + 1,
    "chain": lambda x: (x * x.sigmoid()).clamp(-1, 1),
    "in_place": lambda x: x.abs().add_(x),
    "where": lambda x: torch.where(x > 0.5, x, -x),
    "mask": lambda x: (x > 0.5) & (x < 1),
    "cast": lambda x: x.to(torch.bfloat16, memory_format=torch.channels_last_3d),
    "cat": lambda x: torch.cat([x, x], 1),
    "noise": lambda x: drawn(*x.shape),
    "zeros": lambda x: x.new_zeros(x.shape) + torch.zeros(x.shape),
    "full": lambda x: torch.full(x.shape, 3.0),
    "arange": lambda x: torch.arange(x.numel()),
    "product": lambda x: x @ drawn(16, 16),
    "turned": lambda x: x.movedim(2, -1).contiguous(),
    "padded": lambda x: F.pad(x, (0, 8, 0, 8, 0, 2), mode="replicate"),
    "repeated": lambda x: x.repeat_interleave(3, 0) - x.mean(0, keepdim=True),
    "slope": lambda x: torch.stack(torch.gradient(x[:, 0], dim=(1, 2, 3)), 1),
    "lerp": lambda x: torch.lerp(x, -x, x),
    "sampled": lambda x: F.grid_sample(x, drawn(2, 8, 16, 16, 3), align_corners=True),
    "chosen": lambda x: torch.cat([x[x > 0.5]] * 4),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_say_the_same_to_the_last_bit_and_into_a_file(name):
    expected = OPERATORS[name](VOLUME)
    with volumes_mapped(smallest=SMALLEST):
        found = OPERATORS[name](VOLUME)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride() and found.dtype == expected.dtype
    assert "clinfuse-" in in_files(found) and "clinfuse-" not in in_files(expected)


def test_each_of_several_results_is_mapped():
    with volumes_mapped(smallest=SMALLEST):
        values, places = VOLUME.sort(-1)
    assert torch.equal(values, VOLUME.sort(-1).values)
    assert "clinfuse-" in in_files(values) and "clinfuse-" in in_files(places)


def test_what_gradients_need_is_mapped_too():
    def slope():
        x = VOLUME.clone().requires_grad_()
        return torch.autograd.grad((x.sin() * x).square().sum(), x)[0]

    expected = slope()
    with volumes_mapped(smallest=SMALLEST):
        found = slope()
    assert torch.equal(found, expected)
    assert "clinfuse-" in in_files(found)


def test_no_file_is_left_and_room_is_given_back(tmp_path):
    with volumes_mapped(tmp_path, SMALLEST):
        kept = VOLUME + 1
        assert not any(tmp_path.iterdir())
        assert in_files(kept).startswith(f"{tmp_path}/clinfuse-")
        place = hex(kept.data_ptr()).removeprefix("0x")
        del kept
    assert place not in Path("/proc/self/maps").read_text()


def test_a_room_that_is_given_back_is_lent_again_and_one_in_use_is_not():
    with volumes_mapped(smallest=SMALLEST):
        one, other = VOLUME + 1, VOLUME + 2
        place, kept = one.data_ptr(), other[1]
        del one, other
        again = (VOLUME + 3)[:1]
        beside = VOLUME + 4
        assert again.data_ptr() == place != beside.data_ptr()
        smaller = VOLUME[:1] + 5  # half as large, for which the room of a whole is too good
        del beside
        assert torch.equal(again, VOLUME[:1] + 3) and torch.equal(kept, VOLUME[1] + 2)
        assert (VOLUME[:1] + 6).data_ptr() != smaller.data_ptr()
    assert torch.equal(again, VOLUME[:1] + 3) and torch.equal(smaller, VOLUME[:1] + 5)


def test_so_many_rooms_are_kept_and_no_more(monkeypatch):
    monkeypatch.setattr(mapped_memory, "KEPT", 2)
    with volumes_mapped(smallest=SMALLEST):
        volumes = [VOLUME + number for number in range(5)]
        places = [hex(each.data_ptr()).removeprefix("0x") for each in volumes]
        del volumes
        mapped = Path("/proc/self/maps").read_text()
        assert sum(f"{place}-" in mapped for place in places) == 2


def test_a_disk_that_is_full_of_rooms_has_room_again(tmp_path, monkeypatch):
    own, asked = os.posix_fallocate, []

    def nearly_full(handle, offset, size):
        asked.append(size)
        if len(asked) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    with volumes_mapped(tmp_path, SMALLEST):
        del_me = VOLUME + 1
        place = hex(del_me.data_ptr()).removeprefix("0x")
        del del_me
        larger = torch.cat([VOLUME, VOLUME])
        assert f"{place}-" not in Path("/proc/self/maps").read_text()
    assert torch.equal(larger, torch.cat([VOLUME, VOLUME])) and len(asked) == 3


def test_memory_does_not_grow_with_the_volumes_that_are_held():
    def megabytes():
        (line,) = (
            each
            for each in Path("/proc/self/status").read_text().splitlines()
            if each.startswith("RssAnon")
        )
        return int(line.split()[1]) / 1024

    one = drawn(2**22)  # 16 MiB
    with volumes_mapped():
        one + 1  # what operators are, to the mode, is known from here on
        before = megabytes()
        held = [(one * number).exp().neg() for number in range(12)]
        assert megabytes() < before + 16
    before = megabytes()
    held += [(one * number).exp().neg() for number in range(12)]
    assert megabytes() > before + 11 * 16


def test_small_results_and_those_of_windows_stay_in_memory():
    with volumes_mapped(smallest=SMALLEST):
        small = VOLUME[:1, :1] + 1
        with within_memory():
            features = VOLUME + 1
        after = VOLUME + 1
    assert "clinfuse-" not in in_files(small)
    assert "clinfuse-" not in in_files(features)
    assert "clinfuse-" in in_files(after)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = "No space left on device for 4.9e-05 GB of a volume"
    with pytest.raises(OSError, match=said) as error, volumes_mapped(tmp_path, SMALLEST):
        VOLUME.abs()
    assert Path(error.value.filename) == tmp_path
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("free", "is_mapped"), [(10**12, False), (4 * 50 * 10**6, True)])
def test_volumes_are_mapped_where_memory_would_not_hold_them(monkeypatch, free, is_mapped):
    """A million voxels and two members are 50 volumes of 4 MB, and half of what is free theirs."""
    monkeypatch.setattr(mapped_memory, "free_memory", lambda: free)
    monkeypatch.setattr(mapped_memory, "SMALLEST", SMALLEST)
    with mapped_where_large(10**6, members=2) as folder:
        with mapped_where_large(1) as within:
            made = VOLUME + 1
        assert folder == within == (folder_on_disk() if is_mapped else None)
        assert ("clinfuse-" in in_files(made)) == is_mapped
    assert "clinfuse-" not in in_files(VOLUME + 1)


def test_a_folder_in_memory_is_passed_over_for_one_on_a_disk(monkeypatch, tmp_path):
    in_memory, on_disk = tmp_path / "memory", tmp_path / "disk"
    for folder in (in_memory / "deep", on_disk):
        folder.mkdir(parents=True)
    kinds = {in_memory: "tmpfs", tmp_path: "ext4", Path("/"): "ext4", Path("/var/tmp"): "tmpfs"}
    mounts = [type("Mount", (), {"mountpoint": m, "fstype": k}) for m, k in kinds.items()]
    monkeypatch.setattr(mapped_memory.psutil, "disk_partitions", lambda all: mounts)
    monkeypatch.chdir(on_disk)
    monkeypatch.setattr(tempfile, "tempdir", str(on_disk / ".."))
    assert folder_on_disk() == Path(on_disk / "..")
    monkeypatch.setattr(tempfile, "tempdir", str(in_memory / "deep"))
    assert folder_on_disk() == on_disk
    monkeypatch.chdir(in_memory)
    assert folder_on_disk() == in_memory / "deep"
