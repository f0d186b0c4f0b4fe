"""`metarun diff`: what differs between two runs, and which one is better on the same episodes."""

from __future__ import annotations

import argparse

from metarun.core.errors import EXIT_OK
from metarun.reporting.difference import Side, tables
from metarun.reporting.tables import render


def run(args: argparse.Namespace) -> int:
    """Run `metarun diff RUN RUN [--format …]` and return the exit code.

    Raises:
        ValueError: A run was not found, or is damaged.
    """
    print(render(args.format, tables(Side.read(args.a), Side.read(args.b))), end="")
    return EXIT_OK
