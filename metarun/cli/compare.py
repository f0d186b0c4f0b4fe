"""`metarun compare`: every algorithm on one data set, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metarun.cli.parser import Parser
from metarun.jobs.comparison import compare


def run(argv: Sequence[str]) -> int:
    """Answer `metarun compare data=… [KEY=VALUE,VALUE …]`; returns the exit code."""
    parser = Parser(
        prog="metarun compare",
        description="Train and test every algorithm (or algo=…,…) on a data set, and print the "
        "table. The same command again skips finished runs and continues the others.",
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as `metarun -m` takes them")
    parser.add_argument(
        "--dir", type=Path, default=Path("outputs/compare"), help="where the runs are"
    )
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument(
        "--against", metavar="ALGO", help="on a stream: the algorithm that regret is relative to"
    )
    parser.add_argument("--config-dir", help="your own YAML files beside the shipped ones")
    args = parser.parse_intermixed_args(list(argv))
    for word in args.words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not KEY=VALUE, as in `metarun compare data=sinusoid`")
    return compare(
        args.words, args.dir, args.config_dir, against=args.against, table_only=args.table
    )
