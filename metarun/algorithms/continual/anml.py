"""ANML: a neuromodulatory network gates the features of a prediction network.

Beaulieu et al. (2020); official code uvm-neurobotics-lab/ANML. Shapes: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.common.online import Predictor
from metarun.algorithms.continual.trajectory import TrajectoryLearner
from metarun.backbones.layers.context import ForwardContext


class ANML(TrajectoryLearner):
    """Learns a prediction network and a neuromodulatory network that gates its features.

    Each feature of the prediction network's body is multiplied by a gate in (0, 1). A second
    network of the same kind computes the gates from the same row (Beaulieu et al. 2020, section
    3.1). A training trajectory changes the body and the head of the prediction network; the gate
    is learned by the meta-loss only. Along a stream only the head changes. See
    `TrajectoryLearner`.

    The official code normalizes by the statistics of each batch, which along a trajectory is one
    image: use `backbone.norm=instance`.

    Args:
        gate: Options of the gating network's backbone that differ from the prediction network's,
            such as `{filters: 32}`; null changes none. In the paper the gating network has 112
            channels and the prediction network 256.
        **options: Options of `TrajectoryLearner`.

    Raises:
        ValueError: The backbone has no such option.
    """

    inside: ClassVar[tuple[str, ...]] = ("body.features.", "head.")

    def __init__(
        self, setup: LearnerSetup, *, gate: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.gate_options = {n: v for n, v in (gate or {}).items() if v is not None}
        super().__init__(setup, **options)

    def build(self) -> Predictor:
        features = self.build_network(None)
        size: int = features.feature_dim  # type: ignore[assignment]
        try:
            gate = self._backbone(
                input_shape=self.spec.input_shape, output_dim=size, **self.gate_options
            )
        except TypeError as error:
            raise ValueError(f"algo.gate={self.gate_options}: {error}") from error
        return Predictor(Gated(features, gate), size, self.head, self.spec.output_dim)


class Gated(nn.Module):
    """A network whose features are multiplied by gates.

    Args:
        features: Network from rows to features (R, F).
        gate: Network from rows to gates (R, F), before the logistic function.
    """

    def __init__(self, features: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.gate = gate

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Return the gated features (R, F) of rows (R, …)."""
        gated: Tensor = self.features(x, ctx) * torch.sigmoid(self.gate(x, ctx))
        return gated
