"""The training tasks of each step."""

from __future__ import annotations

from functools import cached_property

from metarun.core.types import EpisodeSource, Progress, TaskBatch, layouts_differ

_STEPS = 64
"""Largest number of steps whose tasks are drawn together."""
_BYTES = 2**19
"""Size of the tasks that are drawn together, unless those of a single step are larger."""


class TrainingTasks:
    """Training tasks by step; small ones are drawn for several steps in one call of the source.

    To draw few numbers takes as long as to draw many, and a task depends on its index alone.

    Args:
        source: Data set of the run.
        tasks_per_step: Number of tasks of a step, of all processes together.
    """

    def __init__(self, source: EpisodeSource, tasks_per_step: int) -> None:
        self._source = source
        self._tasks = tasks_per_step
        self._steps = 1
        """Steps to draw at once; the first draw shows the size of their tasks."""
        self._first = 0
        self._drawn: TaskBatch | None = None

    @cached_property
    def sizes_vary(self) -> bool:
        """Whether the tasks of different steps may have different sizes."""
        return layouts_differ(self._source, "train")

    def ready(self, step: int) -> int:
        """Return the number of steps, from this one on, whose tasks are drawn in one call."""
        drawn = self._drawn.num_tasks // self._tasks if self._drawn is not None else 0
        left = self._first + drawn - step
        return left if left > 0 else self._steps

    def of_step(self, progress: Progress) -> TaskBatch:
        """Return the tasks of this process in the update after `progress.step` updates."""
        step, share = progress.step, progress.share
        if share is not None or self.sizes_vary:
            count = share.count if share else self._tasks
            return self._source.batch("train", progress.first_task(self._tasks), count)
        begin = (step - self._first) * self._tasks
        if self._drawn is None or not 0 <= begin < self._drawn.num_tasks:
            count = min(self._steps, progress.total - step)
            self._drawn = self._source.batch("train", step * self._tasks, count * self._tasks)
            self._first, begin = step, 0
            self._steps = min(_STEPS, max(1, _BYTES * count // _size(self._drawn)))
        return self._drawn[begin : begin + self._tasks]


def _size(tasks: TaskBatch) -> int:
    """Return the bytes of all rows, which are at least one."""
    rows = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
    return max(1, sum(tensor.nbytes for tensor in rows))
