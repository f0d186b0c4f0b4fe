"""Rollouts of an online learner along streams: it predicts each step, then learns from it.

Measurements are kept step by step, so that an interrupted rollout resumes exactly where it
stopped. Shapes: T rollouts, K steps, V visits to tasks, J tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm, task_metric
from metarun.algorithms.common.online import OnlineLearner
from metarun.algorithms.common.update_strategies import Step
from metarun.core import distributed, seeding
from metarun.core.statistics import Floats, interval_record
from metarun.core.types import EpisodeSource, Prediction, Record, Split, Stream, TaskBatch
from metarun.evaluation import continual_metrics
from metarun.evaluation.evaluation import (
    Evaluated,
    Tick,
    add_to_digest,
    base_record,
    merged,
)
from metarun.evaluation.measures import BUILT_IN, Answers, Joined, MeasureEntry, as_array

MEASURED = ("incoming", "incoming_loss", "current", "matrix")
"""Names of the measurements that are kept of a rollout; see `Rollouts.measured`."""


class Rollouts:
    """T rollouts of an online learner that run together.

    Args:
        algorithm: Online learner; its parameters do not change.
        batch: Streams as support rows, and held-out rows of their tasks as query rows.
        stream: Layout of the streams.
        follow: Whether to measure along the stream, which takes most of the time. Otherwise only
            `final` and the last row of the matrix are computed.

    Attributes:
        step: Number of steps done.
        state: State of the learner, (T, …) tensors by name.
    """

    def __init__(
        self, algorithm: OnlineLearner, batch: TaskBatch, stream: Stream, *, follow: bool = True
    ) -> None:
        self._algorithm = algorithm
        self._batch = batch
        self._stream = stream
        self._follow = follow
        self._y = batch.support_y
        self._held_y = batch.query_y.unflatten(1, (stream.num_tasks, stream.queries))
        with torch.no_grad():
            self._x = algorithm.encode(batch.support_x)
            held_x = algorithm.encode(batch.query_x)
            self._held_x = held_x.unflatten(1, (stream.num_tasks, stream.queries))
            self.state = algorithm.start(self._x, self._y)
        self.step = 0
        self._begun = False
        self._kept: dict[str, list[Tensor]] = {name: [] for name in MEASURED}

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self._stream.num_steps

    @torch.no_grad()
    def begin(self, tick: Callable[[], None] | None = None) -> None:
        """Prepare the first step: let learners that train in hindsight do so. Runs only once.

        Args:
            tick: Function called during the preparation; it may raise an exception to stop, and
                the preparation then starts from the beginning.
        """
        if self._begun:
            return
        after = self.state
        for after in self._algorithm.train_in_hindsight(self.state, self._x, self._y, self._stream):  # noqa: B007
            if tick is not None:
                tick()
        self.state, self._begun = after, True

    @torch.no_grad()
    def advance(self) -> None:
        """Predict the rows of the next step, then learn from them."""
        self.begin()
        stream, number = self._stream, self.step
        task = stream.task(number) if stream.task_ids_known else None
        begins_visit = number % stream.steps == 0
        here = slice(number * stream.rows, (number + 1) * stream.rows)
        x, y = self._x[:, here], self._y[:, here]
        # Seeded by the step, so that algorithms that use torch's generator resume exactly.
        seeding.seed_torch(seeding.key("lifetime", number))
        if self._follow:
            if number == 0:
                self._kept["matrix"].append(self._row())
            outputs = self._algorithm.answers(self.state, x, task)
            self._keep("incoming", task_metric(self._algorithm.spec, outputs, y))
            self._keep("incoming_loss", self._loss(outputs, y))
        step = Step(number, here.start, task, begins_visit and stream.task_ids_known)
        self.state = self._algorithm.observe(self.state, x, y, step)
        self.step += 1
        if self._follow:
            current = stream.task(number)
            outputs = self._algorithm.answers(self.state, self._held_x[:, current], task)
            score = task_metric(self._algorithm.spec, outputs, self._held_y[:, current])
            self._keep("current", score)
        if (self._follow and self.step % stream.steps == 0) or self.finished:
            self._kept["matrix"].append(self._row())

    def measured(self) -> dict[str, Tensor]:
        """Return the measurements so far, in float64.

        `incoming` (T, K) and `incoming_loss` (T, K) are the metric and the mean loss of the rows
        of each step, before the learner learns from them. `current` (T, K) is the metric on the
        held-out rows of the step's task after the step. `matrix` (T, V + 1, J) is the metric on
        the held-out rows of each task, before the first visit and after each visit.
        """
        return {name: torch.stack(kept, 1) for name, kept in self._kept.items() if kept}

    def final(self) -> Tensor:
        """Return the metric (T,) over all held-out rows at the end of the stream.

        All tasks have the same number of held-out rows.
        """
        return self._kept["matrix"][-1].mean(-1)

    @torch.no_grad()
    def final_answers(self) -> Answers:
        """Return the answers for all held-out rows at the end of the stream."""
        outputs = self._outputs().flatten(1, 2)
        return Answers(self._algorithm.spec, self._batch, Prediction(outputs))

    def untrained(self) -> Tensor:
        """Return the metric (T, J) of a newly initialized network on the held-out rows."""
        outputs = self._algorithm.untrained_answers(self._batch.query_x)
        return self._scores(outputs.unflatten(1, self._held_y.shape[1:3]))

    def save(self) -> dict[str, Any]:
        """Return everything that `restore` needs."""
        return {
            "step": self.step,
            "state": self.state,
            "kept": self._kept,
            "begun": self._begun,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from the saved state of rollouts along the same streams."""
        device = self._x.device
        self.step, self._begun = saved["step"], saved["begun"]
        self.state = {name: value.to(device) for name, value in saved["state"].items()}
        self._kept = {
            name: [value.to(device) for value in values] for name, values in saved["kept"].items()
        }

    def _keep(self, name: str, values: Tensor) -> None:
        self._kept[name].append(values.double())

    def _row(self) -> Tensor:
        """Return the metric (T, J) on each task's held-out rows in the current state."""
        return self._scores(self._outputs())

    def _outputs(self) -> Tensor:
        """Return the outputs (T, J, Q, …) for each task's held-out rows in the current state."""
        learner, num_tasks = self._algorithm, self._stream.num_tasks
        if self._stream.task_ids_known and learner.capabilities.answers_depend_on_task:
            return learner.answers_of_tasks(self.state, self._held_x)
        rows = self._held_x.flatten(1, 2)
        outputs: Tensor = learner.answers(self.state, rows, None).unflatten(1, (num_tasks, -1))
        return outputs

    def _scores(self, outputs: Tensor) -> Tensor:
        return task_metric(self._algorithm.spec, outputs.double(), self._held_y)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = [self._algorithm.loss(*pair) for pair in zip(outputs, targets, strict=True)]
        return torch.stack(losses)


class StreamEvaluation:
    """Rollouts along all streams of a split, in batches; they can be saved and resumed.

    They run in the main process only, and all processes receive the results.

    Args:
        algorithm: Online learner.
        source: Data set whose tasks are streams.
        split: Split that the streams come from.
        episodes: Number of rollouts.
        tasks_per_batch: Rollouts that run together.
        follow: Whether to measure along the stream, as in `Rollouts`.
        proficiency: See `continual_metrics.summary`.
        measures: What is measured on the held-out rows at the end of a stream.

    Attributes:
        size: Number of steps of all batches together.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        source: EpisodeSource,
        split: Split,
        episodes: int,
        tasks_per_batch: int,
        *,
        follow: bool = True,
        proficiency: float | None = None,
        measures: Sequence[MeasureEntry] = BUILT_IN,
    ) -> None:
        assert isinstance(algorithm, OnlineLearner)
        assert source.spec.streams is not None
        self._algorithm = algorithm
        self._source = source
        self._split: Split = split
        self._stream = source.spec.streams[split]
        self._follow = follow
        self._proficiency = proficiency
        self._measures = {entry.shown.name: entry for entry in measures}
        self._starts = list(range(0, episodes, tasks_per_batch))
        self._sizes = [min(tasks_per_batch, episodes - start) for start in self._starts]
        self.size = len(self._starts) * self._stream.num_steps
        self._done: list[dict[str, Tensor]] = []
        self._rollouts: Rollouts | None = None

    def run(self, tick: Tick | None = None) -> Evaluated:
        """Run all rollouts to their end; see `Evaluation.run`. It counts steps."""
        return distributed.on_main(lambda: self._run(tick))

    def state_dict(self) -> Record | None:
        """Return everything that `load_state_dict` needs."""
        return {
            "done": self._done,
            "rollouts": None if self._rollouts is None else self._rollouts.save(),
        }

    def load_state_dict(self, state: Record) -> None:
        """Continue from the state of the same rollouts."""
        self._done = list(state["done"])
        if state["rollouts"] is not None:
            self._rollouts = self._begin()
            self._rollouts.restore(state["rollouts"])

    def _run(self, tick: Tick | None) -> Evaluated:
        was_training = self._algorithm.training
        self._algorithm.eval()
        try:
            while len(self._done) < len(self._starts):
                rollouts = self._rollouts = self._rollouts or self._begin()
                before = len(self._done) * self._stream.num_steps

                def look(rollouts: Rollouts = rollouts, before: int = before) -> None:
                    if tick is not None:
                        tick(before + rollouts.step)

                rollouts.begin(look)
                while not rollouts.finished:
                    rollouts.advance()
                    look()
                self._done.append({**self._along(rollouts), "final": rollouts.final()})
                self._rollouts = None
        finally:
            self._algorithm.train(was_training)
        # A checkpoint of an older version may lack a measure.
        names = [n for n in self._done[-1] if all(n in part for part in self._done)]
        joined = {n: as_array(torch.cat([part[n] for part in self._done])) for n in names}
        return self._evaluated(joined.pop("final"), joined)

    def _along(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return the measurements of rollouts that have ended."""
        if not self._follow:
            return {}
        found = {**rollouts.measured(), "untrained": rollouts.untrained()}
        answers = rollouts.final_answers()
        for entry in self._measures.values():
            found |= entry.of(answers)
        return found

    def _evaluated(self, values: Floats, joined: dict[str, Floats]) -> Evaluated:
        spec, digest = self._source.spec, self._digest()
        arrays: dict[str, Any] = {spec.metric: values, **joined}
        records = [base_record(values, digest)]
        if not self._follow:
            return Evaluated(values, digest, arrays, records[0])
        for name, entry in self._measures.items():
            if name in joined:
                summary = entry.summary(Joined(joined, values, self._source))
                arrays |= summary.arrays
                records.append(summary.record)
        figures = continual_metrics.summary(
            joined, self._stream, higher=spec.higher_is_better, proficiency=self._proficiency
        )
        arrays |= {f"{continual_metrics.FIGURE}{name}": own for name, own in figures.items()}
        stream = {name: interval_record(own) for name, own in figures.items()}
        records.append({"layout": asdict(self._stream), "stream": stream})
        table = continual_metrics.curves(joined, self._stream)
        return Evaluated(values, digest, arrays, merged(records), {"stream.csv": table.encode()})

    def _begin(self) -> Rollouts:
        batch = self._batch(len(self._done))
        return Rollouts(self._algorithm, batch, self._stream, follow=self._follow)

    def _batch(self, number: int) -> TaskBatch:
        return self._source.batch(self._split, self._starts[number], self._sizes[number])

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for number in range(len(self._starts)):
            add_to_digest(digest, self._batch(number))
        return digest.hexdigest()
