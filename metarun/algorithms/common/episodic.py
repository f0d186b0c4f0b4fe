"""Base class of algorithms without an inner loop, which solve a task in one forward pass.

Shapes: T tasks, S support rows, Q query rows, J rows in the loss, W ways, D outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, task_metric
from metarun.algorithms.common.adversarial import Answer, SupportTerm
from metarun.algorithms.functional import Params, strip_prefix
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Adapted, Prediction, Progress, TaskBatch


class EpisodicLearner(Algorithm):
    """An algorithm whose training loss is the loss of its own predictions.

    All its parameters are in `self.net`. A subclass sets `self.net` and `self.optimizer` and
    implements `answers`. `adapt` keeps the support rows, unless the subclass overrides both verbs.
    """

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
        ways: int,
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
            ways: Number of classes, W; not used for regression.
            ctx: Context of the forward pass.

        Returns:
            Predictions, (J, W) logits or (J, D) values, and targets, (J,) or (J, D).
        """
        return self.answers(net, params, support_x, support_y, query_x, ways, ctx), query_y

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        ways = self.training_ways(batch)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            *parts, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            ctx = ForwardContext(moments=moments, noise=noise)
            own = strip_prefix("net.", params)
            outputs, targets = self.outputs_and_targets(net, own, *parts, ways, ctx)  # type: ignore[call-arg, arg-type]
            loss = self.loss(outputs, targets)
            return loss, (loss, task_metric(self.spec, outputs, targets), moments)

        return task, self.training_rows(batch, progress)

    @property
    def keeps_support(self) -> bool:
        return True

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        return {"support_x": support_x, "support_y": support_y}

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        support_x, support_y = adapted["support_x"], adapted["support_y"]
        ways, ctx = self.ways(support_y), self.joint_context(support_x.shape[1])

        def task(net: nn.Module, params: Params, *rows: Tensor) -> Tensor:
            return self.answers(net, params, rows[0], rows[1], rows[2], ways, ctx)

        rows = (support_x, support_y, query_x)
        return Prediction(self.map_tasks(task, *rows))

    def joint_context(self, support_rows: int) -> ForwardContext:
        """Return the context of one pass over support and query rows at evaluation."""
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
