"""`metarun table`: published figures against measured ones."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path

from metarun.cli.parser import Parser
from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.reporting.published import read_runs, report, tell_damaged
from metarun.reporting.tables import Style

FORMATS = typing.get_args(Style)


def run(argv: Sequence[str]) -> int:
    """Answer `metarun table PATH… [--format …] [--paper NAME]`; returns the exit code."""
    parser = Parser(
        prog="metarun table",
        description="Published against measured, for the runs below the folders.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="run folders, or folders of them")
    parser.add_argument("--format", choices=FORMATS, default="terminal")
    parser.add_argument("--paper", help="every cell of this paper's table, whether run or not")
    parser.add_argument("--config-dir", help="your own YAML files beside the shipped ones")
    args = parser.parse_args(list(argv))
    if not args.paths and args.paper is None:
        raise ValueError("metarun table needs a folder, as in `metarun table outputs/sweeps`")
    found = list(read_runs(map(Path, args.paths)))
    if not found and args.paper is None:
        raise ValueError(f"{args.paths[0]}: there is no run in it")
    print(report(found, args.format, args.config_dir, args.paper), end="")
    return EXIT_FAILED if tell_damaged(found) else EXIT_OK
