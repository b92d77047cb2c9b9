import csv

import lightning
import pytest
import torch

from clinfuse.callbacks.loggers import RunCSVLogger, all_of, has_wandb_key, wandb_logger


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """A home without any trace of W&B."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_lie_in_the_root_of_the_run_s_folder(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.log_metrics({"train/loss": 2.5}, step=4)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert rows(tmp_path / "metrics.csv") == [{"step": "4", "train/loss": "2.5"}]


def test_a_resumed_run_keeps_every_metric_that_was_logged_before(tmp_path):
    for start in (0, 10, 20):
        logger = RunCSVLogger(tmp_path)
        logger.log_metrics({"train/loss": float(start)}, step=start)
        logger.save()
    logged = [row["step"] for path in sorted(tmp_path.glob("metrics*.csv")) for row in rows(path)]
    assert sorted(logged, key=int) == ["0", "10", "20"]
    assert rows(tmp_path / "metrics.csv")[-1]["step"] == "20"


def test_a_trainer_writes_the_losses_of_every_step_it_logs(tmp_path):
    class Falling(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, _index):
            loss = self.weight.square()
            self.log("train/loss", loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.25)

    trainer = lightning.Trainer(
        max_steps=3, log_every_n_steps=1, logger=RunCSVLogger(tmp_path), accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Falling(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    losses = [float(row["train/loss"]) for row in rows(tmp_path / "metrics.csv")]
    assert losses == [1.0, 0.25, 0.0625]  # each step halves the weight


def test_without_a_key_wandb_is_offline_and_says_how_to_sync(no_account, caplog):
    caplog.set_level("INFO")
    logger = wandb_logger(no_account / "run", "smoke", "clinfuse", ["stroke"])
    assert logger._offline
    assert "wandb sync" in caplog.text and str(no_account / "run") in caplog.text


def test_wandb_starts_without_a_word(no_account, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    logger.experiment.finish()
    said = capfd.readouterr()
    assert list(no_account.glob("wandb/offline-run-*")) and not said.out + said.err


def test_with_a_key_wandb_is_online(no_account, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert not wandb_logger(no_account, "smoke", "clinfuse")._offline
    assert not caplog.text


def test_the_users_own_mode_decides_where_it_is_set(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not wandb_logger(no_account, "smoke", "clinfuse")._offline  # W&B itself reads the mode


def test_a_key_is_found_in_the_environment_and_in_netrc(no_account, monkeypatch):
    assert not has_wandb_key()
    netrc = no_account / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert has_wandb_key()
    netrc.write_text("this is no netrc at all")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_wandb_key()


def test_loggers_and_callbacks_are_listed_in_order_without_those_switched_off():
    assert all_of({"a": 1, "b": None, "c": 3}) == [1, 3]
    assert all_of(None) == all_of({}) == []
