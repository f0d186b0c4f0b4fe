"""All words of the command line: the arguments of each subcommand, and what completes them.

`completion.py` offers words from the same declarations. Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from metarun.cli import candidates
from metarun.config.catalogue import GROUPS
from metarun.reporting.tables import Style

Candidates = Callable[[str, Sequence[str]], Iterable[str]]
"""Offers whole words for the beginning of one, given the words before it."""

DEFAULT_CSV = "predictions.csv"
PREDICT = "metarun predict RUN --support DIR --query DIR"
TO_GROW = "conv4-1"

_LONGEST = 120


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a one-line error instead of printing usage and exiting.

    Attributes:
        candidates: What completes the value of an argument, by its `dest`.
    """

    def __init__(self, **options: Any) -> None:
        self.candidates: dict[str, Candidates] = {}
        super().__init__(**options)

    def add(self, *names: str, offers: Candidates | None = None, **options: Any) -> None:
        """Add an argument, and what completes its value other than its choices."""
        action = self.add_argument(*names, **options)
        if offers is not None:
            self.candidates[action.dest] = offers

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse words; a list of positional arguments may have options in between.

        Raises:
            ValueError: An argument is unknown, missing or invalid.
        """
        several = any(action.nargs == "*" for action in self.positionals())
        return (self.parse_intermixed_args if several else self.parse_args)(words)

    def find(self, option: str) -> argparse.Action | None:
        """Return the action of an option such as `--dir`; None if there is none."""
        return next((a for a in self._actions if option in a.option_strings), None)

    def options(self) -> list[str]:
        """Return all options, long and short."""
        return [name for action in self._actions for name in action.option_strings]

    def positionals(self) -> list[argparse.Action]:
        """Return the arguments that are no options, in their order."""
        return [action for action in self._actions if not action.option_strings]

    def error(self, message: str) -> NoReturn:
        """Reject the arguments with argparse's message and the usage.

        Raises:
            ValueError: Always.
        """
        # A pattern that the shell has expanded may be thousands of files.
        shown = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …"
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise ValueError(f"{shown}: expected `{usage}`")


def application() -> Parser:
    """Return the parser of `metarun KEY=VALUE …`: Hydra's own options, and overrides."""
    from hydra._internal.utils import get_args_parser

    parser = Parser(parents=[get_args_parser()], add_help=False, conflict_handler="resolve")
    parser.add("--estimate", action="store_true", help="print what the runs take, start none")
    parser.add("--rehearse", action="store_true", help="give each run half a minute of training")
    parser.candidates = {
        "overrides": candidates.settings,
        "config_dir": candidates.folders,
        "config_path": candidates.folders,
    }
    return parser


def _list() -> Parser:
    parser = Parser(
        prog="metarun list",
        description="List the algorithms, data sets, backbones and experiments, or show one of "
        "them with its keys, as in `metarun list algo maml`. `metarun list runs` and `metarun list "
        "sweeps` list what was run.",
    )
    parser.add(
        "words", nargs="*", metavar="GROUP [NAME]", offers=candidates.listed,
        help=f"GROUP is one of {', '.join([*GROUPS, *candidates.OF_RUNS])}",
    )  # fmt: skip
    parser.add("--all", action="store_true", help="list all runs or sweeps, not the newest alone")
    _add_config_dir(parser)
    return parser


def _data() -> Parser:
    parser = Parser(
        prog="metarun data",
        description="Download or import a data set. Without NAME, list all data sets and say "
        "which are available.",
    )
    parser.add(
        "name", nargs="?", metavar="NAME", help="a data set, as in `metarun list data`",
        offers=candidates.names("data"),
    )  # fmt: skip
    parser.add(
        "which", nargs="?", metavar="CLASS", help="of NAME=torchvision: a class, such as DTD",
        offers=candidates.words(()),
    )  # fmt: skip
    parser.add(
        "--from", dest="source", metavar="PATH", help="import files that you already have",
        offers=candidates.paths,
    )  # fmt: skip
    parser.add(
        "--root", metavar="DIR", offers=candidates.folders,
        help="folder of the data sets (default: $METARUN_DATA, else metarun's folder of caches)",
    )  # fmt: skip
    parser.add("--verify", action="store_true", help="read every file and compare it with its hash")
    return parser


def _compare() -> Parser:
    parser = Parser(
        prog="metarun compare",
        description="Train and test every suitable algorithm on a data set and print one table. "
        "algo=A,B selects algorithms. Repeating the command skips finished runs and continues "
        "the others.",
    )
    parser.add(
        "words", nargs="*", metavar="KEY=VALUE", help="settings, as for a sweep with `metarun -m`",
        offers=candidates.settings,
    )  # fmt: skip
    parser.add(
        "--dir", type=Path, default=Path("outputs/compare"), offers=candidates.folders,
        help="folder of the runs and the table (default: outputs/compare)",
    )  # fmt: skip
    parser.add("--table", action="store_true", help="print the table of existing runs, start none")
    parser.add("--estimate", action="store_true", help="print what the runs take, start none")
    parser.add(
        "--against", metavar="ALGO", help="on a stream: report regret relative to this algorithm",
        offers=candidates.names("algo"),
    )  # fmt: skip
    _add_format(parser)
    _add_columns(parser)
    _add_config_dir(parser)
    return parser


def _table() -> Parser:
    parser = Parser(
        prog="metarun table",
        description="Print published and measured results of all runs in the given folders. "
        "--format selects the output format.",
    )
    _add_runs(parser)
    _add_format(parser)
    parser.add(
        "--paper", help="print all cells of this paper's table, including those not run",
        offers=candidates.names("paper"),
    )  # fmt: skip
    _add_columns(parser)
    _add_config_dir(parser)
    return parser


def _report() -> Parser:
    parser = Parser(
        prog="metarun report",
        description="Write one self-contained HTML page for a run, several runs or a sweep. "
        "Without PATH, for the last run.",
    )
    _add_runs(parser)
    parser.add("--open", action="store_true", help="open the page in the browser")
    parser.add(
        "--output", metavar="DIR", offers=candidates.folders,
        help="where to write report.html and figures/ (default: the folder of the runs)",
    )  # fmt: skip
    _add_config_dir(parser)
    return parser


def _diff() -> Parser:
    parser = Parser(
        prog="metarun diff",
        description="Show what differs between two runs: settings, versions, data, and the metric "
        "on the same test episodes, paired.",
    )
    for name in ("a", "b"):
        parser.add(
            name, metavar="RUN", offers=candidates.runs,
            help="folder of a run, `last`, or a unique part of its folder's name",
        )  # fmt: skip
    _add_format(parser)
    return parser


def _predict() -> Parser:
    parser = Parser(
        prog="metarun predict",
        usage=f"{PREDICT}\n       [--csv FILE] [--transductive] [--device DEVICE]",
        description="Label your own images from a few examples of each class, or predict the rows "
        "of a table (--support FILE.csv --query FILE.csv) with a run on data=csv.",
    )
    parser.add(
        "run", metavar="RUN", help="run that was trained on images or on a table: its folder, "
        "`last`, or a unique part of its folder's name",
        offers=candidates.runs,
    )  # fmt: skip
    parser.add(
        "--support", metavar="DIR", type=Path, required=True, offers=candidates.paths,
        help="folder with one subfolder per class, named after it, with a few images each; or a "
        ".csv or .parquet with the columns of the run's table, targets among them",
    )  # fmt: skip
    parser.add(
        "--query", metavar="DIR", type=Path, required=True, offers=candidates.paths,
        help="folder of the images to label, searched recursively, or a single image; or a table",
    )  # fmt: skip
    parser.add(
        "--csv", metavar="FILE", type=Path, offers=candidates.paths,
        help=f"new file for all predictions (default: {DEFAULT_CSV} in the current folder, "
        "numbered if that exists)",
    )  # fmt: skip
    parser.add(
        "--transductive", action="store_true",
        help="batch-norm statistics over all queries, so that each prediction depends on the "
        "others",
    )  # fmt: skip
    _add_device(parser, "auto", "auto, cpu, cuda or cuda:N")
    return parser


def _features() -> Parser:
    parser = Parser(
        prog="metarun features",
        description="Compute the features of a data set and write them to a file, which "
        "data=features reads: by the network of a run, as in `metarun features last data=folder "
        "data.root=photos --output F.npz`, or by a new one, as in `metarun features "
        "backbone=conv4 data=omniglot_small --output F.npz`.",
    )
    parser.add(
        "words", nargs="*", metavar="RUN|KEY=VALUE", offers=candidates.runs_and_settings,
        help="a run (its folder, `last`, or a unique part of its folder's name), and settings, as "
        "for a meta-test; without a run, settings of a network and a data set",
    )  # fmt: skip
    parser.add(
        "--output", metavar="FILE", type=Path, required=True, offers=candidates.paths,
        help="new .npz file for features, labels, classes, splits, file names and a hash of the "
        "weights",
    )  # fmt: skip
    _add_config_dir(parser)
    return parser


def _export() -> Parser:
    parser = Parser(
        prog="metarun export",
        description="Write the encoder of a run, or with --support a classifier that is adapted to "
        "a support set, as a file that needs no metarun, with a model card beside it. Its answers "
        "are compared with those of metarun first.",
    )
    parser.add(
        "run", metavar="RUN", offers=candidates.runs,
        help="folder of a run, `last`, or a unique part of its folder's name",
    )  # fmt: skip
    parser.add(
        "--format", required=True, choices=("safetensors", "torch", "onnx"),
        help="safetensors: the weights alone; torch: a program for torch alone (*.pt2); onnx: one "
        "for an ONNX runtime",
    )  # fmt: skip
    parser.add(
        "--support", metavar="DIR|CSV", type=Path, offers=candidates.paths,
        help="folder with one subfolder per class, named after it, with a few images each; or a "
        "table with targets, for a run on data=csv",
    )  # fmt: skip
    parser.add(
        "--output", metavar="FILE", type=Path, offers=candidates.paths,
        help="new file (default: encoder or classifier in the current folder, with the ending of "
        "the format)",
    )  # fmt: skip
    return parser


def _bench() -> Parser:
    from metarun.bench.workloads import BASELINES, GROWTH, TF32, WORKLOADS, Variant

    parser = Parser(
        prog="metarun bench",
        description="Measure the speed and memory of metarun on this machine, as ratios to other "
        "implementations timed alternately in the same process. Without arguments, the quick "
        "workloads are measured; this takes two or three minutes on two idle cores.",
    )
    parser.add("--list", action="store_true", help="list the workloads and exit")
    parser.add(
        "--workload", nargs="+", metavar="NAME", default=[],
        offers=candidates.words([workload.name for workload in WORKLOADS]),
        help="workloads to measure: names or patterns such as 'conv4*'; '*' selects all",
    )  # fmt: skip
    for option in dataclasses.fields(Variant):
        words = option.metadata["words"]
        parser.add(
            f"--{option.name}", metavar="WORD", default=option.default,
            offers=candidates.words(words),
            help=f"comma-separated, from {','.join(words)} (default {option.default})",
        )  # fmt: skip
    parser.add(
        "--against", metavar="NAME", offers=candidates.words(BASELINES),
        help=f"baselines, from {','.join(BASELINES)} (default all)",
    )  # fmt: skip
    parser.add(
        "--growth", metavar="SIZE", offers=candidates.words(GROWTH),
        help=f"also measure curves over {','.join(GROWTH)}, for the workloads of --workload "
        f"(default {TO_GROW})",
    )  # fmt: skip
    parser.add(
        "--seconds", type=float, default=5.0,
        help="seconds for each implementation of a workload, at least three rounds (default 5)",
    )  # fmt: skip
    _add_device(parser, "cpu", "cpu, cuda or cuda:1")
    parser.add(
        "--tf32", metavar="WORD", default=TF32[0], offers=candidates.words(TF32),
        help=f"what a GPU may round to TF32, one of {','.join(TF32)} (default {TF32[0]})",
    )  # fmt: skip
    parser.add("--no-memory", action="store_true", help="do not measure memory")
    parser.add(
        "--memory-steps", type=int, default=2000, metavar="N",
        help="sinusoid steps of the check for memory leaks; 0 skips it (default 2000)",
    )  # fmt: skip
    parser.add(
        "--json", type=Path, metavar="FILE", offers=candidates.paths,
        help="also write all measurements to a new file",
    )  # fmt: skip
    parser.add(
        "--figure", type=Path, metavar="FILE", offers=candidates.paths,
        help="also draw a figure to a new .svg or .png file; existing files are kept",
    )  # fmt: skip
    parser.add(
        "--from", type=Path, metavar="FILE", offers=candidates.paths, dest="from_record",
        help="measure nothing: draw --figure from a file that --json has written",
    )  # fmt: skip
    parser.add("--markdown", action="store_true", help="print the table in Markdown")
    return parser


def _add_format(parser: Parser) -> None:
    parser.add(
        "--format", choices=get_args(Style), default="terminal",
        help="of the tables (default: terminal)",
    )  # fmt: skip


def _add_columns(parser: Parser) -> None:
    parser.add(
        "--columns", type=lambda names: names.split(","), default=[], metavar="NAME,NAME",
        help="measures to show as well, such as nll,ece",
    )  # fmt: skip


def _add_config_dir(parser: Parser) -> None:
    parser.add(
        "--config-dir", "-cd", metavar="DIR", help="folder with your own YAML files",
        offers=candidates.folders,
    )  # fmt: skip


def _add_runs(parser: Parser) -> None:
    parser.add(
        "paths", nargs="*", metavar="PATH", offers=candidates.runs,
        help="folders of runs, folders that contain runs, names of sweeps, `last`, or unique parts "
        "of the names of runs' folders",
    )  # fmt: skip


def _add_device(parser: Parser, default: str, devices: str) -> None:
    parser.add(
        "--device", default=default, help=f"{devices} (default {default})",
        offers=candidates.words(("auto", "cpu", "cuda") if default == "auto" else ("cpu", "cuda")),
    )  # fmt: skip


PARSERS: dict[str, Callable[[], Parser]] = {
    "bench": _bench,
    "compare": _compare,
    "data": _data,
    "diff": _diff,
    "export": _export,
    "features": _features,
    "list": _list,
    "predict": _predict,
    "report": _report,
    "table": _table,
}
"""The parser of each subcommand."""
