"""The next updates of a training loop: one, or several that are one call."""

from __future__ import annotations

from collections.abc import Iterator

from metarun.algorithms.base import Algorithm
from metarun.core import seeding
from metarun.core.types import Progress, Share, TaskBatch
from metarun.training.run_state import RunState
from metarun.training.tasks import TrainingTasks


class Updates:
    """Updates of an algorithm on the training tasks of a run.

    Args:
        algorithm: Learner that is trained.
        tasks: Training tasks of each step.
        total: Number of updates of the run.
        seed: Seed of torch's global generator.
        share: Share of this process in the tasks of an update; None without other processes.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        tasks: TrainingTasks,
        total: int,
        seed: int,
        share: Share | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._tasks = tasks
        self._total = total
        self._seed = seed
        self._share = share

    def make(self, state: RunState, most: int) -> None:
        """Make the next update, or up to `most` that are one call, and count them.

        Raises:
            NonFiniteError: A loss or a gradient is not finite; the updates before it are made.
        """
        whole = self._share is None and not self._tasks.sizes_vary
        count = min(most, self._tasks.ready(state.step))
        joined = whole and self._algorithm.joins_updates
        made = self._algorithm.update_several(self._steps(state.step, count)) if joined else []
        for metrics in made or (self._algorithm.update(*next(self._steps(state.step, 1))),):
            state.add(metrics)

    def _steps(self, first: int, count: int) -> Iterator[tuple[TaskBatch, Progress]]:
        for step in range(first, first + count):
            # Seeded by the step, so that algorithms that use torch's generator resume exactly.
            seeding.seed_torch(seeding.key("update", self._seed, step))
            progress = Progress(step, self._total, self._share)
            yield self._tasks.of_step(progress), progress
