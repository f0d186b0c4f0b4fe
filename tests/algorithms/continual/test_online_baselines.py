"""Online baselines, against loops written here in plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.common.update_strategies import Replay, Step
from metarun.algorithms.continual.online_baselines import (
    EWC,
    ExperienceReplay,
    JointHindsight,
    JointTraining,
    Online,
)
from metarun.backbones.mlp import MLP
from metarun.core.types import Stream, TaskBatch, TaskSpec
from metarun.evaluation.stream_rollouts import Rollouts
from tests.helpers import linear_backbone, make, regression_batch, regression_spec

LAYOUT = Stream(visits=(0, 1, 2), steps=4, rows=2, queries=5)
TINY = partial(MLP, hidden=[6])


def spec(stream: Stream = LAYOUT) -> TaskSpec:
    streams = {"train": stream, "val": stream, "test": stream}
    return replace(regression_spec(), streams=streams)  # type: ignore[arg-type]


def trajectories(tasks: int = 3) -> TaskBatch:
    """Return random rows: 24 of the stream and 15 held out."""
    whole = regression_batch(regression_spec(), tasks, 24)
    return TaskBatch(whole.support_x, whole.support_y, whole.query_x[:, :15], whole.query_y[:, :15])


def learner(kind: Any, backbone: Any = TINY, stream: Stream = LAYOUT, **options: Any) -> Any:
    return make(kind, spec(stream), backbone, **{"online_lr": 0.05, **options})


def rolled_out(algorithm: Any, batch: TaskBatch, stream: Stream = LAYOUT) -> Rollouts:
    rollouts = Rollouts(algorithm, batch, stream)
    while not rollouts.finished:
        rollouts.advance()
    return rollouts


def weights(rollouts: Rollouts, task: int) -> list[Tensor]:
    return [v[task] for name, v in rollouts.state.items() if name.startswith("weights.")]


def naive_sgd(algorithm: Any, rows: list[tuple[Tensor, Tensor]], lr: float) -> list[Tensor]:
    """Return the weights after torch's SGD on these rows, one step each."""
    import copy

    net = copy.deepcopy(algorithm.net)
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for x, y in rows:
        optimizer.zero_grad()
        (net.head.last(net.body(x)) - y).square().mean().backward()
        optimizer.step()
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_plain_online_learning_is_stochastic_gradient_descent_in_the_order_of_the_stream(
    engine: str,
) -> None:
    batch = trajectories()
    algorithm = learner(Online, engine=engine)
    rollouts = rolled_out(algorithm, batch)
    for task in range(3):
        rows = [
            (batch.support_x[task, i : i + 2], batch.support_y[task, i : i + 2])
            for i in range(0, 24, 2)
        ]
        expected = naive_sgd(algorithm, rows, 0.05)
        torch.testing.assert_close(weights(rollouts, task), expected)


def test_adam_is_torchs_adam_up_to_where_epsilon_is_added() -> None:
    batch = trajectories(1)
    algorithm = learner(Online, linear_backbone, online_optim="adam", online_lr=0.01)
    rollouts = rolled_out(algorithm, batch)
    parameters = [p.detach().clone().requires_grad_() for p in algorithm.net.head.last.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    for i in range(0, 24, 2):
        x, y = batch.support_x[0, i : i + 2], batch.support_y[0, i : i + 2]
        optimizer.zero_grad()
        (torch.nn.functional.linear(x, *parameters) - y).square().mean().backward()
        optimizer.step()
    found = [rollouts.state[f"weights.head.last.{name}"][0] for name in ("weight", "bias")]
    torch.testing.assert_close(found, [p.detach() for p in parameters], rtol=1e-5, atol=1e-7)


def test_every_step_is_judged_before_it_is_learned_and_its_task_after() -> None:
    batch = trajectories()
    algorithm = learner(Online)
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    before = algorithm.answers(rollouts.state, batch.support_x[:, :2], 0)
    rollouts.advance()
    after = algorithm.answers(rollouts.state, batch.query_x[:, :5], 0)
    measured = rollouts.measured()
    error = (before - batch.support_y[:, :2]).square().mean((1, 2))
    torch.testing.assert_close(measured["incoming"][:, 0], error)
    torch.testing.assert_close(measured["incoming_loss"][:, 0], error)
    error = (after - batch.query_y[:, :5]).square().mean((1, 2))
    torch.testing.assert_close(measured["current"][:, 0], error)


def test_the_matrix_has_a_row_before_and_after_each_visit() -> None:
    batch = trajectories()
    algorithm = learner(Online)
    rollouts = rolled_out(algorithm, batch)
    matrix = rollouts.measured()["matrix"]
    assert matrix.shape == (3, 4, 3)
    outputs = algorithm.answers(rollouts.state, batch.query_x, None)
    errors = (outputs - batch.query_y).square().unflatten(1, (3, 5)).mean((2, 3))
    torch.testing.assert_close(matrix[:, -1], errors)
    torch.testing.assert_close(rollouts.final(), errors.mean(1))
    with torch.no_grad():
        outputs = algorithm.net.head.last(algorithm.net.body(batch.query_x.flatten(0, 1)))
    errors = (outputs.view(3, 15, 1) - batch.query_y).square().unflatten(1, (3, 5)).mean((2, 3))
    torch.testing.assert_close(matrix[:, 0], errors)


@pytest.mark.parametrize("kind", [Online, ExperienceReplay, EWC, JointTraining])
def test_a_lifetime_that_was_stopped_goes_on_bit_for_bit(kind: Any) -> None:
    batch = trajectories()
    whole = rolled_out(learner(kind), batch)
    first = Rollouts(learner(kind), batch, LAYOUT)
    for _ in range(7):
        first.advance()
    second = Rollouts(learner(kind), batch, LAYOUT)
    second.restore(first.save())
    while not second.finished:
        second.advance()
    for name, values in whole.measured().items():
        assert torch.equal(values, second.measured()[name])
    assert all(torch.equal(value, second.state[name]) for name, value in whole.state.items())


@pytest.mark.parametrize("kind", [Online, ExperienceReplay, EWC, JointTraining])
def test_a_lifetime_is_the_same_alone_and_among_others_and_leaves_the_parameters(kind: Any) -> None:
    batch = trajectories()
    algorithm = learner(kind)
    before = [p.detach().clone() for p in algorithm.parameters()]
    together = rolled_out(algorithm, batch)
    alone = rolled_out(algorithm, batch[1:2])
    for name, values in together.measured().items():
        torch.testing.assert_close(values[1:2], alone.measured()[name])
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.parameters(), strict=True))


def test_with_a_memory_of_everything_replay_draws_from_all_rows_before() -> None:
    batch = trajectories(1)
    algorithm = learner(ExperienceReplay, memory=24, replayed=24)
    rollouts = rolled_out(algorithm, batch)
    # All of the memory is replayed, so the order of the draws does not matter.
    x, y = batch.support_x[0], batch.support_y[0]
    order = [torch.cat([torch.arange(i, i + 2), torch.arange(i)]) for i in range(0, 24, 2)]
    expected = naive_sgd(algorithm, [(x[rows], y[rows]) for rows in order], 0.05)
    torch.testing.assert_close(weights(rollouts, 0), expected)


@pytest.mark.slow
def test_a_reservoir_holds_every_row_with_the_same_probability() -> None:
    strategy = Replay(memory=5)
    x = torch.arange(20.0)[:, None]
    counts = torch.zeros(20)
    trials = 600
    for trial in range(trials):
        state = {"key": torch.tensor(trial), **strategy.begin({}, x, x)}
        for row in range(20):
            state = strategy.leave(
                state, x[row : row + 1], x[row : row + 1], Step(row, row, None, False)
            )
        assert torch.equal(state["memory.x"], state["memory.y"])
        kept = state["memory.x"][:, 0].long()
        assert len(kept.unique()) == 5
        counts[kept] += 1
    # Binomial with probability 1/4: five standard deviations.
    expected, deviation = trials / 4, (trials * 3 / 16) ** 0.5
    assert (counts - expected).abs().max() < 5 * deviation


def test_ewc_pulls_to_where_tasks_ended_by_their_fisher_information() -> None:
    stream = Stream(visits=(0, 1), steps=3, rows=2, queries=5)
    batch = trajectories(1)
    batch = TaskBatch(
        batch.support_x[:, :12],
        batch.support_y[:, :12],
        batch.query_x[:, :10],
        batch.query_y[:, :10],
    )
    algorithm = learner(EWC, linear_backbone, stream, strength=7.0, fisher_rows=4)
    rollouts = rolled_out(algorithm, batch, stream)
    last = algorithm.net.head.last
    w = torch.cat([last.weight.detach()[0], last.bias.detach()])
    x = torch.cat([batch.support_x[0], torch.ones(12, 1).double()], 1)
    y = batch.support_y[0, :, 0]

    def gradient(w: Tensor, rows: slice) -> Tensor:
        return 2 * x[rows].T @ (x[rows] @ w - y[rows]) / (rows.stop - rows.start)

    for i in range(0, 6, 2):
        w = w - 0.05 * gradient(w, slice(i, i + 2))
    anchor = w
    # The last four rows of the first task, with the gradient of each squared separately.
    fisher = torch.stack([gradient(anchor, slice(i, i + 1)).square() for i in range(2, 6)]).mean(0)
    for i in range(6, 12, 2):
        w = w - 0.05 * (gradient(w, slice(i, i + 2)) + 7.0 * fisher * (w - anchor))
    found = [
        rollouts.state[f"weights.head.last.{name}"][0].flatten() for name in ("weight", "bias")
    ]
    torch.testing.assert_close(torch.cat(found), w)


def test_ewc_without_strength_is_plain_online_learning() -> None:
    batch = trajectories()
    one, other = (
        rolled_out(learner(EWC, strength=0.0), batch),
        rolled_out(learner(Online), batch),
    )
    for name, values in one.measured().items():
        torch.testing.assert_close(values, other.measured()[name])


def test_ewc_asks_to_be_told_where_tasks_end() -> None:
    with pytest.raises(ValueError, match=r"use data\.task_ids_known=true"):
        learner(EWC, stream=replace(LAYOUT, task_ids_known=False))


@pytest.mark.slow
def test_joint_training_solves_tasks_that_online_learning_forgets() -> None:
    """Three rows that one linear map fits, shown one after another many times."""
    stream = Stream(visits=(0, 1, 2), steps=60, rows=1, queries=1)
    x = torch.eye(3).double() + 0.8
    y = torch.tensor([[1.0], [-1.0], [2.0]]).double()
    rows = torch.arange(3).repeat_interleave(60)
    batch = TaskBatch(x[rows][None], y[rows][None], x[None], y[None])
    joint = rolled_out(
        learner(JointTraining, linear_backbone, stream, updates=20, batch=8), batch, stream
    )
    online = rolled_out(learner(Online, linear_backbone, stream), batch, stream)
    assert joint.final() < 0.01
    assert online.measured()["matrix"][0, -1, 2] < 1e-6
    assert online.final() > 0.5


@pytest.mark.slow
def test_in_hindsight_everything_is_known_before_the_stream_begins_and_nothing_learned() -> None:
    """A linear network's minimum over all rows is the least-squares solution."""
    batch = trajectories()
    algorithm = learner(
        JointHindsight, linear_backbone, updates=3000, batch=24, online_optim="adam", online_lr=0.01
    )
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    rollouts.begin()
    x = torch.cat([batch.support_x, torch.ones_like(batch.support_x[..., :1])], -1)
    best = torch.linalg.lstsq(x, batch.support_y).solution
    squares = (x @ best - batch.support_y).square().mean((1, 2))
    begun = {name: value.clone() for name, value in rollouts.state.items()}
    while not rollouts.finished:
        rollouts.advance()
    losses = rollouts.measured()["incoming_loss"].mean(1)
    assert (losses < 1.05 * squares).all()
    assert (losses >= squares).all()
    for name, value in begun.items():
        torch.testing.assert_close(rollouts.state[name], value, rtol=0, atol=0)


def test_the_head_alone_may_learn_and_begin_anew() -> None:
    batch = trajectories()
    rollouts = rolled_out(learner(Online, adapt="head", head=[4]), batch)
    names = {name for name in rollouts.state if name.startswith("weights.")}
    assert names == {
        f"weights.{layer}.{part}"
        for layer in ("hidden.body.linears.0", "last")
        for part in ("weight", "bias")
    }
    algorithm = learner(Online, adapt="head", reset=True)
    begun = Rollouts(algorithm, batch, LAYOUT).state
    assert not torch.equal(begun["weights.last.weight"][0], algorithm.net.head.last.weight)
    assert (begun["weights.last.bias"] == 0).all()


def test_an_untaught_network_is_another_one_than_that_which_learns() -> None:
    batch = trajectories()
    algorithm = learner(Online)
    rollouts = Rollouts(algorithm, batch, LAYOUT)
    rollouts.advance()
    assert rollouts.untrained().shape == (3, 3)
    assert not torch.equal(rollouts.untrained(), rollouts.measured()["matrix"][:, 0])
    assert torch.equal(rollouts.untrained(), rollouts.untrained())


def test_predict_lives_through_a_stream_that_tells_nothing() -> None:
    batch = trajectories()
    algorithm = learner(Online)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    expected = algorithm.answers(rolled_out(algorithm, batch).state, batch.query_x, None)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Online, {"online_lr": 0.0}, r"algo\.online_lr=0\.0: expected positive numbers"),
        (Online, {"online_lr": []}, r"algo\.online_lr=\[\]: expected positive numbers"),
        (Online, {"head": [0]}, r"algo\.head=\[0\]: expected positive widths"),
        (Online, {"updates": 0}, r"algo\.updates=0: expected 1 or more"),
        (ExperienceReplay, {"memory": 0}, r"algo\.memory=0: expected 1 or more"),
        (EWC, {"strength": -1.0}, r"algo\.strength=-1\.0: expected 0 or more"),
        (JointTraining, {"batch": 0}, r"algo\.batch=0: expected 1 or more"),
        (Online, {"backbone": partial(MLP, batch_norm=True)}, r"use backbone\.norm=none"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(kind: Any, options: dict[str, Any], says: str) -> None:
    backbone = options.pop("backbone", TINY)
    with pytest.raises(ValueError, match=says):
        learner(kind, backbone, **options)


def test_streams_and_their_learners_belong_together() -> None:
    from metarun.algorithms.optimization.maml import MAML

    with pytest.raises(ValueError, match="use data=stream_"):
        make(Online, regression_spec(), TINY)
    with pytest.raises(ValueError, match="such as online or oml"):
        make(MAML, spec(), TINY)


def test_what_was_learned_in_hindsight_is_not_learned_again_by_one_who_was_stopped() -> None:
    batch = trajectories()
    algorithm = learner(JointHindsight, updates=30)
    looks: list[int] = []
    whole = Rollouts(algorithm, batch, LAYOUT)
    whole.begin(lambda: looks.append(1))
    assert len(looks) == 30
    whole.advance()
    later = Rollouts(algorithm, batch, LAYOUT)
    later.restore(whole.save())
    later.begin(lambda: looks.append(1))
    assert len(looks) == 30
    for name, value in whole.state.items():
        torch.testing.assert_close(later.state[name], value, rtol=0, atol=0)

    def stop() -> None:
        raise KeyboardInterrupt

    stopped = Rollouts(algorithm, batch, LAYOUT)
    with pytest.raises(KeyboardInterrupt):
        stopped.begin(stop)
    again = Rollouts(algorithm, batch, LAYOUT)
    again.restore(stopped.save())
    again.advance()
    for name, value in whole.state.items():
        torch.testing.assert_close(again.state[name], value, rtol=0, atol=0)
