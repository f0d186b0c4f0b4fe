"""One run of several: started, resumed where it stopped, or skipped if finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from metarun.config.composition import to_yaml
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import FILE_ONLY, Screen
from metarun.core.errors import Interrupted, OutOfTime, describe_error
from metarun.jobs.resume import continuation
from metarun.jobs.train import train, train_experiment
from metarun.runs.folder import NullRun, RunFolder
from metarun.runs.lock import InUse

State = Literal["finished", "kept", "failed", "interrupted", "paused", "elsewhere"]

_SECONDS_TO_BEGIN = 10.0
"""A folder that lacks a status for longer is abandoned: its process was killed at the start."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: `kept` means finished before, `paused` out of its time, `elsewhere` running in
            another process.
        why: Reason in one line if the run is not finished.
        signum: Signal that interrupted the run, else 0.
    """

    state: State
    why: str = ""
    signum: int = 0


def ensure_finished(
    config: Config, folder: Path, overrides: Sequence[str], config_dir: str | None, screen: Screen
) -> Outcome:
    """Start or resume the run of a folder; record a failure there, with its traceback.

    Args:
        config: Resolved configuration, whose hash is part of the folder's name.
        folder: Folder of the run, which may not exist yet.
        overrides: Overrides of the run.
        config_dir: Folder of the user's YAML files.
        screen: Screen for the progress.
    """
    try:
        if not distributed.on_main(lambda: _begun(folder)):
            train(config, folder, overrides, screen, config_dir)
            return Outcome("finished")
        run = RunFolder.open(folder)
        minutes = config["train"].get("max_minutes")
        # It is no part of the folder's name: the limit that is typed now applies.
        changed = minutes != run.configuration()["train"].get("max_minutes")
        words = [f"train.max_minutes={'null' if minutes is None else minutes}"] * changed
        experiment = continuation(run, words, config_dir, config)
        if experiment is None:
            return Outcome("kept")
        train_experiment(
            run if distributed.is_main() else NullRun(), experiment, screen, config_dir
        )
        return Outcome("finished")
    except Interrupted as stop:
        return Outcome("interrupted", str(stop), stop.signum)
    except OutOfTime as error:
        return Outcome("paused", str(error))
    except InUse as error:
        return Outcome("elsewhere", str(error))
    # Any failure of one run must not stop the others.
    except Exception as error:
        if config["debug"]:
            raise
        if is_finished(folder):  # by another process, a moment ago
            return Outcome("kept")
        # A damaged status.json raises ValueError; the original error is returned below.
        with suppress(OSError, InUse, ValueError):
            if distributed.is_main():
                _record_failure(config, folder, overrides, error)
        return Outcome("failed", describe_error(error))


def _begun(folder: Path) -> bool:
    _clear_false_start(folder)
    return folder.is_dir() and any(folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Return whether a folder's run is finished and its results can be read."""
    run = RunFolder(folder)
    with suppress(OSError, ValueError):
        return run.status().get("state") == "finished" and run.damage_of_results() is None
    return False


def _clear_false_start(folder: Path) -> None:
    """Remove the files of a process that was killed while it created the folder."""
    config = folder / "config.yaml"
    while config.exists() and not (folder / "status.json").exists():
        if time.time() - config.stat().st_mtime > _SECONDS_TO_BEGIN:
            RunFolder(folder).clear_false_start()
            return
        # Another process may be creating it right now.
        time.sleep(0.2)


def _record_failure(
    config: Config, folder: Path, overrides: Sequence[str], error: Exception
) -> None:
    """Write the reason of a failure to the run's folder, unless the trainer has done so."""
    if not (folder / "status.json").exists():
        RunFolder.create(folder, config=to_yaml(config), overrides=list(overrides))
    run = RunFolder(folder)
    with run.locked(), run.logging():
        status = run.status()
        if status["state"] != "failed":
            run.set_status("failed", step=status.get("step"), why=describe_error(error))
            _log.info("failed: %s", error, extra=FILE_ONLY, exc_info=error)
