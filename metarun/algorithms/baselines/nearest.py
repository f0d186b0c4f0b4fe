"""Nearest neighbor on raw inputs: a baseline without learning.

Vinyals et al. (2016) list it as "Pixels (cosine)". Shapes: T tasks, S support rows, Q query rows,
W ways, D outputs, F values of a row.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, task_metric
from metarun.algorithms.capabilities import Capabilities
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch

Distance = Literal["squared_euclidean", "cosine"]


class Nearest(Algorithm):
    """Predicts the label or the value of the nearest support row.

    There are no parameters, and the backbone and the optimizer are ignored. The logit of a class
    is minus the distance to its nearest row.

    Args:
        distance: `squared_euclidean`, or `cosine` (1 - cosine similarity).

    Raises:
        ValueError: The distance is unknown, or it is `cosine` and inputs are single numbers.
    """

    capabilities = Capabilities(accepts_any_way=True, label_equivariant=True, meta_trains=False)

    def __init__(self, setup: LearnerSetup, *, distance: Distance = "squared_euclidean") -> None:
        super().__init__(setup)
        if distance == "cosine" and math.prod(self.spec.input_shape) == 1:
            raise ValueError(
                "algo.distance=cosine: the inputs are single numbers, whose cosine depends only on "
                "their signs: use squared_euclidean"
            )
        self.distance = distance
        self.net = nn.Identity()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:  # noqa: ARG002
        outputs = self.predict(batch.support_x, batch.support_y, batch.query_x).outputs
        losses = [self.loss(o, y) for o, y in zip(outputs, batch.query_y, strict=True)]
        scores = task_metric(self.spec, outputs, batch.query_y)
        return {"loss": torch.stack(losses).mean(), self.spec.metric: scores.mean()}

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        return {"rows": support_x.flatten(2), "targets": support_y}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        targets = adapted["targets"]
        distances = self.distances(query_x.flatten(2), adapted["rows"])
        if self.spec.kind == "regression":
            nearest = distances.argmin(-1, keepdim=True).expand(-1, -1, targets.shape[-1])
            return Prediction(targets.gather(1, nearest))
        others = nn.functional.one_hot(targets).mT[:, None] == 0
        return Prediction(-distances[:, :, None].masked_fill(others, math.inf).amin(-1))

    def distances(self, query: Tensor, support: Tensor) -> Tensor:
        """Return the distances (T, Q, S) between rows (T, Q, F) and (T, S, F)."""
        if self.distance == "cosine":
            unit = nn.functional.normalize
            return 1.0 - unit(query, dim=-1) @ unit(support, dim=-1).mT
        # Not by expanding the square: for close rows that loses digits by cancellation.
        return torch.cdist(query, support, compute_mode="donot_use_mm_for_euclid_dist").square()
