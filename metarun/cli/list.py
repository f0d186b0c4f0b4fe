"""`metarun list`: the available algorithms, data sets, backbones, experiments and papers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from metarun.cli.parser import Parser
from metarun.config.catalogue import GROUPS, conf_dir, entries
from metarun.core.console import INDENT, WIDEST, columns


def run(argv: Sequence[str]) -> int:
    """Run `metarun list [GROUP…] [--config-dir DIR]` and return the exit code."""
    parser = Parser(
        prog="metarun list", description="List every name that a group accepts, one line for each."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument(
        "--config-dir", "-cd", type=Path, help="also list the YAML files in this folder"
    )
    args = parser.parse_args(list(argv))
    for word in args.groups:
        if word not in GROUPS:
            raise ValueError(
                f"metarun list {word}: unknown group, expected one of {', '.join(GROUPS)}"
            )
    if args.config_dir is not None and not args.config_dir.is_dir():
        raise ValueError(f"--config-dir {args.config_dir}: there is no such folder; check the path")
    folders = [conf_dir()] + ([args.config_dir] if args.config_dir is not None else [])
    width = min(WIDEST, columns())
    console = Console(width=width, highlight=False)
    for group in args.groups or GROUPS:
        found = entries(folders, group)
        if found:
            console.print(Text(f"{GROUPS[group]} ({group}=…)", style="italic"))
            for line in _lines(found, width):
                console.print(line, soft_wrap=True)
            console.print()
    return 0


def _lines(found: Mapping[str, str], width: int) -> Iterator[Text]:
    """Yield each name with its description, on the next line if the names are long."""
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
