"""`metarun table`: published results next to measured ones."""

from __future__ import annotations

import argparse

from metarun.core.errors import EXIT_FAILED, EXIT_OK
from metarun.reporting.published import named, report, tell_damaged


def run(args: argparse.Namespace) -> int:
    """Run `metarun table PATH… [--format …] [--paper NAME] [--columns …]` and return the exit code.

    Raises:
        ValueError: No folder was given, or the folders contain no run.
    """
    if not args.paths and args.paper is None:
        raise ValueError(
            "metarun table needs a folder or --paper NAME: type `metarun table outputs/sweeps`"
        )
    found = named(args.paths) if args.paths else []
    print(report(found, args.format, args.config_dir, args.paper, args.columns), end="")
    return EXIT_FAILED if tell_damaged(found) else EXIT_OK
