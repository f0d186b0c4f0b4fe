"""Baseline and Baseline++ (Chen et al. 2019; code wyharveychen/CloserLookFewShot).

Shapes: T tasks, S support rows, Q query rows, B rows of a mini-batch, W ways, F features, E
epochs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.common.pretraining import Pretrained, Weights
from metarun.algorithms.functional import add_prefix, strip_prefix
from metarun.core import seeding
from metarun.core.checks import at_least, positive, within
from metarun.core.types import Adapted, Prediction


class Baseline(Pretrained):
    """Fits a new head to each task, on the features of an ordinary classifier.

    After supervised training over all training classes (section 3.2) the body is frozen. A
    randomly initialized head of the same kind is fitted to the support features by SGD with
    momentum. With `head=cosine` this is Baseline++ (section 3.3).

    Settings of the fit that the paper does not give are those of `baselinefinetune.py`. The
    initial head is the same for every task; the code draws one for each. An inner step
    (`eval.inner_steps`) is an epoch.

    Args:
        head_lr: Learning rate of the fit.
        head_momentum: Momentum of the fit.
        head_dampening: Dampening of the momentum: the share of each gradient that is left out.
        head_weight_decay: Factor of the L2 penalty, which is added to the gradient.
        head_batch: Rows of a mini-batch; None takes all.
        head_epochs: Passes over the support rows, each in a new random order.
        **options: Options of `Pretrained`.

    Raises:
        ValueError: A number or a word is out of range, or the tasks are not classification.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        head_lr: float = 0.01,
        head_momentum: float = 0.9,
        head_dampening: float = 0.9,
        head_weight_decay: float = 0.001,
        head_batch: int | None = 4,
        head_epochs: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        positive("algo", head_lr=head_lr)
        within("algo", "[0, 1)", head_momentum=head_momentum, head_dampening=head_dampening)
        at_least("algo", 0, head_weight_decay=head_weight_decay, head_epochs=head_epochs)
        at_least("algo", 1, null="or null for all rows", head_batch=head_batch)
        self.head_lr = head_lr
        self.head_momentum = head_momentum
        self.head_dampening = head_dampening
        self.head_weight_decay = head_weight_decay
        self.head_batch = head_batch
        self.head_epochs = head_epochs
        self.capabilities = replace(self.capabilities, order_free=head_batch is None)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        adapted = super().adapt(support_x, support_y)
        if self.keeps_support:
            return adapted
        # Batched over the tasks here, since the fit takes many small steps.
        head = self._fitted_head(adapted.pop("features"), adapted.pop("labels"))
        return {**adapted, **add_prefix("head.", head)}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        if not self.keeps_support:
            head, query = strip_prefix("head.", adapted), self.query_features(adapted, query_x)
        else:
            support, query = self.joint_features(adapted["support_x"], query_x)
            head = self._fitted_head(support, adapted["support_y"])
        return Prediction(self.head.scores(head, query))

    def _fitted_head(self, features: Tensor, labels: Tensor) -> Weights:
        """Return the weights of the T heads after the fit."""
        epochs = self.evaluation_steps(self.head_epochs)
        return deque(self.fitted_heads(features, labels, epochs), maxlen=1).pop()

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        support, query = self.joint_features(support_x, query_x)
        heads = self.fitted_heads(support, support_y, steps)
        return torch.stack([self.head.scores(weights, query) for weights in heads])

    def fitted_heads(self, features: Tensor, labels: Tensor, epochs: int) -> Iterator[Weights]:
        """Yield the weights of the T heads at initialization and after each epoch of the fit.

        The tasks share the initialization and the mini-batches, so that predictions are
        equivariant to a permutation of the tasks.

        Args:
            features: (T, S, F) support features.
            labels: (T, S) support labels.
            epochs: Number of epochs E.
        """
        num_tasks, num_rows, num_features = features.shape
        start = self.head.start(
            seeding.key(self.seed, "head"), num_features, int(labels.max()) + 1, features
        )
        weights = {name: w.expand(num_tasks, *w.shape) for name, w in start.items()}
        velocity: Weights | None = None
        yield weights
        orders = torch.tensor(seeding.key(self.seed, "mini-batches"), device=features.device)
        for epoch in range(epochs):
            order = seeding.choose(orders, epoch, num_rows, num_rows)
            for rows in order.split(self.head_batch or num_rows):
                grads = self._gradient(weights, features[:, rows], labels[:, rows])
                velocity = grads if velocity is None else self._accelerated(velocity, grads)
                weights = {n: w - self.head_lr * velocity[n] for n, w in weights.items()}
            yield weights

    def _gradient(self, weights: Weights, features: Tensor, labels: Tensor) -> Weights:
        """Return the gradient of each task's mean cross-entropy plus the L2 penalty."""
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with torch.enable_grad():
            scores = self.head.scores(leaves, features)
            loss = nn.functional.cross_entropy(
                scores.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            grads = torch.autograd.grad(loss / labels.shape[1], list(leaves.values()))
        return {
            name: grad + self.head_weight_decay * weights[name]
            for name, grad in zip(leaves, grads, strict=True)
        }

    def _accelerated(self, velocity: Weights, grads: Weights) -> Weights:
        """Return the next velocity; the first one is the gradient, as in torch's SGD."""
        return {
            name: self.head_momentum * v + (1.0 - self.head_dampening) * grads[name]
            for name, v in velocity.items()
        }
