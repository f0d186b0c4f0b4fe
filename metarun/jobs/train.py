"""The runs of a request: checked before any folder is made, then trained one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from metarun.config.build import build_experiment, build_trackers
from metarun.config.composition import to_yaml
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import silent_screen
from metarun.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_OK,
    Interrupted,
    RunError,
    describe_error,
)
from metarun.reporting.run_figures import draw_curves, draw_figures
from metarun.runs.folder import NullRunFolder, RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from metarun.config.build import Experiment
    from metarun.core.console import Screen


def asked_for(cfg: DictConfig) -> tuple[Config, Path, list[str]]:
    """What Hydra hands to a run: its resolved configuration, its folder and its words."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from metarun.config.composition import names_of

    hydra = HydraConfig.get()
    config = cast("Config", OmegaConf.to_container(cfg, resolve=True))
    choices = cast("dict[str, Any]", OmegaConf.to_container(hydra.runtime.choices))
    config["names"] = names_of(choices, config)
    overrides = [str(word) for word in hydra.overrides.task]
    return config, _from_here(Path(str(hydra.runtime.output_dir))), overrides


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

        config, folder, overrides = asked_for(cfg)
        self.code = guarded(
            lambda: train(config, folder, overrides, Screen()), debug=bool(config["debug"])
        )


def _from_here(folder: Path) -> Path:
    """The folder as one would type it: Hydra's is absolute."""
    here = Path.cwd()
    below = folder != here and folder.is_relative_to(here)
    return folder.relative_to(here) if below else folder


def train(config: Config, folder: Path, overrides: Sequence[str], screen: Screen) -> None:
    """Make the parts of a run and train it in a new folder."""
    experiment = build_experiment(config)
    run = RunFolder.create(folder, config=to_yaml(experiment.record), overrides=list(overrides))
    train_in(run, experiment, screen)


def follow(config: Config) -> int:
    """Train a run whose folder and screen are the first process's; returns the exit code."""
    return guarded(
        lambda: train_in(NullRunFolder(), build_experiment(config), silent_screen()),
        debug=bool(config["debug"]),
    )


def train_in(run: RunFolder, experiment: Experiment, screen: Screen) -> None:
    """Train what was made of a run's configuration, from where its folder stands."""
    from metarun.trackers.base import Trackers
    from metarun.training import trainer

    record, run_info = experiment.record, experiment.run_info
    first = distributed.is_main()
    trackers = Trackers(build_trackers(record) if first else {}, record, run_info)
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
        if not first:
            return
        draw_figures(run.path)
        if trackers.alive:
            draw_curves(run.path)
        trackers.finish(results, sorted((run.path / "figures").glob("*.*")))


def guarded(work: Callable[[], object], *, debug: bool) -> int:
    """Do the work of one run; an exception becomes one line and an exit code.

    A `ValueError` is a refusal, before anything has changed, but for a `RunError`.

    Raises:
        SystemExit: The run was interrupted.
    """
    try:
        work()
    except Interrupted as stop:
        if distributed.is_main():
            print(f"interrupted: {stop}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except Exception as error:
        if debug:
            raise
        if distributed.should_report(error):
            print(f"error: {distributed.error_prefix()}{describe_error(error)}", file=sys.stderr)
        refused = isinstance(error, ValueError) and not isinstance(error, RunError)
        return EXIT_BAD_INPUT if refused else EXIT_FAILED
    return EXIT_OK
