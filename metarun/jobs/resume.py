"""`resume=RUN`: continue a run in its own folder.

The configuration stored in the run's folder applies. Only overrides of keys that may change
replace its values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf.errors import OmegaConfBaseException

from metarun.config import trust
from metarun.config.build import (
    Experiment,
    build_experiment,
    build_trackers,
    check_shares,
    options_in_files,
)
from metarun.config.checks import check_config
from metarun.config.composition import composer, to_yaml
from metarun.config.naming import HOW_IT_RUNS, HOW_TASKS_RUN, root_of
from metarun.config.overrides import (
    parse_value,
    refuse_change,
    with_values,
    without_repeated,
)
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import main_screen, warnings_held
from metarun.core.errors import EXIT_OK, one_line
from metarun.core.files import write_atomically
from metarun.core.nested import flat
from metarun.core.settings import TrainSettings
from metarun.core.streams import tell
from metarun.core.types import EpisodeSource
from metarun.jobs.train import exit_code_of, tell_next, train_experiment
from metarun.runs.folder import NullRun, Run, RunFolder

_log = logging.getLogger(__name__)

PLACES = ("data.root", "data.file")
"""Keys that say where the data are."""

RESUMABLE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.patience",
    "train.max_minutes",
    *HOW_TASKS_RUN,
    "debug",
    "logger",
    *PLACES,
)
"""Keys that may change when a run is resumed; any other key would make it a different run. A
`data.root` or a `data.file` has to hold the same data."""


def resume(path: str, words: Sequence[str], config_dir: str | None) -> int:
    """Continue a run in its own folder and return the exit code.

    Args:
        path: Folder of the run, or another name of it.
        words: Overrides, such as `train.steps=…`.
        config_dir: Folder of the user's YAML files.

    Raises:
        ValueError: The folder is not a run, or an override may not change.
    """
    with distributed.agreed():
        run = RunFolder.open(path)
    experiment = continuation(run, words, config_dir)
    if experiment is None:
        run.check_logs()
        made = run.status()["step"]
        tell(
            f"{run.path} is finished after {made} steps: {_how_to_go_on(run)}, or "
            f"test={run.path} to meta-test it"
        )
        return EXIT_OK
    code = exit_code_of(
        lambda: train_experiment(_ours(run), experiment, main_screen(), config_dir),
        debug=bool(experiment.record["debug"]),
    )
    if code == EXIT_OK and distributed.is_main():
        tell_next(run.path)
    return code


def _how_to_go_on(run: RunFolder) -> str:
    """Return what to type for more training of a finished run."""
    settings = run.configuration()["train"]
    if not _ended_early(run):
        return "type a larger train.steps to continue it"
    if settings.get("rehearse") is not None:
        return "it was a rehearsal: repeat its command without --rehearse"
    return f"train.patience={settings['patience']} ended it: type a larger one to continue it"


def _ended_early(run: RunFolder) -> bool:
    """Return whether a finished run has ended by its patience, or as a rehearsal."""
    settings = run.configuration()["train"]
    ends = any(settings.get(key) is not None for key in ("patience", "rehearse"))
    return ends and int(run.status()["step"]) < settings["steps"]


def _is_over(run: RunFolder, settings: TrainSettings) -> bool:
    """Return whether the patience or the rehearsal of some settings has ended a run already."""
    import torch

    from metarun.training.ending import early_end
    from metarun.training.run_state import RunState

    checkpoint = run.load_last()
    if checkpoint is None or settings.rehearse is not None:
        return True
    state = RunState(share=1)
    state.load_state_dict(checkpoint, torch.device("cpu"))
    return early_end(settings, state) is not None


def _ours(run: RunFolder) -> Run:
    """Return the folder in the main process and a null folder in all others."""
    return run if distributed.is_main() else NullRun()


def continuation(
    run: RunFolder,
    words: Sequence[str],
    config_dir: str | None,
    requested: Mapping[str, Any] | None = None,
) -> Experiment | None:
    """Build the components of a resumed run; None if the run is finished.

    Args:
        run: The run.
        words: Overrides, such as `train.steps=…`.
        config_dir: Folder of the user's YAML files.
        requested: The configuration that the user has typed, if the run belongs to a sweep.

    Raises:
        ValueError: An override may not change.
    """
    with distributed.agreed():
        words = without_repeated(words, run.configuration())
        experiment = _continued(run, words, config_dir, requested)
    if words and experiment is not None:
        distributed.on_main(lambda: _note(run, words, experiment))
    return experiment


def _note(run: RunFolder, words: Sequence[str], experiment: Experiment) -> None:
    """Store the new configuration and overrides of a resumed run."""
    with run.locked():
        _check_steps(run, experiment.train.steps)
        overrides = [*run.overrides(), *words]
        write_atomically(run.path / "config.yaml", to_yaml(experiment.record).encode())
        write_atomically(run.path / "overrides.yaml", to_yaml(overrides).encode())


def _continued(
    run: RunFolder,
    words: Sequence[str],
    config_dir: str | None,
    requested: Mapping[str, Any] | None,
) -> Experiment | None:
    stored = run.configuration()
    typed = dict(map(parse_value, words))
    named = [typed, requested]
    config = copy.deepcopy(stored)
    if "logger" in typed:
        config["logger"] = _trackers_node(typed.pop("logger"), stored, config_dir)
    for key in typed:
        if key not in RESUMABLE and not key.startswith("logger."):
            refuse_change(key, stored, f"a resumed run: only {', '.join(RESUMABLE)} can")
    config = with_values(config, typed)
    settings = check_config(config)
    if run.is_complete():
        early = _ended_early(run)
        reached = run.status()["step"] if early else stored["train"]["steps"]
        if settings.train.steps <= reached:
            return None
        # A run that ended early goes on only by another patience, if that is not over yet.
        if early and ("train.patience" not in typed or _is_over(run, settings.train)):
            return None
    with trust.stored(named, config_dir), warnings_held():
        for line in _changes(run, stored, typed, config_dir):
            _log.warning("%s", line)
        build_trackers(config)
        # Killed before its first checkpoint, it begins again.
        experiment = build_experiment(config, fresh=not run.has_checkpoint())
        check_shares(experiment)
    for key in PLACES:
        if key in typed:
            _check_same_data(run, f"{key}={typed[key]}", experiment.source)
    return experiment


def _check_same_data(run: RunFolder, word: str, source: EpisodeSource) -> None:
    """Check that a new place has the data with which the run began.

    Raises:
        ValueError: The data are other ones.
    """
    was, now = run.environment().get("data_fingerprint"), source.fingerprint()
    if was not in (None, now):
        raise ValueError(
            f"{word}: its fingerprint is {now}, that of the run's data is {was}: type where the "
            "same data are now"
        )


def _check_steps(run: RunFolder, steps: int) -> None:
    checkpoint = run.load_last()
    if checkpoint is not None and checkpoint["step"] > steps:
        raise ValueError(
            f"train.steps={steps}: the run has already made {checkpoint['step']} steps: "
            "expected more"
        )


def _trackers_node(word: Any, stored: Config, config_dir: str | None) -> Config:
    """Return the node `logger` of the new trackers; known trackers keep their stored options."""
    words = word if isinstance(word, list) else [word]
    with composer(config_dir) as compose:
        listed = ",".join(map(str, words))
        node = cast("Config", compose.job([f"logger=[{listed}]"]).config["logger"])
    before = stored.get("logger") or {}
    return {name: before.get(name, options) for name, options in node.items()}


def _changes(
    run: RunFolder, stored: Config, typed: Mapping[str, Any], config_dir: str | None
) -> list[str]:
    """Return a line for each key whose value composes differently now than when stored."""
    try:
        # Trackers are chosen again on a resume, and may be a user's own.
        words = [word for word in run.overrides() if root_of(word) != "logger"]
        trust.check_stored_words(words)
        with composer(config_dir) as compose:
            config = compose.job(words).config
    except (ValueError, OmegaConfBaseException) as error:
        hint = "" if config_dir else "; repeat --config-dir if the run had one"
        return [
            f"the run's overrides no longer compose ({one_line(error)}): its stored configuration "
            f"is used{hint}"
        ]
    then, now = flat(stored), flat(config)
    found = {f"data.{option}" for option in options_in_files(stored["data"])}
    lines: list[str] = []
    for key in sorted(then.keys() | now.keys()):
        expected = key in typed or key.partition(".")[0] in (*HOW_IT_RUNS, "names")
        # A learner without meta-training has stored 0 steps, which no override has set.
        expected |= key == "train.steps" and then.get(key) == 0
        expected |= key in found and now.get(key, _ABSENT) is None
        # Worked out from the weights of the backbone.
        expected |= key.startswith("backbone.") and now.get(key, _ABSENT) is None
        if not expected and then.get(key, _ABSENT) != now.get(key, _ABSENT):
            lines.append(
                f"{key} is now {now.get(key, _ABSENT)} in the configuration but was "
                f"{then.get(key, _ABSENT)} in the run: the run's value is kept"
            )
    return lines


_ABSENT = "absent"
