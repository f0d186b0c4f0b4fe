"""Feature map reconstruction networks (Wertheimer, Tang & Hariharan 2021; code Tsingularity/FRN).

Shapes: S support rows, Q query rows, W ways, K shots, d channels, r positions of a feature map.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner, WithFeatures
from metarun.algorithms.functional import Params
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import positive
from metarun.core.types import Adapted


class FRN(FeatureLearner):
    """Feature map reconstruction network: predicts the class that best reconstructs the query.

    The features of a class at all positions of its support images are the rows of S, (K r, d). The
    features of a query, (r, d), are reconstructed from them by ridge regression:
    Q' = rho Q S^T (S S^T + lambda I)^-1 S (eq. 8), with lambda = K r / d exp(alpha) and
    rho = exp(beta). p(y = c | x) is the softmax over classes of -gamma |Q - Q'|^2 / r. The network
    learns alpha, beta and gamma, which begin at 0, 0 and `scale`. Every class of a task needs the
    same number of support rows.

    Features are divided by the square root of d, as in the code for ResNet-12. The auxiliary loss
    that makes the supports of different classes orthogonal is left out.

    With `all_pairs`, every row of a training task is both support and query, as in Laenen &
    Bertinetto (2021): each set with one row of each class is the support of all other rows. A task
    of W classes with n rows each has W n (n - 1) answers in its loss, in place of W (n - 1).

    Args:
        scale: Initial value of gamma; 1 in the code.
        all_pairs: Whether all rows of a training task are support and query; needs one support row
            of each class.

    Raises:
        ValueError: A setting is out of range, the tasks are not classification, or the backbone
            has no feature maps.
    """

    capabilities = Capabilities(
        kinds=("classification",),
        accepts_any_way=True,
        label_equivariant=True,
        needs_equal_shots=True,
    )
    net: _Reconstruction

    def __init__(self, setup: LearnerSetup, *, scale: float = 1.0, all_pairs: bool = False) -> None:
        positive("algo", scale=scale)
        self.scale = scale
        self.all_pairs = all_pairs
        super().__init__(setup)
        if all_pairs and self.spec.train_shot not in (1, None):
            raise ValueError(
                "algo.all_pairs=true needs one support row of each class, not "
                f"{self.spec.train_shot}: use train.shot=1"
            )

    def build_net(self) -> nn.Module:
        return _Reconstruction(self.build_maps("last"), self.scale)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        counts = nn.functional.one_hot(support_y).sum(1)
        if (counts != counts[:, :1]).any():
            raise ValueError(
                "FRN needs the same number of support rows of each class: leave out the others, "
                "or use another algo"
            )
        return super().adapt(support_x, support_y)

    def embed(self, features: Tensor) -> Tensor:
        """Return maps (N, d, H, W') as the features (N, r, d) of their positions."""
        return features.flatten(2).mT / math.sqrt(features.shape[1])

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        # Sorted by class; every class has as many rows.
        support = support[labels.argsort(stable=True)].unflatten(0, (ways, -1))
        penalty, factor = self.net.alpha.exp(), self.net.beta.exp()
        errors = reconstruction_errors(support.flatten(1, 2), query, penalty, factor)
        return -self.net.gamma * errors

    def outputs_and_targets(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        ways: int,
        ctx: ForwardContext,
    ) -> tuple[Tensor, Tensor]:
        if not self.all_pairs:
            rows = (support_x, support_y, query_x, query_y)
            return super().outputs_and_targets(net, params, *rows, ways, ctx)
        features = self.features(net, params, torch.cat([support_x, query_x]), ctx)
        order = torch.cat([support_y, query_y]).argsort(stable=True)
        sets = features[order].unflatten(0, (ways, -1)).transpose(0, 1)
        number = len(sets)
        every = sets.flatten(0, 1)
        # Each row is a class of its own.
        labels = torch.arange(len(every), device=query_y.device)
        logits: Tensor = self._with(
            net, params, lambda own: own.logits(every, labels, every, len(every))
        )
        logits = logits.view(number, ways, number, ways)
        apart = [logits[i, :, j] for i, j in itertools.permutations(range(number), 2)]
        targets = torch.arange(ways, device=query_y.device).repeat(len(apart))
        return torch.cat(apart), targets


class _Reconstruction(WithFeatures):
    """The network of the feature maps, and the learned numbers of the reconstruction."""

    def __init__(self, features: nn.Module, scale: float) -> None:
        super().__init__()
        self.features = features
        self.alpha = nn.Parameter(torch.tensor(0.0))
        self.beta = nn.Parameter(torch.tensor(0.0))
        self.gamma = nn.Parameter(torch.tensor(float(scale)))


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
    errors: Tensor = distances.unflatten(1, query.shape[:2]).mean(2)
    return errors.mT
