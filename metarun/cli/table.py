"""`metarun table`: published results next to measured ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.reporting.published import read_runs, report, tell_damaged


def run(args: argparse.Namespace) -> int:
    """Run `metarun table PATH… [--format …] [--paper NAME] [--columns …]` and return the exit code.

    Raises:
        ValueError: No folder was given, or the folders contain no run.
    """
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
