"""What conf/ has to choose from, and what its comments say; read, not composed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

GROUPS = {
    "algo": "algorithms",
    "data": "data sets",
    "backbone": "backbones",
    "optim": "outer optimizers",
    "experiment": "experiments",
    "paper": "tables of papers",
    "logger": "experiment trackers",
}
"""The groups that are listed, and what they hold."""

_PACKAGE = re.compile(r"# @package (\S+)")
_NOT_KEYS = ("_target_", "_partial_", "defaults")


@dataclass(frozen=True)
class Key:
    """A key of a choice, as its file explains it.

    Attributes:
        name: Dotted, as typed on the command line.
        default: Its value, as YAML.
        comment: Meaning, unit and source.
    """

    name: str
    default: str
    comment: str


def conf_dir() -> Path:
    """The folder of YAML files: the repository's where there is one, else the package's."""
    package = Path(__file__).resolve().parents[1]
    repository = package.parent
    if (repository / "pyproject.toml").is_file() and (repository / "conf/config.yaml").is_file():
        return repository / "conf"
    return package / "conf"


def entries(folders: Sequence[Path], group: str) -> dict[str, str]:
    """The choices of a group in alphabetical order, each with its description."""
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    # `for_<data>` is how a data set names its backbone; it is not typed.
    shown = [path for path in paths if not path.stem.startswith("for_")]
    return {path.stem: description(path) for path in sorted(shown, key=lambda path: path.stem)}


def find(folders: Sequence[Path], group: str, name: str) -> Path | None:
    """The file of a choice."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def description(path: Path) -> str:
    """The first line of the comment that opens a YAML file."""
    return next(iter(header(path)), "")


def header(path: Path) -> list[str]:
    """The lines of the comment that opens a YAML file, but for Hydra's own first line."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not _PACKAGE.match(line):
            lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


# The safe loader in C, where PyYAML has it, reads all experiments several times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load(path: Path) -> dict[str, Any]:
    """The content of a YAML file as it stands; empty if it is no mapping."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    return content if isinstance(content, dict) else {}


def experiment(folders: Sequence[Path], name: str) -> dict[str, Any]:
    """An experiment's own values and those of the experiments that it builds on, not composed.

    The names of its groups are under `names`, and the size of its tasks is that of its data set
    if it sets none. What was measured for the experiments that it builds on is left out.
    """
    values = _experiment(folders, name)
    data = find(folders, "data", str(values["names"].get("data")))
    sizes = {} if data is None else load(data)
    return {key: sizes[key] for key in ("way", "shot") if key in sizes} | values


def _experiment(folders: Sequence[Path], name: str) -> dict[str, Any]:
    path = find(folders, "experiment", name)
    content = {} if path is None else load(path)
    values: dict[str, Any] = {"names": {}}
    for item in content.pop("defaults", ()):
        if isinstance(item, str) and item != "_self_":
            values = _merged(values, _experiment(folders, item))
        elif isinstance(item, dict):
            groups = {key.removeprefix("override /"): choice for key, choice in item.items()}
            values = _merged(values, {"names": groups})
    values.pop("reference", None)
    return _merged(values, content)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings merged; any other value of `over` takes precedence."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def method_name(folders: Sequence[Path], algo: str) -> str:
    """The name and the paper of an algorithm, which open its description."""
    path = find(folders, "algo", algo)
    return "" if path is None else description(path).partition(":")[0]


def recipes(folders: Sequence[Path], group: str, name: str) -> list[str]:
    """The data sets that an algorithm has a recipe for, or the algorithms of a data set."""
    pairs = [
        path.stem.partition("-")[::2]
        for folder in folders
        for path in sorted((folder / "recipe").glob("*.yaml"))
    ]
    if group == "algo":
        return [data for algo, data in pairs if algo == name]
    return [algo for algo, data in pairs if data == name and group == "data"]


def keys(path: Path, package: str | None = None) -> list[Key]:
    """The keys of a choice in the order of its file, those of what it builds on first.

    Args:
        path: File of the choice.
        package: Node that it sets; None is what its first line says, or that of its group.
    """
    text = path.read_text(encoding="utf-8")
    if package is None:
        found = _PACKAGE.match(text)
        package = path.parent.name if found is None else found.group(1)
    prefix = "" if package == "_global_" else f"{package}."
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        return []
    named: dict[str, Key] = {}
    parts: dict[str, Key] = {}
    for base, below in _bases(load(path).get("defaults", ()), path):
        (named if below is None else parts).update({key.name: key for key in keys(base, below)})
    named |= {key.name: key for key in _keys_below(root, prefix, text.splitlines())}
    return list((named | parts | named).values())


def _bases(defaults: Sequence[Any], path: Path) -> Iterator[tuple[Path, str | None]]:
    """The files that a file builds on, and the node that one of another group fills."""
    for item in defaults:
        found: dict[Path, str | None] = {}
        if isinstance(item, str):
            found[path.with_name(f"{item}.yaml")] = None
        elif isinstance(item, dict):
            for key, choice in item.items():
                group, _, node = key.removeprefix("/").partition("@")
                found[path.parents[1] / group / f"{choice}.yaml"] = node or None
        yield from (base for base in found.items() if base[0].is_file())


def _keys_below(node: yaml.MappingNode, prefix: str, lines: Sequence[str]) -> Iterator[Key]:
    for key, value in node.value:
        if key.value in _NOT_KEYS:
            continue
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _keys_below(value, f"{name}.", lines)
        else:
            yield Key(name, _written(value), _comment(key.start_mark.line, lines))


def _written(value: yaml.Node) -> str:
    """A value as it stands in its file."""
    assert value.start_mark.buffer is not None
    text = value.start_mark.buffer[value.start_mark.pointer : value.end_mark.pointer]
    return " ".join(text.rstrip("\0").split())


def _comment(row: int, lines: Sequence[str]) -> str:
    """The comment above a key, or at the end of its line."""
    above: list[str] = []
    indent = len(lines[row]) - len(lines[row].lstrip())
    while row > len(above) and lines[row - len(above) - 1].startswith(" " * indent + "#"):
        above.insert(0, lines[row - len(above) - 1].strip().removeprefix("#").strip())
    if above:
        return " ".join(above)
    _, mark, behind = lines[row].partition(" # ")
    return behind.strip() if mark else ""
