from pathlib import Path

import pytest

from clinfuse.methods.initial_weights import StartsFromWeights, checkpoint_of_run, file_of


class Counter(StartsFromWeights):
    """How often a training has been started from weights."""

    started = 0

    def start_training(self):
        self.started += 1


def test_a_training_from_its_start_reads_weights_and_one_that_goes_on_does_not():
    fresh, resumed = Counter(), Counter()
    fresh.on_fit_start()
    resumed.on_load_checkpoint({})  # Lightning restores before it fits
    resumed.on_fit_start()
    assert (fresh.started, resumed.started) == (1, 0)


def test_a_file_is_named_or_brought():
    assert file_of("a/b.pth") == file_of(Path("a/b.pth")) == file_of(lambda: Path("a/b.pth"))


def unreachable():
    raise ConnectionError("expected the file, got no answer: http://nowhere")


def test_weights_that_cannot_be_brought_or_are_no_file_s_name_end_in_a_sentence():
    with pytest.raises(FileNotFoundError, match=r"method\.weights=FILE: expected the file, got no"):
        file_of(unreachable)
    for other in (5, ["a.pth"]):
        with pytest.raises(ValueError, match="expected weights as a file's name, got "):
            file_of(other)


def test_a_run_is_known_by_its_last_checkpoint(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(FileNotFoundError, match=f"found none in {tmp_path}"):
        checkpoint_of_run(tmp_path)
    path.parent.mkdir()
    path.touch()
    assert checkpoint_of_run(tmp_path) == path
