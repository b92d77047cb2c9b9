import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clinfuse.callbacks.checkpoint import PREVIOUS
from clinfuse.configuration import CHECKPOINT
from clinfuse.reporting.run_folder import check_config
from clinfuse.runs import (
    STATE,
    State,
    adopt_training,
    begun,
    own_checkpoint,
    read_state,
    run_key,
    shared_training,
    training_key,
)

BEFORE = CHECKPOINT.with_name(PREVIOUS)


def saved(path, step=0):
    """A checkpoint, as far as anybody reads it here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.arange(100.0)}, "global_step": step}, path)
    return path


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def damaged(path):
    """One bit of a weight is another, of which torch takes no notice."""
    content = path.read_bytes()
    place = content.index(torch.arange(100.0).numpy().tobytes()) + 7
    path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    torch.load(path, weights_only=True)


def trained(folder, step=8):
    saved(folder / CHECKPOINT, step)
    (folder / "cost.json").write_text('{"training_seconds": 1.0}')
    return folder


def keys(phantoms, *overrides):
    cfg = phantoms.config(*phantoms.smoke, *overrides)
    return training_key(cfg), run_key(cfg)


@pytest.mark.parametrize(
    "override",
    [
        "method.steps=7", "method.members=3", "sampler=dpm_solver", "guidance.eta=0.3",
        "method.guidance_loss.alpha=2.0", "ablation=no_modulation", "data.misregistration_mm=[1.0]",
        "trainer.limit_test_batches=2", "callbacks.report.mask_source=none",
    ],
)  # fmt: skip
def test_what_only_samples_or_tests_otherwise_shares_a_training_but_is_another_run(
    override, phantoms
):
    training, run = keys(phantoms)
    other_training, other_run = keys(phantoms, override)
    assert other_training == training and other_run != run


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=1e-3", "seed=1", "trainer.max_epochs=3", "data.jitter.max_mm=1.0",
        "method.parameterisation=eps", "data.training_reference=average", "objective.roi=0.5",
        "guidance.alpha=2.0", "callbacks.ema.decay=0.5", "method=deterministic_unet",
        "data.ct_map=window_40_400", "schedule=linear", "phantoms.seed=1",
    ],
)  # fmt: skip
def test_what_changes_a_weight_is_another_training(override, phantoms):
    assert all(a != b for a, b in zip(keys(phantoms), keys(phantoms, override), strict=True))


@pytest.mark.parametrize("override", ["label=x", "group=x", "logger=csv", "name=x"])
def test_what_a_run_is_called_changes_nothing(override, phantoms):
    assert keys(phantoms, override) == keys(phantoms)


def test_a_folder_is_begun_then_finished_and_remembers_what_goes_back_to_a_sweep(
    phantoms, tmp_path
):
    cfg = phantoms.config(*phantoms.smoke)
    state = begun(tmp_path, cfg)
    assert not state.is_finished and not list(tmp_path.iterdir())
    state.write(tmp_path)
    assert begun(tmp_path, cfg) == read_state(tmp_path) == state
    state._replace(is_finished=True, objective=0.25).write(tmp_path)
    assert begun(tmp_path, cfg) == State(run_key(cfg), True, 0.25, state.config)


def test_another_configurations_folder_is_refused_and_its_record_put_back(phantoms, tmp_path):
    begun(tmp_path, phantoms.config(*phantoms.smoke)).write(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("what Hydra wrote over it")
    with pytest.raises(ValueError, match="got one of another .*: " + str(tmp_path)):
        begun(tmp_path, phantoms.config(*phantoms.smoke, "optimizer.lr=0.5"))
    check_config(tmp_path)
    restored = (tmp_path / ".hydra" / "config.yaml").read_text()
    assert restored == read_state(tmp_path).config and "max_epochs: 2" in restored


@pytest.mark.parametrize("content", ["{", "[1]", '{"other": 1}'])
def test_a_record_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / STATE).write_text(content)
    with pytest.raises(ValueError, match=f"cannot be read: {tmp_path / STATE}"):
        read_state(tmp_path)


def test_a_run_goes_on_from_its_own_checkpoint_and_from_no_damaged_one(tmp_path):
    assert own_checkpoint(tmp_path) is None
    path = saved(tmp_path / CHECKPOINT)
    assert own_checkpoint(tmp_path) == path
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="expected a readable checkpoint"):
        own_checkpoint(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [cut, damaged, Path.unlink])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(harm, tmp_path, caplog):
    path, before = saved(tmp_path / CHECKPOINT, 8), saved(tmp_path / BEFORE, 4)
    harm(path)
    assert own_checkpoint(tmp_path) == path and step_of(path) == step_of(before) == 4
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("expected a ") and str(path) in said
    assert said.endswith("this run goes on from the one saved before it")
    assert own_checkpoint(tmp_path) == path and len(caplog.records) == 1


def test_two_damaged_checkpoints_are_refused_and_neither_is_touched(tmp_path):
    paths = saved(tmp_path / CHECKPOINT, 8), saved(tmp_path / BEFORE, 4)
    for path in paths:
        damaged(path)
    contents = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match=f"readable checkpoint, got ValueError: {paths[1]}"):
        own_checkpoint(tmp_path)
    assert [path.read_bytes() for path in paths] == contents


def test_the_first_run_trains_and_those_after_it_take_its_weights(tmp_path):
    trainings, first, second = tmp_path / "trainings", tmp_path / "first", tmp_path / "second"
    with shared_training(trainings, "key", first) as found:
        assert found is None
        trained(first)
    with shared_training(trainings, "other", second) as found:
        assert found is None
    with shared_training(trainings, "key", second) as found:
        assert found == first
        adopt_training(found, second)
    assert os.path.samefile(first / CHECKPOINT, second / CHECKPOINT)
    assert json.loads((second / "cost.json").read_text()) == {"training_seconds": 1.0}


def test_what_an_interrupted_run_had_gives_way_to_the_whole_training(tmp_path):
    whole, interrupted = trained(tmp_path / "whole", 8), trained(tmp_path / "part", 4)
    for folder in (whole, interrupted):
        saved(folder / BEFORE, 2)
        (folder / BEFORE).with_name(".last.ckpt.1.tmp").touch()
    for _ in range(2):  # again: a link onto itself
        adopt_training(whole, interrupted)
        assert step_of(interrupted / CHECKPOINT) == 8
        names = {path.name for path in (interrupted / CHECKPOINT.parent).iterdir()}
        assert names == {"last.ckpt", ".last.ckpt.1.tmp"}  # its own, which it clears away itself


def test_a_training_whose_checkpoint_is_damaged_is_trained_anew(tmp_path, caplog):
    trainings, first = tmp_path / "trainings", tmp_path / "first"
    with shared_training(trainings, "key", first):
        trained(first)
    damaged(first / CHECKPOINT)
    with shared_training(trainings, "key", tmp_path / "second") as found:
        assert found is None
        trained(tmp_path / "second")
    assert str(first / CHECKPOINT) in caplog.text and "trained anew" in caplog.text
    with shared_training(trainings, "key", tmp_path / "third") as found:
        assert found == tmp_path / "second"


def test_a_training_that_failed_or_whose_folder_is_gone_is_trained_anew(tmp_path):
    with (
        pytest.raises(RuntimeError),
        shared_training(tmp_path / "trainings", "key", trained(tmp_path / "first")),
    ):
        raise RuntimeError
    with shared_training(tmp_path / "trainings", "key", tmp_path / "second") as found:
        assert found is None
        folder = trained(tmp_path / "second")
    (folder / CHECKPOINT).unlink()
    with shared_training(tmp_path / "trainings", "key", tmp_path / "third") as found:
        assert found is None


def test_runs_that_come_at_once_train_once(tmp_path):
    def run(number):
        folder = tmp_path / str(number)
        with shared_training(tmp_path / "trainings", "key", folder) as found:
            if found is None:
                trained(folder)
            return found is None

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(run, range(4))) == 1
