"""The meta-test: at the end of a run, and of a finished run in another setting."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from metarun.algorithms.base import Algorithm
from metarun.core import distributed
from metarun.core.console import Screen, summary
from metarun.core.errors import Interrupted
from metarun.core.settings import EvalSettings
from metarun.core.types import EpisodeSource, Record
from metarun.evaluation.episodes import evaluate
from metarun.evaluation.measures import EpisodeMetrics
from metarun.evaluation.stream_rollouts import SplitRollouts
from metarun.runs.folder import RunFolder
from metarun.training.results import about, stream_figures, test_record, write_results
from metarun.training.signals import Signals, StopRequestedError, ticker
from metarun.training.state import load_parameters

_log = logging.getLogger(__name__)


def meta_test(
    algorithm: Algorithm,
    source: EpisodeSource,
    evaluation: EvalSettings,
    run: RunFolder,
    folder: Path,
    run_info: Mapping[str, Any],
    screen: Screen,
) -> Record:
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
        Interrupted: SIGINT or SIGTERM was received.
    """
    with screen.attached(), Signals() as signals, _removed_if_empty(folder):
        began = time.perf_counter()
        kind, checkpoint = distributed.on_main(lambda: _learned(run))
        with distributed.agreed():
            load_parameters(algorithm, checkpoint, run_info, run.path)
        try:
            measured = measure_test(algorithm, source, evaluation, screen, signals)
        except StopRequestedError as stop:
            raise Interrupted(stop.signum, "the meta-test was stopped: start it again") from None
        if not distributed.is_main():
            return {}
        figures = stream_figures(measured, source.spec, evaluation)
        record: Record = {
            **about(algorithm, source, run_info),
            **test_record(measured, source.spec, figures),
            "parameters_from": kind,
            "parameters_step": checkpoint["step"],
            "seconds": time.perf_counter() - began,
        }
        results = write_results(RunFolder(folder), record, algorithm, source, measured, figures)
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
    evaluation: EvalSettings,
    screen: Screen,
    signals: Signals,
) -> EpisodeMetrics:
    """Return the metrics of an algorithm on the test split, with a progress bar.

    It warns of episodes whose metric is not finite.
    """
    if source.spec.streams is not None:
        rollouts = test_rollouts(algorithm, source, evaluation)

        def roll_out() -> EpisodeMetrics:
            with screen.bar("test", rollouts.steps) as bar:
                return rollouts.run(ticker(bar, signals))

        return distributed.on_main(roll_out)
    with screen.bar("test", evaluation.episodes) as bar:
        measured = evaluate(
            algorithm,
            source,
            "test",
            evaluation.episodes,
            evaluation.tasks_per_batch,
            views=evaluation.views,
            curve_steps=evaluation.curve_steps,
            tick=ticker(bar, signals),
        )
    num_bad = int(np.count_nonzero(~np.isfinite(measured.values)))
    if num_bad:
        _log.warning(
            "%d of %d test episodes have no finite %s: try fewer eval.inner_steps",
            num_bad,
            evaluation.episodes,
            source.spec.metric,
        )
    return measured


def test_rollouts(
    algorithm: Algorithm, source: EpisodeSource, evaluation: EvalSettings
) -> SplitRollouts:
    """Return the rollouts along the test streams, not yet started."""
    return SplitRollouts(algorithm, source, "test", evaluation.episodes, evaluation.tasks_per_batch)
