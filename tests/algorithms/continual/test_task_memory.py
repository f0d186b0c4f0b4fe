"""A memory of tasks, on linear tasks whose weights are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.continual.task_memory import TaskMemory
from metarun.core.types import Stream, TaskBatch
from metarun.evaluation.stream_rollouts import Rollouts
from tests.helpers import linear_backbone, make, regression_spec, slow

STEPS, ROWS = 30, 2
TRUTH = torch.tensor(
    [[2.0, -1.0, 0.5, 1.0], [-1.5, 2.0, 1.0, -2.0], [0.5, 1.5, -2.5, 0.5]]
).double()


def layout(visits: tuple[int, ...], *, task_ids_known: bool = True) -> Stream:
    return Stream(visits, STEPS, ROWS, 5, task_ids_known)


def batch(stream: Stream, rollouts: int = 2) -> TaskBatch:
    """Return rows of y = w x + b, with the weights of `TRUTH` for each task."""
    draw = torch.Generator().manual_seed(0)

    def rows(tasks: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.randn(rollouts, len(tasks), 3, generator=draw, dtype=torch.float64)
        y = (x * TRUTH[tasks, :3]).sum(-1, keepdim=True) + TRUTH[tasks, 3:]
        return x, y

    of_row = torch.tensor(stream.visits).repeat_interleave(STEPS * ROWS)
    of_query = torch.arange(stream.num_tasks).repeat_interleave(stream.queries)
    return TaskBatch(*rows(of_row), *rows(of_query))


def learner(stream: Stream, engine: str = "vmap", **options: Any) -> Any:
    spec = replace(regression_spec(), streams={"train": stream, "val": stream, "test": stream})
    how = {"online_lr": 0.1, "updates": 20, "visit_rows": 20, "memory": 4, "probes": 6}
    made = make(TaskMemory, spec, linear_backbone, engine=engine, **how | options)
    with torch.no_grad():
        for param in made.net.parameters():
            param.zero_()
    return made


def after(rollouts: Rollouts, steps: int) -> dict[str, Tensor]:
    while rollouts.step < steps:
        rollouts.advance()
    return rollouts.state


def truth(task: int, rollouts: int = 2) -> Tensor:
    return TRUTH[task].expand(rollouts, -1)


def learned(state: dict[str, Tensor]) -> Tensor:
    """Slope and offset, without the unused parameter of the body."""
    return state["weights"][:, 1:]


@pytest.mark.parametrize("engine", ["loop", slow("vmap")])
@pytest.mark.parametrize("task_ids_known", [True, False])
def test_a_task_that_returns_is_taken_up_where_it_was_left(
    engine: str, task_ids_known: bool
) -> None:
    stream = layout((0, 1, 2, 0), task_ids_known=task_ids_known)
    rollouts = Rollouts(learner(stream, engine), batch(stream), stream)
    for visit in range(3):
        state = after(rollouts, (visit + 1) * STEPS)
        torch.testing.assert_close(learned(state), truth(visit), atol=1e-3, rtol=0.0)
        assert (state["visit.place"] == -1).all()
    state = after(rollouts, 3 * STEPS + 1)
    assert (state["visit.place"] == 0).all()
    assert (state["memory.kept"] == 3).all()
    torch.testing.assert_close(learned(state), truth(0), atol=1e-3, rtol=0.0)


def test_a_new_task_begins_at_the_start_which_moves_towards_what_was_learned() -> None:
    stream = layout((0, 1))
    algorithm = learner(stream, start_lr=0.25, updates=1, online_lr=1e-12)
    rollouts = Rollouts(algorithm, batch(stream), stream)
    begun = rollouts.state["weights"].clone()
    state = after(rollouts, STEPS)
    state["weights"] = state["weights"] + 4.0
    state = after(rollouts, STEPS + 1)
    torch.testing.assert_close(state["weights"], begun + 1.0)
    torch.testing.assert_close(state["start"], begun + 1.0)
    assert (state["visit.rows"] == ROWS).all()


def test_surprise_finds_the_changes_and_nothing_else() -> None:
    stream = layout((0, 1, 2), task_ids_known=False)
    rollouts = Rollouts(learner(stream, memory=0), batch(stream), stream)
    turns = []
    while not rollouts.finished:
        rollouts.advance()
        if (rollouts.state["visit.rows"] == ROWS).any():
            assert (rollouts.state["visit.rows"] == ROWS).all()
            turns.append(rollouts.step - 1)
    assert turns == [0, STEPS, 2 * STEPS]


def test_without_surprise_nothing_begins_where_nothing_is_told() -> None:
    stream = layout((0, 1), task_ids_known=False)
    rollouts = Rollouts(learner(stream, surprise=1e30, updates=1), batch(stream), stream)
    state = after(rollouts, 2 * STEPS)
    assert (state["visit.rows"] == 2 * STEPS * ROWS).all()
    assert (state["memory.kept"] == 0).all()


def test_a_task_that_was_learned_again_keeps_one_place() -> None:
    """With `accept=0` nothing is restored during a visit: embeddings decide at its end."""
    stream = layout((0, 1, 0, 1))
    rollouts = Rollouts(learner(stream, accept=0.0), batch(stream), stream)
    after(rollouts, 3 * STEPS + 1)
    assert (rollouts.state["memory.kept"] == 2).all()
    assert ((rollouts.state["memory.rows"] > 0).sum(1) == 2).all()


def test_a_full_memory_gives_up_what_was_kept_longest_ago() -> None:
    stream = layout((0, 1, 2, 0))
    rollouts = Rollouts(learner(stream, memory=2), batch(stream), stream)
    state = after(rollouts, 3 * STEPS + 1)
    assert (state["visit.place"] == -1).all()
    torch.testing.assert_close(state["memory.weights"][:, 0, 1:], truth(2), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(state["memory.weights"][:, 1, 1:], truth(1), atol=1e-3, rtol=0.0)


def test_an_embedding_is_what_the_weights_answer_to_the_first_rows() -> None:
    stream = layout((0, 1))
    tasks = batch(stream)
    rollouts = Rollouts(learner(stream), tasks, stream)
    before = after(rollouts, STEPS)["weights"][:, 1:]
    state = after(rollouts, STEPS + 1)
    x = tasks.support_x[:, :6]
    torch.testing.assert_close(state["probes"], x)
    expected = (x * before[:, None, :3]).sum(-1) + before[:, None, 3]
    torch.testing.assert_close(state["memory.embedding"][:, 0], expected)


def test_a_lifetime_that_was_stopped_goes_on_bit_for_bit() -> None:
    stream = layout((0, 1, 0))
    whole = Rollouts(learner(stream), batch(stream), stream)
    after(whole, stream.num_steps)
    first = Rollouts(learner(stream), batch(stream), stream)
    after(first, STEPS + 7)
    second = Rollouts(learner(stream), batch(stream), stream)
    second.restore(first.save())
    after(second, stream.num_steps)
    assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": -1}, r"algo\.memory=-1: expected 0 or more"),
        ({"updates": 0}, r"algo\.updates=0: expected 1 or more"),
        ({"accept": -0.1}, r"algo\.accept=-0\.1: expected 0 or more"),
        ({"start_lr": 1.5}, r"algo\.start_lr=1\.5: expected 0 to 1"),
        ({"online_lr": 0.0}, r"algo\.online_lr=0\.0: expected positive numbers"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        learner(layout((0, 1)), **options)


def test_a_task_that_was_mistaken_for_another_does_not_take_its_place() -> None:
    """In the first step of task 1 both tasks give the same values."""
    stream = layout((0, 1))
    tasks = batch(stream)
    x, y = tasks.support_x.clone(), tasks.support_y.clone()
    away = TRUTH[1] - TRUTH[0]
    first = slice(STEPS * ROWS, STEPS * ROWS + ROWS)
    # Along the first input, so that (w1 - w0) x + b1 - b0 = 0.
    x[:, first, 0] -= ((x[:, first] * away[:3]).sum(-1) + away[3]) / away[0]
    y[:, first, 0] = (x[:, first] * TRUTH[1, :3]).sum(-1) + TRUTH[1, 3]
    rollouts = Rollouts(learner(stream), replace(tasks, support_x=x, support_y=y), stream)
    assert (after(rollouts, STEPS + 1)["visit.place"] == 0).all()
    state = after(rollouts, 2 * STEPS)
    algorithm = rollouts._algorithm
    kept = [
        algorithm._keep(algorithm.net, dict(algorithm.net.named_parameters()), own)
        for own in ({n: v[life] for n, v in state.items()} for life in range(2))
    ]
    for one in kept:
        assert one["memory.kept"] == 2
        torch.testing.assert_close(one["memory.weights"][0, 1:], TRUTH[0], atol=1e-3, rtol=0.0)
        torch.testing.assert_close(one["memory.weights"][1, 1:], TRUTH[1], atol=1e-3, rtol=0.0)
