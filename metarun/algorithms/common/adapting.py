"""Base class of algorithms that adapt weights to a task in several steps.

Shapes: T tasks, S support rows, Q query rows, K steps, W ways, D outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Adapted, Prediction
from metarun.execution.engine import TwoStageTask


class Support(NamedTuple):
    """The support rows of one task.

    Attributes:
        x: Inputs, (S, *input_shape).
        y: Targets, (S,) labels or (S, D) values.
        ways: Number of classes, W; not used for regression.
    """

    x: Tensor
    y: Tensor
    ways: int


class AdaptingLearner(Algorithm):
    """An algorithm that predicts with the last weights of an adaptation path.

    `adapt` returns these weights, and with `bn=support` the statistics of the support under them.
    `trace` predicts with all weights of the path. A subclass sets `self.net` and
    `self.inner_steps`, and implements `path` and `update`. It overrides `outputs` if the adapted
    weights are not parameters of the network.
    """

    inner_steps: int

    @abstractmethod
    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        """Return the K + 1 sets of adapted weights before and after each step at evaluation.

        Args:
            net: The network, or its replica.
            theta: Parameters of the network by name.
            support: Support rows of one task.
            steps: Number of steps, K.
        """

    def outputs(
        self, net: nn.Module, theta: Params, weights: Params, x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        """Return the predictions (N, D) of rows x (N, …) with adapted weights.

        Args:
            net: The network, or its replica.
            theta: Parameters of the network by name.
            weights: Adapted weights, which may include statistics of batch norm.
            x: Input rows.
            ctx: Context of the forward pass.
        """
        return forward(net, {**theta, **weights}, x, ctx)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        steps, ways = self.evaluation_steps(self.inner_steps), self.ways(support_y)

        def task(net: nn.Module, theta: Params, x: Tensor, y: Tensor) -> Params:
            weights = self.path(net, theta, Support(x, y, ways), steps)[-1]
            return self.with_statistics(net, theta, weights, x)

        adapted: Adapted = self.map_tasks(task, support_x, support_y)
        return adapted

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        ctx = self.query_context()

        def task(net: nn.Module, theta: Params, own: Params, x: Tensor) -> Tensor:
            return self.outputs(net, theta, own, x, ctx)

        return Prediction(self.map_adapted(task, adapted, query_x))

    def with_statistics(
        self, net: nn.Module, theta: Params, weights: Params, support_x: Tensor
    ) -> Params:
        """Return adapted weights, with `bn=support` also the statistics of the support (S, …)."""
        if self.bn_statistics != "support":
            return weights
        _, statistics = self.support_pass(
            net, lambda ctx: self.outputs(net, theta, weights, support_x, ctx)
        )
        return {**weights, **statistics}

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        ways, ctx = self.ways(support_y), self.query_context()

        def visited(net: nn.Module, theta: Params, x: Tensor, y: Tensor) -> Params:
            path = self.path(net, theta, Support(x, y, ways), steps)
            return {
                name: tensor
                for step, weights in enumerate(path)
                for name, tensor in add_prefix(
                    f"{step} ", self.with_statistics(net, theta, weights, x)
                ).items()
            }

        def answers(net: nn.Module, theta: Params, path: Params, *rows: Tensor) -> Tensor:
            visits = (strip_prefix(f"{step} ", path) for step in range(steps + 1))
            return torch.stack([self.outputs(net, theta, at, rows[2], ctx) for at in visits])

        rows = (support_x, support_y, query_x)
        task = TwoStageTask(visited, answers, reads=(0, 1))
        outputs: Tensor = self.map_tasks(task, *rows)
        return outputs.movedim(1, 0)
