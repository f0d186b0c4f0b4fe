"""The training loop: meta-train, meta-validate, save checkpoints, and meta-test once at the end.

The loop knows no algorithm by name. A step depends only on its number, on the parameters and on
the checkpoint. A run that is killed and resumed therefore equals an uninterrupted one bit for
bit, and so does its `metrics.jsonl`.

If a run has several processes, each executes this loop with its share of the tasks of an update.
Only the main process uses the folder, the screen and the trackers.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from metarun.algorithms.base import Algorithm
from metarun.core import distributed
from metarun.core.console import BAR_SHOWS_IT, GOOD, Bar, Screen, duration, rate_text, summary
from metarun.core.files import check_space
from metarun.core.measures import values_text
from metarun.core.results import Results
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.types import EpisodeSource, Record, Share
from metarun.core.words import number_of
from metarun.data import recorded
from metarun.runs.folder import Run
from metarun.runs.openings import openings_after_training
from metarun.trackers.base import RATE, Trackers
from metarun.training.changes import began_with, note_changes, surroundings
from metarun.training.ending import check_time, early_end, has_ended
from metarun.training.failures import outcome
from metarun.training.meta_test import measure_test
from metarun.training.results import about, plan, write_results
from metarun.training.run_state import RunState
from metarun.training.signals import OutOfTimeError, Signals, StopRequestedError
from metarun.training.state import check_same_parameters, load_parameters, required_bytes
from metarun.training.tasks import TrainingTasks
from metarun.training.updates import Updates
from metarun.training.validation import validate

_log = logging.getLogger(__name__)

_LONG = 3600.0
"""Seconds of training that are told beforehand."""
_SHORTER = "a lower train.steps is shorter; Ctrl-C saves the run, and resume=last continues it"


def train(
    algorithm: Algorithm,
    source: EpisodeSource,
    train: TrainSettings,
    evaluation: EvalSettings,
    run: Run,
    run_info: Mapping[str, Any],
    screen: Screen,
    seed: int,
    trackers: Trackers | None = None,
) -> Results:
    """Start a run, or continue the one in the folder, and return the content of `results.json`.

    Args:
        algorithm: Learner as initialized from the seed; a checkpoint replaces its parameters.
        source: Data set of the run.
        train: Settings of meta-training.
        evaluation: Settings of meta-validation and meta-test.
        run: Folder that is new or has an interrupted run.
        run_info: Entries of the records that identify the run (algo, data, way …); `algo` has to
            be that of the checkpoint.
        screen: Console that shows the progress.
        seed: Seed of torch's global generator, which algorithms may use.
        trackers: Back ends that also receive every line of metrics.

    Raises:
        ValueError: The folder is in use, or its checkpoint does not fit; nothing has changed.
        RunError: The run stopped: a value is not finite, the disk or the memory is full, or
            another process has ended.
        Interrupted: SIGINT, SIGTERM or SIGHUP was received; the run is saved.
    """
    signals = Signals()
    # The last context to end, so that no signal interrupts the end of the others.
    with signals.received(), screen.attached(), run.locked(), run.logging():
        loop = _Loop(
            algorithm, source, train, evaluation, run, run_info, screen, seed, signals,
            trackers or Trackers(),
        )  # fmt: skip
        run.path = distributed.on_main(lambda: run.path)
        loop.restore()
        with outcome(run, signals, loop.state), signals.abortable():
            loop.begin()
            loop.train()
            return loop.finish()


@dataclass
class _Loop:
    """The loop of a run; `state` holds all that changes from step to step. See `train`."""

    algorithm: Algorithm
    source: EpisodeSource
    settings: TrainSettings
    evaluation: EvalSettings
    run: Run
    run_info: Mapping[str, Any]
    screen: Screen
    seed: int
    signals: Signals
    trackers: Trackers

    def __post_init__(self) -> None:
        self.metric = self.source.spec.metric
        self.began = time.perf_counter()
        tasks, number = self.settings.tasks_per_step, distributed.size()
        self.share = Share.of(tasks, distributed.rank(), number) if number > 1 else None
        count = self.share.count if self.share else tasks
        batches = TrainingTasks(self.source, tasks)
        total, seed = self.settings.steps, self.seed
        self.updates = Updates(self.algorithm, batches, total, seed, self.share)
        self.state = RunState(count, validated=0 if self.settings.steps else -1)

    # Start and resume.

    def restore(self) -> None:
        """Load the newest checkpoint, if there is one.

        Raises:
            ValueError: The run is finished, or the checkpoint does not fit; nothing has changed.
        """
        checkpoint = distributed.on_main(self._last)
        if checkpoint is None:
            return
        with distributed.agreed():
            load_parameters(self.algorithm, checkpoint, self.run_info, self.run.path)
        self.state.load_state_dict(checkpoint, self.algorithm.device)
        if not has_ended(self.settings, self.state):
            # The run goes on beyond its former end, and with it the meta-test.
            self.state.test = None
        lengths, step = checkpoint["lengths"], self.state.step
        if distributed.on_main(lambda: self.run.cut(lengths, step)):
            self.save()

    def _last(self) -> Record | None:
        checkpoint = self.run.load_last()
        if checkpoint is None:
            return None
        step, total = checkpoint["step"], self.settings.steps
        if step > total:
            raise ValueError(
                f"train.steps={total}: the run has already made {step} steps: use more"
            )
        if step == total and self.run.is_complete():
            raise ValueError(f"{self.run.path} is finished: use a larger train.steps to continue")
        return checkpoint

    def begin(self) -> None:
        """Write the environment and a first checkpoint, so that a run can resume from its start.

        Raises:
            ValueError: The disk has no space for the run.
        """
        if distributed.is_main():
            check_space(self.run.path, required_bytes(self.algorithm))
        here = surroundings(self.algorithm, self.source, self.run_info)
        state = self.state
        if state.saved is None:
            self.run.cut({}, 0)
            self.run.write_json("environment.json", here)
            self.run.write_json(recorded.FILE, recorded.record_of(self.source))
            self.save()
            _log.info("%s", plan(self.algorithm, self.run_info, self.settings, self.run.path))
        else:
            note_changes(self.run, state.step, here)
            self.run_info = {**self.run_info, **began_with(self.run)}
            _log.info("continuing %s from step %d", self.run.path, state.step)
        if state.best is None:
            self.run.drop_best()
        else:
            self.run.save_best(state.best)
        self._set_status("running")
        opening = time.perf_counter()
        self.trackers.begin(self.run, state.step, self.metric)
        # Not counted as time of the run: MLflow takes seconds to create its first database.
        state.began += time.perf_counter() - opening

    # Meta-training.

    def train(self) -> None:
        """Make the remaining updates, with validation, checkpoints and log lines between them."""
        state, total = self.state, self.settings.steps
        try:
            with self.screen.bar("train", total, state.step, _LONG, _SHORTER) as bar:
                while True:
                    if state.step != state.validated and (
                        has_ended(self.settings, state) or self._due(self.settings.eval_every)
                    ):
                        self._validate()
                    ends = has_ended(self.settings, state)
                    if ends and state.count:
                        self._write(state.means(), bar)
                    if state.step != state.saved and (
                        ends or self._due(self.settings.checkpoint_every)
                    ):
                        self.save()
                    if ends:
                        break
                    self.signals.check()
                    check_time(self.settings, self.began)
                    began = time.perf_counter()
                    self.updates.make(state, self._until_due())
                    line = state.means() if self._due(self.settings.log_every) else None
                    state.window_seconds += time.perf_counter() - began
                    if line is not None:
                        self._write(line, bar)
                    # Several processes would have to agree on the time.
                    elif bar.due and self.share is None:
                        bar.to(state.step, values_text(state.means(), self.metric))
                    else:
                        bar.to(state.step)
        except (StopRequestedError, OutOfTimeError):
            self.save()
            raise
        if state.step < total:
            text = "step %d/%d  %s: training ends here"
            _log.info(text, state.step, total, early_end(self.settings, state))

    def _due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`, or the last step."""
        return self.state.step == self.settings.steps or (
            every > 0 and self.state.step % every == 0
        )

    def _until_due(self) -> int:
        """Return the number of updates until a line, an evaluation or a checkpoint is due."""
        step, settings = self.state.step, self.settings
        every = (settings.log_every, settings.eval_every, settings.checkpoint_every)
        return min([settings.steps - step, *(n - step % n for n in every if n > 0)])

    def _write(self, line: Mapping[str, float], bar: Bar) -> None:
        state, total = self.state, self.settings.steps
        rate = state.count * self.settings.tasks_per_step / max(state.window_seconds, 1e-9)
        left = (total - state.step) * state.window_seconds / state.count
        state.begin_line()
        named = {f"train/{name}": value for name, value in line.items()}
        timing = {"seconds": state.seconds, "tasks_per_second": rate}
        self.run.append("metrics.jsonl", {"step": state.step, **named})
        self.run.append("timing.jsonl", {"step": state.step, **timing})
        self.trackers.metrics(state.step, {**named, RATE: rate})
        text = f"{values_text(line, self.metric)}  {rate_text(rate)}"
        bar.to(state.step, text)
        text = f"step {state.step}/{total}  {text}  {duration(left)} left"
        _log.info("%s", text, extra=BAR_SHOWS_IT)

    def _validate(self) -> None:
        state = self.state
        found = validate(
            self.algorithm,
            self.source,
            self.evaluation,
            self.screen,
            self.signals,
            first=state.best is None,
        )
        self.run.append("metrics.jsonl", {"step": state.step, **found.line()})
        self.trackers.metrics(state.step, found.line())
        state.validated = state.step
        better = found.better_than(None if state.best is None else state.best["mean"])
        total = self.settings.steps
        mark = ", the best so far" if better and total else ""
        at = f"step {state.step}/{total}  " if total else ""
        _log.info("%s%s%s", at, found, mark, extra=GOOD if better else {})
        if better:
            weights = copy.deepcopy(self.algorithm.state_dict())
            state.best = {
                **self._names(), "step": state.step, **found.figures(), "state": weights,
            }  # fmt: skip
            self.run.save_best(state.best)

    # Checkpoints.

    def save(self) -> None:
        """Write a checkpoint with everything that the next step depends on.

        It includes the best parameters: the state of the run depends on no other file.
        """
        state = self.state
        stored = state.state_dict()
        check_same_parameters(self.algorithm, state.step, self.run_info)
        self.run.save_last(
            {
                **self._names(),
                **stored,
                "lengths": self.run.lengths(),
                "state": state.trained or self.algorithm.state_dict(),
            }
        )
        state.saved = state.step
        self._set_status("running")

    def _save_test(self, test: Record) -> None:
        self.state.test = test
        self.save()

    def _set_status(self, status: Literal["running", "finished"]) -> None:
        self.run.set_status(status, step=self.state.step, steps=self.settings.steps)

    def _names(self) -> Record:
        return {name: self.run_info.get(name) for name in ("algo", "data", "seed")}

    # Meta-test.

    def finish(self) -> Results:
        """Evaluate on the test split, for the first and only time, and write the results."""
        state, chosen = self.state, self.state.best
        if chosen is not None:
            # A checkpoint during the meta-test has to hold the state at the end of training.
            state.trained = copy.deepcopy(self.algorithm.state_dict())
            self.algorithm.load_state_dict(chosen["state"])
        step = chosen["step"] if chosen else state.step
        text = f"testing on {number_of(self.evaluation.episodes, 'episode')}"
        text += f" with the parameters of step {step}" if step else ""
        _log.info("%s", text, extra=BAR_SHOWS_IT)
        evaluated = measure_test(
            self.algorithm,
            self.source,
            self.evaluation,
            self.screen,
            self.signals,
            resume=state.test,
            save=self._save_test,
            save_every=self.settings.checkpoint_every,
        )
        if not distributed.is_main():
            return cast("Results", {})
        record: Record = {
            **about(self.algorithm, self.source, self.run_info),
            **evaluated.record,
            "val": chosen and {key: chosen[key] for key in ("mean", "ci95", "episodes", "step")},
            "parameters_from": "best" if chosen else "last",
            "parameters_step": step,
            "test_openings": openings_after_training(self.run, state.step),
            **state.record(self.settings.tasks_per_step),
        }
        results = write_results(self.run, record, evaluated)
        self._set_status("finished")
        _log.info("%s", summary(results, str(self.run.path)))
        return results
