"""SNAIL: temporal convolutions and causal attention (Mishra, Rohaninejad, Chen & Abbeel 2018).

There is no official code; eambutu/snail-pytorch is a replication. Shapes: S support rows, Q query
rows, A rows that are asked about, C channels, W ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import positive
from metarun.algorithms.memory.sequential import Reader, SequenceLearner


class SNAIL(SequenceLearner):
    """Attends to the labeled rows before a row, over features of its recent past.

    The network of section 5.1 and figure 3: attention (keys 64, values 32), a block of temporal
    convolutions, attention (256, 128), another block, attention (512, 256), and a linear layer.
    A block has ceil(log2 T) dense blocks of dilations 2, 4, 8, …, where T is the length of a
    training sequence with its query (section 3; the replication has the natural logarithm).

    A row enters with its label, and a row that is asked about without one. The paper asks about
    the last row alone, `loss_of=query`. With `loss_of=sequence` every row is asked about as if the
    sequence ended there: its answer is the paper's network's for the rows before it and itself.

    Args:
        filters: Channels that a dense block adds.
        length: T; None takes the `train.way` times `train.shot` rows of a training task and one.
        **common: Those of `SequenceLearner` and `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range, or the data are no classification.
    """

    def __init__(self, *, filters: int = 128, length: int | None = None, **common: Any) -> None:
        super().__init__(**common)
        positive("filters", filters)
        if length is None:
            if self.spec.train_shot is None:
                raise ValueError("the data do not say how long a sequence is: use algo.length=26")
            length = self.spec.train_way * self.spec.train_shot + 1
        if length < 2:
            raise ValueError(f"algo.length={length}: expected 2 or more")
        self.filters = filters
        self._make(math.ceil(math.log2(length)))

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        # A meta-test with other shots is of the network that was trained.
        taps = [name for name in state if name.endswith(".taps.weight")]
        if taps and len(taps) // 2 != self.depth:
            self._make(len(taps) // 2)

    def _make(self, depth: int) -> None:
        """Make the network with blocks of so many dense blocks, and its optimizer."""
        self.depth = depth
        features = self.build_network(None)
        size: int = features.feature_dim  # type: ignore[assignment]
        reader = _Reader(size, self.spec.output_dim, depth, self.filters)
        self.net = self.with_reader(features, reader).to(self.device, self.dtype)
        self.optimizer = self.build_optimizer()


class _Reader(Reader):
    """Attention, convolutions, attention, convolutions, attention."""

    def __init__(self, inputs: int, ways: int, depth: int, filters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        channels = inputs + ways
        for keys, values in ((64, 32), (256, 128)):
            self.layers.append(Attention(channels, keys, values))
            channels += values
            for level in range(1, depth + 1):
                self.layers.append(DenseBlock(channels, filters, 2**level))
                channels += filters
        self.layers.append(Attention(channels, 512, 256))
        self.answer = nn.Linear(channels + 256, ways)

    def forward(self, rows: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        labeled = torch.cat([rows, labels], 1)
        unlabeled = torch.cat([rows, queries])
        unlabeled = torch.cat([unlabeled, unlabeled.new_zeros(len(unlabeled), labels.shape[1])], 1)
        place = torch.arange(len(unlabeled), device=rows.device).clamp(max=len(rows))
        for layer in self.layers:
            labeled, unlabeled = layer(labeled, unlabeled, place)
        logits: Tensor = self.answer(unlabeled)
        return logits


class DenseBlock(nn.Module):
    """A gated causal convolution of two taps, joined to what goes in (section 3).

    Args:
        channels: C of what goes in.
        filters: Channels that are joined to them.
        dilation: Rows between the taps.
    """

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.taps = nn.Linear(2 * channels, 2 * filters)

    def forward(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows (S, C) and rows (A, C), each asked about after `place` of the former."""
        past = torch.cat([labeled.new_zeros(self.dilation, labeled.shape[1]), labeled])
        return self._join(past[: len(labeled)], labeled), self._join(past[place], unlabeled)

    def _join(self, past: Tensor, now: Tensor) -> Tensor:
        values, gates = self.taps(torch.cat([past, now], 1)).chunk(2, 1)
        return torch.cat([now, values.tanh() * gates.sigmoid()], 1)


class Attention(nn.Module):
    """Causal attention with one head, joined to what goes in (section 3).

    Args:
        channels: C of what goes in.
        keys: Size of keys and queries.
        values: Size of values.
    """

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, keys)
        self.key = nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)

    def forward(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Map rows (S, C) and rows (A, C), each asked about after `place` of the former.

        A row sees those before it, and itself.
        """
        keys, values = self.key(labeled), self.value(labeled)
        places = torch.arange(len(labeled), device=labeled.device)
        scale = keys.shape[1] ** -0.5
        scores = scale * self.query(labeled) @ keys.T
        seen = scores.masked_fill(places > places[:, None], -torch.inf).softmax(1) @ values
        wanted = scale * self.query(unlabeled)
        scores = (wanted @ keys.T).masked_fill(places >= place[:, None], -torch.inf)
        own = (wanted * self.key(unlabeled)).sum(1, keepdim=True)
        weights = torch.cat([scores, own], 1).softmax(1)
        read = weights[:, :-1] @ values + weights[:, -1:] * self.value(unlabeled)
        return torch.cat([labeled, seen], 1), torch.cat([unlabeled, read], 1)
