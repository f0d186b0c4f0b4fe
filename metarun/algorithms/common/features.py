"""Base class of learners that compare features: an author writes one function of them.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs, F the shape of one row's features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, with_tensors
from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Adapted, Prediction


class WithFeatures(nn.Module):
    """A network of a method with learned numbers of its own, beside its backbone `features`.

    A backbone may have a part of this name, too, as torchvision's have; it is no such network.
    """

    features: nn.Module


class FeatureLearner(EpisodicLearner):
    """A learner whose predictions are a function of the features of support and query rows.

    A subclass implements `logits`. By default the features are those of the backbone without a
    head. A learner with other features, or with learned numbers of its own, overrides `build_net`.
    A learner that has more to compute from the support implements `summarize` and `score` in place
    of `logits`. Training minimizes the loss of the query rows; a network of which nothing learns is
    evaluated without training.
    """

    def __init__(self, setup: LearnerSetup) -> None:
        super().__init__(setup)
        self.net = self.build_net()
        parameters = list(self.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            # A frozen encoder is evaluated as it is.
            self.capabilities = replace(self.capabilities, meta_trains=False)
        else:
            self.optimizer = self.build_optimizer()

    def build_net(self) -> nn.Module:
        """Build the network: one that returns features, or a module that has one as `features`."""
        return self.build_network(None)

    def embed(self, features: Tensor) -> Tensor:
        """Return what the functions below receive as features, (N, *F): the network's own."""
        return features

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        """Predict the query rows of one task from features.

        Each query row is predicted independently of the others. Here, in `summarize` and in
        `score`, parameters and modules of `self.net` can be used as they are.

        Args:
            support: Features of the support rows, (S, *F).
            labels: Labels of these rows, (S,), or their values, (S, D).
            query: Features of the query rows, (Q, *F).
            ways: Number of classes, W.

        Returns:
            Logits (Q, W), or values (Q, D).
        """
        raise NotImplementedError

    def summarize(self, support: Tensor, labels: Tensor, ways: int) -> Params:  # noqa: ARG002
        """Return what `score` reads of one task's support, as tensors by name.

        The default is the features and the labels themselves. The arguments are those of `logits`.
        """
        return {"features": support, "labels": labels}

    def score(self, summary: Params, query: Tensor, ways: int) -> Tensor:
        """Predict the query rows of one task, as `logits` does, from the result of `summarize`."""
        return self.logits(summary["features"], summary["labels"], query, ways)

    @property
    def keeps_support(self) -> bool:
        # Only then do batch statistics combine support and query rows.
        return self.transductive

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        if self.keeps_support:
            return super().adapt(support_x, support_y)
        ways = self.ways(support_y)

        def task(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Params:
            support, statistics = self.support_pass(
                net, lambda ctx: self.features(net, params, x, ctx)
            )
            summary: Params = self._with(net, params, lambda own: own.summarize(support, y, ways))
            return {**summary, **add_prefix("net.", statistics)}

        adapted: Adapted = self.map_tasks(task, support_x, support_y)
        # Summaries need not have a dimension of classes.
        return {**adapted, "ways": torch.full((len(support_x),), ways)}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        if self.keeps_support:
            return super().answer(adapted, query_x)
        ways = int(adapted["ways"][0])

        def task(net: nn.Module, params: Params, own: Params, x: Tensor) -> Tensor:
            query = self._query_features(net, params, own, x)
            logits: Tensor = self._with(
                net, params, lambda learner: learner.score(own, query, ways)
            )
            return logits

        return Prediction(self.map_adapted(task, adapted, query_x))

    def query_features(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Return the features (T, Q, *F) of query rows of T tasks, unless `keeps_support`."""
        found: Tensor = self.map_adapted(self._query_features, adapted, query_x)
        return found

    def _query_features(self, net: nn.Module, params: Params, own: Params, x: Tensor) -> Tensor:
        return self.features(net, params | strip_prefix("net.", own), x, self.query_context())

    def answers(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        ways: int,
        ctx: ForwardContext,
    ) -> Tensor:
        rows = self.features(net, params, torch.cat([support_x, query_x]), ctx)
        support, query = rows.split([len(support_x), len(query_x)])

        def logits(learner: Self) -> Tensor:
            return learner.score(learner.summarize(support, support_y, ways), query, ways)

        outputs: Tensor = self._with(net, params, logits)
        return outputs

    def features(self, net: nn.Module, params: Params, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the embedded features (N, *F) of rows (N, …)."""
        if not isinstance(net, WithFeatures):
            return self.embed(forward(net, params, x, ctx))
        body: Any = net.features
        return self.embed(forward(body, strip_prefix("features.", params), x, ctx))

    def _with(self, net: nn.Module, params: Params, function: Callable[[Self], Any]) -> Any:
        """Return `function(learner)`, where its `net` is `net` with these parameters."""

        def of(net: nn.Module) -> Any:
            learner = copy.copy(self)
            learner._modules = {**self._modules, "net": net}
            return function(learner)

        if not isinstance(net, WithFeatures):
            # The whole network computes features, which are given.
            return of(net)
        return with_tensors(
            net, {n: p for n, p in params.items() if not n.startswith("features.")}, of
        )
