"""Files that would run a program if they were unpickled: each is refused, and nothing is run.

Run configurations are in ``test_allowed.py``, archives in ``preparation/test_archives.py``.
"""

import io
import json
import os
import pickle
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from clinfuse.callbacks.model_draws import read_draws
from clinfuse.configuration import lesion_head_of, trained_method
from clinfuse.data.made_once import MadeOnce, fingerprint_of
from clinfuse.data.paired_slices import _kept
from clinfuse.data.preprocessed import _stack
from clinfuse.networks.lesion_heads import read_bundle, read_nnunet
from clinfuse.networks.pretrained import read_safetensors, read_weights
from clinfuse.runs import own_checkpoint
from clinfuse.teaching import learn_from
from clinfuse.types import FusionBatch

CANARY = "canary"


class Evil:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


def zipped():
    file = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": Evil()}, file)
    return file.getvalue()


def of_before():
    file = io.BytesIO()
    torch.save({"state_dict": Evil()}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def plain():
    return pickle.dumps({"state_dict": Evil()})


def as_numpy():
    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


def numpy_in_torch():
    """Through the types of numpy that an nnU-Net's checkpoint may hold."""
    file = io.BytesIO()
    torch.save({"network_weights": np.array([Evil()], dtype=object)}, file)
    return file.getvalue()


KINDS = (zipped, of_before, plain, as_numpy, numpy_in_torch)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, in which the canary would be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", KINDS)
def test_these_files_do_run_what_they_say_where_they_are_unpickled(make, here):
    content = make()
    if make is as_numpy:
        np.load(io.BytesIO(content), allow_pickle=True)
    else:
        read = pickle.loads if make is plain else partial(torch.load, weights_only=False)
        read(content if make is plain else io.BytesIO(content))
    assert (here / CANARY).is_dir()


def run_of(folder, method, **files):
    """A run's folder with these files among its checkpoints."""
    data = {"_target_": "clinfuse.data.paired_volumes.PairedVolumes", "root": "x"}
    config = {
        "method": {"_target_": method}, "data": data, "method_name": "x", "lesion_head": None,
    }  # fmt: skip
    for part in (".hydra", "checkpoints"):
        (folder / part).mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in files.items():
        (folder / "checkpoints" / name.replace("__", ".")).write_bytes(content)
    return folder


def bundle_of(folder, **files):
    image = {"num_channels": 1, "spatial_shape": ["2*n"] * 3, "value_range": [0, 1]}
    formats = {"inputs": {"i": image}, "outputs": {"pred": {"channel_def": {"0": "stroke"}}}}
    network = {"_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 1,
               "channels": [2, 2], "strides": [2]}  # fmt: skip
    for part in ("configs", "models"):
        (folder / part).mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps({"network_data_format": formats}))
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": network}))
    for name, content in files.items():
        (folder / "models" / name.replace("__", ".")).write_bytes(content)
    return folder


def nnunet_of(folder, content):
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text('{"configurations": {}}')
    (folder / "dataset.json").write_text('{"labels": {"background": 0, "lesion": 1}}')
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(content)
    return folder


def file_of(folder, name, content):
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder / name


AVERAGE = "clinfuse.methods.rules.Maximum"
LESION_HEAD = "clinfuse.methods.lesion_head.LesionHead"

READERS = {
    "a run": lambda f, c: trained_method(run_of(f, AVERAGE, last__ckpt=c)),
    "a run's safetensors": lambda f, c: trained_method(run_of(f, AVERAGE, last__safetensors=c)),
    "a run to go on with": lambda f, c: own_checkpoint(run_of(f, AVERAGE, last__ckpt=c)),
    "a teacher": lambda f, c: learn_from(
        run_of(f, AVERAGE, last__ckpt=c), SimpleNamespace(learn_from=print), f / "student"
    ),
    "a lesion head": lambda f, c: lesion_head_of(run_of(f, LESION_HEAD, last__ckpt=c)),
    "a bundle": lambda f, c: read_bundle(bundle_of(f, model__pt=c)),
    "a bundle's script": lambda f, c: read_bundle(bundle_of(f, model__ts=c)),
    "an nnU-Net": lambda f, c: read_nnunet(nnunet_of(f, c)),
    "model draws": lambda f, c: read_draws(file_of(f, "draw_0_stage_1.pt", c).parent),
    "pretrained weights": lambda f, c: read_weights(file_of(f, "w.pth", c)),
    "safetensors": lambda f, c: read_safetensors(file_of(f, "w.safetensors", c)),
    "a kept reference": lambda f, c: _kept(file_of(f, "r.npy", c)),
}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_would_run_something_is_refused_and_nothing_is_run(reader, make, here):
    with pytest.raises(ValueError) as caught:
        READERS[reader](here / "given", make())
    assert not (here / CANARY).exists()
    assert str(here / "given") in str(caught.value) and "\n" not in str(caught.value)


def test_kept_volumes_are_not_unpickled_either(here):
    mri = torch.zeros(1, 1, 2, 3, 4)
    batch = FusionBatch(mri, mri, torch.zeros(1, 3, 2, 3, 4) > 0, torch.ones(1, 3), ["a"])
    path = here / f"{fingerprint_of(batch)}.npy"
    path.write_bytes(as_numpy())
    with pytest.raises(ValueError, match=str(path)):
        MadeOnce(here, lambda batch: batch.mri)(batch)
    with pytest.raises(ValueError, match="Python objects"):
        _stack(path, "images")
    assert not (here / CANARY).exists()


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("canary", True, 4)


class Loads(nn.Module):
    """Runs when it is loaded, not when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.w = state[0] + torch.from_file("canary", True, 4)
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("module", [Writes, Loads])
def test_a_script_that_writes_files_is_refused_before_it_is_loaded(module, here):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module()), file)
    assert not (here / CANARY).exists()
    folder = bundle_of(here / "b", model__ts=file.getvalue())
    with pytest.raises(ValueError, match=r"expected TorchScript of tensors alone, got from_file"):
        read_bundle(folder)
    assert not (here / CANARY).exists()
    loaded = torch.jit.load(str(folder / "models" / "model.ts"))  # the canary that would have sung
    if module is Writes:
        loaded(torch.ones(4))
    assert (here / CANARY).exists()


def test_a_script_without_its_code_is_refused(here):
    """Whatever else could be loaded from an archive is not what was read."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("x/data.pkl", "x/version", "x/model.json"):
            archive.writestr(name, b"3\n")
    with pytest.raises(ValueError, match="expected TorchScript"):
        read_bundle(bundle_of(here / "b", model__ts=file.getvalue()))
