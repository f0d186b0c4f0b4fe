"""Proto-MAML (Triantafillou et al. 2020; code google-research/meta-dataset, learners/).

Shapes: T tasks, S support rows, Q query rows, W ways, F features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, own_parameters
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.adapting import Support
from metarun.algorithms.common.inner_loop import InnerLoopLearner
from metarun.algorithms.functional import Params, check_inner_loop, prototypes
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import norm_parameters


class ProtoMAML(InnerLoopLearner):
    """Proto-MAML: MAML with a linear head that is initialized from prototypes in each task.

    With c_k the mean embedding of class k, the head starts as W_k = 2 c_k, b_k = -||c_k||^2. Its
    logits are then -||f(x) - c_k||^2 up to a term that is equal for all classes (section 3). Body
    and head take gradient steps on the support. Outer gradients flow through the prototypes, in
    the paper and in the code, also in first-order training, where only the inner gradients are
    constants. All else is as in the code. With `bn=support` (the code's
    `transductive_batch_norm=False`) batch norm normalizes query rows by the support's statistics,
    also in training; otherwise it uses the query's own.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training; 0 is a prototypical network.
        second_order_from: Update from which inner gradients are differentiated; None is never,
            as in the paper's fo-Proto-MAML and in the code.
        adapt_norm: Whether the inner loop adapts scale and shift of batch norm; the code does not.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    capabilities = Capabilities(
        kinds=("classification",), accepts_any_way=True, label_equivariant=True
    )

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        second_order_from: int | None = None,
        adapt_norm: bool = False,
    ) -> None:
        super().__init__(setup)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.net = self.build_network(None)
        kept = set() if adapt_norm else norm_parameters(self.net)
        self.adapted = [name for name in own_parameters(self.net) if name not in kept]
        self.optimizer = self.build_optimizer()

    def start(self, net: nn.Module, theta: Params, support: Support, ctx: ForwardContext) -> Params:
        """Return the initial parameters of the body, and the prototype head."""
        centers = prototypes(forward(net, theta, support.x, ctx), support.y, support.ways)
        head = {"head.weight": 2.0 * centers, "head.bias": -centers.square().sum(1)}
        return {**super().start(net, theta, support, ctx), **head}

    def outputs(
        self, net: nn.Module, theta: Params, weights: Params, x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        return _head(weights, self._features(net, theta, weights, x, ctx))

    def judged(
        self,
        net: nn.Module,
        theta: Params,
        weights: Params,
        support_x: Tensor,
        query_x: Tensor,
        ctx: ForwardContext,
    ) -> Tensor:
        if self.bn != "support":
            return super().judged(net, theta, weights, support_x, query_x, ctx)
        rows = torch.cat([support_x, query_x])
        ctx = replace(ctx, rows=len(support_x))
        features = self._features(net, theta, weights, rows, ctx)
        return _head(weights, features[len(support_x) :])

    def _features(
        self, net: nn.Module, theta: Params, weights: Params, x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        body = {n: w for n, w in weights.items() if not n.startswith("head.")}
        return forward(net, {**theta, **body}, x, ctx)


def _head(weights: Params, features: Tensor) -> Tensor:
    return nn.functional.linear(features, weights["head.weight"], weights["head.bias"])
