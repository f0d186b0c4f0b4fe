"""The `metarun` command: words to a subcommand or a Hydra application, and to an exit code.

The whole request is composed and checked first, every run of a sweep; what is wrong is answered
in one line and with exit code 2, and nothing has been made. Hydra then runs what is right. torch
is imported only when there is something to run.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import metarun
from metarun.config.catalogue import conf_dir
from metarun.config.checks import check_config
from metarun.core import distributed
from metarun.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    describe_error,
)

QUICK_START = "quick_start"
"""The experiment that a bare `metarun` runs."""

SUBCOMMANDS = ("bench", "compare", "data", "list", "predict", "report", "table")
"""The words that are a module of this folder each, with `run(argv)`."""

HELP = """\
metarun: meta-learning experiments

  metarun                                quick start, in about a minute
  metarun algo=maml data=omniglot_small  train, validate and test; KEY=VALUE
                                         changes anything: way=20 train.steps=9
  metarun -m algo=maml,anil seed=1,2,3   a sweep: one run for each combination
  metarun experiment=NAME                a published setting with its recipe
  metarun resume=RUN                     continue a run, exactly
  metarun test=RUN [data=… shot=…]       meta-test a run, on other data if named
  metarun paper=NAME                     a paper's table, as a sweep
  metarun table PATH…                    published against measured
  metarun report PATH…                   one self-contained HTML page
  metarun compare data=NAME              every algorithm, in one table
  metarun predict RUN --support DIR …    label your images from a few examples
  metarun list [algo|experiment|…]       what there is, with one line for each
  metarun data [NAME] [--from PATH]      fetch, import or verify a data set
  metarun bench                          speed and memory on this machine

A RUN is a folder under outputs/. The words to choose from:

{groups}
Options:
  -m, --multirun         run every combination of the values given with commas
  --cfg job [--resolve]  show the configuration and stop
  --config-dir DIR       add your own YAML files (algo/mine.yaml is algo=mine)
  --info [WHAT]          show how the configuration comes about
  --hydra-help           Hydra's options, --shell-completion among them
  --version, --help
  debug=true             show where an error came from
"""


def entry() -> NoReturn:
    """The console script."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # `metarun list | head`: nobody reads on, and Python would complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Answer a command line; returns the exit code."""
    # The installed command does not see the current folder, where a user's own modules are.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    debug = "debug=true" in (word.lower() for word in argv)
    place = distributed.Place()
    try:
        place = distributed.place_from_environment()
        _log_to_stderr() if place.rank == 0 else _hush()
        return _dispatch(list(argv), place)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        # What is wrong before the processes meet is wrong in all of them.
        if place.rank == 0 or (not distributed.is_main() and distributed.should_report(error)):
            print(f"error: {distributed.error_prefix()}{describe_error(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, (ValueError, OSError)) else EXIT_FAILED
    except KeyboardInterrupt:
        if place.rank == 0:
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _hush() -> None:
    """Leave the screen to the first of several processes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.getLogger("metarun").addHandler(logging.NullHandler())


def _dispatch(argv: list[str], place: distributed.Place) -> int:
    if argv and argv[0] in SUBCOMMANDS:
        if place.size > 1:
            raise ValueError(f"`metarun {argv[0]}` works in one process: type it without torchrun")
        words = [word for word in argv[1:] if word.lower() not in ("debug=true", "debug=false")]
        code: int = importlib.import_module(f"metarun.cli.{argv[0]}").run(words)
        return code
    if "--version" in argv:
        print(f"metarun {metarun.__version__}")
        return EXIT_OK
    args = _parse(argv)
    for word in args.overrides:
        if "=" not in word and not word.startswith("~"):
            found = difflib.get_close_matches(word, SUBCOMMANDS, n=1)
            hint = f": did you mean `metarun {found[0]}`?" if found else " (`metarun --help`)"
            raise ValueError(f"{word!r} is neither a command nor KEY=VALUE{hint}")
    if args.hydra_help or args.shell_completion:
        return _hand_over(args, _never)
    if args.help:
        return _help(args)
    if place.size == 1 or args.cfg is not None or args.info is not None:
        return _application(args, argv)
    distributed.start(place)
    code = _application(args, argv)
    distributed.stop()
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's own options, in any order with the words."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    known = [option for action in parser._actions for option in action.option_strings]

    def refuse(message: str) -> NoReturn:
        wrong = [w for w in argv if w.startswith("-") and w.partition("=")[0] not in known]
        found = difflib.get_close_matches(wrong[0], known, n=1) if wrong else []
        hint = f": did you mean {found[0]}?" if found else " (`metarun --help`)"
        raise ValueError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        raise ValueError("--experimental-rerun: type resume=RUN instead")
    return args


def _help(args: argparse.Namespace) -> int:
    from metarun.config.composition import composer
    from metarun.core.console import FULL_WIDTH, columns, stacked

    with composer(args.config_dir, args.config_path, args.config_name) as compose:
        lines = [
            f"  {group + '=':<12}{_wrapped(_visible(compose.options(group)), 14)}\n"
            for group in compose.groups
            if not group.startswith("hydra") and group not in ("recipe", "experiment", "paper")
        ]
    text = HELP.format(groups="".join(lines))
    print(text if columns() >= FULL_WIDTH else stacked(text, columns()), end="")
    return EXIT_OK


def _visible(options: list[str]) -> list[str]:
    """The options that one types; `for_<data>` are chosen by the data."""
    return [option for option in options if not option.startswith("for_")]


def _wrapped(words: list[str], indent: int) -> str:
    import textwrap

    return textwrap.fill(", ".join(words), 78 - indent).replace("\n", "\n" + " " * indent)


def _application(args: argparse.Namespace, typed: list[str]) -> int:
    """Train, resume or test, after everything about the request has been checked."""
    from metarun.config.composition import composer

    folders, words = _take_folders(args.overrides)
    shows = args.cfg is not None or args.info is not None
    if folders:
        if args.multirun:
            raise ValueError(f"{next(iter(folders))}= does not go with -m: it is about one run")
        if len(folders) > 1:
            raise ValueError("resume= and test= do not go together: type one of them")
        if shows:
            raise ValueError("--cfg and --info show a new run; see config.yaml in the run folder")
        from metarun.jobs.meta_test import meta_test
        from metarun.jobs.resume import resume

        verb, path = next(iter(folders.items()))
        act = resume if verb == "resume" else meta_test
        return act(path, words, args.config_dir)
    bare = not words and not args.multirun
    if bare:
        words = [f"experiment={QUICK_START}"]
    from metarun.jobs.checks import check_jobs
    from metarun.jobs.train import HydraTask, train_without_folder

    with distributed.agreed():
        with composer(args.config_dir, args.config_path, args.config_name) as compose:
            sweep = compose.is_sweep(words, args.multirun)
            if sweep and distributed.size() > 1:
                raise ValueError(
                    f"a sweep is many runs, which {distributed.size()} processes would make at "
                    "once: start it without torchrun, or one run of it with torchrun"
                )
            if sweep:
                words = compose.sweep_words(words)
            jobs = compose.jobs(words, sweep)
            method = compose.sweep_method(words) if sweep else None
        args.overrides = words
        if shows:
            for job in jobs:
                check_config(job.config)
            return _hand_over(args, _never)
        if bare:
            print(
                "quick start: MAML learns sinusoids in about a minute (`metarun --help` for more)"
            )
        check_jobs(jobs)
    if not distributed.is_main():
        return train_without_folder(jobs[0].config)
    if method is None:
        task = HydraTask()
        code = _hand_over(args, task)
        return code or task.code
    from metarun.jobs.sweep import check_direction, run

    check_direction(method, jobs[0])
    return run(jobs, method, typed, args.config_dir, lambda task: _hand_over(args, task))


def _take_folders(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split off `resume=` and `test=`: a path may hold what Hydra's grammar does not read."""
    folders: dict[str, str] = {}
    words: list[str] = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("resume", "test") and value != "null":
            # As typed by `resume=$RUN` with RUN unset: no reason to train another run.
            if not value:
                raise ValueError(f"{key}= names nothing: expected the folder of a run")
            folders[key] = value
        else:
            words.append(word)
    return folders, words


def _hand_over(args: argparse.Namespace, task: Callable[[Any], None]) -> int:
    """Let Hydra do what was asked, with its options before the words."""
    import hydra

    from metarun.config.composition import HYDRA_VERSION_BASE, register_resolvers

    register_resolvers()
    flags: list[str] = []
    for name in ("config_name", "config_dir", "cfg", "package", "info"):
        value = getattr(args, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    for name in ("hydra_help", "resolve", "run", "multirun", "shell_completion"):
        if getattr(args, name):
            flags.append(f"--{name.replace('_', '-')}")
    conf = Path(args.config_path).resolve() if args.config_path else conf_dir()
    typed = sys.argv
    sys.argv = [typed[0], *flags, *args.overrides]
    try:
        application = hydra.main(
            version_base=HYDRA_VERSION_BASE, config_path=str(conf), config_name="config"
        )(task)
        cast("Callable[[], None]", application)()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else EXIT_OK
    finally:
        sys.argv = typed
    return EXIT_OK


def _never(_: Any) -> None:
    raise AssertionError("Hydra was asked to show something, not to run")


def _log_to_stderr() -> None:
    """Warnings of metarun's modules, one line each."""
    logger = logging.getLogger("metarun")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to what stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"
