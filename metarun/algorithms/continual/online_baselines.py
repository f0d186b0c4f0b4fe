"""Baselines of online learning, from a random initialization.

They are plain online learning, experience replay, elastic weight consolidation, joint training,
and a comparator for regret that trains on the whole stream in advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.common.online import WeightLearner
from metarun.algorithms.common.update_strategies import (
    Elastic,
    Joint,
    Replay,
    State,
    Step,
    UpdateStrategy,
    draw_key,
)
from metarun.algorithms.functional import Params
from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import Stream

_SLOT_HINDSIGHT = 38


class Online(WeightLearner):
    """Plain online learning: one gradient step on each step of the stream, and no memory.

    Args:
        updates: Gradient steps for each step of the stream.
        **options: Options of `WeightLearner`.
    """

    def __init__(self, setup: LearnerSetup, *, updates: int = 1, **options: Any) -> None:
        super().__init__(setup, **options)
        self.strategy = UpdateStrategy(updates)


class ExperienceReplay(WeightLearner):
    """Replays rows of a reservoir together with the incoming ones; see `Replay`.

    Args:
        updates: Gradient steps for each step of the stream, each with other replayed rows.
        memory: Rows of the reservoir.
        replayed: Remembered rows in a gradient step.
        **options: Options of `WeightLearner`.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        updates: int = 1,
        memory: int = 200,
        replayed: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        self.strategy = Replay(updates, memory, replayed)


class EWC(WeightLearner):
    """Penalizes changes of weights that earlier tasks need; see `Elastic`.

    Args:
        updates: Gradient steps for each step of the stream.
        strength: Factor of the penalty.
        fisher_rows: Rows from which a task's Fisher information is estimated.
        **options: Options of `WeightLearner`.

    Raises:
        ValueError: The task boundaries of the stream are not known.
    """

    capabilities = replace(WeightLearner.capabilities, needs_task_ids=True)

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        updates: int = 1,
        strength: float = 1.0,
        fisher_rows: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        assert self.spec.streams is not None
        visits = [stream.steps * stream.rows for stream in self.spec.streams.values()]
        # No visit has more rows.
        self.strategy = Elastic(updates, strength, min(fisher_rows, max(visits)))


class JointTraining(WeightLearner):
    """Trains on all rows so far at every step: an upper bound, since it keeps all data.

    Args:
        updates: Gradient steps for each step of the stream.
        batch: Rows of a gradient step, drawn from all rows so far.
        **options: Options of `WeightLearner`.
    """

    def __init__(
        self, setup: LearnerSetup, *, updates: int = 1, batch: int = 32, **options: Any
    ) -> None:
        super().__init__(setup, **options)
        self.strategy = Joint(updates, batch)


class JointHindsight(WeightLearner):
    """Trains on the whole stream in advance, and is constant along it.

    No online learner can do this. It is the comparator of `continual_metrics.regret` for learners
    that do not adapt to tasks.

    Args:
        updates: Gradient steps of the training in advance.
        batch: Rows of a gradient step, drawn uniformly with replacement.
        **options: Options of `WeightLearner`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self, setup: LearnerSetup, *, updates: int = 5000, batch: int = 32, **options: Any
    ) -> None:
        super().__init__(setup, **options)
        at_least("algo", 1, updates=updates, batch=batch)
        self.updates = updates
        self.batch = batch

    def train_in_hindsight(
        self,
        state: State,
        x: Tensor,
        y: Tensor,
        stream: Stream,  # noqa: ARG002
    ) -> Iterator[State]:
        for update in range(self.updates):
            step = Step(update, 0, None, begins_visit=False)
            state = self._each(self._trained(step), state, x, y)
            yield state

    def learn(
        self,
        net: nn.Module,  # noqa: ARG002
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,  # noqa: ARG002
        y: Tensor,  # noqa: ARG002
        step: Step,  # noqa: ARG002
    ) -> State:
        return state

    def _trained(self, step: Step) -> Any:
        """Return the gradient step of this number, as a function of the state of one rollout."""

        def one(net: nn.Module, theta: Params, own: State, x: Tensor, y: Tensor) -> State:  # noqa: ARG001
            key = draw_key(own, step, 0, x.device)
            rows = seeding.integers(key, _SLOT_HINDSIGHT, len(x), (self.batch,))
            loss = self._loss_of(net)
            return self._descend(own, loss, x.index_select(0, rows), y.index_select(0, rows))

        return one
