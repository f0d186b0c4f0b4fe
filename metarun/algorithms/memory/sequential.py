"""Base class of memory-based algorithms, which predict each row of a sequence before its label.

Shapes: T tasks, S support rows, Q query rows, N rows, F features, W ways.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner, WithFeatures
from metarun.algorithms.functional import Params, add_prefix, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch
from metarun.execution.engine import Engine

LossOf = Literal["sequence", "query"]


class Reader(nn.Module):
    """A network that predicts along a labeled sequence, and predicts queries after its end."""

    def forward(self, rows: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        """Return logits (S + Q, W): of each row given the labels before it, then of each query.

        Args:
            rows: Features of the sequence in the order of presentation, (S, F).
            labels: One-hot labels of these rows, (S, W).
            queries: Query features, (Q, F). Each query follows the whole sequence, independently
                of the other queries.
        """
        along, state = self.read(rows, labels)
        return torch.cat([along, self.ask(state, queries)])

    @abstractmethod
    def read(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Params]:
        """Return the logits (S, W) along the sequence, and the state after its end."""

    @abstractmethod
    def ask(self, state: Params, queries: Tensor) -> Tensor:
        """Return the logits (Q, W) of queries, each after the whole sequence."""


class SequenceLearner(FeatureLearner):
    """An algorithm that learns to predict along the support rows, in their order of presentation.

    It predicts a row before it receives the row's label. A query is a row after the whole
    support, independent of the other queries. Only batch norm combines all rows of a task: in
    training, and at evaluation unless `bn=running`, which the shipped configurations set. A
    subclass implements `build_reader`.

    Args:
        loss_of: Predictions in the loss: all along the `sequence`, queries included, or those of
            the `query` rows.
        curriculum: Lengths [rows, from, until] of training sequences: truncated to `rows` rows up
            to update `from`, then linearly longer, and whole from update `until` on. None
            truncates none. The binding of an image to its label is learned sooner from short
            sequences; Santoro et al. (2016, section 4.3) increase the number of classes.
            Truncated sequences have no queries, whose classes may be missing.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    capabilities = Capabilities(kinds=("classification",), order_free=False)
    net: _Sequence

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        loss_of: LossOf = "sequence",
        curriculum: tuple[int, int, int] | None = None,
    ) -> None:
        if curriculum is not None:
            rows, first, last = curriculum
            if rows < 1 or not 0 <= first <= last:
                raise ValueError(
                    f"algo.curriculum={list(curriculum)}: expected [rows, from, until] with "
                    "rows 1 or more and 0 <= from <= until"
                )
            if loss_of == "query":
                raise ValueError(
                    "algo.curriculum leaves no queries for the loss: use algo.loss_of=sequence"
                )
        self.loss_of: LossOf = loss_of
        self.curriculum = curriculum
        super().__init__(setup)

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
        """Return the number of rows, of `whole`, that a training sequence has at an update."""
        if self.curriculum is None or step >= self.curriculum[2]:
            return whole
        rows, first, last = self.curriculum
        share = max(0.0, step - first) / max(1, last - first)
        return min(whole, rows + int(share * (whole - rows)))

    def resolved_engine(self) -> Engine:
        """Return the resolved engine, where `auto` is vmap.

        All tasks have the same weights, so vmap turns the many small steps along a sequence into
        batched steps, which is several times faster.
        """
        auto = self.engine.kind == "auto"
        engine = replace(self.engine, kind="vmap") if auto else self.engine
        return engine.resolved(self.net, self.device)

    def build_net(self) -> _Sequence:
        features = self.build_network(None)
        reader = self.build_reader(features.feature_dim)  # type: ignore[arg-type]
        return _Sequence(features, reader, self.spec.output_dim)

    @abstractmethod
    def build_reader(self, feature_dim: int) -> Reader:
        """Build the reader of rows with this number of features, F."""

    def outputs_and_targets(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        ways: int,  # noqa: ARG002
        ctx: ForwardContext,
    ) -> tuple[Tensor, Tensor]:
        outputs = self._along(net, params, support_x, support_y, query_x, ctx)
        if self.loss_of == "sequence":
            return outputs, torch.cat([support_y, query_y])
        if not len(query_y):
            raise ValueError("algo.loss_of=query needs query rows in training: use train.query=1")
        return outputs[len(support_x) :], query_y

    def summarize(self, support: Tensor, labels: Tensor, ways: int) -> Params:  # noqa: ARG002
        along, state = self.net.reader.read(support, self.net.one_hot(labels, support))
        return {"sequence": along, **add_prefix("state.", state)}

    def score(self, summary: Params, query: Tensor, ways: int) -> Tensor:  # noqa: ARG002
        logits: Tensor = self.net.reader.ask(strip_prefix("state.", summary), query)
        return logits

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        if not self.keeps_support:
            return replace(super().answer(adapted, query_x), sequence=adapted["sequence"])
        rows = adapted["support_x"].shape[1]
        ctx = self.joint_context(rows)

        def task(net: nn.Module, params: Params, *parts: Tensor) -> Tensor:
            return self._along(net, params, *parts, ctx)  # type: ignore[call-arg, arg-type]

        outputs = self.map_tasks(task, adapted["support_x"], adapted["support_y"], query_x)
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
        """Return the logits (S + Q, W) of one task, whose rows pass together."""
        outputs: Tensor = torch.func.functional_call(
            net, params, (support_x, support_y, query_x, ctx)
        )
        return outputs


class _Sequence(WithFeatures):
    """A body that computes features of all rows, and a reader along their sequence."""

    def __init__(self, features: nn.Module, reader: Reader, ways: int) -> None:
        super().__init__()
        self.features = features
        self.reader = reader
        self.ways = ways

    def forward(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        features = self.features(torch.cat([support_x, query_x]), ctx)
        rows = len(support_x)
        labels = self.one_hot(support_y, features)
        outputs: Tensor = self.reader(features[:rows], labels, features[rows:])
        return outputs

    def one_hot(self, labels: Tensor, like: Tensor) -> Tensor:
        """Return labels (S,) as rows (S, W) with the dtype of `like`."""
        classes = torch.arange(self.ways, device=labels.device)
        return (labels[:, None] == classes).to(like.dtype)
