"""MANN: a controller with an external memory (Santoro et al. 2016).

There is no official code; results are compared with the replication tristandeleu/ntm-one-shot.
Shapes: N sequences in parallel, S rows, Q query rows, F features, W ways, H hidden units, R heads,
L locations, D cells of a location.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.memory.sequential import Reader, SequenceLearner
from metarun.backbones.layers.recurrent import LSTMCell
from metarun.core.checks import at_least, positive, within

Access = Literal["lrua", "ntm", "none"]
State = dict[str, Tensor]


class MANN(SequenceLearner):
    """MANN: stores a row with the label that follows it, and retrieves it for similar rows.

    At each step an LSTM controller receives the features of a row, the label of the row *before*
    it, and what it read from memory last. It writes and reads, and a linear layer predicts from
    its output and the read memory (Santoro et al. 2016, sections 2 and 3).

    `access=lrua` is the paper's least-recently-used access (section 3.2, eq. 5 to 8). The least
    used location is set to zero first. Each head then writes to a mixture, set by a gate, of what
    it read last and what is least used. It reads by the softmax of cosine similarities.
    `access=ntm` is the access of Neural Turing Machines (Graves et al. 2014, section 3.3). It
    addresses by content, interpolation, shift and sharpening, and one write head erases and adds.
    `access=none` is the paper's LSTM without memory.

    The paper does not specify how several heads share the least used locations. Here head i
    writes to the i-th, and the first is set to zero, as in the replication. The replication also
    emits a gate for each head and step, `gate=emitted`, where the paper learns one number,
    `gate=learned`. It writes separate vectors, `written=vectors`, where the paper writes the keys,
    `written=keys`. Its usage decays by 0.95.

    Args:
        access: Kind of access to memory, `lrua`, `ntm` or `none`.
        controller: Hidden units of the LSTM, H.
        locations: Number of memory locations, L.
        cells: Size of a location, D.
        heads: Number of heads, R.
        usage_decay: Decay of the usage, gamma of eq. 5.
        gate: Kind of write gate, alpha of eq. 7: one `learned` number, or `emitted` at each step.
        written: Vectors that are added to a location, the `keys` or separate `vectors`.
        strength: Factor on a head's similarities before the softmax. `none` is 1, as in the paper;
            `emitted` is beta of Neural Turing Machines (Graves et al. 2014, eq. 5), emitted at
            each step. Similarities lie between -1 and 1, so with `none` a head reads nearly the
            mean of the memory.
        label_scale: Factor on the one-hot labels of the input; 1 in the paper. The features of a
            backbone outweigh a single 1 among them.
        forget_bias: Initial forget-gate bias of the controller; see `LSTMCell`.
        **options: Options of `SequenceLearner`.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        access: Access = "lrua",
        controller: int = 200,
        locations: int = 128,
        cells: int = 40,
        heads: int = 4,
        usage_decay: float = 0.99,
        gate: Literal["learned", "emitted"] = "learned",
        written: Literal["keys", "vectors"] = "keys",
        strength: Literal["none", "emitted"] = "none",
        label_scale: float = 1.0,
        forget_bias: float = 0.0,
        **options: Any,
    ) -> None:
        at_least("algo", 1, controller=controller, locations=locations, cells=cells, heads=heads)
        if heads > locations:
            raise ValueError(f"algo.heads={heads}: expected at most algo.locations={locations}")
        within("algo", "[0, 1]", usage_decay=usage_decay)
        positive("algo", label_scale=label_scale)
        if not math.isfinite(forget_bias):
            raise ValueError(f"algo.forget_bias={forget_bias}: expected a finite number")
        self.access = access
        self.sizes = controller, locations, cells, heads
        self.access_options = usage_decay, gate, written, strength
        self.label_scale = label_scale
        self.forget_bias = forget_bias
        super().__init__(setup, **options)

    def build_reader(self, feature_dim: int) -> Reader:
        controller, ways = self.sizes[0], self.spec.output_dim
        memory: _Memory | None = None
        if self.access == "lrua":
            memory = LeastRecentlyUsed(*self.sizes, *self.access_options)
        elif self.access == "ntm":
            memory = TuringMachine(*self.sizes)
        lstm = LSTMCell(feature_dim + ways + _reads(memory), controller, self.forget_bias)
        return _Controller(lstm, ways, memory, self.label_scale)


class _Memory(nn.Module):
    """A memory that a controller reads and writes; its state is a dictionary of (N, …) tensors."""

    read_dim: int

    def begin(self, like: Tensor) -> State:
        """Return the state (1, …) before the first step, with the device and dtype of `like`."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, state: State) -> State:
        """Return the state after a step, including the vectors `read` (N, read_dim).

        Args:
            hidden: Outputs of the controllers, (N, H).
            state: State before the step.
        """
        raise NotImplementedError


def _reads(memory: _Memory | None) -> int:
    """Return how many numbers a controller reads from its memory at each step."""
    return 0 if memory is None else memory.read_dim


class _Controller(Reader):
    """An LSTM along the rows, with or without a memory."""

    def __init__(
        self, lstm: LSTMCell, ways: int, memory: _Memory | None, label_scale: float
    ) -> None:
        super().__init__()
        self.hidden = lstm.weight_hh.shape[1]
        self.lstm = lstm
        self.memory = memory
        self.label_scale = label_scale
        self.answer = nn.Linear(self.hidden + _reads(memory), ways)

    def read(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, State]:
        # A label enters with the next row; the first row has no label.
        late = self.label_scale * torch.cat([torch.zeros_like(labels[:1]), labels])
        empty = rows.new_zeros(1, self.hidden)
        state = {"hidden": empty, "cell": empty}
        if self.memory is not None:
            state |= self.memory.begin(rows)
        outputs = []
        for row, label in zip(rows.split(1), late.split(1), strict=False):
            output, state = self._step(torch.cat([row, label], 1), state)
            outputs.append(output)
        return torch.cat(outputs), {**state, "label": late[len(rows) :]}

    def ask(self, state: State, queries: Tensor) -> Tensor:
        side_by_side = {n: v.expand(len(queries), *v.shape[1:]) for n, v in state.items()}
        return self._step(torch.cat([queries, side_by_side.pop("label")], 1), side_by_side)[0]

    def _step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits (N, W) and the state after inputs x (N, F + W)."""
        read = [] if self.memory is None else [state["read"]]
        hidden, cell = self.lstm(torch.cat([x, *read], 1), state["hidden"], state["cell"])
        after = {**state, "hidden": hidden, "cell": cell}
        if self.memory is None:
            return self.answer(hidden), after
        after |= self.memory(hidden, state)
        return self.answer(torch.cat([hidden, after["read"]], 1)), after


class LeastRecentlyUsed(_Memory):
    """A memory with least-recently-used access (section 3.2); `MANN` describes the arguments."""

    def __init__(
        self,
        hidden: int,
        locations: int,
        cells: int,
        heads: int,
        usage_decay: float,
        gate: str,
        written: str,
        strength: str,
    ) -> None:
        super().__init__()
        self.shape = (heads, locations, cells)
        self.read_dim = heads * cells
        self.usage_decay = usage_decay
        self.key = _glorot(nn.Linear(hidden, heads * cells))
        self.vector = _glorot(nn.Linear(hidden, heads * cells)) if written == "vectors" else None
        self.gate = _glorot(nn.Linear(hidden, heads)) if gate == "emitted" else None
        self.alpha = nn.Parameter(torch.zeros(())) if gate == "learned" else None
        self.strength = _glorot(nn.Linear(hidden, heads)) if strength == "emitted" else None

    def begin(self, like: Tensor) -> State:
        heads, locations, cells = self.shape
        first = (torch.arange(locations, device=like.device) == 0).to(like.dtype)[None]
        return {
            # Not zero: the cosine has no gradient there.
            "memory": like.new_full((1, locations, cells), 1e-6),
            "reading": first[:, None].expand(1, heads, locations),
            "usage": first,
            "read": like.new_zeros(1, self.read_dim),
        }

    def forward(self, hidden: Tensor, state: State) -> State:
        heads, locations, _ = self.shape
        keys = self.key(hidden).tanh().unflatten(1, (heads, -1))
        written = keys
        if self.vector is not None:
            written = self.vector(hidden).tanh().unflatten(1, (heads, -1))
        gate = self.alpha if self.gate is None else self.gate(hidden)[..., None]
        assert gate is not None
        share = gate.sigmoid()
        order = state["usage"].argsort(dim=1, stable=True)[:, :heads, None]
        least = (order == torch.arange(locations, device=order.device)).to(hidden.dtype)
        writing = share * state["reading"] + (1.0 - share) * least
        kept = state["memory"] * (1.0 - least[:, 0, :, None])
        memory = kept + writing.transpose(1, 2) @ written
        similar = cosine(keys, memory)
        if self.strength is not None:
            similar = nn.functional.softplus(self.strength(hidden))[..., None] * similar
        reading = similar.softmax(2)
        usage = self.usage_decay * state["usage"] + reading.sum(1) + writing.sum(1)
        read = (reading @ memory).flatten(1)
        return {"memory": memory, "reading": reading, "usage": usage, "read": read}


class TuringMachine(_Memory):
    """A memory with Neural Turing Machine access (Graves et al. 2014, section 3).

    At each step it writes before it reads.
    """

    def __init__(self, hidden: int, locations: int, cells: int, heads: int) -> None:
        super().__init__()
        self.shape = (heads, locations, cells)
        self.read_dim = heads * cells
        # The last head writes. Each head has a key, beta, g, three shifts, and gamma.
        self.where = _glorot(nn.Linear(hidden, (heads + 1) * (cells + 6)))
        self.what = _glorot(nn.Linear(hidden, 2 * cells))

    def begin(self, like: Tensor) -> State:
        heads, locations, cells = self.shape
        first = (torch.arange(locations, device=like.device) == 0).to(like.dtype)
        return {
            "memory": like.new_full((1, locations, cells), 1e-6),
            "focus": first.expand(1, heads + 1, locations),
            "read": like.new_zeros(1, self.read_dim),
        }

    def forward(self, hidden: Tensor, state: State) -> State:
        heads, _, cells = self.shape
        where = self.where(hidden).unflatten(1, (heads + 1, cells + 6))
        erase, add = self.what(hidden).chunk(2, 1)
        before = state["memory"]
        writing = self._focus(where[:, heads:], before, state["focus"][:, heads:])
        by_cell = writing.transpose(1, 2)
        memory = before * (1.0 - by_cell * erase.sigmoid()[:, None]) + by_cell * add.tanh()[:, None]
        reading = self._focus(where[:, :heads], memory, state["focus"][:, :heads])
        read = (reading @ memory).flatten(1)
        return {"memory": memory, "focus": torch.cat([reading, writing], 1), "read": read}

    def _focus(self, where: Tensor, memory: Tensor, before: Tensor) -> Tensor:
        """Return the addressing weights of heads, (N, R, L) (Graves et al. 2014, eq. 5 to 9)."""
        cells = self.shape[2]
        key, beta, g, shift, gamma = where.split([cells, 1, 1, 3, 1], 2)
        softplus = nn.functional.softplus
        content = (softplus(beta) * cosine(key.tanh(), memory)).softmax(2)
        gated = g.sigmoid() * content + (1.0 - g.sigmoid()) * before
        back, stay, ahead = shift.softmax(2).split(1, 2)
        shifted = back * gated.roll(-1, 2) + stay * gated + ahead * gated.roll(1, 2)
        # Not zero: the power has no gradient there.
        sharp = (shifted + 1e-12) ** (1.0 + softplus(gamma))
        weights: Tensor = sharp / sharp.sum(2, keepdim=True)
        return weights


def cosine(keys: Tensor, memory: Tensor) -> Tensor:
    """Return cosine similarities (N, R, L) of keys (N, R, D) and locations (N, L, D) (eq. 2)."""
    squares = keys.square().sum(2)[:, :, None] * memory.square().sum(2)[:, None]
    return keys @ memory.transpose(1, 2) * torch.rsqrt(squares + 1e-12)


def _glorot(linear: nn.Linear) -> nn.Linear:
    """Initialize a linear layer as the replication does, and return it."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
