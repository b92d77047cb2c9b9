"""Snapshots of a training in stages: when they are taken, of what, and that they sample."""

import shutil

import lightning
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from clinfuse.callbacks.model_draws import ModelDraws, read_draws
from clinfuse.callbacks.recorder import summary_of
from clinfuse.configuration import checkpoint_of, run_config, trained_method
from clinfuse.evaluate import main as evaluate

STEPS_PER_EPOCH, EPOCHS = 4, 10
STAGES = [(0, 20, ("anchor.registration.",)), (20, 40, ("anchor.network.",))]
EPOCH_OF = {
    "draw_0_stage_0.pt": 3, "draw_1_stage_0.pt": 4, "draw_0_stage_1.pt": 8, "draw_1_stage_1.pt": 9,
}  # fmt: skip
"""The ends of epochs nearest to 60 and 80 percent: of steps 12 and 16, then 32 and 36."""


class Staged(lightning.LightningModule):
    """Weights that move in every step, two of them in stages that draws are taken of."""

    draw_stages = STAGES

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        anchor = {"registration": nn.Linear(3, 3), "network": nn.Linear(3, 3)}
        self.anchor, self.network = nn.ModuleDict(anchor), nn.Linear(3, 3)

    def training_step(self, batch, _index):
        anchor = self.anchor["network"](self.anchor["registration"](batch))
        return (self.network(anchor) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Plain(Staged):
    """The same without stages."""

    draw_stages = property()


class FilesAfterEachEpoch(Callback):
    def __init__(self, folder, killed_in=None):
        self.folder, self.killed_in, self.first_epoch_of = folder, killed_in, {}

    def on_train_epoch_end(self, trainer, _method):
        for path in sorted(self.folder.glob("*")):
            self.first_epoch_of.setdefault(path.name, trainer.current_epoch + 1)

    def on_train_batch_start(self, trainer, *_):
        if trainer.current_epoch + 1 == self.killed_in:
            raise Killed


class Killed(Exception):
    pass


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(STEPS_PER_EPOCH, 3, generator=generator))


def train(folder, method, *others, killed_in=None, resume=None):
    """Trains with draws; returns the epoch in which each file appeared."""
    watch = FilesAfterEachEpoch(folder / "draws", killed_in)
    every_epoch = ModelCheckpoint(
        folder / "checkpoints", "epoch_{epoch}", auto_insert_metric_name=False, save_top_k=-1,
        save_on_train_epoch_end=True,
    )  # fmt: skip
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*others, ModelDraws(folder / "draws"), watch,
        every_epoch],
    )  # fmt: skip
    trainer.fit(method, data(), ckpt_path=resume, weights_only=True)
    return watch.first_epoch_of


def ema():
    return EMAWeightAveraging(decay=0.5)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("averages", [True, False])
def test_each_file_appears_at_its_epoch_with_its_stages_weights_as_a_checkpoint_has_them(
    averages, tmp_path
):
    assert train(tmp_path, Staged(), *([ema()] if averages else [])) == EPOCH_OF
    for name, epoch in EPOCH_OF.items():
        draw = load(tmp_path / "draws" / name)
        part = "registration" if "stage_0" in name else "network"
        assert set(draw) == {f"anchor.{part}.weight", f"anchor.{part}.bias"}
        checkpoint = load(tmp_path / "checkpoints" / f"epoch_{epoch - 1}.ckpt")
        assert all(torch.equal(w, checkpoint["state_dict"][key]) for key, w in draw.items())
        if averages:  # and not the weights that go on learning
            learning = checkpoint["current_model_state"]
            assert not any(torch.allclose(w, learning[key]) for key, w in draw.items())


def test_the_stages_of_a_draw_are_read_together(tmp_path):
    train(tmp_path, Staged())
    first, second = read_draws(tmp_path / "draws")
    for number, draw in enumerate((first, second)):
        names = [f"draw_{number}_stage_{stage}.pt" for stage in (0, 1)]
        parts = [load(tmp_path / "draws" / name) for name in names]
        assert len(draw) == 4 and draw.keys() == parts[0].keys() | parts[1].keys()
        for part in parts:
            assert all(torch.equal(weight, draw[key]) for key, weight in part.items())
    assert not any(torch.equal(first[key], second[key]) for key in first)


def test_a_training_that_is_killed_and_resumed_leaves_the_same_draws(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, Staged(), ema())
    with pytest.raises(Killed):
        train(parts, Staged(), ema(), killed_in=6)
    assert {path.name for path in (parts / "draws").iterdir()} == {
        name for name, epoch in EPOCH_OF.items() if epoch < 6
    }
    torch.manual_seed(9)  # another process
    train(parts, Staged(), ema(), resume=parts / "checkpoints" / "epoch_4.ckpt")
    for ours, theirs in zip(read_draws(parts / "draws"), read_draws(whole / "draws"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())


def test_a_method_without_stages_and_a_stage_without_steps_have_no_draws(tmp_path):
    assert train(tmp_path / "plain", Plain()) == {}
    assert read_draws(tmp_path / "plain" / "draws") == []
    method = Staged()
    method.draw_stages = [(0, 0, ("anchor.registration.",)), (0, 40, ("anchor.network.",))]
    assert train(tmp_path / "one", method) == {"draw_0_stage_1.pt": 6, "draw_1_stage_1.pt": 8}


@pytest.mark.parametrize("fractions", [(0.0, 0.5), (0.5, 1.0), (1.2,)])
def test_fractions_that_are_no_part_of_a_stage_are_refused(fractions, tmp_path):
    with pytest.raises(ValueError, match=r"fractions of a stage in \(0, 1\), got"):
        ModelDraws(tmp_path, fractions)


def test_a_folder_without_draws_has_none(tmp_path):
    assert read_draws(tmp_path) == [] and read_draws(tmp_path / "nowhere") == []


# A run's folder.


def test_a_run_is_loaded_with_its_draws_and_says_what_it_does_not_know(smoke_run, phantoms):
    fractions = run_config(smoke_run).callbacks.model_draws.fractions
    method, batch = trained_method(smoke_run), phantoms.batch()
    draws = method.model_draws(batch)
    assert draws.shape[:2] == (1 + len(fractions), method.members)
    assert torch.equal(draws[0], method.ensemble(batch))
    summary = summary_of(draws)
    assert (summary.epistemic[batch.brain] > 0).all()
    expected = (summary.epistemic.square() + summary.aleatoric.square()).sqrt()
    torch.testing.assert_close(summary.std, expected)


def test_a_runs_draws_differ_from_its_anchor_in_both_stages_and_from_nothing_else(smoke_run):
    final = load(checkpoint_of(smoke_run))["state_dict"]
    for draw in read_draws(smoke_run / "checkpoints"):
        assert draw.keys() == {name for name in final if name.startswith("anchor.")}
        for part in ("registration", "denoisers", "network"):
            weights = {n: w for n, w in draw.items() if n.startswith(f"anchor.{part}.")}
            assert any(not torch.equal(weight, final[name]) for name, weight in weights.items())


def test_without_its_draws_a_run_is_one_model(smoke_run, phantoms, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    for path in (folder / "checkpoints").glob("draw_*"):
        path.unlink()
    batch = phantoms.batch()
    draws = trained_method(folder).model_draws(batch)
    assert len(draws) == 1 and summary_of(draws).epistemic is None
    assert torch.equal(draws[0], trained_method(smoke_run).ensemble(batch))


def test_a_draw_that_cannot_be_read_is_named_in_one_sentence(smoke_run, phantoms, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run, folder)
    spoiled = folder / "checkpoints" / "draw_1_stage_0.pt"
    spoiled.write_bytes(spoiled.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"expected readable weights, got .*draw_1_stage_0\.pt"):
        read_draws(folder / "checkpoints")
    with pytest.raises(SystemExit) as exit_:
        evaluate(phantoms.config(f"run={folder}", name="evaluate", folder=tmp_path / "out"))
    assert exit_.value.code == 1
    sentence = capsys.readouterr().err.strip().splitlines()[0]
    assert sentence.startswith("clinfuse: expected readable weights") and spoiled.name in sentence
