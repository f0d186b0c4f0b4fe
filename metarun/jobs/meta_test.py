"""`test=RUN`: meta-test a run, on its own data or other data, also in another setting.

`test=RUN experiment=OTHER` tests it in the setting of another experiment, which then needs no
training of its own.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from metarun.algorithms.capabilities import Capabilities
from metarun.config import trust
from metarun.config.build import Experiment, build_experiment, build_source, options_in_files
from metarun.config.checks import check_config
from metarun.config.composition import Composer, composer, to_yaml
from metarun.config.naming import HOW_IT_RUNS, HOW_TASKS_RUN, root_of, slug
from metarun.config.overrides import (
    parse_value,
    refuse_change,
    with_values,
    without_repeated,
)
from metarun.config.schema import Config, Settings
from metarun.config.trust import locate
from metarun.core import distributed
from metarun.core.console import main_screen, warnings_held
from metarun.core.files import write_atomically
from metarun.core.nested import flat
from metarun.core.sizes import varies
from metarun.core.types import EpisodeSource
from metarun.jobs.checks import check_data
from metarun.jobs.train import exit_code_of, tell_published
from metarun.reporting.run_figures import draw_figures
from metarun.runs.folder import RunFolder

TESTABLE = ("way", "shot", "query", "sizes", "bn", *HOW_TASKS_RUN, "debug")
"""Keys that may change in a meta-test, in addition to `data`, `data.…` and `eval.…`."""

EVALUATION_ONLY = (
    "way",
    "shot",
    "query",
    "sizes",
    "bn",
    "eval",
    "data.rotations_eval",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
)
"""Keys without influence on the parameters after any step of training, with all keys below them.

`eval` and `train.eval_every` do influence at which step meta-val selects the checkpoint.
"""


def meta_test(path: str, words: Sequence[str], config_dir: str | None) -> int:
    """Meta-test a run and return the exit code.

    Args:
        path: Folder of the run, or another name of it.
        words: Overrides, such as `data=…` or `shot=…`.
        config_dir: Folder of the user's YAML files.

    Raises:
        ValueError: The folder is not a run, or an override may not change in a meta-test.
    """
    with distributed.agreed():
        run = RunFolder.open(path)
        experiment = tested(run, words, config_dir)
    from metarun.training.meta_test import meta_test

    folder = distributed.on_main(lambda: run.test_folder(slug(words, 80) or "same"))
    named = _words_of_experiment(run, words)

    def work() -> None:
        with _removed_without_results(folder):
            meta_test(
                experiment.algorithm,
                experiment.source,
                experiment.eval,
                run,
                folder,
                experiment.run_info,
                main_screen(),
            )
        if not distributed.is_main():
            return
        draw_figures(folder)
        if named:
            listed = to_yaml([*named, *(word for word in words if word not in named)])
            write_atomically(folder / "config.yaml", to_yaml(experiment.record).encode())
            write_atomically(folder / "overrides.yaml", listed.encode())
            screen = main_screen()
            with screen.attached():
                tell_published(run.path, folder, config_dir)

    return exit_code_of(work, debug=bool(experiment.record["debug"]))


@contextlib.contextmanager
def _removed_without_results(folder: Path) -> Iterator[None]:
    """Remove a test's new folder if the test fails, so that the next one has its name."""
    try:
        yield
    except BaseException:
        if distributed.is_main() and not (folder / "results.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def tested(run: RunFolder, words: Sequence[str], config_dir: str | None) -> Experiment:
    """Build the components of a run for a meta-test; its parameters are not loaded.

    Args:
        run: The run.
        words: Overrides, such as `data=…` or `shot=…`.
        config_dir: Folder of the user's YAML files.

    Raises:
        ValueError: An override is invalid, or may not change in a meta-test.
    """
    stored = run.configuration()
    typed = dict(map(parse_value, without_repeated(words, stored)))
    other, name = typed.pop("experiment", None), typed.pop("data", None)
    if other is not None and name is not None:
        raise ValueError("experiment= and data= exclude each other in a meta-test: type one")
    for key in typed:
        if key not in TESTABLE and not key.startswith(("data.", "eval.")):
            rule = f"a meta-test: only experiment, data, eval.…, {', '.join(TESTABLE)} can"
            refuse_change(key, stored, rule)
    config = copy.deepcopy(stored)
    chosen: Config = {}
    if other is not None:
        config = _in_setting_of(other, run, stored, config_dir)
    if name is not None:
        with composer(config_dir) as compose:
            config["data"] = chosen = _data_node(compose, name, words)
        config["names"]["data"] = name
        for option in options_in_files(chosen):
            # As for the run's own data, where the files of the new ones would decide.
            if chosen[option] is None:
                chosen[option] = stored["data"].get(option)
    config = with_values(config, typed)
    # Nothing is trained: the training sizes must not fail the checks of the test's data.
    sizes = {key: config["train"].get(key) for key in ("way", "shot", "query", "sizes")}
    config["train"] |= {key: config.get(key) for key in sizes}
    settings = check_config(config)
    _check_way(settings, stored)
    check_data(config)
    with trust.stored([typed, chosen], config_dir), warnings_held():
        source = _as_for_run(run, build_source(config)) if name is not None else None
        experiment = build_experiment(config, source, fresh=False)
    experiment.record["train"] |= sizes
    _check_way(settings, stored, experiment.algorithm.capabilities)
    return experiment


def _as_for_run(run: RunFolder, source: EpisodeSource) -> EpisodeSource:
    """Bring the images of other data to the shape and the normalization of a run's images."""
    from metarun.data.episodes import PreparesImages
    from metarun.data.preparation import Preparation
    from metarun.data.recorded import FILE

    record = run.read_json(FILE) if run.has(FILE) else {}
    described = record.get("preparation")
    if not isinstance(source, PreparesImages) or not isinstance(described, dict):
        return source
    try:
        device, dtype = source.preparation.device, source.preparation.dtype
        preparation = Preparation.of(described, device, dtype)
        return cast("EpisodeSource", source.as_for(tuple(record["input_shape"]), preparation))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run.path / FILE} is damaged, {error}: remove it") from error


def _check_way(settings: Settings, stored: Config, can: Capabilities | None = None) -> None:
    """Refuse another way for a learner whose head is built for one.

    Args:
        settings: Settings of the test.
        stored: Configuration of the run.
        can: What the learner can do; None takes that of its class and checks varying ways alone,
            for which none can be built.

    Raises:
        ValueError: The learner has such a head.
    """
    rule = settings.sizes
    if can is None:
        if rule is None and not varies(settings.way):
            return
        target = locate("algo._target_", settings.algo["_target_"])
        can = getattr(target, "capabilities", Capabilities())
    if can.accepts_any_way or (rule is None and settings.way == stored["way"]):
        return
    learned = "regression" if stored["way"] == 1 else f"way={stored['way']}"
    typed = f"way={settings.way}" if rule is None else f"sizes={rule}"
    raise ValueError(f"{typed}: the run has a fixed head for {learned}: train a new run instead")


def _in_setting_of(name: Any, run: RunFolder, stored: Config, config_dir: str | None) -> Config:
    """Return the configuration of a run with the evaluation of another experiment.

    Raises:
        ValueError: The run is not finished, there is no such experiment, or it would have trained
            differently.
    """
    if run.status().get("state") != "finished":
        raise ValueError(
            f"experiment={name}: the run is not finished: type resume={run.path} first"
        )
    trust.check_stored_words(run.overrides())
    with composer(config_dir) as compose:
        # A key that is newer than the run has the value that the run would have today.
        today = compose.job(_words_about_results(run)).config
        other = compose.job(_words_of_experiment(run, [f"experiment={name}"])).config
    trained = {**training_keys(today), **training_keys(stored)}
    # A learner without meta-training has stored 0 steps, which no override has set.
    trained["train.steps"] = trained["train.steps"] or today["train"]["steps"]
    wanted = training_keys(other)
    for key in (f"data.{option}" for option in options_in_files(other["data"])):
        # The run has stored what its files gave.
        wanted[key] = trained.get(key) if wanted.get(key) is None else wanted[key]
    differ = [
        f"{key} is {wanted.get(key, 'absent')} there and {trained.get(key, 'absent')} in the run"
        for key in sorted(trained.keys() | wanted.keys())
        if trained.get(key) != wanted.get(key)
    ]
    if differ:
        more = f", and {len(differ) - 2} more" if len(differ) > 2 else ""
        raise ValueError(
            f"experiment={name} trains differently from this run: {', '.join(differ[:2])}{more}; "
            "train a run of its own"
        )
    how = {key: stored[key] for key in HOW_IT_RUNS if key in stored and key != "published"}
    return {**other, **how}


def training_keys(config: Config) -> Config:
    """Return what training depends on, by dotted key, except how it is executed."""
    ignored = (*EVALUATION_ONLY, *HOW_IT_RUNS, "names", "resume", "test")
    return {key: value for key, value in flat(config).items() if not _is_below(key, ignored)}


def _is_below(key: str, others: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in others)


def _words_about_results(run: RunFolder) -> list[str]:
    return [word for word in run.overrides() if root_of(word) not in HOW_IT_RUNS]


def _words_of_experiment(run: RunFolder, words: Sequence[str]) -> list[str]:
    """Return the overrides of an experiment that was trained like a run; empty without one.

    The run's own overrides of training apply to it, such as a smaller `train.steps`.
    """
    named = [word for word in words if word.startswith("experiment=")]
    if not named:
        return []
    apart = ("experiment", *EVALUATION_ONLY)
    keys = {word: word.partition("=")[0] for word in _words_about_results(run)}
    return [*named, *(word for word, key in keys.items() if not _is_below(key, apart))]


def _data_node(compose: Composer, name: Any, words: Sequence[str]) -> Config:
    """Return the node `data` of another data set, without any recipe.

    Args:
        compose: Composer of the shipped and the user's files.
        name: Name of the data set.
        words: Overrides of the test, of which those that name other data sets are needed here.
    """
    if not isinstance(name, str):
        raise ValueError(f"data={name}: expected the name of one data set")
    named = [word for word in words if word.startswith(("data.sources=", "data.options="))]
    job = compose.job([f"data={name}", "backbone=mlp", "~recipe", *named])
    return cast("Config", job.config["data"])
