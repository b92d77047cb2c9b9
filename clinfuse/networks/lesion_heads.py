"""Lesion heads that others trained: MONAI bundles and nnU-Net v2 folders as maps from F to p.

Both readers give a ``FrozenLesionHead``: fixed weights, evaluation mode, gradients to the input.
What a folder's own inference does with a file happens to F here, differentiably, but for one step:
resampling. A head sees F on F's grid, whatever voxel size it was trained at (the log names that
size). Nothing in a folder is run as Python: weights are read as tensors, expressions in a
configuration are refused, and networks are classes of MONAI, torch or
dynamic_network_architectures, which fetch nothing. TorchScript is a program of tensor operations;
one that has operations on files is refused.
"""

import copy
import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, cast

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from monai.bundle import ConfigParser
from monai.bundle.config_item import ConfigComponent
from torch import Tensor, nn

from clinfuse.networks.fusion_unet import crop, pad_to_multiple
from clinfuse.networks.pretrained import read_whole
from clinfuse.networks.scale_space import AIR

log = logging.getLogger(__name__)

LESION_WORDS = ("lesion", "tumor", "tumour", "stroke", "infarct", "metasta")
"""A class whose name contains one of these is lesion, unless the caller names classes himself."""

NETWORK_CODE = ("monai.networks.nets", "monai.networks.blocks", "torch.nn")
"""Where the classes of a bundle's network may lie; anything else is somebody's program."""

FETCHING = ("CellSamWrapper", "Transchex")
"""Classes among them that read other files; so do those with ``pretrained``, where it is asked."""

OF_FILES = ("from_file", "save", "load", "open", "write", "read", "import")
"""Words that TorchScript has for files: ``aten::from_file`` and ``aten::save`` write them."""

MOST_NODES = 100_000
"""Of a bundle's configuration: YAML can say more in a few lines than any memory holds."""

INFERENCE = ("inference.json", "inference.yaml", "inference.yml")
DEEPEST_MULTIPLE = 128
UNETS = "dynamic_network_architectures.architectures.unet"
OLD_UNETS = "dynamic_network_architectures.architectures.residual_unet"

Normalise = Callable[[Tensor], Tensor]
Activation = Literal["sigmoid", "softmax"]


class FrozenLesionHead(nn.Module):
    """Lesion probability from a fused volume of any size, by a network that stays as it is.

    The volume is normalised for each input channel, its axes brought into the network's order,
    padded with its last voxels to what the network's downsampling asks, and the answer brought
    back. Exclusive classes (softmax) add up to lesion; of overlapping ones (sigmoid) the most
    probable counts.

    Args:
        network: maps ``b channels *dhw`` to logits ``b classes *dhw``.
        normalise: what makes each input channel from F in [-1, 1].
        lesion: indices of the classes that are lesion.
        activation: softmax where classes exclude one another, sigmoid where they do not.
        multiple: what the sizes must be multiples of, one number an axis of the network.
        axes: which of F's spatial axes each of the network's is; None keeps F's order.
        flips: which of the network's axes run against F's.
    """

    def __init__(
        self,
        network: nn.Module,
        normalise: Sequence[Normalise],
        lesion: Sequence[int],
        activation: Activation,
        multiple: Sequence[int],
        axes: Sequence[int] | None = None,
        flips: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.normalise, self.lesion, self.activation = tuple(normalise), list(lesion), activation
        self.multiple = tuple(multiple)
        self.axes = tuple(range(len(self.multiple)) if axes is None else axes)
        self.flips = tuple(flips)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenLesionHead":
        """Itself in evaluation mode, whatever is asked: statistics and dropout stay out."""
        return super().train(False)

    def forward(self, fused: Float[Tensor, "b 1 *dhw"]) -> Float[Tensor, "b 1 *dhw"]:
        """Probability of lesion at every voxel, in single precision.

        Raises:
            ValueError: the volume has another number of axes than the network.
        """
        if fused.ndim - 2 != len(self.axes):
            raise ValueError(
                f"expected a volume of {len(self.axes)} axes, which the lesion head reads, "
                f"got one of {fused.ndim - 2}"
            )
        with torch.autocast(fused.device.type, enabled=False):
            channels = torch.cat([normalise(fused.float()) for normalise in self.normalise], 1)
        there = [0, 1, *(2 + axis for axis in self.axes)]
        back = [there.index(axis) for axis in range(fused.ndim)]
        flips = [2 + axis for axis in self.flips]
        turned = channels.permute(there).flip(flips)
        logits = _first(self.network(pad_to_multiple(turned, self.multiple)))
        logits = crop(logits, turned.shape[2:])
        return self._probability(logits.float()).flip(flips).permute(back)

    def _probability(self, logits: Tensor) -> Tensor:
        if self.activation == "softmax":
            return logits.softmax(1)[:, self.lesion].sum(1, keepdim=True).clamp(max=1)
        return logits[:, self.lesion].sigmoid().amax(1, keepdim=True)


def read_bundle(
    folder: str | Path, lesion: Sequence[str] = (), activation: Activation | None = None
) -> FrozenLesionHead:
    """The segmentation network of a MONAI bundle as a lesion head.

    MONAI Bundle Specification. ``models/model.pt`` is read into the ``network_def`` of
    ``configs/inference``; a bundle without it, or whose definition is Python, needs
    ``models/model.ts``. F is mapped linearly to the metadata's ``value_range``; where that is
    empty and the preprocessing is ``NormalizeIntensityd``, F is z-scored; else it enters as it is.
    Axes follow the preprocessing's ``Orientationd``, RAS where there is none.

    Args:
        folder: the bundle's.
        lesion: names of the classes that are lesion; empty looks for ``LESION_WORDS``.
        activation: of the logits; None asks the postprocessing's ``Activationsd``, and without
            one takes softmax for classes with a background and sigmoid for those without.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or describes no network that F can be given to.
    """
    with _understood("a MONAI bundle", Path(folder)):
        return _bundle(Path(folder), lesion, activation)


def _bundle(folder: Path, lesion: Sequence[str], activation: Activation | None) -> FrozenLesionHead:
    path = folder / "configs" / "metadata.json"
    image, prediction = _image_and_prediction(_json(path), path)
    config = _inference(folder)
    names = {int(index): str(name) for index, name in prediction["channel_def"].items()}
    chosen = _lesion_classes(names, lesion, path)
    activation = activation or _activation_of(config, names)
    channels, dims = int(image["num_channels"]), len(image["spatial_shape"])
    normalise, scaling = _bundle_normalisation(image, config)
    network = _bundle_network(folder, config)
    multiple = _multiple_of(network, channels, len(names), image["spatial_shape"], folder)
    axes, flips = _orientation(config) if dims == 3 else ((0, 1), ())
    log.info(
        "lesion head %s: MONAI bundle, F %s in %d channel(s), %s of %s; trained at %s mm "
        "along its axes, applied on F's own grid",
        folder, scaling, channels, activation, [names[i] for i in chosen], _pixdim(config),
    )  # fmt: skip
    return FrozenLesionHead(
        network, [normalise] * channels, chosen, activation, [multiple] * dims, axes, flips
    )


def read_nnunet(
    folder: str | Path, lesion: Sequence[str] = (), configuration: str | None = None
) -> FrozenLesionHead:
    """The network of a trained nnU-Net v2 folder (``TRAINER__PLANS__CONFIGURATION``) as a head.

    Isensee et al. (2021). One fold's ``checkpoint_final.pth``, the first there is, without
    mirroring or tiling. Each channel is F, normalised by the plans' scheme for it; a scheme within
    a mask of nonzero voxels takes those of F that are not air.

    Args:
        folder: with ``plans.json``, ``dataset.json`` and ``fold_0``.
        lesion: names of the labels that are lesion; empty looks for ``LESION_WORDS``.
        configuration: of the plans; None takes the checkpoint's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read, or describes no U-Net that F can be given to, or
            dynamic-network-architectures, which builds it, is not installed.
    """
    with _understood("an nnU-Net folder", Path(folder)):
        return _nnunet(Path(folder), lesion, configuration)


def _nnunet(folder: Path, lesion: Sequence[str], configuration: str | None) -> FrozenLesionHead:
    path = folder / "plans.json"
    plans, dataset = _json(path), _json(folder / "dataset.json")
    weights = _first_fold(folder)
    checkpoint = _read_weights(weights)
    named = configuration or checkpoint.get("init_args", {}).get("configuration")
    plan = _plan(plans, str(named or folder.resolve().name.split("__")[-1]), path)
    names, activation = _nnunet_classes(dataset, folder / "dataset.json")
    chosen = _lesion_classes(names, lesion, folder / "dataset.json")
    normalise = _nnunet_normalisation(plan, path)
    channels = len(dataset.get("channel_names") or dataset.get("modality") or ())
    if channels != len(normalise) or plan.get("previous_stage"):
        raise ValueError(
            f"expected as many channels as normalisation schemes and no earlier stage, got "
            f"{channels}, {len(normalise)} and {plan.get('previous_stage')}: {path}"
        )
    architecture = plan.get("architecture") or _architecture_of_old_plans(plan, path)
    network = _nnunet_network(architecture, channels, len(names), path)
    _load(network, checkpoint.get("network_weights"), weights)
    dims = len(plan["patch_size"])
    strides = [np.broadcast_to(stride, dims) for stride in architecture["arch_kwargs"]["strides"]]
    log.info(
        "lesion head %s: nnU-Net %s, F in %d channel(s), %s of %s; trained at %s mm along "
        "its axes, applied on F's own grid",
        weights, plan["name"], channels, activation, [names[i] for i in chosen], plan["spacing"],
    )  # fmt: skip
    axes = plans.get("transpose_forward") if dims == 3 else None
    multiple = np.prod(strides, axis=0).tolist()
    return FrozenLesionHead(network, normalise, chosen, activation, multiple, axes)


@contextmanager
def _understood(kind: str, folder: Path) -> Iterator[None]:
    """Reading files of others, which may hold anything where we look for a number or a name.

    Raises:
        ValueError: that something else was there, naming the folder.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        said = str(error)
        if isinstance(error, ValueError) and (str(folder) in said or "pip install" in said):
            raise
        reason = " ".join(f"{type(error).__name__}: {said}".split())[:200]
        raise ValueError(f"expected {kind}, got something else ({reason}): {folder}") from error


def _in_range(fused: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * (fused + 1) / 2


def _z_scored(fused: Tensor, inside_only: bool) -> Tensor:
    """Zero mean and unit variance in every case; inside only, air is neither counted nor changed
    to anything but 0."""
    inside = (fused > AIR if inside_only else torch.ones_like(fused, dtype=torch.bool)).to(fused)
    count = reduce(inside, "b 1 ... -> b", "sum").clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        total = reduce(values * inside, "b 1 ... -> b", "sum") / count
        return total.view(-1, *[1] * (fused.ndim - 1))

    centred = fused - mean(fused)
    return inside * centred / mean(centred.square()).clamp(min=1e-16).sqrt()


def _in_unit_range(fused: Tensor) -> Tensor:
    flat = rearrange(fused, "b 1 ... -> b (...)")
    low, high = (t.view(-1, *[1] * (fused.ndim - 1)) for t in (flat.amin(1), flat.amax(1)))
    return (fused - low) / (high - low).clamp(min=1e-8)


def _unchanged(fused: Tensor) -> Tensor:
    return fused


def _first(output: Any) -> Tensor:
    """The full-resolution prediction, of networks that give several."""
    return cast(Tensor, output[0] if isinstance(output, list | tuple) else output)


def _lesion_classes(names: Mapping[int, str], lesion: Sequence[str], path: Path) -> list[int]:
    def is_lesion(name: str) -> bool:
        return "background" not in name and any(word in name for word in LESION_WORDS)

    found = lesion or [name for name in names.values() if is_lesion(name.lower())]
    if not found or set(found) - set(names.values()):
        wanted = list(lesion) or [f"*{word}*" for word in LESION_WORDS]
        raise ValueError(f"expected a class of {wanted}, got {list(names.values())}: {path}")
    return [index for index, name in names.items() if name in found]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"expected a lesion head's {path.name}, found none at {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got something else ({error}): {path}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got a {type(content).__name__}: {path}")
    return content


def _read_weights(path: Path) -> dict[str, Any]:
    """A checkpoint of tensors and plain values; numpy's numbers, which nnU-Net logs, count."""
    scalar = np.float64(0).__reduce__()[0]
    numpy_types: list[Any] = [
        np.dtype, np.ndarray, scalar, (scalar, "numpy.core.multiarray.scalar"),
        *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
    ]  # fmt: skip
    if not path.is_file():
        raise FileNotFoundError(f"expected a lesion head's weights, found none at {path}")
    try:
        with torch.serialization.safe_globals(numpy_types):
            content = read_whole(path)
    except Exception as error:
        raise ValueError(
            f"expected weights that can be read as tensors, got {type(error).__name__}: {path}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of weights, got {type(content).__name__}: {path}")
    return content


def _load(network: nn.Module, state: Any, path: Path) -> None:
    kind = type(network).__name__
    if not isinstance(state, Mapping):
        raise ValueError(f"expected the weights of {kind}, got {type(state).__name__}: {path}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"expected the weights of {kind}, got others ({reason}): {path}"
        ) from error


def _image_and_prediction(
    metadata: Mapping[str, Any], path: Path
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The formats of a bundle's one input and of its prediction, complete."""
    data_format = metadata.get("network_data_format", {})
    inputs, outputs = data_format.get("inputs", {}), data_format.get("outputs", {})
    if len(inputs) != 1 or "pred" not in outputs:
        raise ValueError(
            f"expected a network from one image to 'pred', got one from {list(inputs)} to "
            f"{list(outputs)}: {path}"
        )
    (image,), prediction = inputs.values(), outputs["pred"]
    missing = {"num_channels", "spatial_shape"} - set(image) or {"channel_def"} - set(prediction)
    if missing:
        raise ValueError(f"expected {sorted(missing)} in network_data_format, got none: {path}")
    if image.get("type", "image") != "image" or image.get("format") in ("hounsfield", "latent"):
        raise ValueError(
            f"expected a network that reads an image like F, got one that reads "
            f"{image.get('type', 'image')} of {image.get('format')}: {path}"
        )
    return image, prediction


def _inference(folder: Path) -> dict[str, Any]:
    """A bundle's inference configuration as written, nothing in it evaluated; empty if none."""
    paths = (folder / "configs" / name for name in INFERENCE)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    try:
        config = dict(ConfigParser.load_config_file(path))
    except Exception as error:
        raise ValueError(
            f"expected a readable configuration, got {type(error).__name__}: {path}"
        ) from error
    waiting: list[Any] = [config]
    seen = 0
    while waiting:
        node, seen = waiting.pop(), seen + 1
        if isinstance(node, Mapping | list):
            waiting += node.values() if isinstance(node, Mapping) else node
        if seen > MOST_NODES:
            raise ValueError(f"expected at most {MOST_NODES} values, got more: {path}")
    return config


def _components(config: Any, kind: str | None = None) -> Iterator[Mapping[str, Any]]:
    """What a configuration describes by ``_target_``: all, or ``kind`` and its dictionary form."""
    if isinstance(config, Mapping):
        name = str(config.get("_target_")).rsplit(".", 1)[-1]
        if "_target_" in config and (kind is None or name in (kind, f"{kind}d")):
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from _components(part, kind)


def _activation_of(config: Mapping[str, Any], names: Mapping[int, str]) -> Activation:
    if len(names) == 1:
        return "sigmoid"
    for component in _components(config.get("postprocessing"), "Activations"):
        for activation in ("sigmoid", "softmax"):
            if component.get(activation) in (True, [True]):
                return activation
    return "softmax" if any("background" in name.lower() for name in names.values()) else "sigmoid"


def _bundle_normalisation(
    image: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[Normalise, str]:
    """How a bundle wants its input, as a function and in words."""
    limits = image.get("value_range") or []
    if len(limits) == 2 and all(isinstance(limit, int | float) for limit in limits):
        low, high = map(float, limits)
        if low < high:
            return partial(_in_range, low=low, high=high), f"mapped to [{low:g}, {high:g}]"
    for component in _components(config.get("preprocessing"), "NormalizeIntensity"):
        if not {"subtrahend", "divisor"} & set(component):
            inside_only = component.get("nonzero") is True
            place = " without air" if inside_only else ""
            return partial(_z_scored, inside_only=inside_only), f"z-scored{place}"
    return _unchanged, "as it is, in [-1, 1],"


def _orientation(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """F's axis for each of the network's, and the network's that run the other way; F is SAR."""
    found = (str(c.get("axcodes")) for c in _components(config.get("preprocessing"), "Orientation"))
    codes = next((code for code in found if re.fullmatch("[RLAPSI]{3}", code)), "RAS")
    axes = tuple({"S": 0, "I": 0, "A": 1, "P": 1, "R": 2, "L": 2}[code] for code in codes)
    return axes, tuple(place for place, code in enumerate(codes) if code in "IPL")


def _pixdim(config: Mapping[str, Any]) -> Any:
    found = (c.get("pixdim") for c in _components(config.get("preprocessing"), "Spacing"))
    return next(found, "unknown")


def _bundle_network(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    weights, script = folder / "models" / "model.pt", folder / "models" / "model.ts"
    problem = _not_plain(config)
    if script.is_file() and (problem or not weights.is_file()):
        return _read_script(script)
    if problem:
        raise ValueError(
            f"expected a network_def of plain values in configs/inference, or models/model.ts, "
            f"got {problem}: {folder}"
        )
    state = _read_weights(weights)
    try:
        network = ConfigParser(copy.deepcopy(_reached(config))).get_parsed_content("network_def")
    except Exception as error:
        raise ValueError(
            f"expected a network_def that MONAI can build, got {type(error).__name__}: {folder}"
        ) from error
    wrapped = next((state[k] for k in ("model", "state_dict", "network") if k in state), state)
    _load(network, wrapped if isinstance(wrapped, Mapping) else state, weights)
    return cast(nn.Module, network)


def _read_script(path: Path) -> nn.Module:
    """A network as TorchScript, its code read before it is loaded, for loading may run some."""
    try:
        records = torch._C.PyTorchFileReader(str(path))
        names = records.get_all_records()
        code = [records.get_record(name) for name in names if name.endswith(".py")]
        is_plain = "constants.pkl" in names  # older forms have their code elsewhere
    except Exception as error:
        raise ValueError(f"expected TorchScript, got {type(error).__name__}: {path}") from error
    words = {word for text in code for word in re.findall(rb"\w+", text)}
    if found := sorted(word for word in OF_FILES if word.encode() in words):
        raise ValueError(f"expected TorchScript of tensors alone, got {', '.join(found)}: {path}")
    if not is_plain:
        raise ValueError(f"expected TorchScript of today's form, got another: {path}")
    try:
        return cast(nn.Module, torch.jit.load(str(path), map_location="cpu"))
    except Exception as error:
        raise ValueError(f"expected TorchScript, got {type(error).__name__}: {path}") from error


def _reached(config: Mapping[str, Any]) -> dict[str, Any]:
    """The top-level items that ``network_def`` is made of, by way of ``@`` references."""
    reached: dict[str, Any] = {}
    waiting = ["network_def"]
    while waiting:
        name = waiting.pop()
        if name in config and name not in reached:
            reached[name] = config[name]
            texts = [text for text in _leaves(config[name]) if isinstance(text, str)]
            waiting += [re.split("::|#", t[1:])[0] for t in texts if t.startswith("@")]
    return reached


def _not_plain(config: Mapping[str, Any]) -> str | None:
    """What in the definition of a network is a program rather than a description, if anything."""
    reached = _reached(config)
    if not isinstance(reached.get("network_def"), Mapping):
        return "none" if "network_def" not in reached else str(reached["network_def"])
    for text in _leaves(list(reached.values())):
        if isinstance(text, str) and text[:1] in ("$", "%"):
            return text
    for component in _components(list(reached.values())):
        if problem := _not_a_network(component):
            return problem
    return None


def _not_a_network(component: Mapping[str, Any]) -> str | None:
    """What something to be built is, unless a layer or network of MONAI's or torch's own."""
    target = str(ConfigComponent(component).resolve_module_name())
    if others := [key for key in component if key[:1] == "_" and key not in ("_target_", "_desc_")]:
        return f"{target} with {others[0]}"
    kind = _class_of(target)
    if kind is None or kind.__name__ in FETCHING:
        return target
    for name, parameter in inspect.signature(kind).parameters.items():
        if name.startswith("pretrained") and component.get(name, parameter.default):
            return f"{target} with {name} weights, which would be fetched"
    return None


def _class_of(target: str) -> type[nn.Module] | None:
    """The module of that name, where it is defined in ``NETWORK_CODE``: no name leads out of it."""
    place, _, name = target.rpartition(".")
    if not any(place == code or place.startswith(f"{code}.") for code in NETWORK_CODE):
        return None
    try:
        kind = getattr(importlib.import_module(place), name, None)
    except ImportError:
        return None
    is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
    return kind if is_module and f"{kind.__module__}.".startswith(("monai.", "torch.")) else None


def _leaves(config: Any) -> Iterator[Any]:
    if isinstance(config, Mapping | list):
        for part in config.values() if isinstance(config, Mapping) else config:
            yield from _leaves(part)
    else:
        yield config


def _multiple_of(
    network: nn.Module, channels: int, classes: int, shape: Sequence[int | str], folder: Path
) -> int:
    """What a bundle's network wants sizes to be multiples of.

    The metadata's word ("16*n") is taken where it holds, else doubled until it does: the network
    is tried on tensors without data, at sizes that are odd multiples.
    """
    declared = [re.fullmatch(r"\s*(\d+)\s*\*\s*n\s*", str(size)) for size in shape]
    first = max((int(match[1]) for match in declared if match), default=1)
    if isinstance(network, torch.jit.ScriptModule):
        return first if any(declared) else 32
    trial = copy.deepcopy(network).to("meta").eval()
    multiple, sizes = first, [0]
    shape_out: list[int] | str = ""
    while multiple <= max(first, DEEPEST_MULTIPLE):
        sizes = [multiple * factor for factor in (1, 3, 5)[: len(shape)]]
        volume = torch.empty(1, channels, *sizes, device="meta")
        try:
            with torch.no_grad():
                shape_out = list(_first(trial(volume)).shape)
        except Exception as error:
            shape_out = str(error).splitlines()[0] if str(error) else type(error).__name__
        if shape_out == [1, classes, *sizes]:
            return multiple
        multiple *= 2
    raise ValueError(
        f"expected a network from {channels} channel(s) to {classes} classes that keeps the size "
        f"of its input, got {shape_out} for {[1, channels, *sizes]}: {folder}"
    )


def _first_fold(folder: Path) -> Path:
    found = sorted(folder.glob("fold_*/checkpoint_final.pth"))
    if not found:
        raise FileNotFoundError(
            f"expected an nnU-Net's fold_0/checkpoint_final.pth, found none in {folder}"
        )
    return found[0]


def _plan(plans: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """A configuration of the plans, with what it inherits."""
    known = plans.get("configurations", {})
    chain: list[str] = []
    parent: str | None = name
    while parent is not None and parent not in chain:
        if parent not in known:
            raise ValueError(f"expected a configuration of {sorted(known)}, got {parent}: {path}")
        chain.append(parent)
        parent = known[parent].get("inherits_from")
    plan: dict[str, Any] = {"name": name}
    for ancestor in reversed(chain):
        plan |= known[ancestor]
    missing = {"patch_size", "spacing", "normalization_schemes"} - set(plan)
    if missing:
        raise ValueError(f"expected {sorted(missing)} in configuration {name}, got none: {path}")
    return plan


def _nnunet_classes(dataset: Mapping[str, Any], path: Path) -> tuple[dict[int, str], Activation]:
    """What each output channel stands for: labels exclude one another, regions may overlap.

    Regions are those labels that are lists; a data set with one has a channel for each of its
    foreground entries, in their order, and one without a channel for each label's number.
    """
    labels = {name: value for name, value in dataset.get("labels", {}).items() if name != "ignore"}
    if labels.get("background") != 0:
        raise ValueError(f"expected labels with 'background': 0, got {labels}: {path}")
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        regions = [name for name, value in labels.items() if value not in (0, [0])]
        return dict(enumerate(regions)), "sigmoid"
    numbers = {name: int(np.ravel(value)[0]) for name, value in labels.items()}
    ordered = sorted(numbers, key=lambda name: numbers[name])
    return dict(enumerate(ordered)), "softmax"


def _nnunet_normalisation(plan: Mapping[str, Any], path: Path) -> list[Normalise]:
    schemes = list(plan["normalization_schemes"])
    masked = list(plan.get("use_mask_for_norm") or [False] * len(schemes))
    known: dict[str, Callable[[bool], Normalise]] = {
        "ZScoreNormalization": lambda inside_only: partial(_z_scored, inside_only=inside_only),
        "RescaleTo01Normalization": lambda _: _in_unit_range,
        "NoNormalization": lambda _: _unchanged,
    }
    unknown = sorted(set(schemes) - set(known))
    if unknown:
        raise ValueError(
            f"expected normalisation that F, which has no Hounsfield units, can be given: one of "
            f"{sorted(known)}, got {unknown}: {path}"
        )
    return [known[name](bool(mask)) for name, mask in zip(schemes, masked, strict=True)]


def _architecture_of_old_plans(plan: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The ``architecture`` of plans made before nnU-Net 2.4, which spread it over other keys."""
    kind = plan.get("UNet_class_name")
    if kind not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise ValueError(f"expected an architecture in {plan['name']}, got {kind}: {path}")
    dims, stages = len(plan["patch_size"]), len(plan["n_conv_per_stage_encoder"])
    widest, first = plan["unet_max_num_features"], plan["UNet_base_num_features"]
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    return {
        "network_class_name": f"{UNETS}.{kind}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(first * 2**stage, widest) for stage in range(stages)],
            "conv_op": f"torch.nn.Conv{dims}d",
            "kernel_sizes": plan["conv_kernel_sizes"],
            "strides": plan["pool_op_kernel_sizes"],
            blocks: plan["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": plan["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _nnunet_network(
    architecture: Mapping[str, Any], channels: int, classes: int, path: Path
) -> nn.Module:
    missing = {"network_class_name", "arch_kwargs"} - set(architecture)
    if missing:
        raise ValueError(f"expected {sorted(missing)} in the architecture, got none: {path}")
    settings = dict(architecture["arch_kwargs"])
    kind = str(architecture["network_class_name"]).rsplit(".", 1)[-1]
    if architecture["network_class_name"] not in (f"{UNETS}.{kind}", f"{OLD_UNETS}.{kind}"):
        raise ValueError(
            f"expected a U-Net of {UNETS}, got {str(architecture['network_class_name'])[:100]!r}: "
            f"{path}"
        )
    try:
        unets = importlib.import_module(UNETS)
    except ImportError as error:
        raise ValueError(
            f"expected dynamic-network-architectures, which an nnU-Net lesion head is built of, "
            f"got {error}: pip install 'clinfuse[nnunet]'"
        ) from error
    try:
        for name in architecture.get("_kw_requires_import", ()):
            if settings.get(name) is not None:
                layer = str(settings[name])
                settings[name] = _class_of(layer) if layer.startswith("torch.nn.") else None
                if settings[name] is None:
                    raise ValueError(f"expected a layer of torch.nn, got {layer}")
        settings |= {"input_channels": channels, "num_classes": classes, "deep_supervision": False}
        build = getattr(unets, kind, None)
        if not isinstance(build, type) or not issubclass(build, nn.Module):
            raise ValueError(f"expected a network, got {kind[:100]!r}")
        return build(**settings)
    except Exception as error:
        said = shorten(str(error), 200, placeholder=" …")
        raise ValueError(f"expected an architecture that builds, got {said}: {path}") from error
