"""Prototypical networks (Snell, Swersky & Zemel 2017; code jakesnell/prototypical-networks).

Shapes: S support rows, Q query rows, W ways, F features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward
from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params, prototypes
from metarun.backbones.layers.context import ForwardContext

Distance = Literal["squared_euclidean", "cosine"]


class ProtoNet(EpisodicLearner):
    """Prototypical network: predicts the class with the nearest mean embedding, its prototype.

    p(y = k | x) is the softmax over k of -d(f(x), c_k), where c_k is the mean of f over the
    support rows of class k (eq. 1 and 2). In training, batch norm normalizes the support and query
    rows of an episode in one pass; at evaluation it uses its running statistics, as in the code.

    Args:
        distance: Distance d, `squared_euclidean` or `cosine` (1 - cosine similarity).
        scale: Factor on the distances; the paper has 1.
        **common: Arguments of `Algorithm`.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    accepts_any_way: bool = True
    label_equivariant: bool = True

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
        features = forward(net, params, torch.cat([support_x, query_x]), ctx)
        return self._logits(features, support_y, ways)

    def _logits(self, features: Tensor, support_y: Tensor, ways: int) -> Tensor:
        """Return logits (Q, W), given features (S + Q, F) of one task, support rows first."""
        num_support = support_y.shape[0]
        query = features[num_support:]
        centers = prototypes(features[:num_support], support_y, ways)
        if self.distance == "cosine":
            similarity = nn.functional.normalize(query) @ nn.functional.normalize(centers).T
            return self.scale * (similarity - 1.0)
        return -self.scale * (query[:, None] - centers[None]).square().sum(-1)
