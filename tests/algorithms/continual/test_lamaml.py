"""La-MAML against its algorithm, written here in plain torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.continual.lamaml import LaMAML
from metarun.backbones.mlp import MLP
from metarun.core.types import Stream, TaskBatch
from metarun.evaluation.stream_rollouts import Rollouts
from tests.helpers import linear_backbone, make, regression_batch, regression_spec

LAYOUT = Stream(visits=(0, 1), steps=3, rows=1, queries=5)
STREAMS: Any = {"train": LAYOUT, "val": LAYOUT, "test": LAYOUT}
TINY = partial(MLP, hidden=[4], activation="tanh")


def trajectories(stream: Stream = LAYOUT, tasks: int = 2) -> TaskBatch:
    whole = regression_batch(regression_spec(), tasks, 10)
    rows = stream.num_steps * stream.rows
    return TaskBatch(
        whole.support_x[:, :rows], whole.support_y[:, :rows], whole.query_x, whole.query_y
    )


def rolled_out(
    stream: Stream = LAYOUT, backbone: Any = TINY, engine: str = "loop", **options: Any
) -> Any:
    spec = replace(regression_spec(), streams={**STREAMS, "test": stream})
    algorithm = make(LaMAML, spec, backbone, engine=engine, **options)
    rollouts = Rollouts(algorithm, trajectories(stream), stream)
    while not rollouts.finished:
        rollouts.advance()
    return algorithm, rollouts


def naive(
    algorithm: Any, x: Tensor, y: Tensor, *, glances: int, rates: bool, moves: bool, second: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return weights and rates after single rows, each replayed in full, by the official loop."""
    weights = [p.detach().clone() for p in algorithm.net.parameters()]
    alphas = [torch.full_like(w, 0.15) for w in weights]

    def loss(weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.linear(x, weights[0], weights[1]))
        return (torch.nn.functional.linear(hidden, weights[2], weights[3]) - y).square().mean()

    for row in range(len(x)):
        for _ in range(glances):
            own = [w.clone().requires_grad_() for w in weights]
            steps = [a.clone().requires_grad_() for a in alphas]
            grads = torch.autograd.grad(
                loss(own, x[row : row + 1], y[row : row + 1]), own, create_graph=second
            )
            fast = [w - a.relu() * g for w, a, g in zip(own, steps, grads, strict=True)]
            seen = [row, *range(row)]
            meta = loss(fast, x[seen], y[seen])
            of_weights = torch.autograd.grad(meta, own, retain_graph=True)
            of_rates = torch.autograd.grad(meta, steps)
            clip = [
                [
                    g * min(1.0, 2.0 / float(torch.cat([h.flatten() for h in part]).norm()))
                    for g in part
                ]
                for part in (of_weights, of_rates)
            ]
            if rates:
                alphas = [a - 0.3 * g for a, g in zip(alphas, clip[1], strict=True)]
            weights = [
                w - (a.relu() if moves else 0.1) * g
                for w, a, g in zip(weights, alphas, clip[0], strict=True)
            ]
    return weights, alphas


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("rates", "step", "second"),
    [
        ("learned", "rates", False),
        ("learned", "fixed", False),
        ("fixed", "fixed", False),
        ("learned", "rates", True),
    ],
)
def test_it_is_the_official_loop(engine: str, rates: Any, step: Any, second: bool) -> None:
    algorithm, rollouts = rolled_out(
        engine=engine,
        rates=rates,
        step=step,
        second_order=second,
        glances=2,
        memory=10,
        replayed=10,
    )
    batch = trajectories()
    for task in range(2):
        expected = naive(
            algorithm, batch.support_x[task], batch.support_y[task],
            glances=2, rates=rates == "learned", moves=step == "rates", second=second,
        )  # fmt: skip
        for prefix, values in zip(("weights.", "rates."), expected, strict=True):
            found = [v[task] for n, v in rollouts.state.items() if n.startswith(prefix)]
            torch.testing.assert_close(found, values)


def test_the_rates_of_a_linear_model_follow_the_agreement_of_gradients() -> None:
    """With one row and one glance, the rate changes by its gradient's square after look-ahead."""
    stream = Stream(visits=(0,), steps=1, rows=1, queries=10)
    algorithm, rollouts = rolled_out(
        stream, linear_backbone, glances=1, clip_norm=1e9, rates_lr=0.01
    )
    batch = trajectories(stream)
    last = algorithm.net.head.last
    x, y = batch.support_x[0, 0], batch.support_y[0, 0, 0]
    w, b = last.weight.detach()[0], last.bias.detach()[0]
    first = 2 * (x @ w + b - y)
    ahead = 2 * (x @ (w - 0.15 * first * x) + b - 0.15 * first - y)
    expected = 0.15 + 0.01 * first * ahead * x.square()
    torch.testing.assert_close(rollouts.state["rates.head.last.weight"][0, 0], expected)


def test_a_negative_rate_stands_still() -> None:
    algorithm, rollouts = rolled_out(rates_start=1e-9, rates_lr=1e-12)
    for name, start in algorithm.net.named_parameters():
        torch.testing.assert_close(rollouts.state[f"weights.{name}"][0], start, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rates_lr": 0.0}, r"algo\.rates_lr=0\.0: expected a positive number"),
        ({"glances": 0}, r"algo\.glances=0: expected 1 or more"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rolled_out(**options)
