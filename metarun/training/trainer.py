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
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core import distributed, environment, seeding
from metarun.core.console import BAR_SHOWS_IT, Bar, Screen, duration, figure, number, summary
from metarun.core.files import check_space
from metarun.core.settings import EvalSettings, TrainSettings
from metarun.core.types import EpisodeSource, Progress, Record, Share
from metarun.evaluation.measures import EpisodeMetrics
from metarun.runs.folder import RunFolder
from metarun.trackers.base import RATE, Trackers
from metarun.training.changes import note_changes
from metarun.training.failures import outcome
from metarun.training.meta_test import measure_test, test_rollouts
from metarun.training.results import about, stream_figures, test_record, write_results
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
        Interrupted: SIGINT or SIGTERM was received; the run is saved.
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
    """The state of a run.

    Attributes:
        step: Number of updates done.
        saved: Step of the last checkpoint; None before the first.
        validated: Step of the last evaluation on meta-val, 0 before the first; -1 if there are no
            training steps, so that one evaluation still takes place.
        best: Step, mean, interval and state of the best evaluation on meta-val.
        trained: State at the end of training; None until the best parameters replace it.
        rollouts_state: State of the rollouts along the test streams; None before they begin.
        sums, count: Sums of the metrics since the last line, on the device, and the number of
            updates.
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
            raise ValueError(
                f"train.steps={total}: the run has already made {step} steps: use more"
            )
        if step == total and self.run.status().get("state") == "finished":
            raise ValueError(f"{self.run.path} is finished: use a larger train.steps to continue")
        return checkpoint

    def begin(self) -> None:
        """Write the environment and a first checkpoint, so that a run can resume from its start.

        Raises:
            ValueError: The disk has no space for the run.
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
            self._tell_frozen()
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
        # Not counted as time of the run: MLflow takes seconds to create its first database.
        self.began += time.perf_counter() - opening

    def _tell_frozen(self) -> None:
        """Log how many parameters do not learn, if any."""
        counts = [(p.numel(), p.requires_grad) for p in self.algorithm.parameters()]
        frozen = sum(count for count, learns in counts if not learns)
        if frozen:
            total = sum(count for count, _ in counts)
            _log.info("%s of %s parameters are frozen", f"{frozen:,}", f"{total:,}")

    # Meta-training.

    def train(self) -> None:
        """Make the remaining updates, with validation, checkpoints and log lines between them."""
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
        """Return whether this step is a multiple of `every`, or the last step."""
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _update(self) -> None:
        # Seeded by the step, so that algorithms that use torch's generator resume exactly.
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
        """Average the sums of the metrics over the processes."""
        if self.sums:
            self.sums = distributed.mean(self.sums, self.share_size)

    def _line(self) -> dict[str, float]:
        """Return the means of the metrics since the last line.

        Only this call waits for the device.
        """
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
        """Write a checkpoint with everything that the next step depends on.

        It includes the best parameters: the state of the run depends on no other file.
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
        """Evaluate on the test split, for the first and only time, and write the results."""
        chosen = self.best
        if self.source.spec.streams is not None:
            # A checkpoint during the test rollouts has to hold the state at the end of training.
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
        record: Record = {
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
        results = write_results(self.run, record, self.algorithm, self.source, measured, figures)
        self.run.set_status("finished", step=self.step, steps=self.settings.steps)
        _log.info("%s", summary(results, str(self.run.path)))
        return results

    def _test_on_stream(self) -> EpisodeMetrics:
        """Run the rollouts along the test streams, from the saved state if there is one."""
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
