"""The tasks of a step are the same, however many steps are drawn at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metarun.core.types import EpisodeSize, Progress, Share, SourceSetup, TaskBatch
from metarun.data.synthetic import Sinusoid
from metarun.training import tasks
from metarun.training.tasks import TrainingTasks
from tests.tiny_run import Watched

SIZE = EpisodeSize(1, 5, 10)


def sinusoids() -> Sinusoid:
    device = torch.device("cpu")
    sizes: Any = dict.fromkeys(("train", "val", "test"), SIZE)
    return Sinusoid(
        SourceSetup(sizes=sizes, seed=0, eval_seed=1, device=device, dtype=torch.float32)
    )


class Counted(Sinusoid):
    """Sinusoids that count how often they are asked."""

    def __init__(self) -> None:
        self.__dict__.update(vars(sinusoids()))
        self.asked: list[tuple[int, int]] = []

    def batch(self, split: Any, index: int, num_tasks: int) -> TaskBatch:
        self.asked.append((index, num_tasks))
        return super().batch(split, index, num_tasks)


def equal(one: TaskBatch, other: TaskBatch) -> bool:
    pairs = [
        (one.support_x, other.support_x),
        (one.support_y, other.support_y),
        (one.query_x, other.query_x),
        (one.query_y, other.query_y),
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize("begin", [0, 7])
def test_a_step_has_its_own_tasks_from_whichever_step_a_run_begins(
    most: int, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_STEPS", most)
    source, found = sinusoids(), TrainingTasks(Counted(), 4)
    for step in range(begin, 20):
        assert equal(found.of_step(Progress(step, 20)), source.batch("train", 4 * step, 4))


def test_small_tasks_are_drawn_for_many_steps_but_not_beyond_the_last() -> None:
    source = Counted()
    found = TrainingTasks(source, 4)
    for step in range(150):
        found.of_step(Progress(step, 150))
    assert source.asked == [(0, 4), (4, 256), (260, 256), (516, 84)]


def test_large_tasks_are_drawn_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_BYTES", 4 * SIZE.shot * 8)
    source = Counted()
    found = TrainingTasks(source, 4)
    for step in range(3):
        found.of_step(Progress(step, 150))
    assert source.asked == [(0, 4), (4, 4), (8, 4)]


def test_a_process_asks_for_its_share_alone() -> None:
    source = Counted()
    found = TrainingTasks(source, 5)
    for step in range(3):
        share = Share.of(5, 1, 2)
        tasks_here = found.of_step(Progress(step, 9, share))
        assert equal(tasks_here, sinusoids().batch("train", 5 * step + 2, 3))
    assert source.asked == [(2, 3), (7, 3), (12, 3)]


def test_where_sizes_vary_each_step_asks_for_its_own() -> None:
    source = Watched()
    found = TrainingTasks(source, 2)
    for step in range(3):
        found.of_step(Progress(step, 9))
    assert source.asked == [("train", 0), ("train", 2), ("train", 4)]
