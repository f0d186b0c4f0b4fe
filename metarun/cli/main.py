"""The `metarun` command: runs a subcommand or a Hydra application and returns an exit code.

The whole request, every run of a sweep included, is composed and checked first. An error is
reported in one line with exit code 2 before any file is written. Hydra then starts the runs.
torch is imported only when there is something to run.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NoReturn

import metarun
from metarun.cli.parser import PARSERS, application
from metarun.config.checks import check_config
from metarun.config.naming import QUICK_START
from metarun.config.search_path import OPTIONS, as_config_dir
from metarun.config.trust import taken_from, trusting
from metarun.core import distributed
from metarun.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    describe_error,
)
from metarun.core.streams import flush_or_discard, open_closed_streams, say, unbroken_streams

SUBCOMMANDS = tuple(PARSERS)
"""Subcommands; each is a module of this folder with a function `run(args)`."""

_OPTIONS = {"help": "--help", "version": "--version"}
"""Words that mean an option."""

HELP = """\
metarun: train and evaluate meta-learning algorithms

  metarun                                quick start, takes half a minute
  metarun algo=maml data=omniglot_small  train, validate and test; KEY=VALUE
                                         sets any option: way=20 train.steps=9
  metarun -m algo=maml,anil seed=1,2,3   sweep: one run for each combination
  metarun experiment=NAME                run a published setting with its recipe
  metarun resume=RUN                     continue a run where it stopped
  metarun test=RUN [data=… shot=…]       meta-test a run, also on other data
  metarun init=RUN|FILE algo=… data=…    start from weights learned before
  metarun paper=NAME                     run all experiments of a paper's table
  metarun table PATH…                    print published and measured results
  metarun report PATH… [--open]          write one self-contained HTML page
  metarun diff RUN RUN                   compare two runs: settings, results
  metarun compare data=NAME              run every algorithm, print one table
  metarun predict RUN --support DIR …    label your images from a few examples
  metarun features RUN data=… --output F write features for data=features
  metarun export RUN --format FORMAT …   write an encoder or a classifier
  metarun list [algo|experiment|…]       list the names that each group accepts
  metarun list runs                      list the runs; metarun list sweeps
  metarun data [NAME] [--from PATH]      download, import or verify a data set
  metarun bench                          measure speed and memory

RUN is the folder of a run, a unique part of its name, or `last`; PATH may also
be a folder of runs or a sweep's name. Each subcommand has its own --help.
Groups and their values:

{groups}
Options:
  -m, --multirun         run every combination of comma-separated values
  --cfg job [--resolve]  print the configuration and exit
  --estimate             print what the runs would take, and start none
  --rehearse             give every run half a minute of training
  --config-dir DIR       add your own YAML files (algo/mine.yaml is algo=mine);
                         hydra.searchpath=[file://A,pkg://B] adds several
  trust=PACKAGE,…        packages that a stored run may import (METARUN_TRUST)
  --info [WHAT]          print how the configuration is composed
  --hydra-help           Hydra's own options, such as --shell-completion
  --version, --help      print the version or this text and exit
  debug=true             print the traceback of an error
"""


def entry() -> NoReturn:
    """Run the console script and exit the process."""
    open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt_once)
    try:
        code = main(sys.argv[1:])
    except (BrokenPipeError, KeyboardInterrupt) as stop:
        # The first as in `metarun list | head`.
        code = EXIT_INTERRUPTED if isinstance(stop, KeyboardInterrupt) else EXIT_FAILED
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    error = flush_or_discard(sys.stdout)
    if error is not None and not isinstance(error, BrokenPipeError):
        say("error", f"standard output: {describe_error(error)}")
    sys.exit(code if error is None else code or EXIT_FAILED)


def _interrupt_once(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt at the first SIGINT alone: more would interrupt its handling."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code; errors become one line on stderr."""
    debug = "debug=true" in (word.lower() for word in argv)
    place = distributed.Place()
    try:
        place = distributed.place_from_environment()
        _log_to_stderr() if place.rank == 0 else _hush()
        packages, words = taken_from([_with_home(word) for word in argv])
        with trusting(packages):
            return _dispatch(words, place)
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        # An error before the processes are connected occurs in all of them: report it once.
        if place.rank == 0 or (not distributed.is_main() and distributed.should_report(error)):
            say("error", f"{distributed.error_prefix()}{describe_error(error)}")
        return EXIT_BAD_INPUT if isinstance(error, (ValueError, OSError)) else EXIT_FAILED
    except KeyboardInterrupt:
        if place.rank == 0:
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        # Also after an error: a process that exits while its group communicates may abort.
        distributed.stop()


def _with_home(word: str) -> str:
    """Replace the tilde of `KEY=~/path`, as shells do for a word that begins with one."""
    return re.sub(r"^([^=]+=[\"']?)~(?=[/\"']|$)", lambda key: key[1] + str(Path.home()), word)


def _hush() -> None:
    """Discard the output of this process, so that only the main process prints."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    logging.getLogger("metarun").addHandler(logging.NullHandler())


def _dispatch(argv: list[str], place: distributed.Place) -> int:
    """Run a subcommand, print what an option requests, or start the application."""
    argv = _subcommand_first(argv)
    if argv and argv[0] in SUBCOMMANDS:
        if place.size > 1:
            raise ValueError(f"`metarun {argv[0]}` runs in one process: start it without torchrun")
        return _subcommand(argv[0], argv[1:])
    if argv and argv[0] in _OPTIONS:
        argv = [_OPTIONS[argv[0]], *argv[1:]]
    if "--version" in argv:
        print(f"metarun {metarun.__version__}")
        return EXIT_OK
    args = _parse(as_config_dir(argv))
    for word in args.overrides:
        if "=" not in word and not word.startswith("~"):
            raise ValueError(f"{word!r} is neither a subcommand nor KEY=VALUE{_hint(word)}")
    shells = [w.removeprefix("query=") for w in args.overrides if w.startswith("query=")]
    if args.shell_completion and shells:
        from metarun.cli.completion import answer

        print(answer(shells[0]))
        return EXIT_OK
    if args.hydra_help or args.shell_completion:
        from metarun.config.loading import opened

        with opened(args.config_dir, args.config_path) as hydra:
            return _hand_over(hydra, args, _never)
    if args.help:
        return _help(args)
    if args.cfg is not None or args.info is not None:
        return _application(args, argv)
    with unbroken_streams():
        distributed.start(place)
        return _application(args, argv)


def _subcommand(name: str, argv: list[str]) -> int:
    words = [word for word in argv if word.lower() not in ("debug=true", "debug=false")]
    parser = PARSERS[name]()
    if parser.find("--config-dir"):
        words = as_config_dir(words)
    module = importlib.import_module(f"metarun.cli.{name}")
    code: int = module.run(parser.read(words))
    return code


def _subcommand_first(argv: list[str]) -> list[str]:
    """Move `--config-dir DIR` behind the subcommand that follows it."""
    option, equals, _ = (argv or [""])[0].partition("=")
    place = (1 if equals else 2) if option in OPTIONS else 0
    rest = argv[place:]
    return [rest[0], *argv[:place], *rest[1:]] if rest[:1] and rest[0] in SUBCOMMANDS else argv


def _hint(word: str) -> str:
    """What was probably meant by a word that is no KEY=VALUE."""
    if word in SUBCOMMANDS:
        return f": type the subcommand first, as in `metarun {word} …`"
    if word in ("resume", "test"):
        return f": type {word}=RUN, with the folder of a run"
    found = difflib.get_close_matches(word, [*SUBCOMMANDS, "train"], n=1)
    if found == ["train"]:
        return ": to train, type KEY=VALUE alone, as in `metarun algo=maml data=sinusoid`"
    return f": did you mean `metarun {found[0]}`?" if found else "; see `metarun --help`"


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse Hydra's own options, mixed with overrides in any order."""
    parser = application()
    known = parser.options()

    def refuse(message: str) -> NoReturn:
        wrong = [w for w in argv if w.startswith("-") and w.partition("=")[0] not in known]
        found = difflib.get_close_matches(wrong[0], known, n=1) if wrong else []
        hint = f": did you mean {found[0]}?" if found else "; see `metarun --help`"
        raise ValueError(f"{message}{hint}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun:
        raise ValueError("--experimental-rerun is not supported: type resume=RUN instead")
    if args.resolve and args.cfg is None:
        raise ValueError("--resolve needs --cfg: type --cfg job --resolve")
    if args.multirun and (args.cfg is not None or args.info is not None):
        raise ValueError("--cfg and --info describe one run: type them without -m")
    return args


def _help(args: argparse.Namespace) -> int:
    """Print the help text with the values of each group; return the exit code."""
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
    """Return the options to show: without `for_<data>`, which the data set chooses."""
    return [option for option in options if not option.startswith("for_")]


def _wrapped(words: list[str], indent: int) -> str:
    import textwrap

    return textwrap.fill(", ".join(words), 78 - indent).replace("\n", "\n" + " " * indent)


def _application(args: argparse.Namespace, typed: list[str]) -> int:
    """Check the whole request, then train, sweep, resume or meta-test; return the exit code.

    Args:
        args: Parsed options and overrides.
        typed: The full command line, to be repeated in the message of an incomplete sweep.

    Raises:
        ValueError: The request is invalid; no file has been written.
    """
    from metarun.config.composition import composer
    from metarun.config.initialization import with_path_of_init
    from metarun.config.overrides import rehearsal
    from metarun.core.console import busy

    folders, words = _take_folders(args.overrides)
    shows = args.cfg is not None or args.info is not None
    if folders:
        if args.multirun:
            raise ValueError(f"{next(iter(folders))}= takes one run: type it without -m")
        if len(folders) > 1:
            raise ValueError("resume= and test= exclude each other: type one of them")
        if shows:
            raise ValueError(
                "--cfg and --info describe a new run: for an existing run, read config.yaml in "
                "its folder"
            )
        for option in ("estimate", "rehearse"):
            if getattr(args, option):
                raise ValueError(
                    f"--{option} is for new runs: type it without {next(iter(folders))}="
                )
        with busy("starting"):
            from metarun.jobs.meta_test import meta_test
            from metarun.jobs.resume import resume

        verb, path = next(iter(folders.items()))
        act = resume if verb == "resume" else meta_test
        return act(path, words, args.config_dir)
    words = with_path_of_init(words)
    bare = not words and not args.multirun
    if bare:
        words = [f"experiment={QUICK_START}"]
    if args.rehearse:
        words = rehearsal(words)
    with busy("starting"):
        from metarun.jobs.checks import check_jobs
        from metarun.jobs.train import HydraTask, train_without_folder

    with ExitStack() as opened:
        with distributed.agreed():
            compose = opened.enter_context(
                composer(args.config_dir, args.config_path, args.config_name)
            )
            sweep = compose.is_sweep(words, args.multirun)
            if sweep and distributed.size() > 1:
                raise ValueError(
                    f"a sweep cannot run in {distributed.size()} processes: start it without "
                    "torchrun, or start a single run with torchrun"
                )
            if sweep:
                words = compose.sweep_words(words)
            elif named := next((word for word in words if word.startswith("sweep.")), None):
                raise ValueError(f"{named} is for sweeps: add -m, or leave it out for a single run")
            jobs = compose.jobs(words, sweep)
            method = compose.sweep_method(words) if sweep else None
            args.overrides = words
            if shows:
                for job in jobs:
                    check_config(job.config)
                return _hand_over(compose.hydra, args, _never)
            if bare and not args.estimate:
                print(
                    "quick start: MAML on sinusoid regression, half a minute; see `metarun --help`"
                )
            check_jobs(jobs, None if method is None else method.processes)
        if args.estimate:
            from metarun.jobs.estimate import print_estimates

            return print_estimates(jobs)
        if not distributed.is_main():
            return train_without_folder(jobs[0].config)
        if method is None:
            task = HydraTask(args.config_dir)
            code = _hand_over(compose.hydra, args, task) or task.code
            if bare and code == EXIT_OK:
                _subcommand("report", [str(task.folder)])
            return code
        from metarun.jobs.sweep import check_direction, run

        check_direction(method, jobs[0])

        def start(task: Callable[[Any], Any]) -> int:
            return _hand_over(compose.hydra, args, task, sweep=True)

        return run(jobs, method, typed, args.config_dir, start)


def _take_folders(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split off `resume=` and `test=`, since Hydra's grammar cannot parse every path.

    Returns:
        The folder for `resume` or `test`, and the remaining overrides.

    Raises:
        ValueError: The value is empty.
    """
    folders: dict[str, str] = {}
    words: list[str] = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("resume", "test") and value != "null":
            # `resume=$RUN` with RUN unset must not start a new run.
            if not value:
                raise ValueError(
                    f"{key}= is empty: expected the folder of a run, such as outputs/…"
                )
            folders[key] = value
        else:
            words.append(word)
    return folders, words


def _hand_over(
    hydra: Any, args: argparse.Namespace, task: Callable[[Any], Any], *, sweep: bool = False
) -> int:
    """Let Hydra print what an option requests, or start the task; return the exit code."""
    name, words = args.config_name or "config", args.overrides
    try:
        if args.hydra_help:
            # Hydra composes the words with its own help, which has none of our groups.
            args.overrides = []
            hydra.hydra_help(name, application(), args)
        elif args.shell_completion:
            hydra.shell_completion(name, words)
        elif args.cfg is not None:
            hydra.show_cfg(name, words, args.cfg, args.package, args.resolve)
        elif args.info is not None:
            hydra.show_info(args.info, name, words)
        else:
            (hydra.multirun if sweep else hydra.run)(name, task, words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED if stop.code else EXIT_OK
    return EXIT_OK


def _never(_: Any) -> None:
    raise AssertionError("Hydra started a run although it should only print")


def _log_to_stderr() -> None:
    """Print warnings of metarun's modules to stderr, one line each."""
    logger = logging.getLogger("metarun")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setLevel(logging.WARNING)
        logger.addHandler(handler)


class _StderrHandler(logging.Handler):
    """A handler of the standard error at each message, which tests and Hydra replace."""

    def emit(self, record: logging.LogRecord) -> None:
        kind: Literal["error", "warning"] = (
            "error" if record.levelno > logging.WARNING else "warning"
        )
        say(kind, record.getMessage())
