"""Models for TotalSegmentator of the right shape and without training, made by its own Python.

    PROGRAM_ENVIRONMENT/bin/python random_totalsegmentator.py WEIGHTS_FOLDER

nnU-Net plans, data set description and checkpoint for what ``--fast --roi_subset`` asks for: tasks
297 and 298 (CT) and 852 (MR), with as many classes as the tool has, each a U-Net of nnU-Net's own
classes with few features. Weights are random but for one path from the image through the first
stage to the logits, which carries the image's z-score in its patch: above a first level it is
called brain, above a second one skull, and never anything else. So the answer looks like the
image, and a swapped or mirrored axis would show.
"""

import json
import sys
from pathlib import Path

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from totalsegmentator.map_to_binary import class_map

DATASETS = {
    "Dataset297_TotalSegmentator_total_3mm_1559subj": ("total", "4000epochs", 3.0),
    "Dataset298_TotalSegmentator_total_6mm_1559subj": ("total", "4000epochs", 6.0),
    "Dataset852_TotalSegMRI_total_3mm_1088subj": ("total_mr", "2000epochs", 3.0),
}
FIELD_MM = 192
"""Side of the patch: one patch holds the whole image, padded with 0, which is made to be air."""
LIFT = 20.0
"""Added before each leaky ReLU, so that negative z-scores pass it too."""
BRAIN_ABOVE, SKULL_ABOVE = 0.5, 3.2
"""Z-scores: in the test's image soft tissue is at 1.8 and bone at 4.8."""
NEVER = -1e3

ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 4,
        "features_per_stage": [4, 8, 8, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 4,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


def main(weights: Path) -> None:
    for dataset, (task, epochs, spacing_mm) in DATASETS.items():
        trainer = f"nnUNetTrainer_{epochs}_NoMirroring"
        folder = weights / dataset / f"{trainer}__nnUNetPlans__3d_fullres"
        (folder / "fold_0").mkdir(parents=True)
        classes = class_map[task]
        plans = plans_of(dataset, spacing_mm)
        (folder / "plans.json").write_text(json.dumps(plans, indent=1))
        (folder / "dataset.json").write_text(json.dumps(description_of(dataset, classes), indent=1))
        checkpoint = {
            "network_weights": random_network(classes).state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": "3d_fullres", "fold": 0},
            "inference_allowed_mirroring_axes": None,
        }
        torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")


def random_network(classes: dict[int, str]) -> torch.nn.Module:
    torch.manual_seed(0)
    network = get_network_from_plans(
        ARCHITECTURE["network_class_name"],
        ARCHITECTURE["arch_kwargs"],
        ARCHITECTURE["_kw_requires_import"],
        1,
        len(classes) + 1,
        deep_supervision=False,
    )
    first, last = network.encoder.stages[0][0], network.decoder.stages[-1]
    with torch.no_grad():
        skip = network.decoder.transpconvs[-1].out_channels
        for blocks, channel in ((first, 0), (last, skip)):
            for block in blocks.convs:
                carry(block, channel)
                channel = 0
        head = network.decoder.seg_layers[-1]
        head.weight[:, 0] = 0
        head.weight[:, 1:] *= 1e-6
        head.bias[:] = NEVER
        head.bias[0] = 0
        for name, factor, zero in (
            ("brain", 1.0, BRAIN_ABOVE),
            ("skull", 2.0, (BRAIN_ABOVE + SKULL_ABOVE) / 2),
        ):
            index = next((i for i, label in classes.items() if label == name), None)
            if index is not None:
                head.weight[index, 0], head.bias[index] = factor, -factor * (LIFT + zero)
    return network.eval()


def carry(block: torch.nn.Module, channel: int) -> None:
    """Make output 0 of a convolution block the z-score of one of its inputs, lifted."""
    block.conv.weight[0] = 0
    block.conv.weight[0, channel, 1, 1, 1] = 1
    block.norm.weight[0], block.norm.bias[0] = 1, LIFT


def description_of(dataset: str, classes: dict[int, str]) -> dict:
    return {
        "name": dataset,
        "channel_names": {"0": "MR" if "MRI" in dataset else "CT"},
        "labels": {"background": 0, **{name: index for index, name in classes.items()}},
        "file_ending": ".nii.gz",
        "numTraining": 0,
    }


def plans_of(dataset: str, spacing_mm: float) -> dict:
    patch = [int(FIELD_MM / spacing_mm)] * 3
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch,
        "median_image_size_in_voxels": patch,
        "spacing": [spacing_mm] * 3,
        "normalization_schemes": [
            "RescaleTo01Normalization" if "MRI" in dataset else "CTNormalization"
        ],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities_kwargs": resampling,
        "batch_dice": False,
        "architecture": ARCHITECTURE,
    }
    hounsfield = {
        "mean": -1000.0,
        "std": 1000.0,
        "percentile_00_5": -1024.0,
        "percentile_99_5": 2000.0,
        "median": 0.0,
        "min": -1024.0,
        "max": 3000.0,
    }
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [spacing_mm] * 3,
        "original_median_shape_after_transp": patch,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": hounsfield},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
