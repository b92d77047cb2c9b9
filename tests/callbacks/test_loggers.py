import csv
import io
import os
import signal
import subprocess
import sys
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from clinfuse.callbacks.loggers import (
    RunCSVLogger,
    all_of,
    has_wandb_key,
    log_picture,
    mlflow_logger,
    tensorboard_logger,
    wandb_logger,
)

ONLINE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://localhost:9"}
"""An account at a server that nobody answers for."""


class Falling(lightning.LightningModule):
    """Its weight halves in every step, from 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, _index):
        loss = self.weight.square()
        self.log("train/loss", loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


def kill_wandb():
    """End the service that W&B has started for this process, as a lack of memory may."""
    newest_child = ["pgrep", "-n", "-P", str(os.getpid()), "wandb-core"]
    service = subprocess.run(newest_child, capture_output=True, text=True).stdout
    os.kill(int(service), signal.SIGKILL)


class KillWandb(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            kill_wandb()


class Failing(lightning.Callback):
    def on_train_batch_end(self, trainer, *_):
        raise RuntimeError("at a loss")


def train(folder, *loggers, callbacks=()):
    """Three steps of ``Falling`` with these loggers and the CSV one, and what that has written."""
    trainer = lightning.Trainer(
        max_steps=3, log_every_n_steps=1, logger=[RunCSVLogger(folder), *loggers],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(Falling(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    return [float(row["train/loss"]) for row in rows(folder / "metrics.csv")]


LOSSES = [1.0, 0.25, 0.0625]


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


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
    assert train(tmp_path) == LOSSES


def test_a_run_s_settings_are_in_its_own_record_and_not_beside_metrics_csv(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.log_hyperparams({"seed": 3})
    logger.log_metrics({"train/loss": 2.5}, step=4)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_without_a_key_wandb_is_offline_and_says_how_to_sync(no_account, caplog):
    caplog.set_level("INFO")
    logger = wandb_logger(no_account / "run", "smoke", "clinfuse", ["stroke"])
    assert logger.experiment.settings.mode == "offline"
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
    assert "mode" not in wandb_logger(no_account, "smoke", "clinfuse")._wandb_init
    assert not caplog.text


def test_the_users_own_mode_and_patience_decide_where_they_are_set(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    assert "mode" not in logger._wandb_init  # W&B itself reads the mode
    assert logger._wandb_init["settings"] == {"init_timeout": 30.0}
    assert train(no_account, logger) == LOSSES and not list(no_account.glob("wandb/*run-*"))


def test_an_offline_run_holds_its_settings_curves_pictures_and_place_in_a_sweep(
    no_account, wandb_reading
):
    logger = wandb_logger(
        no_account, "smoke", "clinfuse", ["clinfuse", "", "stroke", "stroke"], group="steps"
    )
    logger.log_hyperparams({"seed": 3, "guidance": {"alpha": 1.5, "start": None}})
    assert train(no_account, logger) == LOSSES
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    log_picture([logger], "validation", picture, 3, "at step 3")
    logger.finish()
    run = wandb_reading(no_account)
    assert (run.run["display_name"], run.run["project"]) == ("smoke", "clinfuse")
    assert (run.run["run_group"], run.run["job_type"]) == ("steps", "train")
    assert run.run["tags"] == ["clinfuse", "stroke"]
    assert run.config["seed"] == 3 and run.config["guidance"] == {"alpha": 1.5, "start": None}
    assert run.curve("train/loss") == dict(enumerate(LOSSES))
    np.testing.assert_array_equal(Image.open(run.pictures("validation")["at step 3"]), picture)
    assert run.exit_code == 0


def test_runs_of_one_process_are_runs_of_their_own(no_account, wandb_reading):
    for name in ("first", "second"):
        (no_account / name).mkdir()
        logger = wandb_logger(no_account / name, name, "clinfuse")
        train(no_account / name, logger)
    logger.finish()
    for name in ("first", "second"):
        run = wandb_reading(no_account / name)
        assert run.run["display_name"] == name
        assert run.curve("train/loss") == dict(enumerate(LOSSES))


@pytest.mark.slow
def test_a_run_that_failed_is_marked_so(no_account, wandb_reading):
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    with pytest.raises(RuntimeError, match="at a loss"):
        train(no_account, logger, callbacks=[Failing()])
    logger.finish()
    assert wandb_reading(no_account).exit_code == 1


@pytest.mark.parametrize(
    "environment",
    [
        ONLINE,
        pytest.param(ONLINE | {"WANDB_API_KEY": "short"}, marks=pytest.mark.slow),
        pytest.param({"WANDB_MODE": "nonsense"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_start_online_is_logged_offline_and_says_so_in_one_line(
    environment, no_account, monkeypatch, caplog, wandb_reading
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = wandb_logger(no_account, "smoke", "clinfuse", start_seconds=1)
    assert train(no_account, logger) == LOSSES
    logger.finish()
    (line,) = warnings_in(caplog)
    assert line.startswith("W&B did not start (") and "wandb sync" in line and "\n" not in line
    assert wandb_reading(no_account).curve("train/loss") == dict(enumerate(LOSSES))


def test_training_goes_on_when_wandb_dies_and_the_next_run_has_wandb_again(
    no_account, caplog, wandb_reading
):
    for name, callbacks in {"first": [KillWandb()], "second": []}.items():
        (no_account / name).mkdir()
        logger = wandb_logger(no_account / name, name, "clinfuse")
        assert train(no_account / name, logger, callbacks=callbacks) == LOSSES
        log_picture([logger], "validation", np.zeros((3, 4, 3), np.uint8), 3)
        logger.experiment.log({"anything": 1})
        logger.finish()
    (line,) = warnings_in(caplog)
    assert line.startswith("W&B failed (") and line.endswith("the run goes on without it")
    assert wandb_reading(no_account / "second").curve("train/loss") == dict(enumerate(LOSSES))


def test_a_finish_that_fails_is_a_warning(no_account, caplog):
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    train(no_account, logger)
    kill_wandb()
    logger.finish()
    assert len(warnings_in(caplog)) == 1


def test_what_wandb_refuses_to_log_is_a_warning_and_no_error(no_account, caplog):
    logger = wandb_logger(no_account, "smoke", "clinfuse")
    logger.log_image("validation", ["no picture"])
    assert train(no_account, logger) == LOSSES
    logger.finish()
    assert len(warnings_in(caplog)) == 1


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


def test_the_key_of_a_server_of_ones_own_is_found(no_account, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    netrc = no_account / ".netrc"
    netrc.write_text("machine wandb.example.org login user password secret\n")
    netrc.chmod(0o600)
    assert has_wandb_key()


def test_tensorboard_has_the_curves_and_the_pictures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = tensorboard_logger(tmp_path)
    assert train(tmp_path, logger) == LOSSES
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    log_picture([logger], "validation", picture, 3)
    logger.save()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.value for event in read.Scalars("train/loss")] == LOSSES
    (image,) = read.Images("validation")
    shown = Image.open(io.BytesIO(image.encoded_image_string))
    np.testing.assert_array_equal(shown, picture)


def test_mlflow_has_settings_curves_and_pictures_in_the_run_s_folder(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    logger = mlflow_logger(tmp_path, "smoke", "clinfuse")
    logger.log_hyperparams({"seed": 3, "guidance": {"alpha": 1.5}})
    assert train(tmp_path, logger) == LOSSES
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    log_picture([logger], "validation", picture, 3)
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("clinfuse").experiment_id])
    assert run.info.run_name == "smoke" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "guidance/alpha": "1.5"}
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.value for point in curve] == LOSSES
    (artifact,) = client.list_artifacts(run.info.run_id)
    shown = Image.open(client.download_artifacts(run.info.run_id, artifact.path, tmp_path))
    np.testing.assert_array_equal(shown, picture)


def test_training_goes_on_when_mlflow_s_server_is_not_there(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger = mlflow_logger(tmp_path, "smoke", "clinfuse", tracking_uri="http://localhost:9")
    assert train(tmp_path, logger) == LOSSES
    (line,) = [line for line in warnings_in(caplog) if "MLflow" in line]
    assert line.startswith("MLflow failed (") and "\n" not in line


@pytest.mark.parametrize(
    ("package", "logger"),
    [("tensorboard", tensorboard_logger), ("mlflow", partial(mlflow_logger, name="", project=""))],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(package, logger, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"pip install 'clinfuse\[{package}\]'"):
        logger(tmp_path)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("default", ["csv", "wandb"]),
        ("tensorboard", ["tensorboard"]),
        ("[csv,tensorboard,mlflow]", ["csv", "tensorboard", "mlflow"]),
        ("none", []),
    ],
)
def test_any_of_the_loggers_go_together(choice, names, phantoms):
    assert list(phantoms.config(f"logger={choice}").logger) == names


def test_loggers_and_callbacks_are_listed_in_order_without_those_switched_off():
    assert all_of({"a": 1, "b": None, "c": 3}) == [1, 3]
    assert all_of(None) == all_of({}) == []
