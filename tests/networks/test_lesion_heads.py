import copy
import json
import logging
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import SegResNet, UNet
from monai.transforms import NormalizeIntensity, Orientation
from torch import nn

from clinfuse.networks.lesion_heads import (
    FrozenLesionHead,
    _z_scored,
    read_bundle,
    read_nnunet,
)

UNET = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2,
    "channels": [4, 6, 8], "strides": [2, 2], "norm": "batch",
}  # fmt: skip


def write_bundle(folder, network=UNET, names=("background", "Stroke lesion"), suffix=".json", **kw):
    """A bundle as the model zoo lays it out; returns its network, weights drawn anew."""
    image = {
        "type": "image", "format": "magnitude", "num_channels": network.get("in_channels", 1),
        "spatial_shape": ["4*n"] * network.get("spatial_dims", 3), "value_range": [0, 1],
    } | kw.get("image", {})  # fmt: skip
    outputs = {"pred": {"channel_def": {str(i): name for i, name in enumerate(names)}}}
    metadata = {"network_data_format": {"inputs": {"image": image}, "outputs": outputs}}
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    config = {
        "imports": ["$import glob"],
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": kw.get("preprocessing", [])},
        "postprocessing": {"_target_": "Compose", "transforms": kw.get("postprocessing", [])},
    } | kw.get("config", {})  # fmt: skip
    (folder / "configs" / f"inference{suffix}").write_text(json.dumps(config))  # is YAML as well
    kind = {"UNet": UNet, "SegResNet": SegResNet}[network["_target_"].rsplit(".", 1)[-1]]
    built = kind(**{k: v for k, v in network.items() if k != "_target_"})
    for name, statistics in built.named_buffers():  # so that evaluation differs from training
        if "running" in name:
            statistics.uniform_(0.5, 1.5)
    torch.save(built.state_dict(), folder / "models" / "model.pt")
    return built.eval()


def volume(*shape):
    return (2 * torch.rand(2, 1, *shape) - 1).requires_grad_()


def assert_frozen_but_differentiable(head, fused):
    probability = head(fused)
    assert probability.shape == fused.shape
    assert probability.min() >= 0 and probability.max() <= 1
    (gradient,) = torch.autograd.grad(probability.sum(), fused)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in head.parameters())
    assert not any(module.training for module in head.train().modules())


def xyz(fused):
    """As MONAI's readers hold a volume: (x, y, z) for our (d, h, w) = (z, y, x)."""
    return fused.permute(0, 1, 4, 3, 2)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_a_bundle_gives_the_probability_that_its_network_gives_by_hand(tmp_path, suffix):
    network, fused = write_bundle(tmp_path / "b", suffix=suffix), volume(8, 12, 16)
    head = read_bundle(tmp_path / "b")
    by_hand = torch.softmax(network(xyz(0.5 * fused + 0.5)), 1)[:, 1:]
    torch.testing.assert_close(head(fused), xyz(by_hand), rtol=0, atol=1e-6)
    assert_frozen_but_differentiable(head, fused)


def test_the_value_range_of_the_metadata_is_what_model_space_is_mapped_to(tmp_path):
    network = write_bundle(tmp_path / "b", image={"value_range": [-3, 5]})
    fused = volume(8, 8, 8)
    by_hand = torch.softmax(network(xyz(1 + 4 * fused)), 1)[:, 1:]
    torch.testing.assert_close(read_bundle(tmp_path / "b")(fused), xyz(by_hand))


def test_overlapping_classes_in_four_channels_count_where_the_likeliest_does(tmp_path, caplog):
    definition = {
        "_target_": "SegResNet", "in_channels": 4, "out_channels": 3, "init_filters": 8,
        "blocks_down": [1, 1, 1], "blocks_up": [1, 1],
    }  # fmt: skip
    network = write_bundle(
        tmp_path / "b",
        definition,
        names=("Tumor core", "Whole tumor", "Oedema"),
        image={"value_range": []},
        preprocessing=[{"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": False}],
        postprocessing=[{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}],
    )
    fused = volume(8, 12, 8)
    with caplog.at_level(logging.INFO):
        head = read_bundle(tmp_path / "b")
    assert len(caplog.records) == 1 and "F z-scored in 4 channel(s)" in caplog.text
    scored = torch.stack([NormalizeIntensity()(case.detach()) for case in xyz(fused)])
    logits = network(torch.cat([scored] * 4, 1))
    by_hand = torch.maximum(logits[:, :1].sigmoid(), logits[:, 1:2].sigmoid())
    torch.testing.assert_close(head(fused), xyz(by_hand), rtol=1e-4, atol=1e-5)
    assert_frozen_but_differentiable(head, fused)


def test_exclusive_classes_of_lesion_add_up(tmp_path):
    definition = UNET | {"out_channels": 4}
    names = ("background", "infarct core", "tumour", "ventricle")
    network, fused = write_bundle(tmp_path / "b", definition, names=names), volume(8, 8, 8)
    by_hand = torch.softmax(network(xyz(0.5 * fused + 0.5)), 1)[:, 1:3].sum(1, keepdim=True)
    torch.testing.assert_close(read_bundle(tmp_path / "b")(fused), xyz(by_hand))
    by_hand = torch.sigmoid(network(xyz(0.5 * fused + 0.5)))[:, 3:]
    head = read_bundle(tmp_path / "b", lesion=["ventricle"], activation="sigmoid")
    torch.testing.assert_close(head(fused), xyz(by_hand))
    with pytest.raises(ValueError, match=r"expected a class of \['tumour', 'vessel'\]"):
        read_bundle(tmp_path / "b", lesion=["tumour", "vessel"])


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPL", "IAR"])
def test_axes_are_those_that_the_bundle_orients_its_images_to(tmp_path, codes):
    steps = [{"_target_": "Orientationd", "keys": "image", "axcodes": codes}]
    network = write_bundle(tmp_path / "b", preprocessing=steps)
    fused = volume(8, 12, 16).detach()
    orient = Orientation(axcodes=codes, labels=(("L", "R"), ("P", "A"), ("I", "S")))

    def oriented(batch):
        return torch.stack([orient(MetaTensor(case, torch.eye(4))).as_tensor() for case in batch])

    there = torch.softmax(network(0.5 * oriented(xyz(fused)) + 0.5), 1)[:, 1:]
    probability = read_bundle(tmp_path / "b")(fused)
    torch.testing.assert_close(oriented(xyz(probability)), there, rtol=0, atol=1e-6)


@pytest.mark.parametrize("declared", ["4*n", "*", 96, "2**p*n", "2*n"])
def test_any_size_is_padded_to_what_the_network_can_read(tmp_path, declared):
    network = write_bundle(tmp_path / "b", image={"spatial_shape": [declared] * 3})
    head, fused = read_bundle(tmp_path / "b"), volume(9, 5, 11)
    assert head.multiple == (4, 4, 4)
    edged = np.pad(xyz(fused.detach()).numpy(), [(0, 0)] * 2 + [(0, 1), (0, 3), (0, 3)], "edge")
    by_hand = torch.softmax(network(0.5 * torch.from_numpy(edged) + 0.5), 1)[:, 1:, :11, :5, :9]
    torch.testing.assert_close(head(fused), xyz(by_hand), rtol=0, atol=1e-6)
    assert_frozen_but_differentiable(head, fused)


def test_a_network_of_slices_reads_slices_and_refuses_volumes(tmp_path):
    network = write_bundle(tmp_path / "b", UNET | {"spatial_dims": 2})
    head, fused = read_bundle(tmp_path / "b"), volume(7, 10)
    by_hand = torch.softmax(network(nn.ReplicationPad2d((0, 2, 0, 1))(0.5 * fused + 0.5)), 1)
    torch.testing.assert_close(head(fused), by_hand[:, 1:, :7, :10])
    with pytest.raises(ValueError, match=r"expected a volume of 2 axes.*got one of 3"):
        head(volume(8, 8, 8))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torchscript_stands_in_for_weights_that_are_missing_or_defined_by_a_program(tmp_path):
    fused = volume(8, 8, 8)
    for place, config in (("a", {}), ("b", {"network_def": "$print('a program')"})):
        network = write_bundle(tmp_path / place, config=config)
        torch.jit.script(network).save(tmp_path / place / "models" / "model.ts")
        if place == "a":
            (tmp_path / place / "models" / "model.pt").unlink()
        by_hand = torch.softmax(network(xyz(0.5 * fused + 0.5)), 1)[:, 1:]
        head = read_bundle(tmp_path / place)
        torch.testing.assert_close(head(fused), xyz(by_hand), rtol=0, atol=1e-6)
        assert_frozen_but_differentiable(head, fused)


def test_a_definition_may_refer_to_other_values_and_weights_may_lie_one_level_deeper(tmp_path):
    folder = tmp_path / "b"
    network = write_bundle(folder, config={"wide": [4, 6, 8], "net": UNET | {"channels": "@wide"}})
    config = json.loads((folder / "configs" / "inference.json").read_text())
    config["network_def"] = UNET | {"channels": "@wide"}
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    torch.save({"model": network.state_dict()}, folder / "models" / "model.pt")
    fused = volume(8, 8, 8)
    by_hand = torch.softmax(network(xyz(0.5 * fused + 0.5)), 1)[:, 1:]
    torch.testing.assert_close(read_bundle(folder)(fused), xyz(by_hand), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "definition",
    [
        UNET | {"channels": "$[4, 6, 8]"},
        UNET | {"channels": "@wide"},
        UNET | {"_target_": "os.system"},
        UNET | {"norm": {"_target_": "builtins.print"}},
        "$import os",
    ],
)
def test_a_bundle_is_read_and_never_run(tmp_path, definition, capsys):
    write_bundle(tmp_path / "b", config={"network_def": definition, "wide": "$print('run')"})
    with pytest.raises(
        ValueError, match=r"network_def of plain values .*, or models/model.ts, got"
    ):
        read_bundle(tmp_path / "b")
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"names": ("background", "spleen")}, r"a class of .*lesion.*got .*spleen.*metadata.json"),
        ({"names": ("background", "lesion", "x")}, r"to 3 classes .*got \[1, 2, "),
        ({"image": {"num_channels": 3}}, "from 3 channel.*got"),
        ({"image": {"format": "hounsfield"}}, "an image like F, got .*hounsfield.*metadata.json"),
        ({"config": {"network_def": UNET | {"chanels": 3}}}, "network_def that MONAI can build"),
        ({"config": {"network_def": UNET | {"channels": [4, 6, 9]}}}, "weights of UNet.*model.pt"),
    ],
)  # fmt: skip
def test_a_bundle_that_makes_no_lesion_head_is_refused_in_one_sentence(tmp_path, settings, message):
    settings = {"image": {}, **settings}
    settings["image"].setdefault("spatial_shape", ["*", "*", "*"])
    write_bundle(tmp_path / "b", **settings)
    with pytest.raises(ValueError, match=message) as caught:
        read_bundle(tmp_path / "b")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_files_of_a_bundle_that_are_missing_or_corrupted_are_named(tmp_path):
    write_bundle(tmp_path / "b")
    weights, metadata = tmp_path / "b/models/model.pt", tmp_path / "b/configs/metadata.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"weights that can be read as tensors.*{weights}"):
        read_bundle(tmp_path / "b")
    weights.write_bytes(
        pickle.dumps({"model": SimpleNamespace()}, protocol=2)
    )  # code could hide here
    with pytest.raises(ValueError, match=f"weights that can be read as tensors.*{weights}"):
        read_bundle(tmp_path / "b")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"weights, found none at {weights}"):
        read_bundle(tmp_path / "b")
    (tmp_path / "b/models/model.ts").write_bytes(b"no TorchScript")
    with pytest.raises(ValueError, match=r"expected TorchScript, got .*model\.ts"):
        read_bundle(tmp_path / "b")
    metadata.write_text("{")
    with pytest.raises(ValueError, match=f"expected JSON.*{metadata}"):
        read_bundle(tmp_path / "b")


def test_statistics_within_the_head_s_mask_leave_air_out():
    normalise = [lambda fused: _z_scored(fused, inside_only=True)]
    head = FrozenLesionHead(nn.Identity(), normalise, [0], "sigmoid", [1, 1, 1])
    fused = volume(6, 7, 8).detach()
    fused[:, :, :3] = -1
    scored = torch.special.logit(head(fused)[:, 0])
    for case, values in zip(scored, fused[:, 0], strict=True):
        inside = values > -0.9
        tissue = values[inside].double()
        expected = (tissue - tissue.mean()) / tissue.std(correction=0)
        torch.testing.assert_close(case[inside].double(), expected, rtol=1e-3, atol=1e-3)
        assert (case[~inside] == 0).all()


# nnU-Net: made as nnU-Net 2.x leaves it, its checkpoint with the numpy numbers that it logs.


def arch_kwargs(**changes):
    return {
        "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    } | changes  # fmt: skip


UNETS = "dynamic_network_architectures.architectures.unet"


LABELS = {"background": 0, "lesion": 1}


def write_plans(parent, labels=LABELS, channels=1, plan=None, transpose=(0, 1, 2)):
    folder = parent / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    configuration = {
        "patch_size": [8, 16, 16], "spacing": [3.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": {
            "network_class_name": f"{UNETS}.PlainConvUNet",
            "arch_kwargs": arch_kwargs(),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }  # fmt: skip
    base = configuration | (plan or {})
    plans = {
        "transpose_forward": list(transpose),
        "configurations": {"base": base, "3d_fullres": {"inherits_from": "base"}},
    }
    names = {str(i): "MR" for i in range(channels)}
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": names}))
    return folder, plans


def write_nnunet(parent, labels=LABELS, channels=1, plan=None, transpose=(0, 1, 2), **checkpoint):
    """A folder of a small PlainConvUNet; returns it and the network, weights drawn anew."""
    unets = pytest.importorskip(UNETS)
    folder, plans = write_plans(parent, labels, channels, plan, transpose)
    regions = any(isinstance(label, list) for label in labels.values())
    heads = len(labels) - regions - ("ignore" in labels)
    layers = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    network = unets.PlainConvUNet(
        **arch_kwargs(**layers), input_channels=channels, num_classes=heads, deep_supervision=True
    )
    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": torch.optim.SGD(network.parameters(), 0.1, momentum=0.9).state_dict(),
        "grad_scaler_state": None,
        "logging": {"dice_per_class_or_region": [[np.float32(0.5)]], "lrs": [np.float64(0.01)]},
        "_best_ema": np.float64(0.5),
        "current_epoch": 1000,
        "init_args": {"configuration": "3d_fullres", "device": torch.device("cuda"), "plans": plans,
                      "dataset_json": {"labels": labels}, "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    } | checkpoint  # fmt: skip
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    network.decoder.deep_supervision = False
    return folder, network.eval()


def z_scored(fused):
    """As ZScoreNormalization: numpy's mean and population standard deviation of each case."""
    cases = fused.detach().numpy()
    return torch.from_numpy(np.stack([(case - case.mean()) / case.std() for case in cases]))


def test_an_nnunet_gives_the_probability_that_its_network_gives_by_hand(tmp_path, caplog):
    folder, network = write_nnunet(tmp_path)
    fused = volume(8, 16, 12)
    with caplog.at_level(logging.INFO):
        head = read_nnunet(folder)
    assert len(caplog.records) == 1 and "trained at [3.0, 1.0, 1.0] mm" in caplog.text
    by_hand = torch.softmax(network(z_scored(fused)), 1)[:, 1:]
    torch.testing.assert_close(head(fused), by_hand, rtol=0, atol=1e-5)
    assert_frozen_but_differentiable(head, fused)


def test_an_nnunet_pads_each_axis_to_its_own_strides(tmp_path):
    folder, network = write_nnunet(tmp_path)
    head, fused = read_nnunet(folder), volume(7, 9, 13)
    assert head.multiple == (2, 4, 4)
    edged = np.pad(z_scored(fused).numpy(), [(0, 0)] * 2 + [(0, 1), (0, 3), (0, 3)], "edge")
    by_hand = torch.softmax(network(torch.from_numpy(edged)), 1)[:, 1:, :7, :9, :13]
    torch.testing.assert_close(head(fused), by_hand, rtol=0, atol=1e-5)
    assert_frozen_but_differentiable(head, fused)


def test_an_nnunet_sees_its_axes_in_the_order_that_its_plans_transpose_them_to(tmp_path):
    folder, network = write_nnunet(tmp_path, transpose=(2, 0, 1))
    fused = volume(8, 12, 16)
    transposed = torch.from_numpy(z_scored(fused).numpy().transpose(0, 1, 4, 2, 3).copy())
    there = torch.softmax(network(transposed), 1)[:, 1:]
    by_hand = there.detach().numpy().transpose(0, 1, 3, 4, 2)
    np.testing.assert_allclose(read_nnunet(folder)(fused).detach().numpy(), by_hand, atol=1e-5)


def test_an_nnunet_of_regions_takes_the_likeliest_that_is_lesion(tmp_path):
    labels = {"background": 0, "whole tumor": [1, 2, 3], "core": [2, 3], "enhancing tumor": 3}
    folder, network = write_nnunet(tmp_path, labels, channels=2)
    fused = volume(8, 8, 8)
    logits = network(torch.cat([z_scored(fused)] * 2, 1)).sigmoid()
    by_hand = torch.maximum(logits[:, :1], logits[:, 2:])
    torch.testing.assert_close(read_nnunet(folder)(fused), by_hand, rtol=0, atol=1e-5)
    core = read_nnunet(folder, lesion=["core"])
    torch.testing.assert_close(core(fused), logits[:, 1:2], rtol=0, atol=1e-5)


def test_labels_of_an_nnunet_are_channels_by_their_number_and_ignored_ones_are_none(tmp_path):
    labels = {"background": 0, "ventricle": 2, "infarct": 1, "ignore": 3}
    folder, network = write_nnunet(tmp_path, labels)
    fused = volume(8, 8, 8)
    by_hand = torch.softmax(network(z_scored(fused)), 1)[:, 1:2]
    torch.testing.assert_close(read_nnunet(folder)(fused), by_hand, rtol=0, atol=1e-5)


def test_plans_made_before_nnunet_2_4_are_read_as_well(tmp_path):
    old = {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 6,
        "conv_kernel_sizes": [[3, 3, 3]] * 2, "pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage_encoder": [2, 2], "n_conv_per_stage_decoder": [2], "architecture": None,
    }  # fmt: skip
    unets = pytest.importorskip(UNETS)
    network = unets.PlainConvUNet(
        1, 2, [4, 6], nn.Conv3d, 3, [1, 2], 2, 2, 2, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
    folder, _ = write_nnunet(tmp_path, plan=old, network_weights=network.state_dict())
    fused = volume(8, 8, 8)
    by_hand = torch.softmax(network.eval()(z_scored(fused)), 1)[:, 1:]
    torch.testing.assert_close(read_nnunet(folder)(fused), by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"labels": {"background": 0, "spleen": 1}}, "a class of .*lesion.*spleen.*dataset.json"),
        ({"plan": {"normalization_schemes": ["CTNormalization"]}}, "Hounsfield.*plans.json"),
        ({"plan": {"previous_stage": "3d_lowres"}}, "no earlier stage.*3d_lowres.*plans.json"),
        ({"init_args": {"configuration": "2d"}}, "configuration of .*got 2d: .*plans.json"),
        ({"network_weights": {}}, "weights of PlainConvUNet.*checkpoint_final.pth"),
        (
            {"plan": {"architecture": {"network_class_name": "os.system", "arch_kwargs": {}}}},
            "expected a U-Net of .*got 'os.system",
        ),
        ({"init_args": SimpleNamespace()}, "read as tensors.*checkpoint_final.pth"),
    ],
)
def test_an_nnunet_that_makes_no_lesion_head_is_refused_in_one_sentence(
    tmp_path, settings, message
):
    folder, _ = write_nnunet(tmp_path, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        read_nnunet(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_an_nnunet_that_are_missing_or_corrupted_are_named(tmp_path):
    folder, _ = write_nnunet(tmp_path)
    weights = folder / "fold_0" / "checkpoint_final.pth"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"weights that can be read as tensors.*{weights}"):
        read_nnunet(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=rf"fold_0/checkpoint_final.pth.*{folder}"):
        read_nnunet(folder)


def test_an_nnunet_without_the_package_that_builds_it_asks_for_it(tmp_path, monkeypatch):
    folder, _ = write_plans(tmp_path)
    torch.save({"network_weights": {}}, folder / "fold_0" / "checkpoint_final.pth")
    monkeypatch.setitem(sys.modules, UNETS, None)
    with pytest.raises(
        ValueError, match=r"expected dynamic-network-architectures.*clinfuse\[nnunet"
    ):
        read_nnunet(folder)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("is_script", [False, True])
def test_a_head_is_copied_saved_and_run_in_bfloat16_with_the_method_it_is_part_of(
    tmp_path, is_script
):
    network, fused = write_bundle(tmp_path / "b"), volume(8, 8, 8)
    if is_script:
        torch.jit.script(network).save(tmp_path / "b" / "models" / "model.ts")
        (tmp_path / "b" / "models" / "model.pt").unlink()
    head = read_bundle(tmp_path / "b")
    averaged = copy.deepcopy(head)
    for weight in head.parameters():
        weight.zero_()
    torch.save(averaged.state_dict(), tmp_path / "head.pt")
    head.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    by_hand = torch.softmax(network(xyz(0.5 * fused + 0.5)), 1)[:, 1:]
    torch.testing.assert_close(head(fused), xyz(by_hand), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = head(fused)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, xyz(by_hand), rtol=0, atol=0.02)  # 8 bits, a few layers
