"""Learners that remember: they answer along a sequence of rows whose labels they are told later.

Shapes: T tasks, S support rows, Q query rows, N rows, F features, W ways.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch
from metarun.execution.engine import Engine

LossOf = Literal["sequence", "query"]


class Reader(nn.Module):
    """Answers along a sequence of features, and rows that are asked about at its end."""

    @abstractmethod
    def forward(self, rows: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Logits (S + Q, W): of each row given the labels before it, then of each query.

        Args:
            rows: (S, F) features in the order of presentation.
            labels: (S, W) their labels, one-hot.
            queries: (Q, F) features, each asked about alone, after the whole sequence.
        """


class SequenceLearner(EpisodicLearner):
    """Learns to answer along the support rows, in the order in which they come.

    It answers a row before it is told its label; a query is a row that follows the whole
    support, and knows of no other query. Batch norm alone looks at all rows of a task: in
    training, and at evaluation unless `bn=running`, which is the default here. A subclass sets
    `self.net` by `with_reader`.

    Args:
        loss_of: Answers that the loss is of: those along the whole `sequence`, queries included,
            or those to the `query` rows.
        curriculum: [rows, from, until]: training sequences are cut to so many rows up to update
            `from`, then to ever more of them, and are whole from update `until` on; null cuts
            none. What binds a drawing to its label is learned sooner from short sequences;
            Santoro et al. (2016, section 4.3) let the number of classes grow. Queries are left
            out as long as sequences are cut: their classes may be.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A word is not allowed, or the data are no classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    order_free: bool = False

    def __init__(
        self,
        *,
        loss_of: LossOf = "sequence",
        curriculum: tuple[int, int, int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if loss_of not in ("sequence", "query"):
            raise ValueError(f"algo.loss_of={loss_of}: expected sequence or query")
        if curriculum is not None:
            rows, first, last = curriculum
            if rows < 1 or not 0 <= first <= last:
                raise ValueError(
                    f"algo.curriculum={list(curriculum)}: expected [rows, from, until], 1 or more "
                    "rows and updates in their order"
                )
            if loss_of == "query":
                raise ValueError(
                    "algo.curriculum has no queries to judge: use algo.loss_of=sequence"
                )
        self.loss_of: LossOf = loss_of
        self.curriculum = curriculum

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        whole = batch.support_x.shape[1]
        rows = self.rows_at(progress.step, whole)
        if rows == whole:
            return super().update(batch, progress)
        cut = TaskBatch(
            batch.support_x[:, :rows],
            batch.support_y[:, :rows],
            batch.query_x[:, :0],
            batch.query_y[:, :0],
        )
        return super().update(cut, progress)

    def rows_at(self, step: int, whole: int) -> int:
        """Rows of a training sequence of `whole` rows at an update."""
        if self.curriculum is None or step >= self.curriculum[2]:
            return whole
        rows, first, last = self.curriculum
        share = max(0.0, step - first) / max(1, last - first)
        return min(whole, rows + int(share * (whole - rows)))

    def resolved_engine(self) -> Engine:
        """`auto` is vmap: weights are those of all tasks, so that a batch of rows is one batch.

        The many small steps along a sequence are shared by the tasks, several times faster.
        """
        auto = self.engine.kind == "auto"
        engine = replace(self.engine, kind="vmap") if auto else self.engine
        return engine.resolved(self.net, self.device)

    def with_reader(self, features: nn.Module, reader: Reader) -> nn.Module:
        """The network: a body of the backbone whose features (N, F) a reader remembers."""
        return _Sequence(features, reader, self.spec.output_dim)

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
        outputs = self._along(net, params, support_x, support_y, query_x, ctx)
        if self.loss_of == "sequence":
            return outputs, torch.cat([support_y, query_y])
        if not len(query_y):
            raise ValueError("algo.loss_of=query learns from queries alone: use train.query=1")
        return outputs[len(support_x) :], query_y

    def answers(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        ways: int,  # noqa: ARG002
        ctx: ForwardContext,
    ) -> Tensor:
        outputs = self._along(net, params, support_x, support_y, query_x, ctx)
        return outputs[len(support_x) :]

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        ctx = self.answering(support_x.shape[1])

        def task(net: nn.Module, params: Params, *rows: Tensor) -> Tensor:
            return self._along(net, params, *rows, ctx)  # type: ignore[call-arg, arg-type]

        outputs = self.map_tasks(task, support_x, support_y, query_x)
        rows = support_x.shape[1]
        return Prediction(outputs[:, rows:], sequence=outputs[:, :rows])

    def _along(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        ctx: ForwardContext,
    ) -> Tensor:
        """Logits (S + Q, W) of one task."""
        outputs: Tensor = torch.func.functional_call(
            net, params, (support_x, support_y, query_x, ctx)
        )
        return outputs


class _Sequence(nn.Module):
    """Features of all rows, read in their order."""

    def __init__(self, features: nn.Module, reader: Reader, ways: int) -> None:
        super().__init__()
        self.features = features
        self.reader = reader
        self.ways = ways

    def forward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        features = self.features(torch.cat([support_x, query_x]), ctx)
        classes = torch.arange(self.ways, device=support_y.device)
        labels = (support_y[:, None] == classes).to(features.dtype)
        rows = len(support_x)
        outputs: Tensor = self.reader(features[:rows], labels, features[rows:])
        return outputs
