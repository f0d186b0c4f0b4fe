"""Proto-MAML against prototypical networks, a naive loop and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.optimization.protomaml import ProtoMAML
from metarun.core.types import Progress, TaskSpec
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    image_spec,
    linear_backbone,
    make,
    moved,
    regression_spec,
)

SECOND = {"second_order_from": 0, "inner_lr": 0.2, "inner_steps": 2}


def test_without_inner_steps_its_answers_are_softmaxes_of_squared_distances() -> None:
    spec = TaskSpec("classification", (4,), 3, 3)
    batch = image_batch(spec)
    algorithm = make(ProtoMAML, spec, linear_backbone, inner_steps=0)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    centers = torch.stack(
        [
            torch.stack([x[y == k].mean(0) for k in range(3)])
            for x, y in zip(batch.support_x, batch.support_y, strict=True)
        ]
    )
    distances = torch.cdist(batch.query_x, centers).square()
    torch.testing.assert_close(outputs.log_softmax(-1), (-distances).log_softmax(-1))


@pytest.mark.parametrize("step", [0, 1])
def test_without_inner_steps_it_learns_as_a_prototypical_network(step: int) -> None:
    # The gradient through the prototypes is the same in first and in second order.
    spec = image_spec()
    batch = image_batch(spec)
    ours = make(ProtoMAML, spec, TINY_BACKBONES["mlp"], inner_steps=0, second_order_from=1)
    protonet = make(ProtoNet, spec, TINY_BACKBONES["mlp"])
    expected, gradient = moved(protonet, batch), moved(ours, batch, step)
    assert gradient.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value)


def naive_logits(
    body: list[Tensor], head: list[Tensor], support_x: Tensor, x: Tensor, bn: str
) -> Tensor:
    """The tiny dense network with batch norm of the helpers, by hand, and a linear head."""
    rows = torch.cat([support_x, x]).flatten(1)
    for i in range(2):
        rows = rows @ body[2 * i].T + body[2 * i + 1]
        seen = rows[: len(support_x)] if bn == "support" else rows[len(support_x) :]
        mean, var = seen.mean(0), seen.var(0, correction=0)
        own, own_var = rows[: len(support_x)].mean(0), rows[: len(support_x)].var(0, correction=0)
        scale, shift = body[4 + 2 * i : 6 + 2 * i]
        parts = [
            (rows[: len(support_x)] - own) / (own_var + 1e-5).sqrt(),
            (rows[len(support_x) :] - mean) / (var + 1e-5).sqrt(),
        ]
        rows = torch.tanh(torch.cat(parts) * scale + shift)
    return rows[len(support_x) :] @ head[0].T + head[1]


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
@pytest.mark.parametrize(
    ("bn", "options"),
    [
        ("support", SECOND),
        ("transductive", SECOND),
        ("transductive", {**SECOND, "adapt_norm": True}),
        ("support", {**SECOND, "second_order_from": None}),
    ],
)
def test_a_naive_loop_over_tasks_gives_the_same_meta_gradient(
    bn: str, options: dict[str, Any], engine: str
) -> None:
    spec = image_spec()
    batch = image_batch(spec)
    backbone = TINY_BACKBONES["mlp with batch norm"]
    algorithm = make(ProtoMAML, spec, backbone, bn=bn, engine=engine, **options)
    leaves = list(algorithm.net.parameters())
    second_order = options["second_order_from"] == 0

    losses = []
    for i in range(batch.num_tasks):
        x, y = batch.support_x[i], batch.support_y[i]
        eye = [torch.eye(5, dtype=x.dtype), torch.zeros(5, dtype=x.dtype)]
        features = naive_logits(leaves, eye, x, x, "support")
        centers = torch.stack([features[y == k].mean(0) for k in range(3)])
        # Copies, so that the body's inner gradient does not flow through the head's initialization.
        copies = [leaf.clone() for leaf in leaves]
        theta = [*copies, 2 * centers, -(centers * centers).sum(1)]
        for _ in range(2):
            logits = naive_logits(theta[:-2], theta[-2:], x, x, "support")
            loss = nn.functional.cross_entropy(logits, y)
            grads = torch.autograd.grad(loss, theta, create_graph=second_order, retain_graph=True)
            theta = [
                p if 4 <= j < 8 and "adapt_norm" not in options else p - 0.2 * g
                for j, (p, g) in enumerate(zip(theta, grads, strict=True))
            ]
        logits = naive_logits(theta[:-2], theta[-2:], x, batch.query_x[i], bn)
        losses.append(nn.functional.cross_entropy(logits, batch.query_y[i]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), leaves)

    gradient = moved(algorithm, batch)
    for (name, _), value in zip(algorithm.net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[f"net.{name}"], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("query", [2, 6])
@pytest.mark.parametrize("backbone", ["conv4 max-pool", "resnet12"])
@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_engines_agree_to_1e_10(engine: str, backbone: str, query: int) -> None:
    spec = image_spec()
    # With six queries per class, the `threads` engine runs tasks in two stages.
    batch = image_batch(spec, tasks=5, query=query)
    one, other = (
        moved(make(ProtoMAML, spec, TINY_BACKBONES[backbone], engine=kind, **SECOND), batch)
        for kind in ("loop", engine)
    )
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-10)


def test_the_meta_gradient_agrees_with_finite_differences() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=2)
    settings: dict[str, Any] = {**SECOND, "bn": "support", "adapt_norm": True}
    backbone = TINY_BACKBONES["mlp with batch norm"]
    gradient = moved(make(ProtoMAML, spec, backbone, **settings), batch)
    draw = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(g.shape, generator=draw).double() for k, g in gradient.items()}

    def loss_at(size: float) -> float:
        algorithm = make(ProtoMAML, spec, backbone, **settings)
        with torch.no_grad():
            for key, param in algorithm.named_parameters():
                param += size * direction[key]
        return float(algorithm.update(batch, Progress(0, 1))["loss"])

    slope = sum(float((gradient[key] * d).sum()) for key, d in direction.items())
    assert (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_the_order_switches_at_the_given_update() -> None:
    spec = image_spec()
    batch = image_batch(spec)

    def gradient(step: int, second_order_from: int | None) -> Tensor:
        options = {**SECOND, "second_order_from": second_order_from}
        algorithm = make(ProtoMAML, spec, TINY_BACKBONES["mlp"], **options)
        return moved(algorithm, batch, step)["net.body.linears.0.weight"]

    assert torch.equal(gradient(4, 5), gradient(4, None))
    assert torch.equal(gradient(5, 5), gradient(5, 0))
    assert not torch.equal(gradient(5, 0), gradient(5, None))


def test_the_trace_passes_through_the_prediction() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    algorithm = make(ProtoMAML, spec, TINY_BACKBONES["conv4 stride"], eval_inner_steps=3, **SECOND)
    rows = (batch.support_x, batch.support_y, batch.query_x)
    trace = algorithm.trace(*rows, 5)
    torch.testing.assert_close(trace[3], algorithm.predict(*rows).outputs, rtol=0, atol=0)


def test_training_may_have_more_ways_than_testing() -> None:
    train, test = image_spec(3, train_way=6), image_spec(4)
    algorithm = make(ProtoMAML, train, TINY_BACKBONES["mlp"])
    moved(algorithm, image_batch(train))
    batch = image_batch(test)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    assert outputs.shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_lr": 0.0}, "algo.inner_lr=0.0"),
        ({"inner_steps": -1}, "algo.inner_steps=-1"),
        ({"second_order_from": -1}, "algo.second_order_from=-1"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(ProtoMAML, image_spec(), TINY_BACKBONES["mlp"], **options)


def test_regression_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match="learns classification, but the data set has regression tasks"
    ):
        make(ProtoMAML, regression_spec(), linear_backbone)
