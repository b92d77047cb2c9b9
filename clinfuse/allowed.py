"""What the configuration of a run may name: a run folder may come from a stranger.

``instantiate`` calls whatever a configuration names, so one that is read back is checked before
anything in it is imported. The line is drawn here: what a user types, and ``conf`` on his machine,
is his and free; a run's folder may name only what ``conf`` names for training, places what has an
effect only where ``conf`` places it, and asks nothing of the machine.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from omegaconf.errors import GrammarParseError
from omegaconf.grammar_parser import parse

TRUSTED = "CLINFUSE_TRUSTED"
"""Environment variable with targets that the user vouches for: ``my.module.Mine,my.other``."""

GROUPS = (
    *("ablation", "anchor", "callbacks", "data", "experiment", "logger", "method", "network"),
    *("objective", "optimizer", "phantoms", "sampler", "scale", "schedule", "trainer", "weights"),
)
"""The folders of ``conf`` that a training is composed of; others prepare, or run programs."""

OF_TRAINING = ("trainer", "callbacks", "logger")
"""What only ``train`` builds; these parts write files, and some send them."""

TRAINING_CODE = ("lightning.", "clinfuse.callbacks.")
"""Where those parts come from."""

PLACED: Mapping[str, str] = {
    "clinfuse.data.phantoms.write_cohort": "prepare",
    "clinfuse.data.phantom_slices.write_slices": "prepare",
    "clinfuse.preparation.download.fetch": "weights",
}
"""Functions with an effect: the one setting that may hold them, and not yet called."""

GET_METHOD = "hydra.utils.get_method"
RESOLVERS = ("precision", "deterministic", "fingerprint", "swept", "oc.select", "hydra")
OF_HYDRA = ("runtime.output_dir", "runtime.choices.method")
"""What a run's configuration may ask of Hydra: where it is, and what it is called."""

WRITTEN = ("folder", "dirpath", "default_root_dir")
"""What the settings are called that say where a training writes."""

OWN_FOLDER = "${hydra:runtime.output_dir}"
"""Where it may without being asked: into the run's own folder."""

OF_BEFORE = frozenset({"lightning.pytorch.callbacks.ModelCheckpoint"})
"""What ``conf`` named once, and runs of that time do."""

LARGEST, DEEPEST = 1_000_000, 40
"""Characters, and levels of nesting, of a run's configuration: many times what ours have."""


class Named(NamedTuple):
    """What ``conf`` names.

    Attributes:
        targets: to be called.
        methods: functions to be looked up and handed on.
        fetched: files to be fetched, as configured.
    """

    targets: frozenset[str]
    methods: frozenset[str]
    fetched: tuple[Mapping[str, Any], ...]


def check_text(text: str, path: Path) -> None:
    """Refuse YAML that is more than plain values: Python's objects, references that multiply.

    Raises:
        ValueError: such a text, one that is no YAML, too long or too deep.
    """
    if len(text) > LARGEST:
        raise ValueError(
            f"expected a run's configuration of at most {LARGEST} characters, got {len(text)}: "
            f"{path}"
        )
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"expected plain values, got the reference *{event.anchor}: {path}"
                )
            if getattr(event, "tag", None) is not None:
                raise ValueError(f"expected plain values, got an object {event.tag}: {path}")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"expected at most {DEEPEST} levels, got more: {path}")
    except yaml.YAMLError as error:
        raise ValueError(
            f"expected a run's configuration, got {type(error).__name__}: {path}"
        ) from error


def check_named(content: Any, path: Path, conf: Path) -> None:
    """Refuse a configuration that names what ``conf`` does not, in one sentence with the name.

    Args:
        content: as read, nothing in it resolved.
        path: of the file, for messages.
        conf: the folder of what may be named.

    Raises:
        ValueError: another target, a known one where it has no place, or as ``check_references``.
    """
    check_references(content, path)
    named = named_by(conf)
    for place, node in _nodes(content):
        is_called = isinstance(node, Mapping) and "_target_" in node
        if is_called and (problem := _not_allowed(node, place, named)) is not None:
            raise ValueError(
                f"expected a run's configuration that names what {conf} does, got {problem[:200]} "
                f"at {_where(place)} ({TRUSTED}=NAME,... in the environment lets a class of your "
                f"own pass): {path}"
            )


def check_references(content: Any, path: Path) -> None:
    """Refuse interpolations that ask for more than the configuration itself has.

    Raises:
        ValueError: one of the environment, of another resolver, or that cannot be read.
    """
    for place, node in _nodes(content):
        if isinstance(node, str) and (problem := _asks_for(node)) is not None:
            raise ValueError(
                f"expected values, or references to other settings, got {problem[:200]} at "
                f"{_where(place)}: {path}"
            )


def check_places(content: Any, path: Path, asked: Sequence[str] = ()) -> None:
    """Refuse a training that would write elsewhere than into its own folder.

    Args:
        content: as read, nothing in it resolved.
        path: of the file, for messages.
        asked: settings that whoever goes on with it has named himself.

    Raises:
        ValueError: a callback or trainer of another folder.
    """
    for place, node in _nodes({part: content.get(part) for part in ("trainer", "callbacks")}):
        if not isinstance(node, Mapping) or _is_trusted(node.get("_target_")):
            continue
        for name in (name for name in WRITTEN if name in node and not _is_own(node[name])):
            where = _where((*place, name))
            if not any(f"{where}.".startswith(f"{own}.") for own in asked):
                raise ValueError(
                    f"expected a run that goes on in its own folder, got one that writes into "
                    f"{str(node[name])[:200]!r} ({where}=FOLDER on the command line says another): "
                    f"{path}"
                )


@lru_cache(maxsize=4)
def named_by(conf: Path) -> Named:
    """What the options of a training name in a folder of configurations."""
    files = [conf / "train.yaml", *(f for group in GROUPS for f in (conf / group).glob("*.yaml"))]
    targets: set[str] = set()
    methods: set[str] = set()
    fetched: list[Mapping[str, Any]] = []
    for file in files:
        text = file.read_text("utf-8") if file.is_file() else ""
        if "_target_" not in text:
            continue
        content = yaml.safe_load(text)
        content.pop("hydra", None)
        for _, node in _nodes(content):
            if isinstance(node, Mapping) and "_target_" in node:
                if node["_target_"] == GET_METHOD:
                    methods.add(str(node["path"]))
                targets.add(str(node["_target_"]))
                fetched += [node] if PLACED.get(node["_target_"]) == "weights" else []
    return Named(frozenset(targets) | OF_BEFORE, frozenset(methods), tuple(fetched))


def _nodes(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in a configuration, with where it is."""
    yield place, content
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _nodes(value, (*place, key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _nodes(value, (*place, index))


def _where(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))[:200] or "the top"


def _not_allowed(node: Mapping[Any, Any], place: tuple[Any, ...], named: Named) -> str | None:
    """What is wrong with something to be called, if anything."""
    target = node["_target_"]
    if not isinstance(target, str):
        return f"a {type(target).__name__} to call"
    if _is_trusted(target):
        return None
    if target not in named.targets:
        return target
    if target == GET_METHOD and (
        set(node) != {"_target_", "path"} or str(node["path"]) not in named.methods
    ):
        return f"{target} of {node.get('path')}"
    if target.startswith(TRAINING_CODE) and place[:1] not in [(part,) for part in OF_TRAINING]:
        return f"{target}, which belongs to {', '.join(OF_TRAINING)},"
    if target in PLACED and (place[-1:] != (PLACED[target],) or node.get("_partial_") is not True):
        return f"{target}, which is called for {PLACED[target]} alone,"
    if PLACED.get(target) == "weights" and node not in named.fetched:
        return f"{target} of {node.get('url')}"
    return None


def _is_trusted(target: Any) -> bool:
    return bool(target) and target in os.environ.get(TRUSTED, "").split(",")


def _is_own(folder: Any) -> bool:
    if folder is None:
        return True
    if not isinstance(folder, str) or not folder.startswith(OWN_FOLDER):
        return False
    below = folder.removeprefix(OWN_FOLDER)
    return below[:1] in ("", "/") and "$" not in below and ".." not in below.split("/")


@lru_cache(maxsize=1024)
def _asks_for(text: str) -> str | None:
    """What a text asks for besides other settings, if anything.

    A dollar that starts no interpolation counts: of two texts that are joined it could make one.
    """
    if "$" not in text:
        return None
    if len(text) > 1000:
        return f"an interpolation of {len(text)} characters"
    try:
        return next((found for found in map(_problem, _parts(parse(text))) if found), None)
    except (GrammarParseError, RecursionError):
        return f"{text!r}, which cannot be read,"


def _parts(part: Any) -> Iterator[Any]:
    yield part
    for child in getattr(part, "children", None) or []:
        yield from _parts(child)


def _problem(part: Any) -> str | None:
    kind, text = type(part).__name__, part.getText()
    if kind == "TerminalNodeImpl" and "$" in text and not text.startswith("${"):
        return f"the text {text!r}"
    if kind != "InterpolationResolverContext":
        return None
    name, asked = part.resolverName().getText(), part.sequence()
    if name not in RESOLVERS or (
        name == "hydra" and (asked is None or asked.getText() not in OF_HYDRA)
    ):
        return text
    return None
