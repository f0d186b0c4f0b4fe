"""FTML and its comparators, against loops written here in plain torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.continual.ftml import FTML, FTMLHindsight
from metarun.backbones.mlp import MLP
from metarun.core.types import Stream, TaskBatch
from metarun.evaluation.stream_rollouts import Rollouts
from tests.helpers import make, regression_batch, regression_spec

LAYOUT = Stream(visits=(0, 1, 2), steps=2, rows=2, queries=5)
TINY = partial(MLP, hidden=[4], activation="tanh")


def learner(stream: Stream = LAYOUT, engine: str = "loop", kind: Any = FTML, **options: Any) -> Any:
    spec = replace(regression_spec(), streams={"train": stream, "val": stream, "test": stream})
    how = {"meta_lr": 0.01, "inner_lr": 0.1, "inner_steps": 2, "meta_tasks": 3, "meta_rows": 4}
    return make(kind, spec, TINY, engine=engine, **how | options)


def trajectories(stream: Stream = LAYOUT, tasks: int = 2) -> TaskBatch:
    whole = regression_batch(regression_spec(), tasks, 30)
    rows, held = stream.num_steps * stream.rows, stream.num_tasks * stream.queries
    return TaskBatch(
        whole.support_x[:, :rows],
        whole.support_y[:, :rows],
        whole.query_x[:, :held],
        whole.query_y[:, :held],
    )


def rolled_out(algorithm: Any, batch: TaskBatch, stream: Stream = LAYOUT) -> Rollouts:
    rollouts = Rollouts(algorithm, batch, stream)
    while not rollouts.finished:
        rollouts.advance()
    return rollouts


def answer(weights: list[Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(torch.nn.functional.linear(x, weights[0], weights[1]))
    return torch.nn.functional.linear(hidden, weights[2], weights[3])


def adapted(
    weights: list[Tensor], x: Tensor, y: Tensor, steps: int = 2, *, graph: bool = False
) -> list[Tensor]:
    for _ in range(steps):
        loss = (answer(weights, x) - y).square().mean()
        grads = torch.autograd.grad(loss, weights, create_graph=graph)
        weights = [w - 0.1 * g for w, g in zip(weights, grads, strict=True)]
    return weights


def start(algorithm: Any) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in algorithm.net.parameters()]


def end(rollouts: Rollouts, task: int) -> list[Tensor]:
    return [v[task] for name, v in rollouts.state.items() if name.startswith("weights.")]


def test_from_scratch_adapts_to_the_rows_of_a_task_that_have_come() -> None:
    algorithm = learner(objective="none")
    batch = trajectories()
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    for _ in range(3):
        rollouts.advance()
    torch.testing.assert_close(end(rollouts, 0), [p.detach() for p in algorithm.net.parameters()])
    for task, rows in ((0, slice(0, 4)), (1, slice(4, 6))):
        found = algorithm.answers(rollouts.state, batch.query_x, task)
        for life in range(2):
            x, y = batch.support_x[life, rows], batch.support_y[life, rows]
            weights = adapted(start(algorithm), x, y)
            torch.testing.assert_close(found[life], answer(weights, batch.query_x[life]).detach())
    # Task 2 has not been met, so the weights are not adapted.
    found = algorithm.answers(rollouts.state, batch.query_x, 2)
    torch.testing.assert_close(found[0], answer(start(algorithm), batch.query_x[0]).detach())


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("objective", "second_order"), [("meta", True), ("meta", False), ("joint", True)]
)
def test_the_meta_update_is_adam_on_the_loss_after_adaptation(
    engine: str, objective: Any, second_order: bool
) -> None:
    """Each task repeats one row, so that the draws of rows do not matter."""
    stream = replace(LAYOUT, visits=(0,), steps=3)
    batch = trajectories(stream)
    same = TaskBatch(
        batch.support_x[:, :1].expand(-1, 6, -1), batch.support_y[:, :1].expand(-1, 6, -1),
        batch.query_x, batch.query_y,
    )  # fmt: skip
    algorithm = learner(stream, engine, objective=objective, second_order=second_order)
    rollouts = rolled_out(algorithm, same, stream)
    for life in range(2):
        weights = start(algorithm)
        first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
        x, y = same.support_x[life, :1], same.support_y[life, :1]
        for step in range(1, 4):
            fast = adapted(weights, x, y, graph=second_order) if objective == "meta" else weights
            grads = torch.autograd.grad((answer(fast, x) - y).square().mean(), weights)
            first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
            second = [0.999 * v + 0.001 * g * g for v, g in zip(second, grads, strict=True)]
            rate = 0.01 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            moves = [m / (v.sqrt() + 1e-8) for m, v in zip(first, second, strict=True)]
            weights = [
                (w - rate * move).detach().requires_grad_()
                for w, move in zip(weights, moves, strict=True)
            ]
        torch.testing.assert_close(end(rollouts, life), [w.detach() for w in weights])


def test_tasks_are_drawn_from_those_met_and_rows_from_those_that_came() -> None:
    algorithm = learner()
    batch = trajectories()
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    for _ in range(3):
        rollouts.advance()
    state = {name: value[0] for name, value in rollouts.state.items()}
    assert state["tasks.rows"].tolist() == [4, 2, 0]
    assert state["tasks.owner"].tolist() == [0, 1, -1]
    seen = set()
    for key in range(100):
        chosen = torch.tensor([0, 1, 1])
        rows = state["tasks.rows"][chosen]
        x, y = algorithm._drawn_rows(state, torch.tensor(key), 3, chosen, rows)
        for task, (own_x, own_y) in enumerate(zip(x, y, strict=True)):
            for row, target in zip(own_x, own_y, strict=True):
                place = (batch.support_x[0] == row).all(1).nonzero().item()
                assert place < 4 if task == 0 else 4 <= place < 6
                torch.testing.assert_close(batch.support_y[0, int(place)], target)
                seen.add(place)
    assert seen == set(range(6))


def test_train_on_everything_answers_alike_whatever_the_task() -> None:
    algorithm = learner(objective="joint", inner_steps=0)
    batch = trajectories()
    rollouts = rolled_out(algorithm, batch)
    answers = [algorithm.answers(rollouts.state, batch.query_x, task) for task in (0, 1, 2, None)]
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_a_frozen_learner_learns_from_the_first_visits_alone() -> None:
    batch = trajectories()
    frozen = rolled_out(learner(freeze_after=1), batch)
    free = Rollouts(learner(), batch, LAYOUT)
    for _ in range(2):
        free.advance()
    torch.testing.assert_close(end(frozen, 0), end(free, 0))
    assert frozen.state["updates"][0] == 2


def test_a_full_memory_gives_up_the_task_that_was_met_longest_ago() -> None:
    algorithm = learner(memory=2)
    batch = trajectories()
    rollouts = rolled_out(algorithm, batch)
    assert rollouts.state["tasks.owner"][0].tolist() == [2, 1]
    torch.testing.assert_close(rollouts.state["tasks.x"][0, 0], batch.support_x[0, 8:12])
    answers = [algorithm.answers(rollouts.state, batch.query_x, task) for task in (0, None)]
    assert torch.equal(*answers)


def test_a_returning_task_adds_to_its_rows() -> None:
    stream = Stream(visits=(0, 1, 0), steps=2, rows=2, queries=5)
    batch = trajectories(stream)
    state = rolled_out(learner(stream), batch, stream).state
    assert state["tasks.rows"][0].tolist() == [8, 4]
    rows = torch.cat([batch.support_x[0, :4], batch.support_x[0, 8:12]])
    torch.testing.assert_close(state["tasks.x"][0, 0], rows)


def test_a_lifetime_that_was_stopped_goes_on_bit_for_bit() -> None:
    batch = trajectories()
    whole = rolled_out(learner(), batch)
    first = Rollouts(learner(), batch, LAYOUT)
    for _ in range(3):
        first.advance()
    second = Rollouts(learner(), batch, LAYOUT)
    second.restore(copy.deepcopy(first.save()))
    while not second.finished:
        second.advance()
    assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"meta_lr": [0.1, -1.0]}, r"algo\.meta_lr=\[0\.1, -1\.0\]: expected positive numbers"),
        ({"inner_steps": -1}, r"algo\.inner_steps=-1: expected 0 or more"),
        ({"memory": 0}, r"algo\.memory=0: expected 1 or more"),
        ({"freeze_after": 0}, r"algo\.freeze_after=0: expected 1 or more"),
        ({"stream": replace(LAYOUT, task_ids_known=False)}, r"use data\.task_ids_known=true"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        learner(**options)


@pytest.mark.slow
def test_in_hindsight_the_start_is_learned_of_all_tasks_and_then_stays() -> None:
    algorithm = learner(kind=FTMLHindsight, meta_updates=400)
    batch = trajectories()
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    rollouts.begin()
    begun = end(rollouts, 0)
    # Before the first step no task has rows, so the initial weights predict.
    x, y = batch.support_x[0], batch.support_y[0]
    torch.testing.assert_close(
        algorithm.answers(rollouts.state, batch.query_x, 1)[0], answer(begun, batch.query_x[0])
    )

    def after_adaptation(weights: list[Tensor]) -> float:
        weights = [w.detach().clone().requires_grad_() for w in weights]
        parts = [(x[first : first + 4], y[first : first + 4]) for first in (0, 4, 8)]
        losses = [(answer(adapted(weights, *p), p[0]) - p[1]).square().mean() for p in parts]
        return float(torch.stack(losses).mean().detach())

    assert after_adaptation(begun) < 0.5 * after_adaptation(start(algorithm))
    while not rollouts.finished:
        rollouts.advance()
    torch.testing.assert_close(end(rollouts, 0), begun, rtol=0, atol=0)
    # At the end all rows of a task have come.
    weights = adapted([w.clone().requires_grad_() for w in begun], x[4:8], y[4:8])
    torch.testing.assert_close(
        algorithm.answers(rollouts.state, batch.query_x, 1)[0], answer(weights, batch.query_x[0])
    )


def test_in_hindsight_all_tasks_must_fit_into_the_memory() -> None:
    with pytest.raises(ValueError, match=r"algo\.memory=2: expected 3 or more"):
        learner(kind=FTMLHindsight, memory=2)
