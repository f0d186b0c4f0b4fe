"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016).

Shapes: S support rows, Q query rows, N rows, W ways, F features, H hidden units.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.base import positive
from metarun.algorithms.common.episodic import EpisodicLearner
from metarun.algorithms.functional import Params
from metarun.algorithms.outer_optimizer import check_positive
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.recurrent import LSTMCell


class MatchingNet(EpisodicLearner):
    """Answers with the labels of the support rows, weighted by attention to their embeddings.

    p(y | x) = sum_i a(x, x_i) y_i, with a the softmax over the support rows of `scale` times
    the cosine similarity of f(x) and g(x_i) (eq. 1 and section 2.1.1); the loss is -log p. There
    is no official code. In the paper `scale` is 1, which leaves the attention nearly flat (of two
    rows one gets 0.88 at most). Ours is 100 after wyharveychen/CloserLookFewShot, which also cuts
    similarities below 0; we do not.

    With `full_context` the embeddings depend on the whole support set (FCE): g is a
    bidirectional LSTM over the support rows in the order they come in (appendix A.2), f reads
    the support by attention in `processing_steps` steps of an LSTM (appendix A.1).

    In training batch norm sees the support and query rows in one pass, at evaluation its
    running statistics, as in both replications (CloserLook and oscarknagg/few-shot).

    Args:
        scale: Factor on the similarities, the inverse temperature of the attention.
        full_context: Embed each row in the context of the support set.
        processing_steps: K, steps of f's LSTM; only used with `full_context`. The paper gives
            no number, CloserLook takes as many as there are support rows.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number is out of range, or the data are no classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    replays: ClassVar[bool] = True
    accepts_any_way: bool = True
    label_equivariant: bool = True

    def __init__(
        self,
        *,
        scale: float = 100.0,
        full_context: bool = False,
        processing_steps: int = 5,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_positive("algo.scale", scale)
        positive("processing_steps", processing_steps)
        self.scale = scale
        self.order_free = not full_context
        self.net = _Embedding(self.build_network(None), processing_steps if full_context else 0)
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
        """Log-probabilities (Q, W) of one task's queries."""
        support, query = torch.func.functional_call(net, params, (support_x, query_x, ctx))
        similarity = nn.functional.normalize(query) @ nn.functional.normalize(support).T
        return class_log_probabilities(self.scale * similarity, support_y, ways)


class _Embedding(nn.Module):
    """Embeds support and query rows, in the context of the support where it has steps for it."""

    def __init__(self, features: nn.Module, processing_steps: int) -> None:
        super().__init__()
        self.features = features
        self.context = (
            FullContext(features.feature_dim, processing_steps)  # type: ignore[arg-type]
            if processing_steps
            else None
        )

    def forward(
        self, support_x: Tensor, query_x: Tensor, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        features = self.features(torch.cat([support_x, query_x]), ctx)
        support, query = features[: len(support_x)], features[len(support_x) :]
        if self.context is None:
            return support, query
        embedded: tuple[Tensor, Tensor] = self.context(support, query)
        return embedded


class FullContext(nn.Module):
    """Full context embeddings of a support set and of queries (appendix A).

    Args:
        dim: F, of the embeddings and of the LSTMs' hidden units.
        steps: K, of the queries' LSTM.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.forwards = LSTMCell(dim, dim)
        self.backwards = LSTMCell(dim, dim)
        # LSTM(f', [h, r], c) of eq. 3 has two hidden inputs; r is one of the inputs here, which
        # is the same sum of products.
        self.attending = LSTMCell(2 * dim, dim)

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Embed (S, F) support rows and (Q, F) queries; both keep their shapes."""
        support = self.embed_support(support)
        return support, self.embed_query(query, support)

    def embed_support(self, rows: Tensor) -> Tensor:
        """g(x_i, S) = forward LSTM + backward LSTM + g'(x_i) of (S, F) rows (appendix A.2)."""
        ahead = _run(self.forwards, rows)
        back = _run(self.backwards, rows.flip(0)).flip(0)
        return ahead + back + rows

    def embed_query(self, rows: Tensor, support: Tensor) -> Tensor:
        """f(x, S) of (Q, F) rows, each alone with the (S, F) support (eq. 3 to 6).

        The paper leaves h_0 open; it is f'(x) here, as in both replications.
        """
        hidden, cell = rows, torch.zeros_like(rows)
        for _ in range(self.steps):
            read = (hidden @ support.T).softmax(1) @ support
            out, cell = self.attending(torch.cat([rows, read], 1), hidden, cell)
            hidden = out + rows
        return hidden


def _run(lstm: LSTMCell, rows: Tensor) -> Tensor:
    """Outputs (S, H) along a sequence of (S, F) rows, from an empty state."""
    hidden = cell = rows.new_zeros(1, lstm.weight_hh.shape[1])
    outputs = []
    for row in rows.split(1):
        hidden, cell = lstm(row, hidden, cell)
        outputs.append(hidden)
    return torch.cat(outputs)


def class_log_probabilities(scores: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Logarithms (Q, W) of the attention that each class receives (eq. 1).

    Args:
        scores: (Q, S) logits of the attention.
        labels: (S,) labels of the support rows; every class has one.
        ways: W.
    """
    member = labels[None] == torch.arange(ways, device=labels.device)[:, None]
    of_class = scores[:, None].masked_fill(~member[None], -torch.inf).logsumexp(2)
    return of_class - scores.logsumexp(1, keepdim=True)
