"""Gaussian-process regression (Rasmussen & Williams 2006, algorithm 2.1), by scikit-learn.

Shapes: T tasks, S support rows, Q query rows, D outputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, task_metric
from metarun.algorithms.capabilities import Capabilities
from metarun.core.checks import at_least
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch

Bounds = float | Sequence[float]


class ExactGP(Algorithm):
    """Predicts the posterior of a Gaussian process with an RBF kernel.

    If the lengthscale and the scale of `data=gp` are numbers, this is the posterior of the
    process that generated the curves: no predictive distribution is better. Ranges, which other
    data have, are fitted to each support set by maximum likelihood.

    There are no parameters, and the backbone and the optimizer are ignored.

    Args:
        lengthscale: Lengthscale l of the kernel, or its range.
        scale: Output scale s of the kernel, or its range.
        noise: Standard deviation of the noise on the targets, which is part of the spread.

    Raises:
        ValueError: A number is out of range, scikit-learn is missing, or the tasks are not
            regression.
    """

    capabilities = Capabilities(kinds=("regression",), package="sklearn", meta_trains=False)

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        lengthscale: Bounds = 1.0,
        scale: Bounds = 1.0,
        noise: float = 0.02,
    ) -> None:
        super().__init__(setup)
        try:
            import sklearn.gaussian_process  # noqa: F401
        except ImportError:
            raise ValueError("algo=gp_exact needs scikit-learn: pip install '.[sklearn]'") from None
        self.lengthscale = _bounds("lengthscale", lengthscale)
        self.scale = _bounds("scale", scale)
        at_least("algo", 0, noise=noise)
        self.noise_std = noise
        self.net = nn.Identity()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:  # noqa: ARG002
        outputs = self.predict(batch.support_x, batch.support_y, batch.query_x).outputs
        score = task_metric(self.spec, outputs, batch.query_y).mean()
        return {"loss": score, self.spec.metric: score}

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        """Fit a process to each of T tasks.

        `rows` and `targets` are the support, `factor` and `weights` the Cholesky factor of its
        kernel matrix and the solution for the targets, and `kernel` the logarithms of the
        kernel's numbers.
        """
        fits = [self._fitted(x, y) for x, y in zip(support_x, support_y, strict=True)]
        return {
            name: torch.stack([torch.as_tensor(fit[name]) for fit in fits]) for name in fits[0]
        } | {"targets": support_y}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        tasks = [
            {name: tensor[task] for name, tensor in adapted.items()} for task in range(len(query_x))
        ]
        pairs = [self._posterior(own, asked) for own, asked in zip(tasks, query_x, strict=True)]
        means, spreads = zip(*pairs, strict=True)
        return Prediction(torch.stack(means), spread=torch.stack(spreads))

    def _process(self) -> Any:
        """Return a process of scikit-learn's before its fit."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel

        squares = [edge**2 for edge in self.scale]
        kernel = ConstantKernel(_middle(squares), _range(squares)) * RBF(
            _middle(self.lengthscale), _range(self.lengthscale)
        )
        # Not zero: with nearly equal rows the matrix would not be positive definite.
        noise = max(self.noise_std**2, 1e-10)
        return GaussianProcessRegressor(kernel, alpha=noise)

    def _fitted(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return the numbers of one task's process after its fit, by the names of `adapt`."""
        from sklearn.exceptions import ConvergenceWarning

        process = self._process()
        with warnings.catch_warnings():
            # scikit-learn warns if the optimum is at an end of the range, which is allowed here.
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(_numbers(x), _numbers(y))
        return {
            "rows": process.X_train_,
            "factor": process.L_,
            "weights": process.alpha_,
            "kernel": process.kernel_.theta,
        }

    def _posterior(self, own: Adapted, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted mean and standard deviation (Q, D) of one task."""
        y = own["targets"]
        process = self._process()
        process.X_train_, process.L_, process.alpha_ = (
            own[name].cpu().numpy() for name in ("rows", "factor", "weights")
        )
        process.kernel_ = process.kernel.clone_with_theta(own["kernel"].cpu().numpy())
        # Targets are not normalized.
        process._y_train_mean, process._y_train_std = np.zeros(y.shape[1]), np.ones(y.shape[1])
        mean, spread = process.predict(_numbers(asked), return_std=True)
        spread = torch.as_tensor(spread).square().add(self.noise_std**2).sqrt()
        shape = (len(asked), y.shape[1])
        return (
            torch.as_tensor(mean).reshape(shape).to(y),
            spread.reshape(len(asked), -1).expand(shape).to(y),
        )


def _bounds(name: str, value: Bounds) -> tuple[float, float]:
    edges = (value, value) if isinstance(value, int | float) else tuple(value)
    if len(edges) != 2 or not 0.0 < edges[0] <= edges[1] < math.inf:
        raise ValueError(f"algo.{name}={value}: expected a positive number, or a range of them")
    return float(edges[0]), float(edges[1])


def _middle(edges: Sequence[float]) -> float:
    return math.sqrt(edges[0] * edges[1])


def _range(edges: Sequence[float]) -> Any:
    """Return the bounds in scikit-learn's form; a parameter given as one number is not fitted."""
    return "fixed" if edges[0] == edges[1] else tuple(edges)


def _numbers(rows: Tensor) -> Any:
    return rows.detach().flatten(1).double().cpu().numpy()
