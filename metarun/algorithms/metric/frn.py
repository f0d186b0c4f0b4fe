"""Feature map reconstruction networks (Wertheimer, Tang & Hariharan 2021; code Tsingularity/FRN).

Shapes: S support rows, Q query rows, W ways, K shots, d channels, r positions of a feature map.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params
from metarun.backbones.layers.context import ForwardContext


class FRN(EpisodicLearner):
    """Feature map reconstruction network: predicts the class that best reconstructs the query.

    The features of a class at all positions of its support images are the rows of S, (K r, d). The
    features of a query, (r, d), are reconstructed from them by ridge regression:
    Q' = rho Q S^T (S S^T + lambda I)^-1 S (eq. 8), with lambda = K r / d exp(alpha) and
    rho = exp(beta). p(y = c | x) is the softmax over classes of -gamma |Q - Q'|^2 / r. The network
    learns alpha, beta and gamma, which begin at 0, 0 and `scale`. Every class of a task needs the
    same number of support rows.

    As in the code, features are divided by the square root of d. The auxiliary loss that makes the
    supports of different classes orthogonal is left out.

    Args:
        scale: Initial value of gamma; 1 in the code.
        **common: Arguments of `Algorithm`.

    Raises:
        ValueError: A setting is out of range, the tasks are not classification, or the backbone
            has no feature maps.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    accepts_any_way: bool = True
    label_equivariant: bool = True
    replays: ClassVar[bool] = True

    def __init__(self, *, scale: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        if not scale > 0:
            raise ValueError(f"algo.scale={scale}: expected a positive number")
        self.net = _Reconstruction(self.build_maps("last"), scale)
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
        """Return the logits (Q, W) of one task's queries."""
        logits: Tensor = torch.func.functional_call(
            net, params, (support_x, support_y, query_x, ways, ctx)
        )
        return logits


class _Reconstruction(nn.Module):
    """The feature maps, and the learned numbers of the reconstruction."""

    def __init__(self, features: nn.Module, scale: float) -> None:
        super().__init__()
        self.features = features
        self.alpha = nn.Parameter(torch.tensor(0.0))
        self.beta = nn.Parameter(torch.tensor(0.0))
        self.gamma = nn.Parameter(torch.tensor(float(scale)))

    def forward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ways: int, ctx: ForwardContext
    ) -> Tensor:
        maps = self.features(torch.cat([support_x, query_x]), ctx)
        rows = maps.flatten(2).mT / math.sqrt(maps.shape[1])
        # Sorted by class, since every class has as many rows.
        order = support_y.argsort(stable=True)
        support = rows[: len(order)][order].unflatten(0, (ways, -1)).flatten(1, 2)
        errors = reconstruction_errors(
            support, rows[len(order) :], self.alpha.exp(), self.beta.exp()
        )
        return -self.gamma * errors


def reconstruction_errors(
    support: Tensor, query: Tensor, penalty: Tensor, factor: Tensor
) -> Tensor:
    """Return the mean squared distance of queries to their reconstructions from each class, (Q, W).

    Args:
        support: Features of each class, (W, K r, d).
        query: Features of each query, (Q, r, d).
        penalty: exp(alpha), 0-dimensional and positive.
        factor: rho, 0-dimensional.
    """
    _, num_rows, depth = support.shape
    gram = support @ support.mT
    lam = penalty * (num_rows / depth) + 1e-6
    system = gram + lam * torch.eye(num_rows, dtype=gram.dtype, device=gram.device)
    # With G = S S^T, M = (G + lambda I)^-1 and p = S q, a query's feature q has the distance
    # |q - rho S^T M p|^2 = q q - p (2 rho M - rho^2 M G M) p.
    inverse = torch.linalg.inv_ex(system).inverse
    kernel = 2.0 * factor * inverse - factor.square() * (inverse @ gram @ inverse)
    products = support @ query.flatten(0, 1).mT
    explained = (products * (kernel @ products)).sum(1)
    distances = query.square().sum(-1).flatten() - explained
    return distances.unflatten(1, query.shape[:2]).mean(2).mT
