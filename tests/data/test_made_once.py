from dataclasses import replace

import pytest
import torch

from clinfuse.data.made_once import MadeOnce, fingerprint_of


@pytest.fixture
def counted():
    """A slow average, and how often it was made."""
    calls = []

    def make(batch):
        calls.append(batch.case_id)
        return (batch.mri + batch.ct) / 2

    return make, calls


def test_what_was_made_is_read_by_whoever_asks_again(phantoms, counted, tmp_path):
    make, calls = counted
    batch = phantoms.batch()
    first = MadeOnce(tmp_path, make)(batch)
    assert torch.equal(first, (batch.mri + batch.ct) / 2)
    assert torch.equal(MadeOnce(tmp_path, make)(phantoms.batch()), first)  # another process, say
    assert len(calls) == 1


def test_another_movement_case_or_mask_is_made_anew(phantoms, counted, tmp_path):
    make, calls = counted
    once, batch = MadeOnce(tmp_path, make), phantoms.batch(2.0)
    others = (
        batch,
        phantoms.batch(4.0),
        phantoms.batch(2.0, case=1),
        replace(batch, roi=torch.zeros_like(batch.roi)),
        replace(batch, spacing_mm=2 * batch.spacing_mm),
        replace(batch, case_id=["another"]),
    )
    for other in (*others, *others):
        assert torch.equal(once(other), (other.mri + other.ct) / 2)
    assert len(calls) == len(others) == len(set(map(fingerprint_of, others)))


def test_what_a_method_may_not_see_makes_no_difference(phantoms):
    batch = phantoms.batch()
    assert fingerprint_of(replace(batch, reference=None, findings=None)) == fingerprint_of(batch)


def test_a_making_that_fails_leaves_nothing_behind(phantoms, tmp_path):
    def fails(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        MadeOnce(tmp_path / "made", fails)(phantoms.batch())
    assert not list(tmp_path.rglob("*.npy"))
