"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016).

Shapes: S support rows, Q query rows, N rows, W ways, F features, H hidden units.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.features import FeatureLearner, WithFeatures
from metarun.algorithms.functional import Params
from metarun.backbones.layers.recurrent import LSTMCell
from metarun.core.checks import at_least, positive


class MatchingNet(FeatureLearner):
    """Matching network: predicts with support labels, weighted by attention to their rows.

    p(y | x) = sum_i a(x, x_i) y_i, where a is the softmax over the support rows of `scale` times
    the cosine similarity of f(x) and g(x_i) (eq. 1 and section 2.1.1). The loss is -log p.

    There is no official code. In the paper `scale` is 1, which leaves the attention nearly
    uniform (of two rows one gets at most 0.88). The default is 100, as in
    wyharveychen/CloserLookFewShot, which also sets negative similarities to 0; this does not.

    With `full_context` the embeddings depend on the whole support set (FCE). g is a bidirectional
    LSTM over the support rows in their order of presentation (appendix A.2). f reads the support
    by attention in `processing_steps` steps of an LSTM (appendix A.1).

    In training, batch norm normalizes support and query rows in one pass; at evaluation it uses
    its running statistics. Both replications do this (CloserLook and oscarknagg/few-shot).

    Args:
        scale: Factor on the similarities, the inverse temperature of the attention.
        full_context: Whether to embed each row in the context of the support set.
        processing_steps: Steps of f's LSTM, K; only used with `full_context`. The paper gives
            no number; CloserLook takes the number of support rows.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    capabilities = Capabilities(
        kinds=("classification",), accepts_any_way=True, label_equivariant=True
    )
    net: _Embedding

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        scale: float = 100.0,
        full_context: bool = False,
        processing_steps: int = 5,
    ) -> None:
        positive("algo", scale=scale)
        at_least("algo", 1, processing_steps=processing_steps)
        self.scale = scale
        self.steps = processing_steps if full_context else 0
        super().__init__(setup)
        self.capabilities = replace(self.capabilities, order_free=not full_context)

    def build_net(self) -> nn.Module:
        return _Embedding(self.build_network(None), self.steps)

    def summarize(self, support: Tensor, labels: Tensor, ways: int) -> Params:
        if self.net.context is not None:
            support = self.net.context.embed_support(support)
        return super().summarize(support, labels, ways)

    def logits(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        """Return the log-probabilities (Q, W) of one task's queries."""
        if self.net.context is not None:
            query = self.net.context.embed_query(query, support)
        similarity = nn.functional.normalize(query) @ nn.functional.normalize(support).T
        return class_log_probabilities(self.scale * similarity, labels, ways)


class _Embedding(WithFeatures):
    """The embedding of single rows, and their context if `processing_steps` is positive."""

    def __init__(self, features: nn.Module, processing_steps: int) -> None:
        super().__init__()
        self.features = features
        self.context = (
            FullContext(features.feature_dim, processing_steps)  # type: ignore[arg-type]
            if processing_steps
            else None
        )


class FullContext(nn.Module):
    """Full context embeddings of a support set and of queries (appendix A).

    Args:
        dim: Size of the embeddings and of the LSTMs' hidden states, F.
        steps: Steps of the query LSTM, K.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.forwards = LSTMCell(dim, dim)
        self.backwards = LSTMCell(dim, dim)
        # LSTM(f', [h, r], c) of eq. 3 has two hidden inputs. Here r is concatenated to the input
        # f', which gives the same sum of products.
        self.attending = LSTMCell(2 * dim, dim)

    def forward(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings in context of support (S, F) and query (Q, F) features."""
        support = self.embed_support(support)
        return support, self.embed_query(query, support)

    def embed_support(self, rows: Tensor) -> Tensor:
        """Return g(x_i, S) = forward LSTM + backward LSTM + g'(x_i), (S, F) (appendix A.2)."""
        ahead = _run(self.forwards, rows)
        back = _run(self.backwards, rows.flip(0)).flip(0)
        return ahead + back + rows

    def embed_query(self, rows: Tensor, support: Tensor) -> Tensor:
        """Return f(x, S), (Q, F), of each query independently of the others (eq. 3 to 6).

        The paper does not specify h_0; here it is f'(x), as in both replications.

        Args:
            rows: Query features f'(x), (Q, F).
            support: Support embeddings g(x_i, S), (S, F).
        """
        hidden, cell = rows, torch.zeros_like(rows)
        for _ in range(self.steps):
            read = (hidden @ support.T).softmax(1) @ support
            out, cell = self.attending(torch.cat([rows, read], 1), hidden, cell)
            hidden = out + rows
        return hidden


def _run(lstm: LSTMCell, rows: Tensor) -> Tensor:
    """Return the outputs (S, H) of an LSTM along a sequence (S, F), from a zero state."""
    hidden = cell = rows.new_zeros(1, lstm.weight_hh.shape[1])
    outputs = []
    for row in rows.split(1):
        hidden, cell = lstm(row, hidden, cell)
        outputs.append(hidden)
    return torch.cat(outputs)


def class_log_probabilities(scores: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Return the logarithms of the attention that each class receives, (Q, W) (eq. 1).

    Args:
        scores: Logits of the attention, (Q, S).
        labels: Support labels, (S,); every class occurs.
        ways: Number of classes, W.
    """
    member = labels[None] == torch.arange(ways, device=labels.device)[:, None]
    of_class = scores[:, None].masked_fill(~member[None], -torch.inf).logsumexp(2)
    return of_class - scores.logsumexp(1, keepdim=True)
