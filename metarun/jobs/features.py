"""`metarun features`: the features of a data set as a file, by a run's network or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from metarun.config.build import Experiment, build_experiment
from metarun.config.composition import composer
from metarun.core.console import Screen, warnings_held
from metarun.core.files import to_npz, write_new
from metarun.core.types import SPLITS, HasRowsOfClasses
from metarun.inference.features import counted, features_of
from metarun.inference.learner import learned_state
from metarun.jobs.checks import check_data
from metarun.jobs.meta_test import tested
from metarun.runs.folder import RunFolder
from metarun.training.state import load_parameters

_SMALL = {"shot": "1", "query": "1"}
"""Sizes of the tasks, of which there are none: the fewest rows that a class needs."""
_OF_TRAINING = {"train.way": "2", "train.shot": "1", "train.query": "1"}
_NEW = {"algo": "protonet", "way": "2", **_SMALL, **_OF_TRAINING}


def write_features(
    run: str | None, words: Sequence[str], output: Path, config_dir: str | None
) -> str:
    """Write the features of a data set to a new `.npz` file.

    Args:
        run: Run whose network computes them; None takes a new one.
        words: Settings, such as `data=omniglot_small` and `backbone=conv4`.
        output: File to write.
        config_dir: Folder of the user's YAML files.

    Returns:
        What was written, in words.

    Raises:
        ValueError: A setting is invalid, or the network has no features of single rows.
    """
    experiment = _of_run(run, words, config_dir) if run else _new(words, config_dir)
    name = str(experiment.run_info["data"])
    screen = Screen()
    source = experiment.source
    total = 0
    if isinstance(source, HasRowsOfClasses):
        total = sum(count for split in SPLITS for count in source.counts(split))
    with screen.attached(), screen.bar("computing features", total) as bar:
        arrays = features_of(experiment.algorithm.eval(), source, name, bar.to)
    write_new(output, to_npz(arrays))
    return counted(arrays)


def _new(words: Sequence[str], config_dir: str | None) -> Experiment:
    """Build a network that no run has trained."""
    with composer(config_dir) as compose:
        config = compose.job(_with(words, _NEW)).config
    check_data(config)
    with warnings_held():
        return build_experiment(config)


def _of_run(name: str, words: Sequence[str], config_dir: str | None) -> Experiment:
    run = RunFolder.open(name)
    experiment = tested(run, _with(words, _SMALL), config_dir)
    load_parameters(experiment.algorithm, learned_state(run), experiment.run_info, run.path)
    return experiment


def _with(words: Sequence[str], defaults: dict[str, str]) -> list[str]:
    """Return words, with a default for each key that is not typed."""
    typed = {word.partition("=")[0] for word in words}
    return [*words, *(f"{key}={value}" for key, value in defaults.items() if key not in typed)]
