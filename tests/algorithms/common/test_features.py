"""Adapting first and answering then, against one pass of support and query rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.base import forward
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.adapting import Support
from metarun.algorithms.common.features import FeatureLearner
from metarun.algorithms.functional import prototypes
from metarun.algorithms.metric.frn import FRN
from metarun.algorithms.metric.matching import MatchingNet
from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.metric.relation import RelationNet
from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.optimization.r2d2 import R2D2
from metarun.backbones.conv4 import Conv4
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Progress, TaskBatch, TaskSpec
from tests.helpers import image_batch, image_spec, make

CONV = partial(Conv4, filters=[9, 4], blocks=2)
EXACT: dict[str, float] = {"rtol": 1e-12, "atol": 1e-12}


class InnerProduct(FeatureLearner):
    """A learner as an author writes it: one function of features and labels."""

    capabilities = Capabilities(kinds=("classification",), accepts_any_way=True)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        return query @ prototypes(support, labels, ways).T


def after_training(kind: Any, bn: str, **options: Any) -> tuple[Any, TaskBatch]:
    """A learner after an update, which moves its running statistics, and tasks."""
    spec, backbone = image_spec(), CONV
    if kind is RelationNet:
        spec = TaskSpec("classification", (1, 28, 28), 3, 3)
        backbone = partial(Conv4, filters=4)
    learner = make(kind, spec, backbone, bn=bn, **options)
    learner.update(image_batch(spec), Progress(0, 10))
    return learner, image_batch(spec, seed=1)


@pytest.mark.parametrize("bn", ["support", "running"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (InnerProduct, {}),
        (ProtoNet, {}),
        (MatchingNet, {}),
        (MatchingNet, {"full_context": True, "scale": 1.0}),
        (FRN, {}),
        (R2D2, {"init_scale": 0.1}),
    ],
)
def test_the_two_verbs_equal_one_pass_of_support_and_query_rows(
    kind: Any, options: dict[str, Any], bn: str
) -> None:
    learner, batch = after_training(kind, bn, **options)
    net, params = learner.net, dict(learner.net.named_parameters())
    rows = (batch.support_x, batch.support_y, batch.query_x)
    adapted = learner.adapt(*rows[:2])
    assert not {"support_x", "support_y"} & adapted.keys()
    ctx = ForwardContext(rows=6 if bn == "support" else None, running=bn == "running")
    for found, task in zip(
        learner.answer(adapted, batch.query_x).outputs, zip(*rows, strict=True), strict=True
    ):
        expected = learner.answers(net, params, *task, 3, ctx).detach()
        torch.testing.assert_close(found, expected, **EXACT)


def test_batch_statistics_of_all_rows_need_the_support_again() -> None:
    learner, batch = after_training(InnerProduct, "transductive")
    assert learner.keeps_support
    adapted = learner.adapt(batch.support_x, batch.support_y)
    assert adapted.keys() == {"support_x", "support_y"}
    for index, found in enumerate(learner.answer(adapted, batch.query_x).outputs):
        rows = torch.cat([batch.support_x[index], batch.query_x[index]])
        features = learner.net(rows)
        centers = prototypes(features[:6], batch.support_y[index], 3)
        torch.testing.assert_close(found, (features[6:] @ centers.T).detach(), **EXACT)


def test_a_learner_of_one_function_is_trained_by_the_loss_of_its_queries() -> None:
    learner, batch = after_training(InnerProduct, "running")
    losses = []
    for step in range(20):
        losses.append(float(learner.update(batch, Progress(step, 20))["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("engine", ["loop", "vmap", "threads"])
def test_maml_answers_with_the_statistics_of_the_support_as_in_one_pass(engine: str) -> None:
    learner, batch = after_training(MAML, "support", inner_lr=0.3, inner_steps=2, engine=engine)
    outputs = learner.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    theta = dict(learner.net.named_parameters())
    for x, y, asked, found in zip(
        batch.support_x, batch.support_y, batch.query_x, outputs, strict=True
    ):
        weights = learner.path(learner.net, theta, Support(x, y, 3), 2)[-1]
        ctx = ForwardContext(rows=len(x))
        both = forward(learner.net, {**theta, **weights}, torch.cat([x, asked]), ctx)
        torch.testing.assert_close(found, both[len(x) :].detach(), **EXACT)


def test_relation_networks_compare_by_the_statistics_of_the_pairs_of_the_support() -> None:
    learner, batch = after_training(RelationNet, "support")
    outputs = learner.predict(batch.support_x, batch.support_y, batch.query_x).outputs
    net = learner.net
    for x, y, asked, found in zip(
        batch.support_x, batch.support_y, batch.query_x, outputs, strict=True
    ):
        maps = net.embedding(torch.cat([x, asked]), ForwardContext(rows=len(x)))
        classes = torch.stack([maps[: len(x)][y == way].sum(0) for way in range(3)])
        scores = net.relation(classes, maps, ForwardContext(rows=3 * len(x)))
        expected = scores[len(x) :].detach()
        torch.testing.assert_close(found, expected, **EXACT)
