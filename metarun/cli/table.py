"""`metarun table`: published results next to measured ones."""

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
    """Run `metarun table PATH… [--format …] [--paper NAME] [--columns …]` and return the exit code.

    Raises:
        ValueError: No folder was given, or the folders contain no run.
    """
    parser = Parser(
        prog="metarun table",
        description="Print published and measured results of all runs in the given folders. "
        "--format selects the output format.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="run folders, or folders that contain runs"
    )
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="of the tables")
    parser.add_argument(
        "--paper", help="print all cells of this paper's table, including those not run"
    )
    parser.add_argument(
        "--columns",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,NAME",
        help="measures to show as well, such as nll,ece",
    )
    parser.add_argument("--config-dir", help="folder with your own YAML files")
    args = parser.parse_args(list(argv))
    if not args.paths and args.paper is None:
        raise ValueError(
            "metarun table needs a folder or --paper NAME: type `metarun table outputs/sweeps`"
        )
    found = list(read_runs(map(Path, args.paths)))
    if not found and args.paper is None:
        raise ValueError(
            f"{args.paths[0]} contains no run: expected a run folder or a folder of runs"
        )
    print(report(found, args.format, args.config_dir, args.paper, args.columns), end="")
    return EXIT_FAILED if tell_damaged(found) else EXIT_OK
