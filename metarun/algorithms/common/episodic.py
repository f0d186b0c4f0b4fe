"""Learners whose update is the loss of their own answers: no inner loop, one pass for a task.

Shapes: S support rows, Q query rows, J judged rows, W ways, D outputs.
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
    """Learns what `answers` of one task needs, everything in `self.net`.

    A subclass sets `self.net` and `self.optimizer` and writes `answers`.
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
        """Answer the queries of one task.

        Args:
            net: The network, or its replica.
            params: Its parameters by name.
            support_x: (S, *input_shape).
            support_y: (S,) labels, or (S, D) values.
            query_x: (Q, *input_shape).
            ways: W of a classification.
            ctx: Of the pass; `rows` counts support rows, which come first.

        Returns:
            (Q, W) logits, or (Q, D) values.
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
        """Answers (J, W) or (J, D) of one training task that the loss is of, and their targets.

        Those of the queries, unless a subclass knows better.
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
            task, self.net, own_parameters(self.net), rows, key=self.replay_key()
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
        return Prediction(self.map_tasks(task, *rows, key=self.replay_key(ways)))

    def answering(self, support_rows: int) -> ForwardContext:
        """How a pass over the support and query rows of a task is made at evaluation."""
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
        """Answer any rows of one task; see `AdversarialLearner.solve`. There is no inner loss."""
        own, ways = strip_prefix("net.", params), self.spec.train_way
        return lambda x, ctx: self.answers(net, own, support_x, support_y, x, ways, ctx)

    def limited(self, grads: Params) -> Params:
        """Gradients by their names in the learner, as they go to the outer optimizer."""
        return add_prefix("net.", self.clipped(strip_prefix("net.", grads)))

    def clipped(self, grads: Params) -> Params:
        """The gradients by name, as they go to the outer optimizer."""
        return grads
