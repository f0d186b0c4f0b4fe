"""One run: build its components, then train, validate and test them in a new folder.

Read `train` first; it calls the trainer in `training/trainer.py`.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from metarun.config.build import build_experiment, build_trackers
from metarun.config.composition import to_yaml
from metarun.config.loading import names_of
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import Screen, silent_screen
from metarun.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    Interrupted,
    OutOfTime,
    RunError,
    describe_error,
)
from metarun.core.sizes import least, varies
from metarun.core.streams import say, tell
from metarun.reporting import published
from metarun.reporting.run_figures import draw_curves, draw_figures
from metarun.runs.find import LAST, OUTPUTS
from metarun.runs.folder import NullRun, Run, RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from metarun.config.build import Experiment


_log = logging.getLogger(__name__)


def train(
    config: Config,
    folder: Path,
    overrides: Sequence[str],
    screen: Screen,
    config_dir: str | None = None,
) -> None:
    """Build the components of a run and train it in a new folder, which the main process makes.

    Args:
        config: Resolved and checked configuration.
        folder: Folder of the run, which does not exist yet or is empty.
        overrides: Overrides of the run, stored for a later `resume=`.
        screen: Screen for the progress.
        config_dir: Folder of the user's YAML files.
    """
    with distributed.agreed():
        experiment = build_experiment(config)
    run: Run = NullRun()
    if distributed.is_main():
        record = to_yaml(experiment.record)
        run = RunFolder.create(folder, config=record, overrides=list(overrides))
    train_experiment(run, experiment, screen, config_dir)


def train_experiment(
    run: Run, experiment: Experiment, screen: Screen, config_dir: str | None = None
) -> None:
    """Train, validate and test a run, starting from the checkpoint in its folder if any."""
    from metarun.trackers.base import Trackers
    from metarun.training import trainer

    record, run_info = experiment.record, experiment.run_info
    is_main = distributed.is_main()
    trackers = Trackers(build_trackers(record) if is_main else {}, record, run_info)
    with trackers.closing():
        results = trainer.train(
            experiment.algorithm,
            experiment.source,
            experiment.train,
            experiment.eval,
            run,
            run_info,
            screen,
            experiment.seed,
            trackers,
        )
        if not is_main:
            return
        draw_figures(run.path)
        if trackers.alive:
            draw_curves(run.path)
        trackers.finish(results, sorted((run.path / "figures").glob("*.*")))
    if record.get("published"):
        with screen.attached(), run.logging():
            tell_published(run.path, run.path, config_dir)


def tell_published(run: Path, folder: Path, config_dir: str | None) -> None:
    """Show a result with the published one and our reference, see `published.at_the_end`."""
    try:
        _log.info("%s", published.at_the_end(run, folder, config_dir))
    except (ValueError, OSError) as error:  # The run itself is complete.
        _log.warning("not compared with published values: %s", describe_error(error))


def train_without_folder(config: Config) -> int:
    """Train in a process other than the main one, without folder and screen; return exit code."""
    return exit_code_of(
        lambda: train(config, Path(), [], silent_screen()), debug=bool(config["debug"])
    )


class HydraTask:
    """The callable that Hydra calls for a single run.

    Attributes:
        code: Exit code of the run, once it has ended.
        folder: Folder of the run.
    """

    folder: Path

    def __init__(self, config_dir: str | None = None) -> None:
        self.code = EXIT_OK
        self._config_dir = config_dir

    def __call__(self, cfg: DictConfig) -> None:
        """Train a run in the folder that Hydra has created."""
        config, folder, overrides = from_hydra(cfg)
        self.folder = folder
        self.code = exit_code_of(
            lambda: train(config, folder, overrides, Screen(), self._config_dir),
            debug=bool(config["debug"]),
        )
        if self.code == EXIT_OK:
            tell_next(folder)


def tell_next(folder: Path) -> None:
    """Print the commands that usually follow a finished run."""
    results = RunFolder(folder).read_results()
    # A run outside outputs/ is not the one that `last` stands for.
    name = LAST if folder.resolve().is_relative_to(OUTPUTS.resolve()) else shlex.quote(str(folder))
    commands = [f"`metarun report {name}` draws it"]
    if "layout" not in results:
        commands.append(f"`metarun test={name} {_other_size(results)}` tests it in another setting")
    tell(f"next: {', '.join(commands)}")


def _other_size(results: Mapping[str, Any]) -> str:
    """Return words for another setting that the run's learner and data allow."""
    shot, query = results["shot"], results["query"]
    if results.get("sizes"):
        return "sizes=null way=5 shot=1"
    if any(map(varies, (results["way"], shot, query))):
        return " ".join(f"{key}={least(results[key])}" for key in ("way", "shot", "query"))
    if results["kind"] == "regression":
        return f"shot={10 if shot == 5 else 5}"
    if shot > 2:
        return "shot=2"
    # The classes may have no more rows than the run takes.
    return f"shot={shot + 1} query={query - 1}" if query > 1 else "eval.episodes=1000"


def from_hydra(cfg: DictConfig) -> tuple[Config, Path, list[str]]:
    """Return the resolved configuration, folder and overrides of the run that Hydra starts."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    config = cast("Config", OmegaConf.to_container(cfg, resolve=True))
    choices = cast("dict[str, Any]", OmegaConf.to_container(hydra.runtime.choices))
    config["names"] = names_of(choices, config)
    overrides = [str(word) for word in hydra.overrides.task]
    return config, _as_typed(Path(str(hydra.runtime.output_dir))), overrides


def _as_typed(folder: Path) -> Path:
    """Make Hydra's absolute folder relative to the current one if it is below it."""
    here = Path.cwd()
    below = folder != here and folder.is_relative_to(here)
    return folder.relative_to(here) if below else folder


def exit_code_of(work: Callable[[], object], *, debug: bool) -> int:
    """Call `work` and return an exit code; an exception becomes one line on stderr.

    A `ValueError` other than a `RunError` means bad input: nothing has been changed yet.

    Raises:
        SystemExit: The run was interrupted.
    """
    try:
        work()
    except Interrupted as stop:
        if distributed.is_main():
            say("interrupted", str(stop))
        raise SystemExit(stop.exit_code) from None
    except Exception as error:
        if debug:
            raise
        if distributed.should_report(error):
            kind: Literal["note", "error"] = "note" if isinstance(error, OutOfTime) else "error"
            say(kind, f"{distributed.error_prefix()}{describe_error(error)}")
        refused = isinstance(error, ValueError) and not isinstance(error, RunError)
        return EXIT_BAD_INPUT if refused else EXIT_FAILED
    return EXIT_OK
