"""The only loop: meta-train, meta-validate, checkpoint, and meta-test once at the end.

It knows no algorithm by name. Everything that a step depends on is in its number, in the
parameters and in the checkpoint, so that a run that was killed and resumed is the run that was
never killed, bit for bit, and so is its `metrics.jsonl`.

Where several processes make a run, all of them are in this loop: each has a share of the tasks of
an update, and they keep step. The folder, the screen and the trackers are the first one's.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core import distributed, environment, seeding
from metarun.core.console import BAR_SHOWS_IT, Bar, Screen, duration, figure, number, summary
from metarun.core.files import check_space
from metarun.core.nested import finite
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.types import EpisodeSource, Progress, Record, Share
from metarun.evaluation.measures import EpisodeMetrics
from metarun.runs.folder import RunFolder
from metarun.trackers.base import RATE, Trackers
from metarun.training.changes import note_changes
from metarun.training.failures import outcome
from metarun.training.meta_test import measure_test, test_rollouts
from metarun.training.results import about, stream_figures, test_record, write_samples, write_test
from metarun.training.signals import Signals, StopRequestedError, ticker
from metarun.training.state import check_same_parameters, load_parameters, required_bytes
from metarun.training.validation import is_better, validate

_log = logging.getLogger(__name__)


def train(
    algorithm: Algorithm,
    source: EpisodeSource,
    train: TrainSettings,
    evaluation: EvalSettings,
    run: RunFolder,
    run_info: Mapping[str, Any],
    screen: Screen,
    seed: int,
    trackers: Trackers | None = None,
) -> Record:
    """Make a run, or continue the one in the folder, to its end.

    Args:
        algorithm: As it was made from the seed; a checkpoint replaces its parameters.
        source: The data.
        train: Meta-training.
        evaluation: Meta-validation and meta-test.
        run: The folder, new or of a run that was interrupted.
        run_info: What the records say of the run (algo, data, way …); `algo` and `data` have to be
            those of the checkpoint.
        screen: Where to show how it goes.
        seed: Of whatever an algorithm draws from torch's global generator.
        trackers: What else is told of every line of metrics.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: The folder is in use, or its checkpoint does not suit; nothing has changed.
        RunError: The run broke off: not finite, no space, or another process is gone.
        Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    with screen.attached(), run.locked(), run.logging(), Signals() as signals:
        loop = _Loop(
            algorithm,
            source,
            train,
            evaluation,
            run,
            run_info,
            screen,
            seed,
            signals,
            trackers or Trackers(),
        )
        run.path = distributed.on_main(lambda: run.path)
        loop.restore()
        with outcome(run, signals, loop):
            loop.begin()
            loop.train()
            return loop.finish()


class _Loop:
    """One run under way.

    Attributes:
        step: Updates done.
        validated: Step of the last evaluation on meta-val, 0 before the first; -1 where there is
            nothing to train, and one evaluation all the same.
        best: Step, value, interval and state of the best evaluation on meta-val.
        trained: State at the end of training, once the best has taken its place.
        rollouts_state: How far the test lifetimes of a stream have come; None before they begin.
        sums, count: Metrics of the updates since the last line, on the device, and their number.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        source: EpisodeSource,
        train: TrainSettings,
        evaluation: EvalSettings,
        run: RunFolder,
        run_info: Mapping[str, Any],
        screen: Screen,
        seed: int,
        signals: Signals,
        trackers: Trackers,
    ) -> None:
        self.algorithm = algorithm
        self.source = source
        self.settings = train
        self.evaluation = evaluation
        self.run = run
        self.run_info = run_info
        self.screen = screen
        self.seed = seed
        self.signals = signals
        self.trackers = trackers
        self.metric = source.spec.metric
        self.share: Share | None = None
        self.share_size = train.tasks_per_step
        if distributed.size() > 1:
            self.share = Share.of(train.tasks_per_step, distributed.rank(), distributed.size())
            self.share_size = self.share.count
        self.step = 0
        self.saved: int | None = None
        self.validated = 0 if train.steps else -1
        self.best: Record | None = None
        self.trained: Record | None = None
        self.rollouts_state: Record | None = None
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.seconds_before = 0.0
        self.train_seconds = 0.0
        self.window_seconds = 0.0
        self.began = time.perf_counter()

    # Before and after.

    def restore(self) -> None:
        """Take up the newest checkpoint, if there is one.

        Raises:
            ValueError: The run is finished, or the checkpoint does not suit; nothing has changed.
        """
        checkpoint = distributed.on_main(self._last)
        if checkpoint is None:
            return
        with distributed.agreed():
            load_parameters(self.algorithm, checkpoint, self.run_info, self.run.path)
        device = self.algorithm.device
        self.step = self.saved = checkpoint["step"]
        self.validated = checkpoint["validated"]
        self.best = checkpoint["best"]
        self.sums = {name: value.to(device) for name, value in checkpoint["sums"].items()}
        self.count = checkpoint["count"]
        self.seconds_before = checkpoint["seconds"]
        self.train_seconds = checkpoint["train_seconds"]
        self.window_seconds = checkpoint["window_seconds"]
        over = self.step == self.settings.steps
        self.rollouts_state = checkpoint.get("rollouts") if over else None
        self.run.cut(checkpoint["lengths"])

    def _last(self) -> Record | None:
        checkpoint = self.run.load_last()
        if checkpoint is None:
            return None
        step, total = checkpoint["step"], self.settings.steps
        if step > total:
            raise ValueError(f"train.steps={total}: the run has made {step} steps: type more")
        if step == total and self.run.status().get("state") == "finished":
            raise ValueError(f"{self.run.path} is finished: type a larger train.steps to go on")
        return checkpoint

    def begin(self) -> None:
        """Write what the run runs on, and a checkpoint that a kill at once goes back to.

        Raises:
            ValueError: The disk has no room for the run.
        """
        if distributed.is_main():
            check_space(self.run.path, required_bytes(self.algorithm))
        device = str(self.algorithm.device)
        here = {
            **environment.describe(device),
            "engine": self.algorithm.resolved_engine().describe(),
            "data_fingerprint": self.source.fingerprint(),
        }
        if self.saved is None:
            self.run.cut({})
            self.run.write_json("environment.json", here)
            self.save()
        else:
            note_changes(self.run, self.step, here)
            _log.info("continuing %s from step %d", self.run.path, self.step)
        if self.best is None:
            self.run.drop_best()
        else:
            self.run.save_best(self.best)
        self.run.set_status("running", step=self.step, steps=self.settings.steps)
        opening = time.perf_counter()
        self.trackers.begin(self.run, self.step, self.metric)
        # No part of the run: MLflow makes its first database in seconds.
        self.began += time.perf_counter() - opening

    # Meta-training.

    def train(self) -> None:
        """Make the updates that are left."""
        total = self.settings.steps
        try:
            with self.screen.bar("train", total, self.step) as bar:
                while True:
                    self._validate_if_due()
                    if self._due(self.settings.checkpoint_every) and self.saved != self.step:
                        self.save()
                    if self.step >= total:
                        break
                    self.signals.check()
                    began = time.perf_counter()
                    self._update()
                    line = self._line() if self._due(self.settings.log_every) else None
                    self.window_seconds += time.perf_counter() - began
                    if line is not None:
                        self._write(line, bar)
                    bar.to(self.step)
        except StopRequestedError:
            self.save()
            raise

    def _due(self, every: int) -> bool:
        """Whether it is time for something that comes every so many steps and at the end."""
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _update(self) -> None:
        # So that an algorithm that draws from torch's generator resumes like any other.
        seeding.seed_torch(seeding.key("update", self.seed, self.step))
        progress = Progress(self.step, self.settings.steps, self.share)
        first = progress.first_task(self.settings.tasks_per_step)
        batch = self.source.batch("train", first, self.share_size)
        metrics = self.algorithm.update(batch, progress)
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.step += 1

    def _average(self) -> None:
        """Make the sums of the metrics those over all processes' tasks."""
        if self.sums:
            self.sums = distributed.mean(self.sums, self.share_size)

    def _line(self) -> dict[str, float]:
        """Means of the metrics since the last line: the only time that the device is waited for."""
        self._average()
        values = torch.stack(list(self.sums.values())) / self.count
        return dict(zip(self.sums, values.tolist(), strict=True))

    def _write(self, line: dict[str, float], bar: Bar) -> None:
        rate = self.count * self.settings.tasks_per_step / max(self.window_seconds, 1e-9)
        left = (self.settings.steps - self.step) * self.window_seconds / self.count
        self.train_seconds += self.window_seconds
        self.sums, self.count, self.window_seconds = {}, 0, 0.0
        named = {f"train/{name}": value for name, value in line.items()}
        self.run.append("metrics.jsonl", {"step": self.step, **named})
        self.run.append(
            "timing.jsonl",
            {"step": self.step, "seconds": self._seconds(), "tasks_per_second": rate},
        )
        self.trackers.metrics(self.step, {**named, RATE: rate})
        values = "  ".join(
            f"{name} {figure(name, value) if name == self.metric else number(value)}"
            for name, value in line.items()
        )
        text = f"{values}  {rate:,.0f} tasks/s"
        bar.to(self.step, text)
        _log.info(
            "step %d/%d  %s  %s left",
            self.step,
            self.settings.steps,
            text,
            duration(left),
            extra=BAR_SHOWS_IT,
        )

    # Meta-validation.

    def _validate_if_due(self) -> None:
        if self.step == self.validated or not self._due(self.settings.eval_every):
            return
        num_episodes = self.evaluation.val_episodes
        found = validate(self.algorithm, self.source, self.evaluation, self.screen, self.signals)
        option, mean, ci95 = found.option, found.mean, found.ci95
        named = {f"val/{self.metric}": mean, f"val/{self.metric}_ci95": ci95}
        named |= {f"val/{name}": value for name, value in option.items()}
        self.run.append("metrics.jsonl", {"step": self.step, **named})
        self.trackers.metrics(self.step, named)
        self.validated = self.step
        before = None if self.best is None else self.best["mean"]
        better = is_better(mean, before, higher=self.source.spec.higher_is_better)
        _log.info(
            "step %d/%d  val %s %s (%d episodes%s)%s",
            self.step,
            self.settings.steps,
            self.metric,
            figure(self.metric, mean, ci95),
            num_episodes,
            "".join(f", {name} {value:g}" for name, value in option.items()),
            ", the best so far" if better else "",
        )
        if better:
            self.best = {
                **self._names(),
                "step": self.step,
                "mean": mean,
                "ci95": ci95,
                "episodes": num_episodes,
                "state": copy.deepcopy(self.algorithm.state_dict()),
            }
            self.run.save_best(self.best)

    # Checkpoints.

    def save(self) -> None:
        """Write everything that the next step depends on.

        The best parameters are part of it: whatever else is on the disk, this file alone says
        where the run stands.
        """
        self._average()
        check_same_parameters(self.algorithm, self.step, self.run_info)
        self.run.save_last(
            {
                **self._names(),
                "step": self.step,
                "validated": self.validated,
                "best": self.best,
                "sums": self.sums,
                "count": self.count,
                "seconds": self._seconds(),
                "train_seconds": self.train_seconds,
                "window_seconds": self.window_seconds,
                "lengths": self.run.lengths(),
                "state": self.trained or self.algorithm.state_dict(),
                "rollouts": self.rollouts_state,
            }
        )
        self.saved = self.step
        self.run.set_status("running", step=self.step, steps=self.settings.steps)

    def _names(self) -> Record:
        return {"algo": self.run_info.get("algo"), "data": self.run_info.get("data")}

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    # Meta-test.

    def finish(self) -> Record:
        """Open the test split, for the first time and once, and sum up."""
        chosen = self.best
        if self.source.spec.streams is not None:
            # What is saved while the best lives.
            self.trained = copy.deepcopy(self.algorithm.state_dict())
        if chosen is not None:
            self.algorithm.load_state_dict(chosen["state"])
        _log.info(
            "testing on %d episodes with the parameters of step %d",
            self.evaluation.episodes,
            chosen["step"] if chosen else self.step,
            extra=BAR_SHOWS_IT,
        )
        if self.source.spec.streams is None:
            measured = measure_test(
                self.algorithm, self.source, self.evaluation, self.screen, self.signals
            )
        else:
            measured = distributed.on_main(self._test_on_stream)
        if not distributed.is_main():
            return {}
        figures = stream_figures(measured, self.source.spec, self.evaluation)
        results: Record = {
            **about(self.algorithm, self.source, self.run_info),
            **test_record(measured, self.source.spec, figures),
            "val": chosen and {key: chosen[key] for key in ("mean", "ci95", "episodes", "step")},
            "parameters_from": "best" if chosen else "last",
            "parameters_step": chosen["step"] if chosen else self.step,
            "steps": self.step,
            "tasks_per_step": self.settings.tasks_per_step,
            "seconds": self._seconds(),
            "train_seconds": self.train_seconds,
            "tasks_per_second": self.step
            * self.settings.tasks_per_step
            / max(self.train_seconds, 1e-9),
        }
        results = finite(results)
        write_test(self.run.path, self.source, measured, figures)
        self.run.write_json("results.json", results)
        write_samples(self.run.path, self.algorithm, self.source)
        self.run.set_status("finished", step=self.step, steps=self.settings.steps)
        _log.info("%s", summary(results, str(self.run.path)))
        return results

    def _test_on_stream(self) -> EpisodeMetrics:
        """Live through the test trajectories; a run that was stopped goes on in the midst."""
        rollouts = test_rollouts(self.algorithm, self.source, self.evaluation)
        if self.rollouts_state is not None:
            rollouts.restore(self.rollouts_state)
        with self.screen.bar("test", rollouts.steps) as bar:
            tick = ticker(bar, self.signals)

            every, kept = self.settings.checkpoint_every, 0

            def keep(done: int) -> None:
                nonlocal kept
                if every and done % every == 0 and done != kept:
                    kept = done
                    self.rollouts_state = rollouts.save()
                    self.save()
                tick(done)

            try:
                return rollouts.run(keep)
            except StopRequestedError:
                self.rollouts_state = rollouts.save()
                self.save()
                raise
