"""`metarun compare`: train and test every algorithm on one data set and print one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metarun.cli.parser import Parser
from metarun.jobs.comparison import compare


def run(argv: Sequence[str]) -> int:
    """Run `metarun compare data=… [KEY=VALUE,VALUE …]` and return the exit code.

    Raises:
        ValueError: An argument is invalid; no run has been started.
    """
    parser = Parser(
        prog="metarun compare",
        description="Train and test every suitable algorithm on a data set and print one table. "
        "algo=A,B selects algorithms. Repeating the command skips finished runs and continues "
        "the others.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="settings, as for a sweep with `metarun -m`"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("outputs/compare"),
        help="folder of the runs and the table (default: outputs/compare)",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the table of existing runs, start none"
    )
    parser.add_argument(
        "--against", metavar="ALGO", help="on a stream: report regret relative to this algorithm"
    )
    parser.add_argument(
        "--columns",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,NAME",
        help="measures to show as well, such as nll,ece",
    )
    parser.add_argument("--config-dir", help="folder with your own YAML files")
    args = parser.parse_intermixed_args(list(argv))
    for word in args.words:
        if "=" not in word:
            raise ValueError(
                f"{word!r} is not KEY=VALUE: type it as in `metarun compare data=sinusoid`"
            )
    return compare(
        args.words,
        args.dir,
        args.config_dir,
        against=args.against,
        table_only=args.table,
        measures=args.columns,
    )
