"""Base class of algorithms that adapt weights to a task in several steps.

Shapes: T tasks, S support rows, Q query rows, K steps.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.core.types import Prediction
from metarun.execution.engine import TwoStageTask


class AdaptingLearner(Algorithm):
    """An algorithm that predicts with the last weights of an adaptation path.

    `trace` predicts with all weights of the path. A subclass sets `self.net` and
    `self.inner_steps`, and implements `path` and `update`.
    """

    inner_steps: int

    @abstractmethod
    def path(self, net: nn.Module, theta: Params, x: Tensor, y: Tensor, steps: int) -> list[Params]:
        """Return the K + 1 sets of weights before and after each of K steps at evaluation.

        Args:
            net: The network, or its replica.
            theta: Meta-learned parameters, as `map_tasks` passes them.
            x: Support inputs of one task, (S, *input_shape).
            y: Support targets of the task, (S, …).
            steps: Number of steps, K.
        """

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        steps = self.evaluation_steps(self.inner_steps)

        def adapted(net: nn.Module, theta: Params, x: Tensor, y: Tensor) -> Params:
            return self.path(net, theta, x, y, steps)[-1]

        def answers(net: nn.Module, _: Params, weights: Params, *rows: Tensor) -> Tensor:
            return self.answer(net, weights, rows[0], rows[2])

        rows = (support_x, support_y, query_x)
        task = TwoStageTask(adapted, answers, reads=(0, 1))
        return Prediction(self.map_tasks(task, *rows))

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        def visited(net: nn.Module, theta: Params, x: Tensor, y: Tensor) -> Params:
            path = self.path(net, theta, x, y, steps)
            return {
                k: v for step, at in enumerate(path) for k, v in add_prefix(f"{step} ", at).items()
            }

        def answers(net: nn.Module, _: Params, path: Params, *rows: Tensor) -> Tensor:
            weights = (strip_prefix(f"{step} ", path) for step in range(steps + 1))
            return torch.stack([self.answer(net, at, rows[0], rows[2]) for at in weights])

        rows = (support_x, support_y, query_x)
        task = TwoStageTask(visited, answers, reads=(0, 1))
        return self.map_tasks(task, *rows).movedim(1, 0)
