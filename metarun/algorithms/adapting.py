"""Learners that solve a task by steps from one set of weights to the next.

Shapes: T tasks, S support rows, Q query rows, K steps.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.inner import Params
from metarun.types import Prediction


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

        def task(net: nn.Module, theta: Params, *rows: Tensor) -> Tensor:
            last = self.path(net, theta, rows[0], rows[1], steps)[-1]
            return self.answer(net, last, rows[0], rows[2])

        rows = (support_x, support_y, query_x)
        return Prediction(self.map_tasks(task, *rows, key=self.replay_key(steps)))

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        def task(net: nn.Module, theta: Params, *rows: Tensor) -> Tensor:
            visited = self.path(net, theta, rows[0], rows[1], steps)
            return torch.stack([self.answer(net, weights, rows[0], rows[2]) for weights in visited])

        rows = (support_x, support_y, query_x)
        return self.map_tasks(task, *rows, key=self.replay_key(steps)).movedim(1, 0)
