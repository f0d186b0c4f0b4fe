"""Prototypical networks (Snell, Swersky & Zemel 2017; code jakesnell/prototypical-networks).

Shapes: S support rows, Q query rows, W ways, F features.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner
from metarun.algorithms.functional import Params, prototypes
from metarun.core.checks import positive

Distance = Literal["squared_euclidean", "cosine"]


class ProtoNet(FeatureLearner):
    """Prototypical network: predicts the class with the nearest mean embedding, its prototype.

    p(y = k | x) is the softmax over k of -d(f(x), c_k), where c_k is the mean of f over the
    support rows of class k (eq. 1 and 2). In training, batch norm normalizes the support and query
    rows of an episode in one pass; at evaluation it uses its running statistics, as in the code.

    Args:
        distance: Distance d, `squared_euclidean` or `cosine` (1 - cosine similarity).
        scale: Factor on the distances; the paper has 1.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    capabilities = Capabilities(
        kinds=("classification",), accepts_any_way=True, label_equivariant=True
    )

    def __init__(
        self, setup: LearnerSetup, *, distance: Distance = "squared_euclidean", scale: float = 1.0
    ) -> None:
        super().__init__(setup)
        positive("algo", scale=scale)
        self.distance = distance
        self.scale = scale

    def summarize(self, support: Tensor, labels: Tensor, ways: int) -> Params:
        return {"prototypes": prototypes(support, labels, ways)}

    def score(self, summary: Params, query: Tensor, ways: int) -> Tensor:  # noqa: ARG002
        centers = summary["prototypes"]
        if self.distance == "cosine":
            similarity = nn.functional.normalize(query) @ nn.functional.normalize(centers).T
            return self.scale * (similarity - 1.0)
        return -self.scale * (query[:, None] - centers[None]).square().sum(-1)
