"""The runs of a request: checked before any folder is made, then trained one by one."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from metarun.config import build
from metarun.config.build import Plain, one_line
from metarun.core import distributed
from metarun.runs.folder import Elsewhere, Interrupted, RunError, RunFolder, check_space

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from metarun.config.build import Experiment
    from metarun.config.composition import Job
    from metarun.core.console import Screen

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def check_jobs(jobs: Sequence[Job]) -> None:
    """Refuse what cannot run, and say which pairs have no recipe; makes nothing on disk.

    Raises:
        ValueError: The first thing that is wrong in any of the runs.
    """
    for job in jobs:
        build.check(job.plain)
        _check_folder(job)
    for job in jobs:
        check_data(job.plain)
        build.trackers(job.plain)
    from metarun.training.trainer import required_bytes

    with warnings_held():
        for job in jobs:
            experiment = build.build(job.plain)
            build.check_shares(experiment)
            check_space(job.folder, required_bytes(experiment.algorithm))
    if not distributed.first():
        return
    for pair in dict.fromkeys(_pair(job) for job in jobs if not job.has_recipe):
        print(
            f"note: there is no recipe for {pair}: the values are the general ones, not tuned "
            "for the pair",
            file=sys.stderr,
        )


@contextmanager
def warnings_held() -> Iterator[None]:
    """Keep warnings back until it is clear that no error makes them pointless; each once."""
    logger = logging.getLogger("metarun")
    before, records = list(logger.handlers), _Records()
    logger.handlers[:] = [records]
    try:
        yield
    finally:
        logger.handlers[:] = before
    for record in records.by_text.values():
        logger.handle(record)


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.by_text: dict[str, logging.LogRecord] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.by_text.setdefault(record.getMessage(), record)


def _pair(job: Job) -> str:
    names = job.plain["names"]
    return f"algo={names['algo']} data={names['data']}"


def check_data(plain: Plain) -> None:
    """Answer missing data at once, without loading torch."""
    from metarun.data.storage import registry

    message = registry.missing(plain["names"]["data"], plain["data"].get("root"))
    if message is not None:
        raise ValueError(message)


def to_yaml(plain: Any) -> str:
    """Plain values as YAML that OmegaConf reads back alike."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _check_folder(job: Job) -> None:
    folder = job.folder
    in_the_way = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if in_the_way and not job.may_be_there:
        raise ValueError(f"{folder} exists and is not empty: a run is never written over another")
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {parent} is not a folder that you can write")


def asked_for(cfg: DictConfig) -> tuple[Plain, Path, list[str]]:
    """What Hydra hands to a run: its resolved configuration, its folder and its words."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from metarun.config.composition import names_of

    hydra = HydraConfig.get()
    plain = cast(Plain, OmegaConf.to_container(cfg, resolve=True))
    choices = cast("dict[str, Any]", OmegaConf.to_container(hydra.runtime.choices))
    plain["names"] = names_of(choices, plain)
    overrides = [str(word) for word in hydra.overrides.task]
    return plain, _from_here(Path(str(hydra.runtime.output_dir))), overrides


class Launch:
    """Trains the one run that Hydra hands over.

    Attributes:
        code: The exit code.
    """

    def __init__(self) -> None:
        self.code = EXIT_OK

    def run(self, cfg: DictConfig) -> None:
        """Train a run in the folder that Hydra made."""
        from metarun.core.console import Screen

        plain, folder, overrides = asked_for(cfg)
        self.code = guarded(
            lambda: train(plain, folder, overrides, Screen()), debug=bool(plain["debug"])
        )


def _from_here(folder: Path) -> Path:
    """The folder as one would type it: Hydra's is absolute."""
    here = Path.cwd()
    below = folder != here and folder.is_relative_to(here)
    return folder.relative_to(here) if below else folder


def train(plain: Plain, folder: Path, overrides: Sequence[str], screen: Screen) -> None:
    """Make the parts of a run and train it in a new folder."""
    experiment = build.build(plain)
    run = RunFolder.create(folder, config=to_yaml(experiment.record), overrides=list(overrides))
    train_in(run, experiment, screen)


def follow(plain: Plain) -> int:
    """Train a run whose folder and screen are the first process's; returns the exit code."""
    return guarded(
        lambda: train_in(Elsewhere(), build.build(plain), silent()), debug=bool(plain["debug"])
    )


def silent() -> Screen:
    """A screen that shows nothing."""
    from rich.console import Console

    from metarun.core.console import Screen

    return Screen(Console(quiet=True))


def train_in(run: RunFolder, experiment: Experiment, screen: Screen) -> None:
    """Train what was made of a run's configuration, from where its folder stands."""
    from metarun.trackers.base import Trackers
    from metarun.training import trainer

    record, facts = experiment.record, experiment.facts
    first = distributed.first()
    trackers = Trackers(build.trackers(record) if first else {}, record, facts)
    with trackers.closing():
        results = trainer.train(
            experiment.algorithm,
            experiment.source,
            experiment.train,
            experiment.eval,
            run,
            facts,
            screen,
            experiment.seed,
            trackers,
        )
        if not first:
            return
        draw_figures(run.path)
        if trackers.alive:
            draw_curves(run.path)
        trackers.finish(results, sorted((run.path / "figures").glob("*.*")))


def draw_figures(folder: Path) -> None:
    """Draw what a finished run or test shows of itself; a disk that is full fails nothing.

    `metarun report` draws the rest, which takes a look at what was learned.
    """
    names = ("stream.csv", "samples.npz")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if "presentations" not in results and not any((folder / name).exists() for name in names):
        return
    from metarun.reporting.run_figures import draw

    _undisturbed(draw, folder)


def draw_curves(folder: Path) -> None:
    """Draw what a finished run has learned and reached, for those that ask for figures."""
    from metarun.reporting.run_figures import draw_curves as draw

    _undisturbed(draw, folder)


def _undisturbed(draw: Callable[[Path], object], folder: Path) -> None:
    try:
        draw(folder)
    except OSError as error:
        print(f"warning: {folder}/figures cannot be written: {error}", file=sys.stderr)


def guarded(work: Callable[[], object], *, debug: bool) -> int:
    """Do the work of one run; an exception becomes one line and an exit code.

    A `ValueError` is a refusal, before anything has changed, but for a `RunError`.

    Raises:
        SystemExit: The run was interrupted.
    """
    try:
        work()
    except Interrupted as stop:
        if distributed.first():
            print(f"interrupted: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except Exception as error:
        if debug:
            raise
        if distributed.speaks_of(error):
            print(f"error: {distributed.speaker()}{describe(error)}", file=sys.stderr)
        refused = isinstance(error, ValueError) and not isinstance(error, RunError)
        return EXIT_BAD_INPUT if refused else EXIT_FAILED
    return EXIT_OK


def describe(error: BaseException) -> str:
    """An error in one line for a reader, without a traceback."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (ValueError, ArithmeticError, OSError)):
        return one_line(error)
    # Not a user's mistake, so that one who can mend it needs to know what it is.
    return f"{type(error).__name__}: {one_line(error)} (debug=true shows where)"
