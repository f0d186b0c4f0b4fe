"""Matching networks against nearest neighbors, naive attention and torch's own LSTMs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.metric.matching import (
    FullContext,
    LSTMCell,
    MatchingNet,
    class_log_probabilities,
)
from metarun.core.types import TaskSpec
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_spec,
)

VECTORS = TaskSpec("classification", (4,), 5, 5)


def answers(algorithm: Any, batch: Any) -> Tensor:
    outputs: Tensor = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    return outputs


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return x @ y / (x.norm() * y.norm())


def test_with_one_shot_and_a_large_scale_it_is_the_nearest_neighbor_by_cosine() -> None:
    batch = image_batch(VECTORS, tasks=6, shot=1, query=7)
    probabilities = answers(make(MatchingNet, VECTORS, linear_backbone, scale=1e6), batch).exp()
    for t in range(6):
        for q, query in enumerate(batch.query_x[t]):
            nearest = max(range(5), key=lambda i: float(cosine(query, batch.support_x[t, i])))
            wanted = nn.functional.one_hot(batch.support_y[t, nearest], 5).double()
            torch.testing.assert_close(probabilities[t, q], wanted)


def test_an_answer_is_the_mean_of_one_hot_labels_weighted_by_attention() -> None:
    batch = image_batch(VECTORS, tasks=2, shot=3, query=2)
    probabilities = answers(make(MatchingNet, VECTORS, linear_backbone, scale=2.0), batch).exp()
    for t in range(2):
        for q, query in enumerate(batch.query_x[t]):
            weights = torch.stack([(2 * cosine(query, x)).exp() for x in batch.support_x[t]])
            total = torch.zeros(5, dtype=torch.float64)
            for weight, label in zip(weights / weights.sum(), batch.support_y[t], strict=True):
                total[label] += weight
            torch.testing.assert_close(probabilities[t, q], total)


def test_log_probabilities_bear_scores_that_would_overflow() -> None:
    scores = torch.tensor([[800.0, 0.0, 0.0]])
    logs = class_log_probabilities(scores, torch.tensor([0, 1, 1]), 2)
    torch.testing.assert_close(logs, torch.tensor([[0.0, torch.log(torch.tensor(2.0)) - 800.0]]))


def test_our_step_is_that_of_torchs_cell() -> None:
    ours, theirs = LSTMCell(6, 4), nn.LSTMCell(6, 4)
    theirs.load_state_dict(ours.state_dict())
    x, hidden, cell = torch.randn(5, 6), torch.randn(5, 4), torch.randn(5, 4)
    for mine, other in zip(ours(x, hidden, cell), theirs(x, (hidden, cell)), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_support_is_embedded_by_a_bidirectional_lstm_with_a_skip() -> None:
    context = FullContext(4, steps=1).double()
    lstm = nn.LSTM(4, 4, bidirectional=True).double()
    weights = {f"{n}_l0": p for n, p in context.forwards.named_parameters()}
    weights |= {f"{n}_l0_reverse": p for n, p in context.backwards.named_parameters()}
    lstm.load_state_dict(weights)
    rows = torch.randn(7, 4, dtype=torch.float64)
    out = lstm(rows)[0]
    torch.testing.assert_close(context.embed_support(rows), out[:, :4] + out[:, 4:] + rows)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_queries_attend_to_the_support_in_steps(steps: int) -> None:
    context = FullContext(4, steps).double()
    lstm = nn.LSTMCell(8, 4).double()
    lstm.load_state_dict(context.attending.state_dict())
    queries = torch.randn(3, 4, dtype=torch.float64)
    support = torch.randn(6, 4, dtype=torch.float64)
    for query, ours in zip(queries, context.embed_query(queries, support), strict=True):
        hidden, cell = query[None], torch.zeros(1, 4, dtype=torch.float64)
        for _ in range(steps):
            weights = torch.stack([hidden[0] @ row for row in support]).softmax(0)
            read = sum(weight * row for weight, row in zip(weights, support, strict=True))
            out, cell = lstm(torch.cat([query, read])[None], (hidden, cell))
            hidden = out + query
        torch.testing.assert_close(ours, hidden[0])


def test_training_descends_the_negative_log_probability_and_gathers_statistics() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1)
    algorithm = make(MatchingNet, spec, TINY_BACKBONES["conv4 max-pool"], bn="running", scale=3.0)
    net = algorithm.net.features
    rows = torch.cat([batch.support_x[0], batch.query_x[0]])
    first = net.body.convs[0](rows)
    features = net(rows)
    similarity = nn.functional.cosine_similarity(features[6:, None], features[None, :6], dim=-1)
    attention = (3 * similarity).softmax(1)
    same = (batch.query_y[0][:, None] == batch.support_y[0][None]).double()
    loss = -(attention * same).sum(1).log().mean()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    gradient = moved(algorithm, batch)
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[f"net.features.{name}"], value)
    torch.testing.assert_close(net.body.norms[0].running_mean, 0.1 * first.mean((0, 2, 3)))


@pytest.mark.parametrize("full_context", [False, True])
@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_engines_agree(engine: str, full_context: bool) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=4)
    backbone = TINY_BACKBONES["resnet12"]
    expected = moved(make(MatchingNet, spec, backbone, full_context=full_context), batch)
    other = make(MatchingNet, spec, backbone, full_context=full_context, engine=engine)
    gradient = moved(other, batch)
    assert any(name.startswith("net.context.") for name in gradient) == full_context
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value, rtol=1e-10, atol=1e-10)


def test_every_weight_of_the_context_learns() -> None:
    gradient = moved(
        make(MatchingNet, VECTORS, linear_backbone, full_context=True), image_batch(VECTORS)
    )
    for name, value in gradient.items():
        assert value.abs().sum() > 0 or "unused" in name, name


@pytest.mark.parametrize("full_context", [False, True])
def test_the_order_of_the_support_matters_with_context_alone(full_context: bool) -> None:
    batch = image_batch(VECTORS, shot=2)
    algorithm = make(MatchingNet, VECTORS, linear_backbone, full_context=full_context)
    turned = algorithm.predict(batch.support_x.flip(1), batch.support_y.flip(1), batch.query_x)
    assert (
        torch.allclose(turned.outputs, answers(algorithm, batch))
        == algorithm.capabilities.order_free
    )
    assert algorithm.capabilities.order_free != full_context


def test_training_may_have_more_ways_than_testing() -> None:
    train, test = image_spec(3, train_way=6), image_spec(4)
    algorithm = make(MatchingNet, train, TINY_BACKBONES["mlp"], full_context=True)
    moved(algorithm, image_batch(train))
    assert answers(algorithm, image_batch(test)).shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "algo.scale=0.0: expected a positive number"),
        ({"processing_steps": 0}, "algo.processing_steps=0: expected 1 or more"),
    ],
)
def test_a_number_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(MatchingNet, VECTORS, linear_backbone, **options)


def test_regression_is_refused() -> None:
    with pytest.raises(ValueError, match="learns classification"):
        make(MatchingNet, regression_spec(), linear_backbone)
