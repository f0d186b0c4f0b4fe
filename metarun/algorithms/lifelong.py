"""Online learners that learn nothing before they live: the lines that others are held to.

Plain online learning, experience replay, elastic weight consolidation and joint training, from a
random start.
"""

from __future__ import annotations

from typing import Any

from metarun.algorithms.online import WeightLearner
from metarun.algorithms.rules import Elastic, Joint, Replay, Rule


class Online(WeightLearner):
    """Plain online learning: one gradient step on each step of the stream, and no memory.

    Args:
        updates: Gradient steps for each step of the stream.
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    def __init__(self, *, updates: int = 1, **common: Any) -> None:
        super().__init__(**common)
        self.rule = Rule(updates)


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
        self.rule = Replay(updates, memory, replayed)


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

    def __init__(
        self,
        *,
        updates: int = 1,
        strength: float = 1.0,
        fisher_rows: int = 100,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.rule = Elastic(updates, strength, fisher_rows)
        assert self.spec.streams is not None
        if not self.spec.streams["test"].told:
            raise ValueError("EWC consolidates where a task ends: use data.told=true")


class JointTraining(WeightLearner):
    """Trains on everything seen so far at every step: a ceiling, since it forgets nothing.

    Args:
        updates: Gradient steps for each step of the stream.
        batch: Rows of a gradient step, from all that came.
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    def __init__(self, *, updates: int = 1, batch: int = 32, **common: Any) -> None:
        super().__init__(**common)
        self.rule = Joint(updates, batch)
