"""Prototypical networks (Snell, Swersky & Zemel 2017; code jakesnell/prototypical-networks).

Shapes: T tasks, S support rows, Q query rows, W ways, F features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward, own_parameters, task_metric
from metarun.algorithms.inner import prototypes
from metarun.backbones.layers import Pass, update_running
from metarun.types import Metrics, Prediction, Progress, TaskBatch

Distance = Literal["squared_euclidean", "cosine"]


class ProtoNet(Algorithm):
    """Answers with the class whose mean support embedding, its prototype, is nearest.

    p(y = k | x) is the softmax over k of -d(f(x), c_k), where c_k is the mean of f over the
    support rows of class k (eq. 1 and 2). In training batch norm sees the support and query
    rows of an episode in one pass, at evaluation its running statistics, as in the code.

    Args:
        distance: `squared_euclidean`, or `cosine` (1 - cosine similarity).
        scale: Factor on the distances; the paper has 1.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range, or the data are no classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    accepts_any_way: ClassVar[bool] = True
    label_equivariant: ClassVar[bool] = True

    def __init__(
        self, *, distance: Distance = "squared_euclidean", scale: float = 1.0, **common: Any
    ) -> None:
        super().__init__(**common)
        if distance not in ("squared_euclidean", "cosine"):
            raise ValueError(f"algo.distance={distance}: expected squared_euclidean or cosine")
        if not scale > 0:
            raise ValueError(f"algo.scale={scale}: expected a positive number")
        self.distance = distance
        self.scale = scale
        self.net = self.build_network(None)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        ways = self.spec.train_way

        def task(net: nn.Module, params: dict[str, Tensor], *rows: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            how = Pass(moments=moments, noise=noise)
            features = forward(net, params, torch.cat([support_x, query_x]), how)
            logits = self._logits(features, support_y, ways)
            loss = self.loss(logits, query_y)
            return loss, (loss, task_metric(self.spec, logits, query_y), moments)

        rows = self.training_rows(batch, progress)
        params = own_parameters(self.net)
        grads, (losses, scores, moments) = self.settled_engine().gradients(
            task, self.net, params, rows
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        update_running(self.net, moments)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        ways = int(support_y.max()) + 1
        how = Pass(
            rows=support_x.shape[1] if self.bn == "support" else None, running=self.bn == "running"
        )

        def task(net: nn.Module, params: dict[str, Tensor], *rows: Tensor) -> Tensor:
            features = forward(net, params, torch.cat([rows[0], rows[2]]), how)
            return self._logits(features, rows[1], ways)

        return Prediction(self.map_tasks(task, support_x, support_y, query_x))

    def _logits(self, features: Tensor, support_y: Tensor, ways: int) -> Tensor:
        """(Q, W) from the (S + Q, F) features of one task, support rows first."""
        num_support = support_y.shape[0]
        query = features[num_support:]
        centres = prototypes(features[:num_support], support_y, ways)
        if self.distance == "cosine":
            similarity = nn.functional.normalize(query) @ nn.functional.normalize(centres).T
            return self.scale * (similarity - 1.0)
        return -self.scale * (query[:, None] - centres[None]).square().sum(-1)
