"""`test=RUN`: meta-test a run, on its own data or other data, also in another setting."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from metarun.config.build import Experiment, build_experiment
from metarun.config.checks import check_config
from metarun.config.composition import Composer, composer
from metarun.config.naming import HOW_TASKS_RUN, slug
from metarun.config.overrides import parse_value, refuse_change, with_values
from metarun.config.schema import Config
from metarun.core import distributed
from metarun.core.console import main_screen, warnings_held
from metarun.jobs.checks import check_data
from metarun.jobs.train import exit_code_of
from metarun.reporting.run_figures import draw_figures
from metarun.runs.folder import RunFolder

TESTABLE = ("way", "shot", "query", "bn", *HOW_TASKS_RUN, "debug")
"""Keys that may change in a meta-test, in addition to `data`, `data.…` and `eval.…`."""


def meta_test(path: str, words: Sequence[str], config_dir: str | None) -> int:
    """Meta-test a run and return the exit code.

    Args:
        path: Folder of the run.
        words: Overrides, such as `data=…` or `shot=…`.
        config_dir: Folder of the user's YAML files.

    Raises:
        ValueError: The folder is not a run, or an override may not change in a meta-test.
    """
    with distributed.agreed():
        run = RunFolder.open(path)
        experiment = _tested(run, words, config_dir)
    from metarun.training.meta_test import meta_test

    folder = distributed.on_main(lambda: run.test_folder(slug(words, 80) or "same"))

    def work() -> None:
        meta_test(
            experiment.algorithm,
            experiment.source,
            experiment.eval,
            run,
            folder,
            experiment.run_info,
            main_screen(),
        )
        if distributed.is_main():
            draw_figures(folder)

    return exit_code_of(work, debug=bool(experiment.record["debug"]))


def _tested(run: RunFolder, words: Sequence[str], config_dir: str | None) -> Experiment:
    """Build the components of a run for a meta-test."""
    stored = run.configuration()
    typed = dict(map(parse_value, words))
    name = typed.pop("data", None)
    for key in typed:
        if key not in TESTABLE and not key.startswith(("data.", "eval.")):
            refuse_change(key, stored, f"a meta-test: only data, eval.…, {', '.join(TESTABLE)} can")
    config = copy.deepcopy(stored)
    if name is not None:
        with composer(config_dir) as compose:
            config["data"] = _data_node(compose, name)
        config["names"]["data"] = name
    config = with_values(config, typed)
    # Nothing is trained: the training sizes must not fail the checks of the test's data.
    config["train"] |= {key: config[key] for key in ("way", "shot", "query")}
    settings = check_config(config)
    check_data(config)
    with warnings_held():
        experiment = build_experiment(config)
    if settings.way != stored["way"] and not experiment.algorithm.accepts_any_way:
        learned = "regression" if stored["way"] == 1 else f"way={stored['way']}"
        raise ValueError(
            f"way={settings.way}: the run has a fixed head for {learned}: train a new run instead"
        )
    return experiment


def _data_node(compose: Composer, name: Any) -> Config:
    """Return the node `data` of another data set, without any recipe."""
    if not isinstance(name, str):
        raise ValueError(f"data={name}: expected the name of one data set")
    job = compose.job([f"data={name}", "backbone=mlp", "~recipe"])
    return cast("Config", job.config["data"])
