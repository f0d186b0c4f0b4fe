"""Pre-training of a classifier of all training classes, before online learning along a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, task_metric
from metarun.algorithms.common.online import WeightLearner
from metarun.algorithms.functional import Params, strip_prefix
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Progress, TaskBatch


class Pretrained(WeightLearner):
    """Trains a classifier of all training classes, then learns online along the stream.

    This is a baseline for OML's representation (Javed & White 2019, section 5). The support and
    query rows of a training trajectory form an ordinary batch.

    Args:
        **options: Options of `WeightLearner`.
    """

    capabilities = replace(WeightLearner.capabilities, kinds=("classification",), meta_trains=True)

    def __init__(self, setup: LearnerSetup, **options: Any) -> None:
        super().__init__(setup, **options)
        self.optimizer = self.build_optimizer()

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:  # noqa: ARG002
        def task(net: nn.Module, params: Params, *parts: Tensor) -> tuple[Tensor, Any]:
            x, y = parts
            outputs = forward(net, strip_prefix("net.", params), x, ForwardContext())
            loss = self.loss(outputs, y)
            return loss, (loss, task_metric(self.spec, outputs, y), {})

        return task, (
            torch.cat([batch.support_x, batch.query_x], 1),
            torch.cat([batch.support_y, batch.query_y], 1),
        )
