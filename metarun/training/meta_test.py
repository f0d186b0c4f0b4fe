"""The meta-test: at the end of a run, and of a finished run in another setting."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from metarun.algorithms.base import Algorithm
from metarun.core import distributed
from metarun.core.console import Screen, summary
from metarun.core.errors import Interrupted
from metarun.core.results import Results
from metarun.core.settings import EvalSettings
from metarun.core.types import EpisodeSource, Record
from metarun.evaluation.calibration import fit_temperature
from metarun.evaluation.evaluation import Evaluated
from metarun.evaluation.on_split import meta_test as evaluation_of
from metarun.evaluation.samples import generated_samples
from metarun.runs.folder import RunFolder
from metarun.runs.openings import openings_with
from metarun.training.results import about, write_results
from metarun.training.signals import Signals, StopRequestedError, ticker
from metarun.training.state import load_parameters

_log = logging.getLogger(__name__)

_LONG = 60.0
"""Seconds of a meta-test that are told beforehand."""
_SHORTER = "fewer eval.episodes are shorter, with a wider interval"


def meta_test(
    algorithm: Algorithm,
    source: EpisodeSource,
    evaluation: EvalSettings,
    run: RunFolder,
    folder: Path,
    run_info: Mapping[str, Any],
    screen: Screen,
) -> Results:
    """Meta-test the learned parameters of a run, on its own data or on others.

    Args:
        algorithm: Learner built from the run's configuration, for the tasks of `source`.
        source: Data set of the test.
        evaluation: Settings of the test: number of episodes, inner steps and others.
        run: Run whose parameters are tested: the best by meta-val, else the last.
        folder: Folder for `results.json` and `episodes.npz`, created by `run.test_folder`.
        run_info: Entries of the records that identify the test, as in `train`.
        screen: Console that shows the progress.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: The run has no checkpoint, or it does not fit the algorithm.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received.
    """
    signals = Signals()
    with (
        signals.received(),
        screen.attached(),
        _removed_if_empty(folder),
        signals.abortable(),
    ):
        began = time.perf_counter()
        kind, checkpoint = distributed.on_main(lambda: _learned(run))
        with distributed.agreed():
            load_parameters(algorithm, checkpoint, run_info, run.path)
        try:
            evaluated = measure_test(algorithm, source, evaluation, screen, signals)
        except StopRequestedError as stop:
            raise Interrupted(stop.signum, "the meta-test was stopped: start it again") from None
        if not distributed.is_main():
            return cast("Results", {})
        record: Record = {
            **about(algorithm, source, run_info),
            **evaluated.record,
            "parameters_from": kind,
            "parameters_step": checkpoint["step"],
            "test_openings": openings_with(run, source.fingerprint()),
            "seconds": time.perf_counter() - began,
        }
        results = write_results(RunFolder(folder), record, evaluated)
        _log.info("%s", summary(results, str(folder)))
        return results


def _learned(run: RunFolder) -> tuple[str, Record]:
    """Return `best` or `last`, and that checkpoint."""
    learned = run.load_learned()
    if learned is None:
        raise ValueError(f"{run.path} has no checkpoint to test yet: let it run first")
    return learned


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folder at the end of the block if nothing was written into it."""
    try:
        yield
    finally:
        if distributed.is_main():
            with suppress(OSError):
                folder.rmdir()


def measure_test(
    algorithm: Algorithm,
    source: EpisodeSource,
    settings: EvalSettings,
    screen: Screen,
    signals: Signals,
    resume: Record | None = None,
    save: Callable[[Record], None] | None = None,
    save_every: int = 0,
) -> Evaluated:
    """Return the results of an algorithm on the test split, with a progress bar.

    It warns of episodes whose metric is not finite.

    Args:
        algorithm: The trained learner.
        source: The data set.
        settings: Settings of the test.
        screen: Console that shows the progress.
        signals: Signals that stop the test.
        resume: State of the same test, which then continues.
        save: Function that saves the state of the test, if the test can continue from one.
        save_every: Units of the test, such as steps of a stream, between two calls of `save`; with
            0, only a signal calls it.
    """
    temperature = 1.0
    if settings.temperature == "val":
        with screen.bar("temperature", settings.val_episodes) as bar:
            temperature = fit_temperature(algorithm, source, settings, ticker(bar, signals))
    evaluation = evaluation_of(algorithm, source, settings, temperature)
    if resume is not None:
        evaluation.load_state_dict(resume)
    saved = 0

    def keep() -> None:
        state = evaluation.state_dict()
        if save is not None and state is not None:
            save(state)

    with screen.bar("test", evaluation.size, 0, _LONG, _SHORTER) as bar:
        tick = ticker(bar, signals)

        def noted(done: int) -> None:
            nonlocal saved
            if save_every and done % save_every == 0 and done != saved:
                saved = done
                keep()
            tick(done)

        try:
            evaluated = evaluation.run(noted)
        except StopRequestedError:
            keep()
            raise
    num_bad = int(np.count_nonzero(~np.isfinite(evaluated.values)))
    if num_bad and source.spec.streams is None:
        _log.warning(
            "%d of %d test episodes have no finite %s: try fewer eval.inner_steps",
            num_bad,
            settings.episodes,
            source.spec.metric,
        )
    record = {**evaluated.record, "temperature": temperature}
    files = {**evaluated.files, **generated_samples(algorithm, source)}
    return replace(evaluated, record=record, files=files)
