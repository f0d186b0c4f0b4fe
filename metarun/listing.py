"""`metarun list`: what there is to choose from, each with the first comment line of its YAML."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from metarun.config import conf_dir

GROUPS = {
    "algo": "algorithms",
    "data": "data sets",
    "backbone": "backbones",
    "experiment": "experiments",
    "paper": "tables of papers",
    "logger": "experiment trackers",
}
_NARROWEST = 40


def run(argv: Sequence[str]) -> int:
    """Answer `metarun list [GROUP…] [--config-dir DIR]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="metarun list", description="Algorithms, data sets, backbones and experiments."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--config-dir", "-cd", type=Path, help="list your own YAML files, too")
    args, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ValueError(f"metarun list takes no {unknown[0]}: only --config-dir DIR")
    for word in args.groups:
        if word not in GROUPS:
            raise ValueError(f"metarun list {word}: expected {' or '.join(GROUPS)}")
    if args.config_dir is not None and not args.config_dir.is_dir():
        raise ValueError(f"--config-dir {args.config_dir}: there is no such folder")
    folders = [conf_dir()] + ([args.config_dir] if args.config_dir is not None else [])
    width = max(_NARROWEST, min(80, shutil.get_terminal_size((80, 24)).columns))
    console = Console(width=width, highlight=False)
    for group in args.groups or GROUPS:
        found = entries(folders, group)
        if found:
            console.print(_table(group, GROUPS[group], found))
    return 0


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


def _table(group: str, title: str, found: dict[str, str]) -> Table:
    table = Table(
        title=f"{title} ({group}=…)", title_justify="left", show_header=False, box=None, expand=True
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for name, text in found.items():
        table.add_row(name, text)
    table.add_row("", "")
    return table
