"""Base class of algorithms without an inner loop, which solve a task in one forward pass.

Shapes: S support rows, Q query rows, J rows in the loss, W ways, D outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, own_parameters, task_metric
from metarun.algorithms.common.adversarial import Answer, SupportTerm
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.algorithms.outer_optimizer import OuterOptimizer, update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch


class EpisodicLearner(Algorithm):
    """An algorithm whose training loss is the loss of its own predictions.

    All its parameters are in `self.net`. A subclass sets `self.net` and `self.optimizer` and
    implements `answers`.
    """

    optimizer: OuterOptimizer

    @abstractmethod
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
        """Predict the query rows of one task.

        Args:
            net: The network, or its replica.
            params: Parameters of the network by name.
            support_x: Support inputs, (S, *input_shape).
            support_y: Support targets, (S,) labels or (S, D) values.
            query_x: Query inputs, (Q, *input_shape).
            ways: Number of classes, W; not used for regression.
            ctx: Context of the forward pass. Support rows come first in it: `ctx.rows` counts
                them.

        Returns:
            Predictions, (Q, W) logits or (Q, D) values.
        """

    def outputs_and_targets(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        ctx: ForwardContext,
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions in the loss of one training task, and their targets.

        The default is the predictions of the query rows; a subclass may override it.

        Args:
            net: The network, or its replica.
            params: Parameters of the network by name.
            support_x: Support inputs, (S, *input_shape).
            support_y: Support targets, (S,) labels or (S, D) values.
            query_x: Query inputs, (Q, *input_shape).
            query_y: Query targets, (Q,) labels or (Q, D) values.
            ctx: Context of the forward pass.

        Returns:
            Predictions, (J, W) logits or (J, D) values, and targets, (J,) or (J, D).
        """
        ways = self.spec.train_way
        return self.answers(net, params, support_x, support_y, query_x, ways, ctx), query_y

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            *parts, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            ctx = ForwardContext(moments=moments, noise=noise)
            outputs, targets = self.outputs_and_targets(net, params, *parts, ctx)  # type: ignore[call-arg, arg-type]
            loss = self.loss(outputs, targets)
            return loss, (loss, task_metric(self.spec, outputs, targets), moments)

        rows = self.training_rows(batch, progress)
        grads, (losses, scores, moments) = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), rows
        )
        self.optimizer.step(add_prefix("net.", grads), progress, self.limited)
        update_running_statistics(self.net, moments)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        classes = self.spec.kind == "classification"
        ways = int(support_y.max()) + 1 if classes else self.spec.train_way
        ctx = self.answering(support_x.shape[1])

        def task(net: nn.Module, params: Params, *rows: Tensor) -> Tensor:
            return self.answers(net, params, rows[0], rows[1], rows[2], ways, ctx)

        rows = (support_x, support_y, query_x)
        return Prediction(self.map_tasks(task, *rows))

    def answering(self, support_rows: int) -> ForwardContext:
        """Return the context of a forward pass over support and query rows at evaluation."""
        rows = support_rows if self.bn == "support" else None
        return ForwardContext(rows=rows, running=self.bn == "running")

    def solve(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        noise: Tensor,  # noqa: ARG002
        progress: Progress,  # noqa: ARG002
        term: SupportTerm | None,  # noqa: ARG002
    ) -> Answer:
        """Return the function that predicts any rows of one task; there is no inner loss.

        See `AdversarialLearner.solve`.
        """
        own, ways = strip_prefix("net.", params), self.spec.train_way
        return lambda x, ctx: self.answers(net, own, support_x, support_y, x, ways, ctx)

    def limited(self, grads: Params) -> Params:
        """Return clipped gradients, by their names in the outer optimizer."""
        return add_prefix("net.", self.clipped(strip_prefix("net.", grads)))

    def clipped(self, grads: Params) -> Params:
        """Return the gradients of `self.net` after the algorithm's own clipping; none here."""
        return grads
