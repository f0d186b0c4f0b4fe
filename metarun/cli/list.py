"""`metarun list`: what there is to choose from, and one choice with its keys."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from metarun.config.catalogue import GROUPS, entries, find, header, keys, recipes
from metarun.config.search_path import refuse_shipped_names
from metarun.config.suggestions import nearest
from metarun.core.console import INDENT, table_console
from metarun.reporting.references import (
    folders_of,
    is_unverified,
    read_published,
    read_reference,
    reference_figures,
)

EXAMPLES = {
    "algo": "algo={name} data={recipe}",
    "data": "algo={recipe} data={name}",
    "backbone": "algo=protonet data=omniglot_small backbone={name}",
    "optim": "algo=maml data=sinusoid optim={name}",
    "experiment": "experiment={name}",
    "paper": "paper={name}",
    "logger": "algo=maml data=sinusoid logger={name}",
}
"""A command to try for a choice of each group."""


def run(args: argparse.Namespace) -> int:
    """Answer `metarun list [GROUP…]` and `metarun list GROUP NAME…`; returns the exit code."""
    folders = folders_of(args.config_dir)
    refuse_shipped_names(folders[1:], folders[0])
    words = args.words
    if words and words[0] in GROUPS and any(word not in GROUPS for word in words[1:]):
        paths = [_path(folders, words[0], name) for name in words[1:]]
        for path in paths:
            _show_choice(folders, path)
        return 0
    for word in words:
        if word not in GROUPS:
            raise ValueError(f"list {word}: unknown group, expected one of {', '.join(GROUPS)}")
    for group in words or GROUPS:
        _show_group(folders, group)
    return 0


def _path(folders: Sequence[Path], group: str, name: str) -> Path:
    path = find(folders, group, name)
    if path is None:
        hint = nearest(name, entries(folders, group)) or f" (`metarun list {group}`)"
        raise ValueError(f"list {group} {name}: there is no {group}={name}{hint}")
    return path


def _show_group(folders: Sequence[Path], group: str) -> None:
    found = entries(folders, group)
    if not found:
        return
    console = table_console()
    console.print(Text(f"{GROUPS[group]} ({group}=…)", style="italic"))
    if group == "experiment":
        found = {name: f"{text}{_measured(folders, name)}" for name, text in found.items()}
    for line in _lines(found, console.width):
        console.print(line, soft_wrap=True)
    console.print()


def _measured(folders: Sequence[Path], name: str) -> str:
    """What a description lacks: whether its published values are unverified, and our reference."""
    published = read_published(folders, name)
    if published is None:
        return ""
    unverified = [is_unverified(published, cell) for cell in published.cells]
    parts = []
    if any(unverified):
        parts.append(" (unverified)" if all(unverified) else " (partly unverified)")
    figures = [f for f in reference_figures(read_reference(folders, name), published) if f]
    if figures:
        values = " / ".join(f"{figure.mean:.{figure.places}f}" for figure in figures)
        words = ", ".join(dict.fromkeys(figure.mark for figure in figures))
        parts.append(f"; here {values} ({words})")
    return "".join(parts)


def _show_choice(folders: Sequence[Path], path: Path) -> None:
    """The description of a choice, its keys with their defaults, and a command to try."""
    console = table_console()
    group, name = path.parent.name, path.stem

    def show(text: str, indent: int = 0) -> None:
        margin = " " * indent
        for line in textwrap.wrap(text, console.width - indent) or [""]:
            console.print(Text(f"{margin}{line}"), soft_wrap=True)

    first, *others = header(path) or [""]
    console.print(Text(f"{group}={name}", style="bold"))
    show(first)
    for line in others:
        console.print(Text(line), soft_wrap=True)
    if group not in ("experiment", "paper"):
        for key in keys(path):
            console.print()
            console.print(Text.assemble((f" {key.name}", "bold"), f" = {key.default}"))
            show(key.comment, INDENT)
    console.print()
    known = recipes(folders, group, name)
    if group in ("algo", "data"):
        show(f"recipes: {', '.join(known) or 'none'}")
    usual = "sinusoid" if group == "algo" else "maml"
    example = EXAMPLES[group].format(name=name, recipe=_best_known(known) or usual)
    console.print(Text(f"try: metarun {example}\n"), soft_wrap=True)


def _best_known(known: Sequence[str]) -> str | None:
    """Of the recipes the one that a reader expects."""
    usual = ("omniglot_small", "sinusoid", "protonet", "maml", "online")
    return next((name for name in usual if name in known), known[0] if known else None)


def _lines(found: Mapping[str, str], width: int) -> Iterator[Text]:
    """Names with their texts next to them, or below where the names are long."""
    longest = max(map(len, found))
    side_by_side = longest <= width // 3
    indent = longest + 3 if side_by_side else INDENT
    for name, text in found.items():
        first, *others = textwrap.wrap(text, width - indent) or [""]
        if not side_by_side:
            yield Text(f" {name}", style="bold")
            others.insert(0, first)
        else:
            yield Text.assemble((f" {name}".ljust(indent), "bold"), first)
        yield from (Text(" " * indent + line) for line in others)
