"""Everything of ours that reads what others wrote, with valid small files to start from."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
import yaml
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from monai.networks.nets import UNet
from mutations import mutated
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors.torch import save
from torch import nn

from clinfuse.callbacks.calibration import read_calibration
from clinfuse.callbacks.model_draws import read_draws
from clinfuse.configuration import (
    CONFIG_PATH,
    checkpoint_content,
    checkpoint_of,
    register_resolvers,
    run_config,
    trained_method,
)
from clinfuse.data.made_once import MadeOnce, fingerprint_of
from clinfuse.data.phantoms import make_phantom
from clinfuse.data.slices import read_picture
from clinfuse.data.splits import read_splits
from clinfuse.data.studies import load_study, patient_of
from clinfuse.data.volumes import read_volume
from clinfuse.functional import contrast, entropy, epi, fsim, psnr, qabf, scd, ssim, vif, yang
from clinfuse.functional.surface import surface_agreement
from clinfuse.methods.regional_weights import RegionalWeights
from clinfuse.metrics.calibration import REGIONS
from clinfuse.metrics.suite import case_metrics
from clinfuse.networks.lesion_heads import read_bundle, read_nnunet
from clinfuse.networks.pretrained import read_weights
from clinfuse.preparation.archives import unpack
from clinfuse.preparation.dicom.writing import write_scan
from clinfuse.preparation.pipeline import quality_in, read_facts
from clinfuse.preparation.reading import read_scan
from clinfuse.reporting.card import write_model_card, write_run_card
from clinfuse.reporting.rows import CASE_COLUMNS, read_rows
from clinfuse.runs import read_state
from clinfuse.tables import collect
from clinfuse.types import FusionBatch

Seed = Mapping[str, bytes]
"""A valid input: contents of files by their names."""


@dataclass(frozen=True)
class Reader:
    """A reader and what it is given.

    Attributes:
        name: in the table.
        what: is changed, in words.
        weight: share of the inputs; dear readers get few.
        valid: makes valid inputs, in a folder of its own.
        of_folder: reads one that has been written.
    """

    name: str
    what: str
    weight: float
    valid: Callable[[Path], Sequence[Seed]]
    of_folder: Callable[[Path], Any]

    def seeds(self, folder: Path) -> Sequence[Seed]:
        folder.mkdir(parents=True, exist_ok=True)
        return self.valid(folder)

    def write(self, seeds: Sequence[Seed], rng: np.random.Generator, folder: Path) -> Any:
        """One of the valid inputs, one file of it changed, in the folder."""
        seed = seeds[int(rng.integers(len(seeds)))]
        changed = list(seed)[int(rng.integers(len(seed)))]
        others = [content for one in seeds for content in one.values()]
        for name, content in seed.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(mutated(content, others, rng) if name == changed else content)
        return None

    def read(self, folder: Path, given: Any) -> Any:
        return self.of_folder(folder)


def files_in(folder: Path) -> Seed:
    """What a folder holds, by names relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def first_file(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*")) if path.is_file())


@cache
def head() -> Any:
    return make_phantom(0, 0, (10, 16, 16), (12.0, 12.0, 12.0), "t2")


# Volumes.


def nifti(folder: Path) -> list[Seed]:
    """Of several types, with a scale, compressed and not, with and without a fourth axis."""
    rng, seeds = np.random.default_rng(0), []
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    for dtype, shape in ((np.int16, (5, 6, 7)), (np.float32, (5, 6, 7, 1)), (np.uint8, (5, 6, 7))):
        image = nib.Nifti1Image(rng.integers(0, 200, shape).astype(dtype), affine)
        image.header.set_xyzt_units("mm")
        image.set_qform(affine, 1)
        if dtype == np.int16:
            image.header.set_slope_inter(2.0, -100.0)
        for ending in (".nii", ".nii.gz"):
            path = folder / f"{np.dtype(dtype).name}{ending}"
            nib.save(image, path)
            seeds.append({path.name: path.read_bytes()})
    return seeds


def itk(folder: Path) -> list[Seed]:
    image = sitk.GetImageFromArray(np.arange(210, dtype=np.int16).reshape(7, 6, 5))
    image.SetSpacing((2.0, 2.0, 4.0))
    seeds = []
    for ending in (".nrrd", ".mha"):
        sitk.WriteImage(image, folder / f"scan{ending}")
        seeds.append(files_in(folder))
        (folder / f"scan{ending}").unlink()
    return seeds


def dicom(folder: Path) -> list[Seed]:
    seeds = []
    for modality, array in (("MR", head().mri), ("CT", head().ct_hu)):
        image = sitk.GetImageFromArray(array[:5, :8, :8].round())
        write_scan(folder / modality, image, modality)
        seeds.append(files_in(folder / modality))
    return seeds


def study(folder: Path) -> list[Seed]:
    phantom = head()
    volumes = {
        "mri": phantom.mri, "ct": phantom.ct_hu, "brain_mask": phantom.brain,
        "bone_mask": phantom.bone, "lesion_mask": phantom.lesion,
    }  # fmt: skip
    for name, array in volumes.items():
        stored = array.transpose(2, 1, 0).astype(np.uint8 if array.dtype == bool else np.int16)
        nib.save(nib.Nifti1Image(stored, np.diag([12.0, 12.0, 12.0, 1.0])), folder / f"{name}.nii")
    (folder / "study.json").write_text(json.dumps(FACTS))
    return [files_in(folder)]


def picture(folder: Path) -> list[Seed]:
    array = np.random.default_rng(0).integers(0, 255, (8, 9, 3)).astype(np.uint8)
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.bmp", "RGB"), ("d.tif", "L")):
        Image.fromarray(array).convert(mode).save(folder / name)
    return [{name: content} for name, content in files_in(folder).items()]


# Records.

QUALITY = {
    "verdict": "pass", "reasons": [], "facts": {"ct": "HU"}, "notes": ["a"],
    "histograms": {"mri": {"counts": [1, 2], "edges": [0.0, 1.0, 2.0]}},
}  # fmt: skip
FACTS = {
    "patient": "P-0123456789ab", "fingerprint": "0", "quality": QUALITY,
    "masks": {"brain_mask": {"tool": "TotalSegmentator", "task": "total_mr"}},
}  # fmt: skip
SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["d"], "source": "drawn"}
CONFIG = {
    "name": "x", "method_name": "weighted", "label": "weighted", "preset": "default", "seed": 0,
    "cache_dir": "runs/cache", "lesion_head": None, "spatial_dims": 3,
    "method": {"_target_": "clinfuse.methods.rules.Weighted", "mri_weight": 0.5},
    "data": {"_target_": "clinfuse.data.paired_volumes.PairedVolumes", "root": "${cache_dir}/a",
             "ct_map": "piecewise", "seed": "${seed}"},
    "guidance": {"alpha": 1.0, "beta": 1.0, "gamma": 2.0, "eta": 0.1},
    "trainer": {"_target_": "lightning.Trainer", "max_epochs": 2, "precision": "${precision:}"},
    "callbacks": {"cards": {"_target_": "clinfuse.callbacks.cards.RunCards",
                            "folder": "${hydra:runtime.output_dir}"}},
}  # fmt: skip
LEARNED = {
    **CONFIG, "method_name": "weighted_by_roi",
    "method": {"_target_": "clinfuse.methods.regional_weights.RegionalWeights",
               "loss": {"_target_": "clinfuse.losses.sources.SourceLoss", "ssim": 1.0},
               "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.05},
               "warmup_steps": 10},
}  # fmt: skip
CALIBRATION = {
    "level": 0.9, "curve": {key: [[0.01, 0.1, 1.0], [0.02, 0.1, 0.5]] for key in REGIONS},
    "quantile": dict.fromkeys(REGIONS, 1.64), "temperature": 1.2, "case_ids": ["a", "b"],
    "misregistration_mm": 2.0, "sampling_version": 1,
}  # fmt: skip


def jsons(**content: Any) -> Seed:
    return {f"{name}.json": json.dumps(value, indent=1).encode() for name, value in content.items()}


def rows_text() -> bytes:
    row = {
        "case_id": "a", "patient_id": "a", "method": "x", "preset": "default", "seed": 0,
        "misregistration_mm": 2.0, "mask_source": "expert", "roi": "bone", "metric": "psnr",
        "value": 21.5, "perturbation": "", "amount": 0.0,
    }  # fmt: skip
    rows = [
        row,
        {**row, "case_id": "b", "patient_id": "b"},
        {**row, "roi": "brain", "value": "nan"},
    ]
    lines = [",".join(CASE_COLUMNS)]
    lines += [",".join(str(one.get(name, 0)) for name in CASE_COLUMNS) for one in rows]
    return "\n".join(lines).encode() + b"\n"


def scored(_: Path) -> list[Seed]:
    said = {"data": {"root": "x", "cases": {"test": 2}}, "seed": 0, "torch": "2", "commit": "a"}
    cost = {"parameters": 3, "trained_parameters": 3, "training_steps": 5, "training_seconds": 1.0}
    hydra = {"hydra": {"job": {"name": "train"}, "overrides": {"task": ["seed=0"]}}}
    return [
        {
            "cases.csv": rows_text(),
            **jsons(facts=said, cost=cost, splits={**SPLITS, "test": ["a", "b"]}),
            ".hydra/config.yaml": yaml.safe_dump(CONFIG).encode(),
            ".hydra/hydra.yaml": yaml.safe_dump(hydra).encode(),
        }
    ]


def facts(_: Path) -> list[Seed]:
    return [jsons(study=FACTS)]


def calibration(_: Path) -> list[Seed]:
    return [jsons(calibration=CALIBRATION)]


def state(_: Path) -> list[Seed]:
    done = {"key": "0", "is_finished": True, "objective": 1.5, "config": "a: 1"}
    return [jsons(run=done)]


def of_quality(folder: Path) -> Any:
    said = read_facts(folder)
    return said and quality_in(said, folder)


def of_calibration(folder: Path) -> Any:
    method = SimpleNamespace(sampling_version=1)
    found = read_calibration(folder, method)  # type: ignore[arg-type]
    batch = a_batch()
    return found and found.interval(batch.mri, batch.mri.abs(), batch.roi)


def of_cards(folder: Path) -> Any:
    return write_model_card(folder), write_run_card(folder)


def of_scores(folder: Path) -> Any:
    return collect([str(folder)], folder / "out")


# Weights, configurations and archives.


def saved(content: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


WEIGHTS = {"w": torch.arange(4.0), "norm.b": torch.ones(2, 2, dtype=torch.float16)}


def run(_: Path) -> list[Seed]:
    seeds: list[Seed] = [{".hydra/config.yaml": yaml.safe_dump(CONFIG).encode()}]
    method: RegionalWeights = instantiate(LEARNED["method"], _convert_="all")
    config = yaml.safe_dump(LEARNED).encode()
    content = {"state_dict": method.state_dict(), "epoch": 1, "global_step": 4}
    seeds.append({".hydra/config.yaml": config, "checkpoints/last.ckpt": saved(content)})
    exported = save(dict(method.state_dict()), {"config": config.decode()})
    seeds.append({".hydra/config.yaml": config, "checkpoints/last.safetensors": exported})
    return seeds


def of_run(folder: Path) -> Any:
    cfg = run_config(folder)
    return trained_method(folder, cfg) if (folder / "checkpoints").is_dir() else cfg


def checkpoint(_: Path) -> list[Seed]:
    content = {"state_dict": WEIGHTS, "epoch": 1, "callbacks": {"x": {"a": [1, 2.0, None]}}}
    zipped, old = saved(content), saved(content, _use_new_zipfile_serialization=False)
    return [{"checkpoints/last.ckpt": each} for each in (zipped, old)]


def weights(_: Path) -> list[Seed]:
    old = saved(WEIGHTS, _use_new_zipfile_serialization=False)
    return [
        {"w.pth": saved(WEIGHTS)},
        {"w.pth": old},
        {"w.safetensors": save(WEIGHTS, {"config": "a: 1"})},
    ]


def draws(_: Path) -> list[Seed]:
    return [{"draw_0_stage_1.pt": saved(WEIGHTS), "draw_0_stage_2.pt": saved({"x": torch.ones(1)})}]


def kept(_: Path) -> list[Seed]:
    batch, file = a_batch(), io.BytesIO()
    np.save(file, batch.mri.numpy())
    return [{f"{fingerprint_of(batch)}.npy": file.getvalue()}]


def of_kept(folder: Path) -> Any:
    return MadeOnce(folder, lambda batch: batch.mri)(a_batch())


NETWORK = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 1,
    "channels": [2, 2], "strides": [2], "num_res_units": 0,
}  # fmt: skip


def bundle(_: Path) -> list[Seed]:
    image = {"num_channels": 1, "spatial_shape": ["2*n"] * 3, "value_range": [0, 1]}
    outputs = {"pred": {"channel_def": {"0": "stroke"}}}
    metadata = {"network_data_format": {"inputs": {"image": image}, "outputs": outputs}}
    network = UNet(3, 1, 1, [2, 2], [2], num_res_units=0)
    steps = {"transforms": [{"_target_": "Orientationd", "axcodes": "RAS"}]}
    config = {"network_def": NETWORK, "preprocessing": steps}
    common = {
        "configs/metadata.json": json.dumps(metadata).encode(),
        "models/model.pt": saved(network.state_dict()),
    }
    as_json = {"configs/inference.json": json.dumps(config).encode()}
    return [
        {**common, **as_json},
        {**common, "configs/inference.yaml": yaml.safe_dump(config).encode()},
    ]


def nnunet(_: Path) -> list[Seed]:
    unets = "dynamic_network_architectures.architectures.unet"
    settings = {
        "n_stages": 2, "features_per_stage": [2, 2], "conv_op": "torch.nn.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"affine": True},
        "dropout_op": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
    }  # fmt: skip
    plan = {
        "patch_size": [8, 8, 8], "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "architecture": {"network_class_name": f"{unets}.PlainConvUNet", "arch_kwargs": settings,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
    }  # fmt: skip
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    network = PlainConvUNet(**{**settings, **layers}, input_channels=1, num_classes=2)
    content = {
        "network_weights": network.state_dict(), "init_args": {"configuration": "3d"},
        "lrs": [np.float64(0.01)],
    }  # fmt: skip
    labels = {"labels": {"background": 0, "lesion": 1}, "channel_names": {"0": "MR"}}
    return [
        {
            **jsons(plans={"configurations": {"3d": plan}}, dataset=labels),
            "fold_0/checkpoint_final.pth": saved(content),
        }
    ]


def archive(_: Path) -> list[Seed]:
    zipped, seeds = io.BytesIO(), []
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("a/b.txt", b"text" * 50)
        members.writestr("c", b"x")
    seeds.append({"given/a.bin": zipped.getvalue()})
    for mode in ("w", "w:gz", "w:bz2", "w:xz"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode=mode) as members:
            for name in ("a/b.txt", "c"):
                info = tarfile.TarInfo(name)
                info.size = 200
                members.addfile(info, io.BytesIO(b"text" * 50))
        seeds.append({"given/a.bin": packed.getvalue()})
    return seeds


def of_archive(folder: Path) -> Any:
    unpacked = folder / "there" / "out"
    try:
        unpack(folder / "given" / "a.bin", unpacked)
    finally:
        outside = {
            str(p.relative_to(folder)) for p in folder.rglob("*") if unpacked not in p.parents
        }
        assert outside <= {"given", "given/a.bin", "there", "there/out"}, outside


# What is no file: command lines and arrays.

OVERRIDES = (
    *("seed=1", "method=average", "preset=stroke", "data.batch_size=2", "trainer.max_epochs=3"),
    *("method.steps=4", "lesion_head=runs/x", "guidance.eta=0.1", "network=tiny", "+x=1"),
    *("data.misregistration_mm=[0,1]", "logger=none", "~callbacks.ema", "objective.roi=2.0"),
)


class CommandLine(Reader):
    """Words of a command line; what Hydra refuses it says itself, in its own way."""

    def write(self, seeds: Sequence[Seed], rng: np.random.Generator, folder: Path) -> Any:
        words = [OVERRIDES[int(i)].encode() for i in rng.integers(len(OVERRIDES), size=2)]
        words[0] = mutated(words[0], words, rng)
        return [word.decode(errors="replace") for word in words]

    def read(self, folder: Path, given: Any) -> Any:
        register_resolvers()
        try:
            with initialize_config_dir(CONFIG_PATH, version_base="1.3"):
                return compose("train", given)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(f"{folder}: {type(error).__name__}") from error


def a_batch() -> FusionBatch:
    mri = torch.linspace(-1, 1, 2 * 4 * 6 * 8).view(2, 1, 4, 6, 8)
    roi = torch.stack([mri[:, 0] > 0, mri[:, 0] < -0.5, mri[:, 0] > 0.5], 1)
    return FusionBatch(mri, mri.flip(-1), roi, torch.full((2, 3), 2.0), ["a", "b"])


PAIRWISE: Sequence[Callable[..., Any]] = (
    entropy.mutual_information, qabf.qabf, vif.vif, scd.scd, epi.epi, yang.q_y,
)  # fmt: skip
ALONE: Sequence[Callable[..., Any]] = (
    entropy.entropy, contrast.standard_deviation, contrast.spatial_frequency,
    contrast.average_gradient,
)  # fmt: skip


class Arrays(Reader):
    """Volumes of odd sizes that hold odd values."""

    def write(self, seeds: Sequence[Seed], rng: np.random.Generator, folder: Path) -> Any:
        shape = (1, 1, *(int(n) for n in rng.choice([1, 2, 3, 5, 9, 12], size=3)))
        volumes = [torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)) for _ in range(3)]
        for volume in volumes:
            odd = rng.choice([np.nan, np.inf, -np.inf, 0.0, 1e30, -1e-30, 1.0])
            how = rng.random()
            if how < 0.3:
                volume.fill_(float(odd))
            elif how < 0.7:
                volume.view(-1)[int(rng.integers(volume.numel()))] = float(odd)
        masks = [torch.from_numpy(rng.random(shape) < rng.choice([0, 0.2, 1])) for _ in range(3)]
        spacing_mm = rng.choice([0.1, 1.0, 30.0], size=3).astype(np.float32)
        return volumes, masks, torch.from_numpy(spacing_mm)[None], int(rng.integers(6))

    def read(self, folder: Path, given: Any) -> Any:
        (fused, mri, ct), masks, spacing_mm, which = given
        if which == 0:
            return [score(fused, mri, ct) for score in PAIRWISE]
        if which == 1:
            return [score(fused) for score in ALONE]
        if which == 2:
            return psnr.psnr(fused, mri, masks[0]), ssim.ssim(fused, mri, masks[0], spacing_mm)
        if which == 3:
            return fsim.fsim(fused, mri, masks[0])
        if which == 4:
            return surface_agreement(masks[0], masks[1], spacing_mm).hd95()
        batch = FusionBatch(mri, ct, torch.cat(masks, 1), spacing_mm, [str(folder)])
        return case_metrics(fused, batch, spread=fused.abs(), with_fusion=True)


def of_first(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: read(first_file(folder))


def single(name: str, content: bytes) -> Callable[[Path], list[Seed]]:
    return lambda _: [{name: content}]


def nothing(_: Path) -> list[Seed]:
    return []


def of_none(_: Path) -> None:
    return None


READERS: Sequence[Reader] = (
    Reader("splits.json", "JSON", 8, lambda _: [jsons(splits=SPLITS)], read_splits),
    Reader("splits/*.txt", "text", 3, lambda _: [
        {f"splits/{name}.txt": f"{name}1\n{name}2\n".encode() for name in ("train", "val", "test")}
    ], read_splits),
    Reader("study.json", "JSON, as data reads it", 6, facts, patient_of),
    Reader("study.json again", "JSON, as prepare does", 6, facts, of_quality),
    Reader("run.json", "JSON", 4, state, read_state),
    Reader("calibration.json", "JSON", 5, calibration, of_calibration),
    Reader("cases.csv", "CSV", 6, single("cases.csv", rows_text()), of_first(read_rows)),
    Reader("cards", "CSV, JSON, YAML of a run", 3, scored, of_cards),
    Reader("tables", "the same", 3, scored, of_scores),
    Reader("volume", "NIfTI, as data reads it", 14, nifti, of_first(read_volume)),
    Reader("scan", "NIfTI, as prepare does", 8, nifti, of_first(read_scan)),
    Reader("itk", "NRRD, MetaImage", 3, itk, of_first(read_scan)),
    Reader("picture", "PNG, BMP, TIFF", 5, picture, of_first(read_picture)),
    Reader("kept.npy", "numpy", 5, kept, of_kept),
    Reader("checkpoint", "torch, new and old form", 8, checkpoint,
           lambda folder: checkpoint_content(checkpoint_of(folder))),
    Reader("weights", "torch, safetensors", 8, weights, of_first(read_weights)),
    Reader("draws", "torch", 3, draws, read_draws),
    Reader("archive", "zip, tar, tar.gz, bz2, xz", 8, archive, of_archive),
    Arrays("metrics", "arrays", 4, nothing, of_none),
    Reader("run", "YAML, checkpoint, safetensors", 8, run, of_run),
    Reader("dicom", "a series of five slices", 4, dicom, read_scan),
    Reader("study", "five volumes, JSON", 2, study, partial(load_study, cache_dir=None)),
    Reader("bundle", "MONAI bundle", 2, bundle, read_bundle),
    Reader("nnunet", "nnU-Net folder", 1.5, nnunet, read_nnunet),
    CommandLine("overrides", "words of a command line", 0.5, nothing, of_none),
)  # fmt: skip
