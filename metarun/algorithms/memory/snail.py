"""SNAIL: temporal convolutions and causal attention (Mishra, Rohaninejad, Chen & Abbeel 2018).

There is no official code; eambutu/snail-pytorch is a replication. Shapes: S support rows, which
are labeled, Q query rows, A = S + Q unlabeled rows to predict, C channels, W ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.functional import Params
from metarun.algorithms.memory.sequential import Reader, SequenceLearner
from metarun.core.checks import at_least


class SNAIL(SequenceLearner):
    """SNAIL: temporal convolutions over the recent past, and attention to all labeled rows before.

    The network is that of section 5.1 and figure 3: attention (keys 64, values 32), a block of
    temporal convolutions, attention (256, 128), another block, attention (512, 256), and a linear
    layer. A block has ceil(log2 T) dense blocks of dilations 2, 4, 8, …, where T is the length of
    a training sequence with its query (section 3), as in the replication. The replication's
    softmax runs over the rows that ask; here each row has weights over the rows before it that sum
    to 1, as in the paper.

    Labeled rows enter with their labels; a row to predict enters without one. The paper predicts
    only the last row, `loss_of=query`. With `loss_of=sequence` every row is predicted as if the
    sequence ended there, which gives the output of the paper's network for the rows up to it.

    Args:
        filters: Channels that a dense block adds.
        length: Length of a training sequence with its query, T. None takes `train.way` times
            `train.shot`, plus 1.
        **options: Options of `SequenceLearner`.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    def __init__(
        self, setup: LearnerSetup, *, filters: int = 128, length: int | None = None, **options: Any
    ) -> None:
        at_least("algo", 1, filters=filters)
        at_least("algo", 2, length=length)
        self.filters = filters
        self.length = length
        super().__init__(setup, **options)

    def build_reader(self, feature_dim: int) -> Reader:
        length = self.length
        if length is None:
            if self.spec.train_shot is None:
                raise ValueError("the data set has no fixed number of shots: use algo.length=26")
            length = self.spec.train_way * self.spec.train_shot + 1
        self.depth = math.ceil(math.log2(length))
        return _Reader(feature_dim, self.spec.output_dim, self.depth, self.filters)

    def match_shapes(self, state: Mapping[str, Any]) -> None:
        # A meta-test with other shots keeps the depth of the trained network.
        taps = [name for name in state if name.endswith(".taps.weight")]
        if taps and len(taps) // 2 != self.depth:
            self.length = 2 ** (len(taps) // 2)
            self.net = self.build_net().to(self.device, self.dtype)
            self.optimizer = self.build_optimizer()


class _Reader(Reader):
    """The layers of SNAIL: attention, convolutions, attention, convolutions, attention."""

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

    def read(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Params]:
        labeled = torch.cat([rows, labels], 1)
        unlabeled = torch.cat([rows, torch.zeros_like(labels)], 1)
        place = torch.arange(len(rows), device=rows.device)
        state: Params = {}
        for number, layer in enumerate(self.layers):
            state[str(number)] = labeled
            labeled, unlabeled = layer(labeled, unlabeled, place)
        logits: Tensor = self.answer(unlabeled)
        return logits, state

    def ask(self, state: Params, queries: Tensor) -> Tensor:
        labels = queries.new_zeros(len(queries), state["0"].shape[1] - queries.shape[1])
        unlabeled = torch.cat([queries, labels], 1)
        place = torch.full((len(queries),), len(state["0"]), device=queries.device)
        for number, layer in enumerate(self.layers):
            unlabeled = layer.ask(state[str(number)], unlabeled, place)  # type: ignore[operator]
        logits: Tensor = self.answer(unlabeled)
        return logits


class DenseBlock(nn.Module):
    """A gated causal convolution with two taps, concatenated to its input (section 3).

    Args:
        channels: Channels of the input, C.
        filters: Channels of the convolution's output.
        dilation: Distance between the taps, in rows.
    """

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.taps = nn.Linear(2 * channels, 2 * filters)

    def forward(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Map labeled rows (S, C) and unlabeled rows (A, C).

        Args:
            labeled: Features of the labeled rows, (S, C).
            unlabeled: Features of the rows to predict, (A, C).
            place: Number of labeled rows before each row to predict, (A,).
        """
        past = self._past(labeled)
        return self._join(past[: len(labeled)], labeled), self._join(past[place], unlabeled)

    def ask(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> Tensor:
        """Map unlabeled rows only."""
        return self._join(self._past(labeled)[place], unlabeled)

    def _past(self, labeled: Tensor) -> Tensor:
        """Return the labeled row `dilation` rows before each place, (dilation + S, C)."""
        return torch.cat([labeled.new_zeros(self.dilation, labeled.shape[1]), labeled])

    def _join(self, past: Tensor, now: Tensor) -> Tensor:
        values, gates = self.taps(torch.cat([past, now], 1)).chunk(2, 1)
        return torch.cat([now, values.tanh() * gates.sigmoid()], 1)


class Attention(nn.Module):
    """Causal attention with one head, concatenated to its input (section 3).

    Args:
        channels: Channels of the input, C.
        keys: Size of keys and queries.
        values: Size of values.
    """

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, keys)
        self.key = nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)

    def forward(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Map labeled rows (S, C) and unlabeled rows (A, C).

        A row attends to the labeled rows before it and to itself. The arguments are those of
        `DenseBlock.forward`.
        """
        keys, values = self.key(labeled), self.value(labeled)
        places = torch.arange(len(labeled), device=labeled.device)
        scale = keys.shape[1] ** -0.5
        scores = scale * self.query(labeled) @ keys.T
        seen = scores.masked_fill(places > places[:, None], -torch.inf).softmax(1) @ values
        return torch.cat([labeled, seen], 1), self._read(keys, values, unlabeled, place)

    def ask(self, labeled: Tensor, unlabeled: Tensor, place: Tensor) -> Tensor:
        """Map unlabeled rows only."""
        return self._read(self.key(labeled), self.value(labeled), unlabeled, place)

    def _read(self, keys: Tensor, values: Tensor, unlabeled: Tensor, place: Tensor) -> Tensor:
        places = torch.arange(len(keys), device=keys.device)
        scale = keys.shape[1] ** -0.5
        wanted = scale * self.query(unlabeled)
        scores = (wanted @ keys.T).masked_fill(places >= place[:, None], -torch.inf)
        own = (wanted * self.key(unlabeled)).sum(1, keepdim=True)
        weights = torch.cat([scores, own], 1).softmax(1)
        read = weights[:, :-1] @ values + weights[:, -1:] * self.value(unlabeled)
        return torch.cat([unlabeled, read], 1)
