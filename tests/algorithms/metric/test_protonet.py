"""Prototypical networks against nearest neighbors and naive distances."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metarun.algorithms.functional import prototypes
from metarun.algorithms.metric.protonet import ProtoNet
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


def test_with_one_shot_it_is_a_nearest_neighbor() -> None:
    spec = TaskSpec("classification", (4,), 5, 5)
    batch = image_batch(spec, tasks=6, shot=1, query=7)
    algorithm = make(ProtoNet, spec, linear_backbone)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    nearest = torch.cdist(batch.query_x, batch.support_x).argmin(-1)
    assert torch.equal(outputs.argmax(-1), batch.support_y.gather(1, nearest))


def test_prototypes_are_the_means_of_their_classes() -> None:
    features = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]])
    centers = prototypes(features, torch.tensor([0, 1, 0]), 2)
    assert centers.tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_logits_are_minus_the_squared_distance_and_not_its_root() -> None:
    spec = TaskSpec("classification", (4,), 3, 3)
    batch = image_batch(spec, tasks=1, shot=1, query=2)
    algorithm = make(ProtoNet, spec, linear_backbone, scale=2.0)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    expected = -2.0 * torch.cdist(batch.query_x, batch.support_x) ** 2
    torch.testing.assert_close(outputs, expected)


def test_cosine_distance_ignores_the_length_of_embeddings() -> None:
    spec = TaskSpec("classification", (4,), 3, 3)
    batch = image_batch(spec, shot=1)
    algorithm = make(ProtoNet, spec, linear_backbone, distance="cosine")
    one = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    other = algorithm.predict(3 * batch.support_x, batch.support_y, 0.1 * batch.query_x).outputs
    torch.testing.assert_close(one, other)
    similarity = nn.functional.cosine_similarity(
        batch.query_x[:, :, None], batch.support_x[:, None], dim=-1
    )
    torch.testing.assert_close(one, similarity - 1)


def test_training_sees_support_and_query_in_one_pass_and_gathers_statistics() -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=1)
    algorithm = make(ProtoNet, spec, TINY_BACKBONES["conv4 max-pool"], bn="running")
    net = algorithm.net
    first = net.body.convs[0](torch.cat([batch.support_x[0], batch.query_x[0]]))
    features = net(torch.cat([batch.support_x[0], batch.query_x[0]]))
    centers = torch.stack([features[:6][batch.support_y[0] == k].mean(0) for k in range(3)])
    loss = nn.functional.cross_entropy(-(torch.cdist(features[6:], centers) ** 2), batch.query_y[0])
    expected = torch.autograd.grad(loss, list(net.parameters()))
    gradient = moved(algorithm, batch)
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradient[f"net.{name}"], value)
    torch.testing.assert_close(net.body.norms[0].running_mean, 0.1 * first.mean((0, 2, 3)))


@pytest.mark.parametrize("engine", ["vmap", "threads"])
def test_the_engines_agree(engine: str) -> None:
    spec = image_spec()
    batch = image_batch(spec, tasks=4)
    backbone = TINY_BACKBONES["resnet12"]
    expected = moved(make(ProtoNet, spec, backbone), batch)
    gradient = moved(make(ProtoNet, spec, backbone, engine=engine), batch)
    for key, value in expected.items():
        torch.testing.assert_close(gradient[key], value, rtol=1e-10, atol=1e-10)


def test_training_may_have_more_ways_than_testing() -> None:
    train, test = image_spec(3, train_way=6), image_spec(4)
    algorithm = make(ProtoNet, train, TINY_BACKBONES["mlp"])
    moved(algorithm, image_batch(train))
    batch = image_batch(test)
    outputs = algorithm.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    assert outputs.shape == (3, 8, 4)


def test_regression_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match="learns classification, but the data set has regression tasks"
    ):
        make(ProtoNet, regression_spec(), linear_backbone)
