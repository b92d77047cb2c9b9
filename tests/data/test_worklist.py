import errno
import fcntl
import os
import signal
import time
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinfuse.data.worklist import WORK, Share, Worklist, begun_alike, digest_of, share_of

CASES = [f"case_{number}" for number in range(6)]
FORK = get_context("fork")


def written(case, scratch):
    (scratch / "first").write_text(case)
    (scratch / "second").write_text(f"{case} by {os.getpid()}")


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if WORK not in path.parts}


# Shares.


@given(cases=st.integers(0, 40), count=st.integers(1, 9))
def test_shares_are_all_cases_once_and_differ_by_one_at_most(cases, count):
    names = [str(number) for number in range(cases)]
    shares = [Share(index, count).of(names) for index in range(count)]
    assert sorted(case for share in shares for case in share) == sorted(names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "environment, share",
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (1, 3)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "6"}, (5, 6)),
        (
            {  # --array=10-18:4
                "SLURM_ARRAY_TASK_ID": "18", "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "4",
            },
            (2, 3),
        ),
        (  # an array's batch script, which starts nothing by srun, is one process
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_NTASKS": "8"},
            (1, 2),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4",
            },
            (6, 8),
        ),
    ],
)  # fmt: skip
def test_slurm_and_torchrun_tell_a_worker_its_share(environment, share):
    assert share_of("rank", environment) == share


def test_a_share_is_named_or_everything_is_anyones():
    assert share_of("1/4", {}) == (1, 4) and share_of(None, {"RANK": "1"}) is None


@pytest.mark.parametrize("asked", ["4/4", "1", "-1/2", "a/b", "1/0", ""])
def test_a_share_that_there_is_not_is_refused(asked):
    with pytest.raises(ValueError, match=r"expected shard=I/N with I from 0 to N - 1"):
        share_of(asked, {})


def test_a_rank_that_nobody_tells_is_refused():
    with pytest.raises(ValueError, match=r"expected Slurm .* or torchrun .* got neither"):
        share_of("rank", {})


# Workers.


def test_a_case_appears_whole_and_is_not_done_again(tmp_path):
    def half(case, scratch):
        (scratch / "first").write_text(case)
        assert not (tmp_path / case).exists()
        written(case, scratch)

    Worklist(tmp_path, CASES).go(half)
    before = times(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*CASES, WORK}
    again = Worklist(tmp_path, CASES)
    again.go(written)
    assert again.done == CASES and not again.failed and times(tmp_path) == before


def test_of_several_workers_each_case_is_one_ones(tmp_path):
    log = tmp_path / "log"

    def make(case, scratch):
        time.sleep(0.02)
        written(case, scratch)
        with log.open("a") as file:
            file.write(f"{case}\n")

    folder = tmp_path / "out"
    workers = [FORK.Process(target=lambda: Worklist(folder, CASES).go(make)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert sorted(log.read_text().split()) == CASES
    authors = {(folder / case / "second").read_text().split()[-1] for case in CASES}
    assert len(authors) > 1


def test_what_a_killed_worker_had_begun_is_done_anew_and_the_rest_is_left(tmp_path):
    def killed(case, scratch):
        (scratch / "first").write_text("half")
        if case == CASES[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        written(case, scratch)

    worker = FORK.Process(target=lambda: Worklist(tmp_path, CASES).go(killed))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    before = times(tmp_path)
    assert Worklist(tmp_path, CASES).done == CASES[:2] and (tmp_path / WORK / CASES[2]).is_dir()
    later = Worklist(tmp_path, CASES)
    later.go(written)
    assert later.done == CASES and before.items() <= times(tmp_path).items()
    assert (tmp_path / CASES[2] / "first").read_text() == CASES[2]


def test_a_case_that_another_one_holds_is_left_to_it(tmp_path):
    begun, go_on = FORK.Event(), FORK.Event()

    def slow(case, scratch):
        begun.set()
        go_on.wait(30)
        written(case, scratch)

    other = FORK.Process(target=lambda: Worklist(tmp_path, CASES[:1]).go(slow))
    other.start()
    assert begun.wait(30)
    mine = Worklist(tmp_path, CASES)
    mine.go(written)
    assert mine.done == CASES[1:] and not mine.failed
    go_on.set()
    other.join()
    assert mine.done == CASES
    assert (tmp_path / CASES[0] / "second").read_text() == f"{CASES[0]} by {other.pid}"


def test_a_case_that_fails_keeps_no_other_and_is_tried_again_by_the_next_worker(tmp_path, capsys):
    tried = []

    def make(case, scratch):
        tried.append(case)
        written(case, scratch)
        if case == CASES[1]:
            raise ValueError("expected a head,\ngot none")
        if case == CASES[2]:
            raise KeyError("mri")

    first = Worklist(tmp_path, CASES)
    first.go(make)
    assert tried == CASES and first.done == [CASES[0], *CASES[3:]]
    assert first.failed == {CASES[1]: "expected a head, got none", CASES[2]: "KeyError: 'mri'"}
    said = capsys.readouterr().err
    assert "KeyError" in said and "a head" not in said  # the traceback of our own mistakes alone
    second = Worklist(tmp_path, CASES)
    second.go(make)
    assert tried[6:] == CASES[1:3]
    Worklist(tmp_path, CASES).go(written)
    assert second.done == CASES and not second.failed


def test_a_fixed_share_needs_no_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"expected a file system with locks, got No locks .*I/N"):
        Worklist(tmp_path, CASES).go(written)
    Worklist(tmp_path, CASES, Share(1, 2)).go(written)
    both = Worklist(tmp_path, CASES, Share(0, 2))
    assert both.done == CASES[1::2]
    with both.alone():
        both.go(written)
    assert both.done == CASES


# What all have begun alike.


def test_the_first_workers_record_is_everyones_and_another_key_is_refused(tmp_path):
    record = tmp_path / "out" / "fusion.json"
    first = begun_alike(record, {"key": "a", "memory_gb": 2.0})
    assert first == begun_alike(record, {"key": "a", "memory_gb": 1.0})
    assert [path.name for path in record.parent.iterdir()] == ["fusion.json"]
    with pytest.raises(ValueError, match="expected a folder that is new, or of the same settings"):
        begun_alike(record, {"key": "b", "memory_gb": 2.0})
    record.write_text("{")
    with pytest.raises(ValueError, match="expected a record in JSON"):
        begun_alike(record, {"key": "a"})


def test_a_digest_differs_with_content_and_with_where_one_file_ends(tmp_path):
    def digest(*contents):
        files = [tmp_path / str(number) for number in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        return digest_of(files)

    assert digest(b"a", b"b") == digest(b"a", b"b")
    assert len({digest(b"a", b"b"), digest(b"ab", b""), digest(b"b", b"a"), digest(b"ab")}) == 4
