"""Reptile against an independent loop over tasks and mini-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.common.adapting import Support
from metarun.algorithms.optimization.reptile import Reptile, mini_batches
from metarun.core import seeding
from metarun.core.types import Progress, TaskBatch
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_batch,
    regression_spec,
)


def descended(weights: Tensor, x: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    """Run full-batch gradient descent on mean((x w - y)^2), a column of ones for the bias."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    for _ in range(steps):
        weights = weights - lr * 2 * x.T @ (x @ weights - y) / len(x)
    return weights


def stacked(algorithm: Any) -> Tensor:
    head = algorithm.net.head
    return torch.cat([head.weight, head.bias[:, None]], 1).T.detach().clone()


def test_with_outer_rate_1_it_lands_on_the_mean_of_the_adapted_weights() -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    algorithm = make(
        Reptile, spec, linear_backbone, inner_optimizer="sgd", inner_lr=0.05, inner_batch=None
    )
    start = stacked(algorithm)
    algorithm.update(batch, Progress(0, 10))
    x = torch.cat([batch.support_x, batch.query_x], 1)
    y = torch.cat([batch.support_y, batch.query_y], 1)
    ends = [descended(start, x[i], y[i], 0.05, 5) for i in range(batch.num_tasks)]
    torch.testing.assert_close(stacked(algorithm), torch.stack(ends).mean(0))


def test_a_sum_over_the_rows_of_a_mini_batch_is_a_rate_of_sgd_as_many_times_as_large() -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    sgd: dict[str, Any] = {"inner_optimizer": "sgd", "inner_batch": 4}
    summed = make(Reptile, spec, linear_backbone, inner_lr=0.01, inner_loss="sum", **sgd)
    averaged = make(Reptile, spec, linear_backbone, inner_lr=0.04, **sgd)
    for algorithm in (summed, averaged):
        algorithm.update(batch, Progress(0, 10))
    torch.testing.assert_close(stacked(summed), stacked(averaged))


def test_with_adam_a_sum_changes_the_steps_of_evaluation_alone() -> None:
    """Training keeps second moments of sums over 4 rows; evaluation steps on sums over 2."""
    spec = regression_spec()
    batch = regression_batch(spec)
    options: dict[str, Any] = {"inner_batch": 4, "eval_inner_batch": 2, "inner_lr": 0.01}
    pair = [make(Reptile, spec, linear_backbone, inner_loss=k, **options) for k in ("mean", "sum")]
    for algorithm in pair:
        algorithm.update(batch, Progress(0, 10))
    torch.testing.assert_close(stacked(pair[0]), stacked(pair[1]))
    kept = [dict(a.named_buffers())["second_moment/head/weight"] for a in pair]
    torch.testing.assert_close(kept[1], 16 * kept[0])
    rows = (batch.support_x[0], batch.support_y[0])
    steps = []
    for algorithm in pair:
        theta = dict(algorithm.net.named_parameters())
        start, end = algorithm.path(algorithm.net, theta, Support(*rows, 1), 1)
        steps.append(end["head.weight"] - start["head.weight"])
    ratio = steps[1] / steps[0]
    # It would be 2 / 4, were the step's own gradient not a part of the moments it is divided by.
    assert ((ratio >= 0.5) & (ratio < 0.9)).all()


def naive_adam(algorithm: Any, batch: TaskBatch, carry: bool) -> Tensor:
    """Return the mean weights after Adam with beta1 = 0, with moments kept or reset per task."""
    x = torch.cat([batch.support_x, batch.query_x], 1)
    y = torch.cat([batch.support_y, batch.query_y], 1)
    start = stacked(algorithm)
    keys = seeding.task_keys(0, "mini-batches", 0, batch.num_tasks, torch.device("cpu"))
    order = mini_batches(keys, x.shape[1], 4, 5)
    second, count = torch.zeros_like(start), 0
    ends = []
    for i in range(batch.num_tasks):
        weights = start
        if not carry:
            second, count = torch.zeros_like(start), 0
        for rows in order[i]:
            ones = torch.ones(len(rows), 1, dtype=x.dtype)
            features = torch.cat([x[i, rows], ones], 1)
            grad = 2 * features.T @ (features @ weights - y[i, rows]) / len(rows)
            count += 1
            second = 0.999 * second + 0.001 * grad**2
            rate = 0.01 * (1 - 0.999**count) ** 0.5
            weights = weights - rate * grad / (second.sqrt() + 1e-8)
        ends.append(weights)
    return torch.stack(ends).mean(0)


@pytest.mark.parametrize("carry", [True, False])
def test_the_inner_adam_keeps_its_moments_from_task_to_task_if_asked(carry: bool) -> None:
    spec = regression_spec()
    batch = regression_batch(spec)
    algorithm = make(
        Reptile, spec, linear_backbone, inner_lr=0.01, inner_batch=4, carry_moments=carry
    )
    expected = naive_adam(algorithm, batch, carry)
    algorithm.update(batch, Progress(0, 10))
    torch.testing.assert_close(stacked(algorithm), expected)


def test_evaluation_starts_from_the_moments_of_training_and_leaves_them() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    trained = make(Reptile, spec, TINY_BACKBONES["conv4 stride"])
    trained.update(batch, Progress(0, 10))
    fresh = make(Reptile, spec, TINY_BACKBONES["conv4 stride"])
    fresh.net.load_state_dict(trained.net.state_dict())
    before = {
        name: value.clone() for name, value in trained.state_dict().items() if "_extra" not in name
    }
    assert not torch.allclose(trained.predict(*rows).outputs, fresh.predict(*rows).outputs)
    after = trained.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_query_of_no_rows_trains_on_the_support_alone() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    empty = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, :0], batch.query_y[:, :0])
    gradient = moved(make(Reptile, spec, TINY_BACKBONES["mlp"], inner_batch=None), empty)
    assert all(torch.isfinite(value).all() and value.any() for value in gradient.values())


def test_mini_batches_use_each_row_once_before_any_row_twice() -> None:
    keys = torch.arange(6)
    order = mini_batches(keys, num_rows=10, size=4, steps=5)
    assert order.shape == (6, 5, 4)
    flat = order.reshape(6, 20)
    for epoch in (flat[:, :10], flat[:, 10:]):
        assert torch.equal(epoch.sort(-1).values, torch.arange(10).expand(6, -1))
    assert not torch.equal(flat[:, :10], flat[:, 10:])


@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_engines_agree_on_predictions(engine: str) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    backbone = TINY_BACKBONES["conv4 max-pool"]
    expected = make(Reptile, spec, backbone).predict(*rows).outputs
    outputs = make(Reptile, spec, backbone, engine=engine).predict(*rows).outputs
    # Adam divides by the root of tiny moments, which magnifies rounding.
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0"),
        ({"inner_steps": 0}, "algo.inner_steps=0"),
        ({"inner_batch": 0}, "algo.inner_batch=0"),
    ],
)
def test_bad_numbers_and_words_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(Reptile, image_spec(), TINY_BACKBONES["mlp"], **options)
