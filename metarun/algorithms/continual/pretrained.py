"""Pre-training: a classifier of all training classes, whose features a lifetime builds on.

Shapes: T trajectories, R rows of all of them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward, own_parameters, task_metric
from metarun.algorithms.common.online import WeightLearner
from metarun.algorithms.functional import Params
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Metrics, Progress, TaskBatch


class Pretrained(WeightLearner):
    """Learns to tell all training classes apart, then lives by plain online learning.

    The baseline of Javed & White (2019, section 5) that OML's representation is held against:
    the rows of a training trajectory and of its query make an ordinary batch.

    Args:
        **common: Those of `WeightLearner` and `Algorithm`.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    meta_trains: ClassVar[bool] = True

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        def task(net: nn.Module, params: Params, *parts: Tensor) -> tuple[Tensor, Any]:
            x, y = parts
            outputs = forward(net, params, x, ForwardContext())
            loss = self.loss(outputs, y)
            return loss, (loss, task_metric(self.spec, outputs, y))

        parts = (
            torch.cat([batch.support_x, batch.query_x], 1),
            torch.cat([batch.support_y, batch.query_y], 1),
        )
        grads, (losses, scores) = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), parts
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}
