"""Learners that solve a task by steps from one set of weights to the next.

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
    """Answers with the weights at the end of a path, and traces the answers along it.

    A subclass sets `self.net` and `self.inner_steps` and writes `path`.
    """

    inner_steps: int

    @abstractmethod
    def path(self, net: nn.Module, theta: Params, x: Tensor, y: Tensor, steps: int) -> list[Params]:
        """The K + 1 weights of `net` before and after each of K steps at evaluation.

        Args:
            net: As in a task function.
            theta: Where the path begins: what `map_tasks` maps over.
            x, y: (S, …) support rows of one task.
            steps: K.
        """

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        steps = self.evaluation_steps(self.inner_steps)

        def adapted(net: nn.Module, theta: Params, x: Tensor, y: Tensor) -> Params:
            return self.path(net, theta, x, y, steps)[-1]

        def answers(net: nn.Module, _: Params, weights: Params, *rows: Tensor) -> Tensor:
            return self.answer(net, weights, rows[0], rows[2])

        rows = (support_x, support_y, query_x)
        task = TwoStageTask(adapted, answers, reads=(0, 1))
        return Prediction(self.map_tasks(task, *rows, key=self.replay_key(steps)))

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
        return self.map_tasks(task, *rows, key=self.replay_key(steps)).movedim(1, 0)
