"""`metarun list`: what there is to choose from, each with the first comment line of its YAML."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from metarun.cli.parser import Parser
from metarun.config.build import conf_dir

GROUPS = {
    "algo": "algorithms",
    "data": "data sets",
    "backbone": "backbones",
    "experiment": "experiments",
    "paper": "tables of papers",
    "logger": "experiment trackers",
}
FULL_WIDTH = 80
_NARROWEST, _WIDEST = 40, 100
_INDENT = 4


def run(argv: Sequence[str]) -> int:
    """Answer `metarun list [GROUP…] [--config-dir DIR]`; returns the exit code."""
    parser = Parser(
        prog="metarun list", description="Algorithms, data sets, backbones and experiments."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--config-dir", "-cd", type=Path, help="list your own YAML files, too")
    args = parser.parse_args(list(argv))
    for word in args.groups:
        if word not in GROUPS:
            raise ValueError(f"metarun list {word}: expected {' or '.join(GROUPS)}")
    if args.config_dir is not None and not args.config_dir.is_dir():
        raise ValueError(f"--config-dir {args.config_dir}: there is no such folder")
    folders = [conf_dir()] + ([args.config_dir] if args.config_dir is not None else [])
    width = min(_WIDEST, columns())
    console = Console(width=width, highlight=False)
    for group in args.groups or GROUPS:
        found = entries(folders, group)
        if found:
            console.print(Text(f"{GROUPS[group]} ({group}=…)", style="italic"))
            for line in _lines(found, width):
                console.print(line, soft_wrap=True)
            console.print()
    return 0


def columns() -> int:
    """Of the terminal, or of what reads instead of one."""
    return max(_NARROWEST, shutil.get_terminal_size((FULL_WIDTH, 24)).columns)


def stacked(text: str, width: int) -> str:
    """A text of two columns with the second below the first, for a narrow terminal."""
    paragraphs: list[tuple[str, str]] = []
    for line in text.splitlines():
        margin = " " * (len(line) - len(line.lstrip()))
        left, _, right = line.strip().partition("  ")
        if len(margin) > _INDENT:
            place, before = paragraphs.pop()
            paragraphs.append((place, f"{before} {left}"))
        else:
            paragraphs.append((margin, left))
            if right:
                paragraphs.append((margin + " " * _INDENT, right.strip()))
    return "".join(
        textwrap.fill(words, width, initial_indent=margin, subsequent_indent=margin) + "\n"
        for margin, words in paragraphs
    )


def entries(folders: Sequence[Path], group: str) -> dict[str, str]:
    """The words of a group in alphabetical order, with one line about each."""
    paths = [path for folder in folders for path in (folder / group).glob("*.yaml")]
    # `for_<data>` is how a data set names its backbone; nobody types it.
    shown = [path for path in paths if not path.stem.startswith("for_")]
    return {path.stem: description(path) for path in sorted(shown, key=lambda path: path.stem)}


def description(path: Path) -> str:
    """The first comment line of a YAML file that is not one of Hydra's headers."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").rstrip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def _lines(found: Mapping[str, str], width: int) -> Iterator[Text]:
    """Names with their texts beside them, or below where the names are long."""
    longest = max(map(len, found))
    beside = longest <= width // 3
    indent = longest + 3 if beside else _INDENT
    for name, text in found.items():
        first, *others = textwrap.wrap(text, width - indent) or [""]
        if not beside:
            yield Text(f" {name}", style="bold")
            others.insert(0, first)
        else:
            yield Text.assemble((f" {name}".ljust(indent), "bold"), first)
        yield from (Text(" " * indent + line) for line in others)
