"""Tests that every key of the shipped configuration has a comment, every file a description.

A comment stands directly above its key, at its indentation, or at the end of its line. The comment
that opens a file describes the file, and no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from metarun.config.catalogue import conf_dir, description

CONF = conf_dir()
GROUPS = ("algo", "data", "augmentation", "backbone", "optim", "logger")
FILES = [
    CONF / "config.yaml",
    *sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml")),
]
EXEMPT = {"_target_", "_partial_", "defaults"}

Pair = tuple[yaml.ScalarNode, yaml.Node]


def relative(path: Path) -> str:
    return path.relative_to(CONF).as_posix()


def pairs(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, Pair]]:
    """Every key of a mapping by its dotted name, nested ones included, with its value."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value in EXEMPT:
            continue
        yield prefix + key.value, (key, value)
        yield from pairs(value, f"{prefix}{key.value}.")


def has_comment_above(lines: list[str], key: yaml.ScalarNode) -> bool:
    line, column = key.start_mark.line, key.start_mark.column
    above = line
    while above and lines[above - 1].startswith(" " * column + "#"):
        above -= 1
    # A comment on the first line of the file describes the file.
    return 0 < above < line


def has_comment_beside(lines: list[str], pair: Pair) -> bool:
    key, value = pair
    nested = isinstance(value, yaml.MappingNode) and not value.flow_style
    end = key.end_mark if nested else value.end_mark
    return lines[end.line][end.column :].lstrip(": ").startswith("#")


def uncommented(text: str) -> list[str]:
    lines = [*text.splitlines(), ""]
    return [
        name
        for name, pair in pairs(yaml.compose(text, Loader=yaml.SafeLoader))
        if not has_comment_above(lines, pair[0]) and not has_comment_beside(lines, pair)
    ]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_key_of_the_configuration_has_a_comment(path: Path) -> None:
    missing = uncommented(path.read_text(encoding="utf-8"))
    assert not missing, f"conf/{relative(path)}: no comment above {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_file_of_the_configuration_has_a_description(path: Path) -> None:
    assert description(path), f"conf/{relative(path)}: no comment at the top says what it is"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("# File.\n\n# Key.\na: 1\n", []),
        ("# File.\na: 1\n", ["a"]),
        ("# File.\n\na: 1  # Key.\nb: 2\n", ["b"]),
        ("# File.\n\n# Key.\n\na: 1\n", ["a"]),
        ("# File.\n\n# Node.\na:\n  b: 1\n  # Key.\n  c: 1\n", ["a.b"]),
        ("# File.\n\na:  # Node.\n  b: [1, 2]  # Key.\n# Elsewhere.\n  c: 1\n", ["a.c"]),
        ("# File.\n_target_: m.C\n_partial_: true\ndefaults:\n  - b: c\n", []),
    ],
)
def test_a_key_without_a_comment_of_its_own_is_found(text: str, missing: list[str]) -> None:
    assert uncommented(text) == missing
