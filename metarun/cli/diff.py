"""`metarun diff`: what differs between two runs, and which one is better on the same episodes."""

from __future__ import annotations

import argparse

from metarun.core.errors import EXIT_OK
from metarun.reporting.difference import Side, tables
from metarun.reporting.tables import render
from metarun.runs.find import find_run


def run(args: argparse.Namespace) -> int:
    """Run `metarun diff RUN RUN [--format …]` and return the exit code.

    Raises:
        ValueError: A run was not found, or is damaged.
    """
    a, b = find_run(args.a), find_run(args.b)
    if a.resolve() == b.resolve():
        raise ValueError(f"{args.a} and {args.b} are the same run, {a}: expected two runs")
    print(render(args.format, tables(Side.read(str(a)), Side.read(str(b)))), end="")
    return EXIT_OK
