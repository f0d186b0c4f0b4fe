"""`metarun compare`: train and test every algorithm on one data set and print one table."""

from __future__ import annotations

import argparse

from metarun.config.initialization import with_path_of_init
from metarun.jobs.comparison import compare


def run(args: argparse.Namespace) -> int:
    """Run `metarun compare data=… [KEY=VALUE,VALUE …] [~recipe]` and return the exit code.

    Raises:
        ValueError: An argument is invalid; no run has been started.
    """
    for word in args.words:
        if "=" not in word and not word.startswith("~"):
            raise ValueError(
                f"{word!r} is not KEY=VALUE: type it as in `metarun compare data=sinusoid`"
            )
    return compare(
        with_path_of_init(args.words),
        args.dir,
        args.config_dir,
        against=args.against,
        table_only=args.table,
        only_estimate=args.estimate,
        measures=args.columns,
        style=args.format,
    )
