import json
import shutil

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save, save_file

from clinfuse.callbacks.calibration import read_calibration
from clinfuse.configuration import (
    CONFIG_PATH,
    draws_of,
    lesion_head_of,
    run_config,
    trained_method,
    weights_file,
    weights_of,
)
from clinfuse.export import export, imported, main
from clinfuse.networks.pretrained import read_safetensors


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory):
    """A run's file, and the run's folder that was made of it."""
    place = tmp_path_factory.mktemp("exported")
    file = export(smoke_run, place / "run.safetensors")
    return file, imported(file, place / "run")


def fused(run, phantoms):
    method = trained_method(run)
    torch.manual_seed(3)
    with torch.no_grad():
        return method.fuse(phantoms.batch())


def test_weights_and_draws_come_back_bit_for_bit(exported, smoke_run):
    ours, theirs = weights_of(smoke_run), weights_of(exported[1])
    assert len(ours.draws) == len(theirs.draws) > 0
    pairs = [(ours.state, theirs.state), *zip(ours.draws, theirs.draws, strict=True)]
    for a, b in pairs:
        assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_image_is_fused(exported, smoke_run, phantoms):
    assert torch.equal(fused(smoke_run, phantoms), fused(exported[1], phantoms))


def test_configuration_and_calibration_are_the_runs(exported, smoke_run):
    file, run = exported
    assert run_config(run) == run_config(smoke_run)
    method = trained_method(run)
    assert read_calibration(run, method) == read_calibration(smoke_run, method) is not None
    with safe_open(file, framework="pt") as content:  # as others read it
        texts = content.metadata()
    facts = json.loads((smoke_run / "facts.json").read_text())
    assert (texts["method"], texts["commit"]) == ("clinfuse", facts["commit"])
    assert yaml.safe_load(texts["config"])["method"]["steps"] == 2
    assert set(texts) == {
        "format", "clinfuse", "method", "config", "config_sha256", "commit", "precision",
        "calibration",
    }  # fmt: skip


def test_an_exported_lesion_head_is_one(phantoms, tmp_path):
    built, run = phantoms.method("lesion_head"), tmp_path / "head"
    for part in (".hydra", "checkpoints"):
        (run / part).mkdir(parents=True)
    cfg = phantoms.config("experiment=smoke", "method=lesion_head")
    OmegaConf.save(cfg, run / ".hydra" / "config.yaml")
    torch.save({"state_dict": built.state_dict()}, run / "checkpoints" / "last.ckpt")
    again = lesion_head_of(imported(export(run, tmp_path / "h.safetensors"), tmp_path / "again"))
    for name, weight in built.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_the_file_of_a_runs_weights_is_found_unread_and_its_draws_without_them(
    exported, smoke_run, tmp_path
):
    for run, name in ((smoke_run, "last.ckpt"), (exported[1], "last.safetensors")):
        assert weights_file(run) == run / "checkpoints" / name
        draws, expected = draws_of(run), weights_of(run).draws
        assert len(draws) == len(expected) > 0
        for draw, of_weights in zip(draws, expected, strict=True):
            assert draw.keys() == of_weights.keys()
            assert all(torch.equal(draw[name], of_weights[name]) for name in draw)
    broken = shutil.copytree(smoke_run / "checkpoints", tmp_path / "checkpoints") / "last.ckpt"
    broken.write_bytes(b"broken")
    assert weights_file(tmp_path) == broken and len(draws_of(tmp_path)) == len(draws)
    with pytest.raises(ValueError, match=f"expected a readable checkpoint, got .*: {broken}"):
        weights_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint at .*last\.ckpt"):
        weights_file(tmp_path / "gone")


def test_a_checkpoint_counts_before_what_was_exported(smoke_run, exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported[1], run)
    assert weights_of(run).path.suffix == ".safetensors"
    shutil.copy(smoke_run / "checkpoints" / "last.ckpt", run / "checkpoints")
    assert weights_of(run).path.suffix == ".ckpt"


def configured(*overrides):
    """What the entry point would get for these overrides."""
    with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
        return compose("export", list(overrides))


def test_the_command_line_does_both(smoke_run, tmp_path, capsys):
    file, run = tmp_path / "a.safetensors", tmp_path / "again"
    main(configured(f"run={smoke_run}", f"out={file}"))
    main(configured(f"file={file}", f"out={run}"))
    assert capsys.readouterr().out == f"exported: {file}\nrun: {run}\n"
    with pytest.raises(SystemExit):
        main(configured(f"file={file}", f"run={run}", f"out={run}"))
    assert "expected run=RUN out=FILE.safetensors, or file=" in capsys.readouterr().err


def changed(file, to, **texts):
    tensors, before = read_safetensors(file)
    save_file(tensors, to, {name: t for name, t in {**before, **texts}.items() if t is not None})
    return to


def test_what_is_no_run_is_refused_and_nothing_is_left(exported, tmp_path):
    file, _ = exported
    evil = yaml.safe_dump({"method": {"_target_": "os.system"}, "data": {}})
    other = yaml.safe_load(read_safetensors(file)[1]["config"])
    other["network"]["channels"] = [8, 24]
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "plain.safetensors").write_bytes(save({"w": torch.ones(1)}))
    for given, said in (
        (changed(file, tmp_path / "a.safetensors", config=evil), "got os.system at method"),
        (
            changed(
                file,
                tmp_path / "b.safetensors",
                config=yaml.safe_dump(other),
                config_sha256=None,  # as of before there was one
            ),
            "got others",
        ),
        (
            changed(file, tmp_path / "d.safetensors", config=yaml.safe_dump(other)),
            "expected the configuration that was exported, got another",
        ),
        (changed(file, tmp_path / "c.safetensors", config=None), "got no config in it"),
        (tmp_path / "broken.safetensors", "something else or a damaged file"),
        (tmp_path / "plain.safetensors", "got no config in it"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            imported(given, tmp_path / "run")
        assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="expected a file of weights"):
        imported(tmp_path / "gone.safetensors", tmp_path / "run")
    with pytest.raises(ValueError, match="expected a new or empty folder for the run"):
        imported(file, tmp_path)
    with pytest.raises(ValueError, match=r"expected out=FILE\.safetensors"):
        export(exported[1], tmp_path / "run.pt")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
