"""Baseline and Baseline++: the fit of a head against torch's own SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.baselines.baseline import Baseline
from metarun.core import seeding
from tests.helpers import (
    TINY_BACKBONES,
    labeled_batch,
    labeled_spec,
    linear_backbone,
    make,
    regression_spec,
)

CONV = TINY_BACKBONES["conv4 max-pool"]
FIT: dict[str, Any] = {"head_lr": 0.2, "head_momentum": 0.8, "head_dampening": 0.7}
FIT |= {"head_weight_decay": 0.05, "head_batch": 4, "head_epochs": 5}


class Cosine(nn.Module):
    """2 g_k cos(x, v_k)."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.v = nn.Parameter(direction.clone())
        self.g = nn.Parameter(direction.norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + 1e-5)
        return 2.0 * x @ (self.g[:, None] * self.v / self.v.norm(dim=1, keepdim=True)).T


def torch_fit(algorithm: Baseline, kind: str, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Fit the head of one task by torch's SGD on the same mini-batches."""
    start = algorithm.head.start(seeding.key(algorithm.seed, "head"), x.shape[1], 3, x)
    model: nn.Module
    if kind == "linear":
        model = nn.Linear(x.shape[1], 3).double()
        model.load_state_dict(start)
    else:
        model = Cosine(start["direction"])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.8, dampening=0.7, weight_decay=0.05
    )
    keys = torch.tensor(seeding.key(algorithm.seed, "mini-batches"))
    for epoch in range(epochs):
        order = seeding.choose(keys, epoch, len(x), len(x)).tolist()
        for i in range(0, len(x), 4):
            rows = order[i : i + 4]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_fit_is_that_of_torch_sgd_on_each_task(head: str) -> None:
    batch = labeled_batch(tasks=3, shot=3)
    algorithm = make(Baseline, labeled_spec(), linear_backbone, head=head, **FIT)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    trace = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, 5)
    for task in range(3):
        x, y = batch.support_x[task].flatten(1), batch.support_y[task]
        query = batch.query_x[task].flatten(1)
        for epochs in (0, 1, 5):
            expected = torch_fit(algorithm, head, x, y, epochs)(query)
            torch.testing.assert_close(trace[epochs, task], expected.detach())
        torch.testing.assert_close(outputs[task], expected.detach())


def test_mini_batches_are_new_orders_of_all_rows_in_each_epoch() -> None:
    seen: list[list[Tensor]] = []

    class Watched(Baseline):
        def _gradient(self, weights: Any, features: Tensor, labels: Tensor) -> Any:
            seen[-1].append(features[0, :, 0])
            return super()._gradient(weights, features, labels)

    algorithm = make(Watched, labeled_spec(), linear_backbone)
    features = torch.arange(10.0).double()[None, :, None].expand(1, 10, 2)
    labels = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]])
    seen.append([])
    for _ in algorithm.fitted_heads(features, labels, 3):
        seen.append([])
    epochs = [rows for rows in seen if rows]
    assert [len(rows) for rows in epochs[0]] == [4, 4, 2]
    orders = [torch.cat(rows).tolist() for rows in epochs]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_the_body_is_frozen_and_running_statistics_answer_each_query_alone() -> None:
    batch = labeled_batch()
    algorithm = make(Baseline, labeled_spec(), CONV, bn="running", head_epochs=3)
    before = {name: value.clone() for name, value in algorithm.net.state_dict().items()}
    whole = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    alone = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :1]).outputs
    torch.testing.assert_close(whole[:, :1], alone)
    assert all(
        torch.equal(value, before[name]) for name, value in algorithm.net.state_dict().items()
    )


def test_all_rows_in_one_batch_have_no_order() -> None:
    batch = labeled_batch()
    algorithm = make(Baseline, labeled_spec(), CONV, bn="running", head_batch=None)
    assert algorithm.capabilities.order_free
    assert not make(Baseline, labeled_spec(), CONV).capabilities.order_free
    expected = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    turned = algorithm.predict(batch.support_x.flip(1), batch.support_y.flip(1), batch.query_x)
    torch.testing.assert_close(turned.outputs, expected)


def test_inner_steps_at_evaluation_are_epochs() -> None:
    batch = labeled_batch()
    rows = (batch.support_x, batch.support_y, batch.query_x)
    seven = make(Baseline, labeled_spec(), CONV, head_epochs=7)
    same = make(Baseline, labeled_spec(), CONV, head_epochs=2, eval_inner_steps=7)
    assert torch.equal(seven.predict(*rows).outputs, same.predict(*rows).outputs)


def test_a_task_may_have_any_number_of_ways() -> None:
    batch = labeled_batch()
    algorithm = make(Baseline, labeled_spec(ways=3), CONV)
    labels = torch.arange(6).expand(3, 6)
    assert algorithm.predict(batch.support_x, labels, batch.query_x).outputs.shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_lr": 0.0}, "algo.head_lr=0.0"),
        ({"head_momentum": 1.0}, "algo.head_momentum=1.0"),
        ({"head_dampening": -0.1}, "algo.head_dampening=-0.1"),
        ({"head_weight_decay": -1.0}, "algo.head_weight_decay=-1.0"),
        ({"head_batch": 0}, "algo.head_batch=0"),
        ({"head_epochs": -1}, "algo.head_epochs=-1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(Baseline, labeled_spec(), CONV, **options)


def test_regression_is_refused() -> None:
    with pytest.raises(ValueError, match="learns classification"):
        make(Baseline, regression_spec(), linear_backbone)
