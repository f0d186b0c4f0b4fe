"""Relation networks against a naive double loop over pairs, and their batch statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metarun.algorithms.metric.relation import RelationNet
from metarun.backbones.conv4 import Conv4
from metarun.core.types import TaskBatch, TaskSpec
from tests.helpers import (
    TINY_BACKBONES,
    image_batch,
    linear_backbone,
    make,
    moved,
    regression_spec,
)

BACKBONE = partial(Conv4, filters=3, blocks=3)


def images(ways: int = 3, train_way: int | None = None) -> TaskSpec:
    return TaskSpec("classification", (1, 24, 24), ways, train_way or ways)


def relation_net(spec: TaskSpec | None = None, **options: Any) -> Any:
    return make(RelationNet, spec or images(), BACKBONE, clip_norm=None, **options)


def answers(algorithm: Any, batch: TaskBatch) -> Tensor:
    outputs: Tensor = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    return outputs


def block(x: Tensor, conv: Any, norm: Any, *, padding: int, pool: bool, running: bool) -> Tensor:
    x = F.conv2d(x, conv.weight, conv.bias, padding=padding)
    gathered = (norm.running_mean, norm.running_var) if running else (None, None)
    x = torch.relu(F.batch_norm(x, *gathered, norm.weight, norm.bias, training=not running))
    return F.max_pool2d(x, 2) if pool else x


def naive_maps(net: Any, x: Tensor, running: bool = False) -> Tensor:
    body = net.embedding.body
    for i in range(3):
        how = {"padding": 0 if i < 2 else 1, "pool": i < 2, "running": running}
        x = block(x, body.convs[i], body.norms[i], **how)
    return x


def naive_scores(
    net: Any, support: Tensor, labels: Tensor, queries: Tensor, running: bool = False
) -> Tensor:
    """Return scores of maps before the sigmoid: pair by pair up to g, which has one batch."""
    pairs = []
    for query in queries:
        for k in range(3):
            total = torch.zeros_like(query)
            for row, label in zip(support, labels, strict=True):
                if label == k:
                    total = total + row
            pairs.append(torch.cat([total, query]))
    g = net.relation
    x = torch.stack(pairs)
    for i in range(2):
        x = block(x, g.convs[i], g.norms[i], padding=1, pool=True, running=running)
    x = F.linear(x.flatten(1), g.hidden.weight, g.hidden.bias)
    return F.linear(torch.relu(x), g.score.weight, g.score.bias).reshape(len(queries), 3)


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
def test_a_double_loop_over_pairs_gives_the_same_loss_and_gradient(engine: str) -> None:
    batch = image_batch(images(), tasks=2, shot=5, query=2)
    algorithm = relation_net(engine=engine)
    net = algorithm.net
    losses = []
    for t in range(2):
        # The support and the queries are normalized separately, as the code calls f twice.
        maps = naive_maps(net, batch.support_x[t]), naive_maps(net, batch.query_x[t])
        scores = naive_scores(net, maps[0], batch.support_y[t], maps[1]).sigmoid()
        total = torch.zeros((), dtype=torch.float64)
        for q, label in enumerate(batch.query_y[t]):
            for k in range(3):
                total = total + (scores[q, k] - (1.0 if k == label else 0.0)) ** 2
        losses.append(total / scores.numel())
    names = [name for name, _ in algorithm.named_parameters()]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(algorithm.parameters()))
    gradient = moved(algorithm, batch)
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(gradient[name], value, rtol=1e-9, atol=1e-12)


def test_the_maps_of_the_papers_images_are_theirs() -> None:
    for shape, side in (((1, 28, 28), 5), ((3, 84, 84), 19)):
        net = Conv4(shape, None, maps="early")
        assert net(torch.zeros(2, *shape)).shape == (2, 64, side, side)
    for shape, padding, inputs in (((1, 28, 28), 1, 64), ((3, 84, 84), 0, 576)):
        spec = TaskSpec("classification", shape, 5, 5)
        assert make(RelationNet, spec, Conv4, padding=padding).net.relation.hidden.weight.shape == (
            8,
            inputs,
        )


def test_at_evaluation_support_queries_and_pairs_are_normalized_each_by_themselves() -> None:
    batch = image_batch(images(), tasks=1)
    algorithm = relation_net(bn="transductive")
    maps = (
        naive_maps(algorithm.net, batch.support_x[0]),
        naive_maps(algorithm.net, batch.query_x[0]),
    )
    expected = naive_scores(algorithm.net, maps[0], batch.support_y[0], maps[1])
    torch.testing.assert_close(answers(algorithm, batch)[0], expected)


def test_running_statistics_are_those_of_queries_and_of_pairs() -> None:
    batch = image_batch(images(), tasks=1)
    algorithm = relation_net(bn="running")
    f, g = algorithm.net.embedding.body, algorithm.net.relation
    first = f.convs[0](batch.query_x[0]).mean((0, 2, 3))
    moved(algorithm, batch)
    torch.testing.assert_close(f.norms[0].running_mean, 0.1 * first)
    assert all(norm.running_mean.abs().sum() > 0 for norm in (*f.norms, *g.norms))
    maps = [naive_maps(algorithm.net, x[0], running=True) for x in (batch.support_x, batch.query_x)]
    expected = naive_scores(algorithm.net, maps[0], batch.support_y[0], maps[1], running=True)
    torch.testing.assert_close(answers(algorithm, batch)[0], expected)


def test_statistics_of_the_support_are_those_of_support_rows_and_of_their_pairs() -> None:
    batch = image_batch(images(), tasks=1)
    algorithm = relation_net(bn="support")
    # Queries equal to the support rows leave all statistics unchanged.
    maps = naive_maps(algorithm.net, batch.support_x[0])
    expected = naive_scores(algorithm.net, maps, batch.support_y[0], maps)
    same = TaskBatch(batch.support_x, batch.support_y, batch.support_x, batch.support_y)
    torch.testing.assert_close(answers(algorithm, same)[0], expected)


@pytest.mark.parametrize("bn", ["support", "running"])
def test_an_answer_does_not_depend_on_the_other_queries(bn: str) -> None:
    batch = image_batch(images())
    algorithm = relation_net(bn=bn)
    alone = algorithm.predict(batch.support_x, batch.support_y, batch.query_x[:, :1]).outputs
    torch.testing.assert_close(alone, answers(algorithm, batch)[:, :1])


def test_the_gradients_of_the_two_modules_are_clipped_apart() -> None:
    spec, batch = images(), image_batch(images())
    free = moved(relation_net(), batch)
    cut = moved(make(RelationNet, spec, BACKBONE, clip_norm=1e-5), batch)
    for module in ("net.embedding.", "net.relation."):
        norm = torch.stack([g.norm() for name, g in free.items() if name.startswith(module)]).norm()
        assert norm > 1e-5
        for name in (name for name in free if name.startswith(module)):
            torch.testing.assert_close(cut[name], free[name] * (1e-5 / norm))


def test_a_gradient_that_is_short_enough_is_left_alone() -> None:
    batch = image_batch(images())
    free = moved(relation_net(), batch)
    cut = moved(make(RelationNet, images(), BACKBONE, clip_norm=1e3), batch)
    assert all(torch.equal(free[name], cut[name]) for name in free)


def test_training_may_have_more_ways_than_testing() -> None:
    train, test = images(3, train_way=6), images(4)
    algorithm = relation_net(train)
    moved(algorithm, image_batch(train))
    assert answers(algorithm, image_batch(test)).shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (TINY_BACKBONES["mlp"], "which this backbone does not provide: use backbone=conv4"),
        (TINY_BACKBONES["resnet12"], "which this backbone does not provide: use backbone=conv4"),
        (TINY_BACKBONES["conv4 stride"], "backbone.pool=mean leaves no feature maps"),
        (linear_backbone, "use backbone=conv4"),
    ],
)
def test_a_backbone_without_maps_is_refused_with_what_to_do(backbone: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(RelationNet, images(), backbone)


@pytest.mark.parametrize(
    ("side", "message"),
    [(8, "images of 10 pixels or more a side"), (12, "feature maps are 1x1, too small")],
)
def test_images_that_are_too_small_are_refused(side: int, message: str) -> None:
    spec = TaskSpec("classification", (1, side, side), 3, 3)
    with pytest.raises(ValueError, match=message):
        make(RelationNet, spec, BACKBONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "algo.hidden=0: expected 1 or more"),
        ({"padding": 2}, "algo.padding=2: expected 0 or 1"),
        ({"clip_norm": 0.0}, "algo.clip_norm=0.0: expected a positive number, or null"),
    ],
)
def test_a_number_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(RelationNet, images(), BACKBONE, **options)


def test_regression_is_refused() -> None:
    with pytest.raises(ValueError, match="learns classification"):
        make(RelationNet, regression_spec(), BACKBONE)
