import psutil
import pytest

from clinfuse.functional.free_memory import free_memory

GIB = 2**30
STAT_2 = f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\n"
STAT_1 = f"rss {2 * GIB}\ntotal_inactive_file {GIB}\ntotal_active_file {GIB // 2}\n"


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 64 GiB free."""
    memory = type("Memory", (), {"available": 64 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_without_groups_it_is_what_the_machine_has(tmp_path):
    assert free_memory(tmp_path, tmp_path / "missing") == 64 * GIB
    (tmp_path / "own").write_text("4:memory:/job\n0::/job\n")
    assert free_memory(tmp_path, tmp_path / "own") == 64 * GIB
    group(tmp_path / "job", memory__max="max\n", memory__current=GIB, memory__stat=STAT_2)
    assert free_memory(tmp_path, tmp_path / "own") == 64 * GIB


def test_a_groups_limit_counts_less_what_is_used_but_for_files(tmp_path):
    (tmp_path / "own").write_text("0::/slurm/job\n")
    group(tmp_path / "slurm/job", memory__max=8 * GIB, memory__current=5 * GIB, memory__stat=STAT_2)
    assert free_memory(tmp_path, tmp_path / "own") == 4.5 * GIB
    group(tmp_path / "slurm", memory__max=6 * GIB, memory__current=5 * GIB, memory__stat=STAT_2)
    assert free_memory(tmp_path, tmp_path / "own") == 2.5 * GIB
    group(tmp_path / "slurm", memory__max=2 * GIB, memory__current=5 * GIB, memory__stat=STAT_2)
    assert free_memory(tmp_path, tmp_path / "own") == 0


def test_groups_of_the_first_version_too(tmp_path):
    (tmp_path / "own").write_text("5:devices:/x\n4:cpu,memory:/docker/a\n0::/\n")
    named = {"memory__limit_in_bytes": 8 * GIB, "memory__usage_in_bytes": 5 * GIB}
    group(tmp_path / "memory/docker/a", **named, memory__stat=STAT_1)
    assert free_memory(tmp_path, tmp_path / "own") == 4.5 * GIB
