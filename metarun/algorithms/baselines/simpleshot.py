"""SimpleShot (Wang, Chao, Weinberger & van der Maaten 2019; code mileyan/simple_shot).

Shapes: T tasks, S support rows, Q query rows, W ways, F features, N rows of a mini-batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward
from metarun.algorithms.common.pretraining import Pretrained, Weights, labeled_rows
from metarun.algorithms.functional import prototypes
from metarun.backbones.layers.context import ForwardContext
from metarun.core import distributed
from metarun.core.checks import within
from metarun.core.types import Metrics, Progress, TaskBatch

Transform = Literal["none", "l2", "cl2"]


class SimpleShot(Pretrained):
    """Predicts the class whose mean support feature is nearest, after a transform.

    The features are those of an ordinary classifier of all training classes. `l2` divides them
    by their length (the paper's L2N); `cl2` first subtracts the mean training feature (CL2N). A
    logit is minus the squared Euclidean distance to the mean of a class's transformed features.

    The code computes the mean training feature after training, over all training images without
    augmentation. Here it is a running mean, like the statistics of batch norm. After each update
    the mini-batch passes once more, with running statistics, and enters the mean with weight
    `mean_momentum` (1 / (number of updates) at first). This mean includes augmentation, which is
    most of its difference from the code's.

    Args:
        transform: Transform of the features: `none`, `l2` or `cl2`.
        mean_momentum: Weight of a mini-batch in the mean training feature.
        **options: Options of `Pretrained`.

    Raises:
        ValueError: A number or a word is out of range, or the tasks are not classification.
    """

    capabilities = replace(Pretrained.capabilities, label_equivariant=True)

    feature_mean: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        transform: Transform = "cl2",
        mean_momentum: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        within("algo", "(0, 1]", mean_momentum=mean_momentum)
        self.transform = transform
        self.mean_momentum = mean_momentum
        self.register_buffer("feature_mean", torch.zeros(self.num_features))

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        metrics = super().update(batch, progress)

        def task(net: nn.Module, params: Weights, x: Tensor) -> Tensor:
            return forward(net, params, x, ForwardContext(running=True)).mean(0)

        mean = self.map_tasks(task, labeled_rows(batch)[0][None])[0]
        mean = distributed.mean({"mean": mean}, batch.num_tasks)["mean"]
        self.feature_mean.lerp_(mean, max(self.mean_momentum, 1.0 / (progress.step + 1)))
        return metrics

    def embed(self, features: Tensor) -> Tensor:
        """Return the transformed features (N, F)."""
        if self.transform == "none":
            return features
        centered = features - self.feature_mean if self.transform == "cl2" else features
        return nn.functional.normalize(centered, dim=-1)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        centers = prototypes(support, labels, ways)
        return -(query[:, None] - centers).square().sum(-1)
