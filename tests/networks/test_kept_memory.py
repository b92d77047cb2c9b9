import resource
from pathlib import Path

import pytest
import torch

from clinfuse.networks import kept_memory
from clinfuse.networks.kept_memory import _glibc, freed_memory_kept, memory_by_size

pytestmark = pytest.mark.skipif(_glibc() is None, reason="only glibc on Linux is told to keep it")

MIB = 2**20
PAGES = 96 * MIB // resource.getpagesize()


def pages_cleared():
    """How often the system has had to find a page for 96 MiB that are taken, filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(96 * MIB, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def fewest_cleared():
    """Of several times: a freed block that small ones are cut from does not fit the next one."""
    return min(pages_cleared() for _ in range(12))


def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


def test_what_is_freed_is_at_hand_within_and_given_back_at_the_end():
    before = resident_mib()
    with freed_memory_kept():
        assert fewest_cleared() < 0.05 * PAGES
        with freed_memory_kept():
            pass
        assert fewest_cleared() < 0.05 * PAGES  # the inner one has not given back the outer one's
    assert resident_mib() < before + 48


def test_it_is_given_back_after_an_error_too():
    before = resident_mib()
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        pages_cleared()
        assert resident_mib() > before + 48
        1 / 0  # noqa: B018
    assert resident_mib() < before + 48


def test_as_a_decorator_it_holds_for_every_call():
    @freed_memory_kept()
    def cleared_in_the_end():
        return fewest_cleared()

    for _ in range(2):
        assert cleared_in_the_end() < 0.05 * PAGES


@pytest.mark.parametrize(("largest", "is_kept"), [(16 * 32 * 32, True), (1000, False)])
def test_what_fuses_keeps_it_unless_the_volume_is_large(phantoms, monkeypatch, largest, is_kept):
    @memory_by_size
    def cleared_in_the_end(_method, batch):
        return torch.tensor(fewest_cleared())

    monkeypatch.setattr(kept_memory, "LARGEST", largest)
    cleared = cleared_in_the_end(None, phantoms.batch())
    assert (cleared.item() < 0.05 * PAGES) == is_kept
