import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from monai.networks.nets import UNet
from omegaconf import DictConfig, OmegaConf

from clinfuse.configuration import (
    CONFIG_PATH,
    build_method,
    checkpoint_of,
    choice_was_made,
    commit,
    fastest_precision,
    fingerprint,
    in_one_sentence,
    lesion_head_of,
    run_config,
    run_facts,
    trained_method,
    with_other_guidance,
)
from clinfuse.diffusion.schedule import cosine


def options(group):
    return sorted(path.stem for path in (Path(CONFIG_PATH) / group).glob("*.yaml"))


PRESETS = {  # alpha, beta, gamma, typed from the table in section 2 of the method
    "default": (1.0, 1.0, 2.0),
    "stroke": (1.0, 1.2, 3.0),
    "brain_tumor": (1.5, 0.5, 2.0),
    "bone_tumor": (0.5, 2.0, 2.0),
    "metastasis": (1.0, 1.0, 3.0),
}


@pytest.mark.parametrize("preset", options("preset"))
def test_presets_are_those_of_the_method_s_table(preset, phantoms):
    cfg = phantoms.config(f"preset={preset}")
    assert (cfg.guidance.alpha, cfg.guidance.beta, cfg.guidance.gamma) == PRESETS[preset]
    assert cfg.preset == preset
    for loss in (cfg.method.loss, cfg.method.guidance_loss):
        assert (loss.alpha, loss.beta, loss.gamma) == PRESETS[preset]


def test_every_preset_of_the_method_exists():
    assert set(options("preset")) == set(PRESETS)


def test_defaults_are_those_that_the_method_states(phantoms):
    cfg = phantoms.config()
    torch.testing.assert_close(instantiate(cfg.schedule), cosine(1000))
    assert list(cfg.guidance.lambdas) == [1.0, 1.0, 0.5]
    assert (cfg.guidance.kappa, cfg.guidance.tau_mm) == (0.5, 2.0)
    assert cfg.method.members == 5 and cfg.method.parameterisation == "v"
    assert cfg.trainer.gradient_clip_val == 1.0 and cfg.trainer.inference_mode is False
    assert cfg.optimizer._target_ == "torch.optim.AdamW" and cfg.optimizer.lr == 1e-4
    paper = phantoms.config("guidance=paper").guidance
    assert 0.1 <= paper.eta <= 0.2 and paper.eta_u == 0.05
    jitter = phantoms.config("data=studies", "data.root=anywhere").data.jitter
    assert (jitter.max_mm, jitter.max_deg, jitter.probability) == (2.0, 2.0, 0.5)


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("method", ["clinfuse", "deterministic_unet", "lesion_head"])
def test_every_experiment_can_train_every_kind_of_method(experiment, method, phantoms):
    cfg = phantoms.config(f"experiment={experiment}", f"method={method}", "network=tiny")
    assert build_method(cfg).is_trainable


@pytest.mark.parametrize("network", options("network"))
def test_every_network_can_be_asked_for(network, phantoms):
    cfg = phantoms.config(f"network={network}", "network.channels=[8,16]")
    unet = instantiate(cfg.network)(state_channels=1, out_channels=1)
    assert unet.haar == (network != "pixel")
    assert unet.cross_attention == (network == "cross_attention")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_a_recipe_can_be_given_the_users_own_data(experiment, phantoms, tmp_path):
    cfg = phantoms.config(f"experiment={experiment}", "data=studies", f"data.root={tmp_path}")
    assert instantiate(cfg.data, _convert_="all").prepare is None


@pytest.mark.parametrize("method", ["clinfuse", "deterministic_unet"])
def test_a_lesion_head_can_be_left_out_of_training_and_guide_all_the_same(method, phantoms):
    usual, without = (
        phantoms.config(f"method={method}", "preset=stroke", *changes).method
        for changes in ((), ("objective.gamma=0",))
    )
    assert usual.loss.gamma == 3.0 and without.loss.gamma == 0
    if method == "clinfuse":
        assert usual.guidance_loss.gamma == without.guidance_loss.gamma == 3.0


@pytest.mark.parametrize("name", ["evaluate", "fuse"])
def test_guidance_is_overridden_on_the_command_line_as_the_configuration_says(name, phantoms):
    assert phantoms.config("guidance.eta=0.3", name=name).guidance.eta == 0.3


def test_a_fingerprint_tells_configurations_apart_and_nothing_else():
    one = {"cases": 60, "shape": [32, 96, 96]}
    same = OmegaConf.create({"shape": [32, 96, 96], "cases": 60})
    assert fingerprint(one) == fingerprint(same) and len(fingerprint(one)) == 8
    assert fingerprint(one) != fingerprint({**one, "cases": 61})
    assert fingerprint(one) != fingerprint({**one, "shape": [96, 32, 96]})


def test_cohorts_of_other_parameters_lie_in_other_folders(phantoms):
    roots = [
        phantoms.config(f"data.prepare.cases={cases}", "data.prepare.seed=0").data.root
        for cases in (5, 5, 6)
    ]
    assert roots[0] == roots[1] != roots[2]


def test_the_precision_is_one_that_lightning_knows():
    assert fastest_precision() in ("bf16-mixed", "16-mixed", "32-true")


def test_a_trainer_repeats_itself_unless_it_is_told_otherwise(phantoms):
    """What CUDA's sums need for it is set as well, before anything is computed."""
    for asked, is_on, only_warns in (
        ((), True, torch.cuda.is_available()),
        (("trainer.deterministic=true",), True, False),
        (("trainer.deterministic=warn",), True, True),
        (("trainer.deterministic=false",), False, False),
    ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        instantiate(phantoms.config(*phantoms.smoke, *asked).trainer)
        assert torch.are_deterministic_algorithms_enabled() == is_on
        assert torch.is_deterministic_algorithms_warn_only_enabled() == only_warns
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if is_on else None)


# One sentence.


def explained(error, capsys):
    @in_one_sentence
    def main(_cfg):
        raise error

    with pytest.raises(SystemExit) as exit_:
        main(DictConfig({}))
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize("filename", [None, "/disk/last.ckpt"])
def test_a_full_disk_is_one_line_that_names_the_file(filename, capsys):
    status, stderr = explained(OSError(errno.ENOSPC, "No space left on device", filename), capsys)
    assert status == 1 and "Traceback" not in stderr
    assert stderr.splitlines()[0] == (
        "clinfuse: expected files that can be read and written, got No space left on device"
        + (f": {filename}" if filename else "")
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("expected an MRI,\n   got a cat"),
        FileNotFoundError("expected an MRI,\tgot a cat"),
        FileExistsError("expected an MRI, got a cat"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_one(error, capsys):
    status, stderr = explained(error, capsys)
    assert status == 1
    assert stderr.splitlines()[0] == "clinfuse: expected an MRI, got a cat"
    assert "Traceback" not in stderr


def test_bad_input_inside_a_constructor_is_said_as_plainly(capsys):
    settings = {"_target_": "clinfuse.methods.rules.Weighted", "mri_weight": 7.0}
    with pytest.raises(InstantiationException) as inner:
        instantiate(settings)
    status, stderr = explained(inner.value, capsys)
    assert status == 1
    assert stderr.splitlines()[0] == "clinfuse: expected mri_weight in [0, 1], got 7.0"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nPlease see"), "CUDA out of memory."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "DefaultCPUAllocator: can't "),
        (MemoryError(), "none left"),
    ],
)
def test_memory_that_ran_out_is_said_with_what_takes_less(error, reason, capsys):
    status, stderr = explained(error, capsys)
    said, *_ = stderr.splitlines()
    assert status == 1 and "Traceback" not in stderr
    assert said.startswith(f"clinfuse: memory ran out ({reason}")
    assert all(setting in said for setting in ("data.patch_shape", "data.batch_size", "memory_gb"))


def test_what_windows_say_of_memory_is_said_as_it_is(capsys):
    sentence = "memory ran out in the smallest window of FusionUNet"
    assert explained(MemoryError(sentence), capsys)[1].splitlines()[0] == f"clinfuse: {sentence}"


@pytest.mark.parametrize(
    "error",
    [TypeError("a bug"), KeyError("a bug"), AssertionError("a bug"), RuntimeError("sizes differ")],
)
def test_our_own_bugs_are_not_dressed_up(error):
    @in_one_sentence
    def main(_cfg):
        raise error

    with pytest.raises(type(error)):
        main(DictConfig({}))


def test_whoever_asks_for_it_sees_where_it_was_raised(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    @in_one_sentence
    def main(_cfg):
        raise ValueError("bad input")

    with pytest.raises(ValueError, match="bad input"):
        main(DictConfig({}))


def test_what_succeeds_is_passed_through():
    assert in_one_sentence(lambda cfg: cfg.value)(DictConfig({"value": 3})) == 3


# Run folders.


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"run folder with .hydra/config.yaml.*{tmp_path}"):
        run_config(tmp_path)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/checkpoints/last.ckpt.*train the run"):
        checkpoint_of(tmp_path)


def copied(run, folder):
    """The run without what a test does not need."""
    for name in (".hydra", "checkpoints"):
        shutil.copytree(run / name, folder / name)
    return folder


def test_a_run_gives_back_its_trained_method(smoke_run):
    method = trained_method(smoke_run)
    saved = torch.load(smoke_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not method.training
    own = {n: w for n, w in method.state_dict().items() if not n.startswith("other_anchors.")}
    assert saved.keys() == own.keys() and len(own) < len(method.state_dict())
    assert all(torch.equal(own[name], saved[name]) for name in saved)


def test_a_checkpoint_that_cannot_be_read_is_named(smoke_run, tmp_path):
    run = copied(smoke_run, tmp_path / "run")
    path = run / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=f"readable checkpoint.*{path}"):
        trained_method(run)


def test_a_runs_configuration_that_became_another_valid_one_is_not_taken(smoke_run, tmp_path):
    run = copied(smoke_run, tmp_path / "run")
    path = run / ".hydra" / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("\n  steps: 2\n", "\n  steps: 3\n"))
    assert path.read_text() != text
    for read in (run_config, trained_method):
        with pytest.raises(ValueError, match=f"run has written, got one that was .*: {path}"):
            read(run)
    (run / ".hydra" / "config.sha256").unlink()
    assert trained_method(run).steps == 3


@pytest.mark.parametrize("text", ["", "- a list\n", "seed: 0\n", "a: [unclosed\n"])
def test_a_configuration_that_is_none_is_named(text, tmp_path):
    path = tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"expected a run's configuration.*{path}"):
        run_config(tmp_path)


def test_a_setting_that_has_to_be_given_is_named_on_the_command_line(capsys):
    @in_one_sentence
    def wants_a_root(cfg):
        return cfg.data.root

    with pytest.raises(SystemExit):
        wants_a_root(OmegaConf.create({"data": {"root": "???"}}))
    assert "expected data.root=VALUE on the command line" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"mri_weight": "much"}, {"of": 1}, "weighted", {"_args_": 1}, {"mri_weight": "${gone}"}],
)
def test_a_configuration_that_builds_nothing_is_named(change, tmp_path):
    method = {"_target_": "clinfuse.methods.rules.Weighted", "mri_weight": 0.5}
    method = {**method, **change} if isinstance(change, dict) else change
    data = {"_target_": "clinfuse.data.paired_volumes.PairedVolumes", "root": "x"}
    for part in (".hydra", "checkpoints"):
        (tmp_path / part).mkdir()
    path = tmp_path / ".hydra" / "config.yaml"
    OmegaConf.save({"method": method, "data": data, "lesion_head": None}, path)
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=f"expected a configuration that builds, got .*: {path}"):
        trained_method(tmp_path)


@pytest.mark.parametrize("state", [torch.ones(1), [1], {"w": 1}, {1: torch.ones(1)}])
def test_weights_that_are_none_are_refused_by_name(state, tmp_path, phantoms):
    saved_run(tmp_path, phantoms, "weighted_by_roi")
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=f"expected the weights of weighted_by_roi.*{path}"):
        trained_method(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(smoke_run):
    cfg = run_config(smoke_run)
    cfg.network.channels = [8, 24]
    with pytest.raises(ValueError, match="expected the weights of clinfuse, got others"):
        trained_method(smoke_run, cfg)


def saved_run(folder, phantoms, method, *overrides):
    """The folder that a training of a method leaves, its weights drawn rather than learnt."""
    built = phantoms.method(method, *overrides)
    (folder / ".hydra").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    cfg = phantoms.config("experiment=smoke", f"method={method}", *overrides)
    cfg.name, cfg.method_name = str(cfg.name), str(cfg.method_name)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    torch.save({"state_dict": built.state_dict()}, folder / "checkpoints" / "last.ckpt")
    return built


def saved_bundle(folder):
    """A MONAI bundle of a small network that finds strokes, its weights drawn."""
    definition = {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 1,
        "channels": [4, 4], "strides": [2],
    }  # fmt: skip
    image = {"num_channels": 1, "spatial_shape": ["2*n"] * 3, "value_range": [0, 1]}
    formats = {
        "inputs": {"image": image},
        "outputs": {"pred": {"channel_def": {"0": "stroke"}}},
    }
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": definition}))
    network = UNet(3, 1, 1, [4, 4], [2])
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    return network


def test_a_frozen_lesion_head_comes_from_its_own_run(phantoms, tmp_path):
    folder = tmp_path / "head"
    head = saved_run(folder, phantoms, "lesion_head")
    method = build_method(phantoms.config("experiment=smoke", f"lesion_head={folder}"))
    loaded = method.lesion_head.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in head.state_dict().items())
    assert not any(p.requires_grad for p in method.lesion_head.parameters())
    assert any(p.requires_grad for p in method.network.parameters())


def test_a_lesion_head_may_be_a_bundle_and_lies_frozen_in_the_method(phantoms, tmp_path):
    network = saved_bundle(tmp_path / "bundle")
    method = build_method(phantoms.config("experiment=smoke", f"lesion_head={tmp_path / 'bundle'}"))
    for name, weight in network.state_dict().items():
        assert torch.equal(method.state_dict()[f"lesion_head.network.{name}"], weight)
    assert not any(p.requires_grad for p in method.lesion_head.parameters())
    assert not any(module.training for module in method.train().lesion_head.modules())
    batch = phantoms.batch()
    fused = batch.mri.clone().requires_grad_()
    method.lesion_head(fused).sum().backward()
    assert fused.grad.abs().sum() > 0


def test_an_nnunet_folder_is_known_by_its_plans_and_its_data_set(tmp_path):
    (tmp_path / "plans.json").write_text('{"configurations": {}}')
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0, "lesion": 1}}')
    with pytest.raises(FileNotFoundError, match=r"nnU-Net's fold_0/checkpoint_final.pth"):
        lesion_head_of(tmp_path)


def test_a_folder_that_holds_no_lesion_head_is_named_with_what_could_lie_there(tmp_path):
    layouts = r"\.hydra/config\.yaml.*configs/metadata\.json.*plans\.json and dataset\.json"
    for folder, found in ((tmp_path, "none of them in"), (tmp_path / "gone", "no folder at")):
        with pytest.raises(FileNotFoundError, match=f"{layouts}.*{found} {folder}"):
            lesion_head_of(folder)


def test_a_run_of_another_method_is_no_lesion_head(phantoms, tmp_path):
    saved_run(tmp_path / "run", phantoms, "deterministic_unet")
    with pytest.raises(
        ValueError, match="method=lesion_head, got one of method=deterministic_unet"
    ):
        lesion_head_of(tmp_path / "run")


def test_a_run_whose_lesion_head_has_vanished_says_which_and_where_to_tell_it(phantoms, tmp_path):
    bundle, run = tmp_path / "bundle", tmp_path / "run"
    saved_bundle(bundle)
    built = saved_run(run, phantoms, "deterministic_unet", f"lesion_head={bundle}")
    again = trained_method(run).state_dict()
    assert again.keys() == built.state_dict().keys()
    bundle.rename(tmp_path / "moved")
    with pytest.raises(
        FileNotFoundError, match=f"{run} was trained with .* {bundle} .*config.yaml"
    ):
        trained_method(run)
    cfg = run_config(run)
    cfg.lesion_head = str(tmp_path / "moved")
    assert trained_method(run, cfg).state_dict().keys() == again.keys()


def test_a_run_can_be_sampled_with_another_preset_and_other_guidance(smoke_run, phantoms):
    saved = run_config(smoke_run)
    asked = phantoms.config("preset=bone_tumor", "++guidance.eta=0.3", name="evaluate")
    other = with_other_guidance(saved, asked)
    assert (other.guidance.alpha, other.guidance.beta, other.guidance.eta) == (0.5, 2.0, 0.3)
    assert other.preset == "bone_tumor"
    assert other.guidance.eta_u == saved.guidance.eta_u
    unchanged = with_other_guidance(saved, phantoms.config(name="evaluate"))
    assert unchanged.guidance == saved.guidance and unchanged.preset == "stroke"


def test_guidance_that_does_not_exist_is_refused_with_what_does(smoke_run, phantoms):
    asked = phantoms.config("++guidance.etta=0.3", name="evaluate")
    with pytest.raises(ValueError, match=r"guidance settings of .*'eta_u'.*got \['etta'\]"):
        with_other_guidance(run_config(smoke_run), asked)


@pytest.mark.parametrize(
    "overrides, made",
    [
        ([], False), (["data=phantom"], True), (["data.num_workers=0"], True),
        (["+data.foo=1"], True), (["cache_dir=data"], False),
    ],
)  # fmt: skip
def test_it_is_known_whether_the_command_line_chose_the_data(overrides, made, phantoms):
    phantoms.config(*overrides, name="evaluate")
    assert choice_was_made("data") == made


def test_the_record_of_a_run_is_json_and_names_versions_and_commit():
    facts = json.loads(json.dumps(run_facts()))
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"clinfuse", "lightning", "monai", "python", "processor", "commit"} <= facts.keys()
    assert commit() == "unknown" or int(commit().split()[0], 16) >= 0
