"""ANML: a network that gates another's features, so that it learns where it may.

Beaulieu et al. 2020; official code uvm-neurobotics-lab/ANML. Shapes: R rows, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.common.online import Predictor
from metarun.algorithms.continual.trajectory import TrajectoryLearner
from metarun.backbones.layers.context import ForwardContext


class ANML(TrajectoryLearner):
    """Learns a prediction network, and a neuromodulating one that gates its features.

    The features of a row are those of the prediction network's body times a gate in (0, 1) for
    each, which another network of the same kind computes from the row itself (Beaulieu et al.
    2020, section 3.1). A training trajectory changes the prediction network, body and head; the
    gate is learned by the meta-loss alone. A lifetime changes the head. See `TrajectoryLearner`.

    The official code asks for the rows of the trajectory again in the meta-loss, where ours are
    held out, and normalizes by the statistics of each batch, which along a trajectory is one
    image: use `backbone.norm=instance`.

    Args:
        gate: Options of the gating network's backbone that differ from the other's, such as
            `{filters: 32}`; null is as there. The paper has 112 channels there and 256 here.
        **common: Those of `TrajectoryLearner`, `WeightLearner` and `Algorithm`.

    Raises:
        ValueError: The backbone does not take such an option.
    """

    inside: ClassVar[tuple[str, ...]] = ("body.features.", "head.")

    def __init__(self, *, gate: Mapping[str, Any] | None = None, **common: Any) -> None:
        self.gate_options = {n: v for n, v in (gate or {}).items() if v is not None}
        super().__init__(**common)

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
    """Features, each times a gate.

    Args:
        features: Maps rows to (R, F).
        gate: Maps rows to (R, F), before the logistic function.
    """

    def __init__(self, features: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.gate = gate

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """(R, F) gated features of rows (R, …)."""
        gated: Tensor = self.features(x, ctx) * torch.sigmoid(self.gate(x, ctx))
        return gated
