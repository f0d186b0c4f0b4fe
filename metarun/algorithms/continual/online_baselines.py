"""Online learners that learn nothing before they live: the lines that others are held to.

Plain online learning, experience replay, elastic weight consolidation and joint training, from a
random start; and what regret is counted against. Shapes: T lifetimes, S rows of a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.base import positive
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
from metarun.core.types import Stream

_SLOT_HINDSIGHT = 38


class Online(WeightLearner):
    """Plain online learning: one gradient step on each step of the stream, and no memory.

    Args:
        updates: Gradient steps for each step of the stream.
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    def __init__(self, *, updates: int = 1, **common: Any) -> None:
        super().__init__(**common)
        self.strategy = UpdateStrategy(updates)


class ExperienceReplay(WeightLearner):
    """Replays a reservoir of earlier rows beside the incoming ones; see `rules.Replay`.

    Args:
        updates: Gradient steps for each step of the stream, each with rows drawn anew.
        memory: Rows remembered.
        replayed: Of them in a gradient step.
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    def __init__(
        self, *, updates: int = 1, memory: int = 200, replayed: int = 10, **common: Any
    ) -> None:
        super().__init__(**common)
        self.strategy = Replay(updates, memory, replayed)


class EWC(WeightLearner):
    """Holds weights back that earlier tasks need; see `rules.Elastic`.

    Args:
        updates: Gradient steps for each step of the stream.
        strength: Of the pull.
        fisher_rows: Rows that a task's Fisher information is taken over.
        **common: Those of `WeightLearner` and `Algorithm`.

    Raises:
        ValueError: The stream does not tell when a task ends.
    """

    needs_task_ids = True

    def __init__(
        self,
        *,
        updates: int = 1,
        strength: float = 1.0,
        fisher_rows: int = 100,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        assert self.spec.streams is not None
        visits = [stream.steps * stream.rows for stream in self.spec.streams.values()]
        # No task has more.
        self.strategy = Elastic(updates, strength, min(fisher_rows, max(visits)))


class JointTraining(WeightLearner):
    """Trains on everything seen so far at every step: a ceiling, since it forgets nothing.

    Args:
        updates: Gradient steps for each step of the stream.
        batch: Rows of a gradient step, from all that came.
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    def __init__(self, *, updates: int = 1, batch: int = 32, **common: Any) -> None:
        super().__init__(**common)
        self.strategy = Joint(updates, batch)


class JointHindsight(WeightLearner):
    """Weights that were trained on the whole stream before it began, and then stay.

    Nobody can have them: the comparator of `continual.regret` for a learner that does not adapt
    to tasks.

    Args:
        updates: Gradient steps of that training.
        batch: Rows of each, drawn evenly with replacement.
        **common: Those of `WeightLearner` and `Algorithm`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, *, updates: int = 5000, batch: int = 32, **common: Any) -> None:
        super().__init__(**common)
        positive("updates", updates)
        positive("batch", batch)
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
        """The gradient step of this number, as a function of one lifetime."""

        def one(net: nn.Module, theta: Params, own: State, x: Tensor, y: Tensor) -> State:  # noqa: ARG001
            key = draw_key(own, step, 0, x.device)
            rows = seeding.integers(key, _SLOT_HINDSIGHT, len(x), (self.batch,))
            loss = self._loss_of(net)
            return self._descend(own, loss, x.index_select(0, rows), y.index_select(0, rows))

        return one
