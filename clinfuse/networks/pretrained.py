"""Weights that come as a file: read without running anything in it, checked before they load."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SAFETENSORS = ".safetensors"

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
"""Of weights that a network can start from."""

NAMED = 3
"""How many weights a message names; it counts the rest."""


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file of weights by their names.

    A state dict as torch saves it, by itself or as ``state_dict`` among other things, as in a
    checkpoint of Lightning's; or safetensors, by its ending. The prefix ``module.``, which parallel
    training leaves, is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of dense, real and finite tensors, or one that would have to be run
            to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, found no file at {path}")
    is_safe = path.suffix == SAFETENSORS
    content: Any = read_safetensors(path)[0] if is_safe else _unpickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"expected tensors by name, got {type(content).__name__}: {path}")
    if not all(isinstance(weight, Tensor) for weight in content.values()):
        others = [str(name) for name, weight in content.items() if not isinstance(weight, Tensor)]
        raise ValueError(f"expected tensors by name, got {_listed(others)} among them: {path}")
    if others := [str(name) for name, weight in content.items() if not _is_plain(weight)]:
        raise ValueError(f"expected dense real tensors, got others in {_listed(others)}: {path}")
    if others := [str(name) for name, weight in content.items() if not weight.isfinite().all()]:
        raise ValueError(f"expected finite weights, got NaN or inf in {_listed(others)}: {path}")
    return {str(name).removeprefix("module."): weight for name, weight in content.items()}


def read_whole(path: Path) -> Any:
    """What ``torch.save`` has written, read without running anything in it.

    Every record is compared with its CRC-32, of which torch itself takes no notice.

    Raises:
        ValueError: a record was changed after it was written, or they unpack to more than the file.
        Exception: of any kind, where torch cannot read it.
    """
    if zipfile.is_zipfile(path):  # what is not is torch's to refuse, or of its first format
        with zipfile.ZipFile(path) as records:
            size = sum(record.file_size for record in records.infolist())
            if size > path.stat().st_size:  # torch packs nothing
                raise ValueError(f"its records unpack to {size} bytes")
            damaged = records.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is not what was written")
    with warnings.catch_warnings(action="ignore"):  # of protocols it then cannot read
        return torch.load(path, map_location="cpu", weights_only=True)


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by their names, and the texts that came with them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, found no file at {path}")
    try:
        with safe_open(path, framework="pt") as content:
            names = content.keys()
            tensors = {name: content.get_tensor(name) for name in names}
            return tensors, dict(content.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"expected safetensors, got something else or a damaged file "
            f"({type(error).__name__}): {path}"
        ) from error


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], expected: str, path: Path | str
) -> None:
    """Copy weights into a module that has all of them and no others, of the same shapes.

    How many batches a batch norm has seen may be missing: old files do not have it.

    Args:
        expected: what the weights should be of, for the message.
        path: where they are from, for the message.

    Raises:
        ValueError: weights of another architecture; the module is left as it was.
    """
    ours = module.state_dict()
    needed = [name for name in ours if not name.endswith("num_batches_tracked")]
    missing = [name for name in needed if name not in weights]
    unexpected = [name for name in weights if name not in ours]
    misshapen = [
        f"{name} {tuple(weights[name].shape)} for {tuple(ours[name].shape)}"
        for name in ours
        if name in weights and weights[name].shape != ours[name].shape
    ]
    problems = [
        f"{word} {_listed(names)}"
        for word, names in (("no", missing), ("too many:", unexpected), ("shapes:", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"expected weights of {expected}, got {'; '.join(problems)}: {path}")
    module.load_state_dict({**ours, **weights})


def _unpickled(path: Path) -> Any:
    """What torch saved, read without running anything in it."""
    try:
        return read_whole(path)
    except Exception as error:  # unpickling may fail in any way
        raise ValueError(
            f"expected readable weights, got {_unreadable(path, error)}: {path}"
        ) from error


def _unreadable(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "an empty file"
    if "GLOBAL" in str(error):  # as torch names what it does not look up
        return "pickled objects, which could run anything and are not loaded"
    return f"something else or a damaged file ({type(error).__name__})"


def _is_plain(weight: Tensor) -> bool:
    is_strided = weight.layout == torch.strided and weight.device.type == "cpu"
    return is_strided and weight.dtype in DTYPES


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
