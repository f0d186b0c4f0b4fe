"""R2-D2: ridge regression as the base learner (Bertinetto et al. 2019; code bertinetto/r2d2).

Shapes: S support rows, Q query rows, W ways, F features including a constant 1, D outputs.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner, WithFeatures
from metarun.algorithms.functional import Params
from metarun.core.checks import positive

Solver = Literal["auto", "primal", "dual"]


class R2D2(FeatureLearner):
    """R2-D2: fits a ridge regression to support embeddings, and learns embeddings through it.

    The closed form is W = argmin |X W - Y|^2 + lambda |W|^2 (eq. 4 and 5). X are embeddings with
    a column of ones, whose weight is penalized like the others. Y are one-hot labels or values.
    A query has the prediction `scale` x W + `bias`, both learned (eq. 6). The loss is the
    cross-entropy or the squared error.

    Where the paper and the official code differ, this follows the code. It divides X and Y by
    sqrt(S), which multiplies lambda by S (`lambda_per_row: false` is the paper's formula), and
    keeps lambda at 50 unless `learn_lambda` is set. A learned lambda is the exponential of a
    parameter, which keeps it positive; the base is the code's `lambda_base`, here e. Batch norm
    normalizes support and query rows in one pass in training and by its running statistics at
    evaluation, as in the code.

    Differences from the code: it draws 1 to 10 shots at random in training, here shots are fixed.
    It has its own network, 96-192-384-512 filters with the last two blocks side by side; here
    `backbone` chooses the network. Regression tasks are an addition: the same formula fits values.

    Args:
        solver: Linear system to solve: `primal` for the F weights, `dual` for the S rows by
            Woodbury's identity (eq. 5), or `auto` for the smaller one.
        init_lambda: Initial penalty lambda.
        learn_lambda: Whether to meta-learn lambda.
        lambda_per_row: Whether to multiply lambda by S.
        init_scale: Initial scale: 10 in the code for Omniglot and CIFAR-FS, 1e-4 for
            miniImageNet. The bias starts at 0 and has no effect in classification.

    Raises:
        ValueError: A setting is out of range.
    """

    capabilities = Capabilities(accepts_any_way=True, label_equivariant=True)
    net: _Ridge

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        solver: Solver = "auto",
        init_lambda: float = 50.0,
        learn_lambda: bool = False,
        lambda_per_row: bool = True,
        init_scale: float = 10.0,
    ) -> None:
        positive("algo", init_lambda=init_lambda)
        if not (math.isfinite(init_scale) and init_scale):
            raise ValueError(f"algo.init_scale={init_scale}: expected a number other than 0")
        self.solver: Solver = solver
        self.lambda_per_row = lambda_per_row
        self.initial = init_lambda, learn_lambda, init_scale
        super().__init__(setup)

    def build_net(self) -> nn.Module:
        return _Ridge(self.build_network(None), *self.initial)

    def embed(self, features: Tensor) -> Tensor:
        return torch.cat([features, torch.ones_like(features[:, :1])], 1)

    def summarize(self, support: Tensor, labels: Tensor, ways: int) -> Params:
        """Return the weights (F, W) or (F, D) of the ridge regression."""
        targets = labels
        if self.spec.kind == "classification":
            targets = labels[:, None] == torch.arange(ways, device=labels.device)
        penalty = self.net.log_lambda.exp()
        if self.lambda_per_row:
            penalty = penalty * len(support)
        return {"weights": ridge(support, targets.to(support.dtype), penalty, self.solver)}

    def score(self, summary: Params, query: Tensor, ways: int) -> Tensor:  # noqa: ARG002
        return self.net.scale * (query @ summary["weights"]) + self.net.bias


class _Ridge(WithFeatures):
    """The embedding, and the hyperparameters of the ridge regression on it."""

    log_lambda: Tensor

    def __init__(
        self, features: nn.Module, init_lambda: float, learn_lambda: bool, init_scale: float
    ) -> None:
        super().__init__()
        self.features = features
        log_lambda = torch.tensor(math.log(init_lambda))
        if learn_lambda:
            self.log_lambda = nn.Parameter(log_lambda)
        else:
            self.register_buffer("log_lambda", log_lambda)
        self.scale = nn.Parameter(torch.tensor(float(init_scale)))
        self.bias = nn.Parameter(torch.tensor(0.0))


def ridge(x: Tensor, y: Tensor, penalty: Tensor, solver: Solver = "auto") -> Tensor:
    """Return the weights (F, D) that minimize |x w - y|^2 + penalty |w|^2.

    The weights are differentiable with respect to `x`, `y` and `penalty`.

    Args:
        x: Embeddings, (S, F).
        y: Targets, (S, D).
        penalty: Factor of the penalty, 0-dimensional and positive.
        solver: Linear system to solve, as in `R2D2`; the result is the same.
    """
    num_rows, num_features = x.shape
    if solver == "auto":
        solver = "primal" if num_rows > num_features else "dual"
    dual = solver == "dual"
    gram, right = (x @ x.T, y) if dual else (x.T @ x, x.T @ y)
    system = gram + penalty * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    # Not `solve`: its check waits for the GPU, and the outer optimizer finds non-finite values.
    solution: Tensor = torch.linalg.solve_ex(system, right).result
    return x.T @ solution if dual else solution
