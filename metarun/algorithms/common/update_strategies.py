"""Rules of learning online: which rows a step learns from, and what holds weights back.

Each is a few pure functions of one lifetime's own state, which `online.WeightLearner` calls
around its gradient steps. Shapes: B rows of a step, M rows of a memory, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metarun.algorithms.base import positive
from metarun.algorithms.functional import (
    AdamState,
    Params,
    adam_start,
    adam_step,
    add_prefix,
    gradient,
    strip_prefix,
)
from metarun.core import seeding

State = dict[str, Tensor]
"""What a lifetime has become, by name; nothing else is remembered of it."""

RowLoss = Callable[[Params, Tensor, Tensor], Tensor]
"""Mean loss of weights on rows x and y."""

_SLOT_RESERVOIR, _SLOT_REPLAY, _SLOT_JOINT = 30, 31, 32


@dataclass(frozen=True, slots=True)
class Step:
    """Where a lifetime stands when it learns; the same for all lifetimes of a batch.

    Attributes:
        number: Steps before this one.
        rows: Rows before this one.
        task: The task of the rows; None where it is not told.
        begins_visit: Whether a visit to a task begins here; False where it is not told.
    """

    number: int
    rows: int
    task: int | None
    begins_visit: bool


@dataclass(frozen=True)
class UpdateStrategy:
    """Plain online learning: a gradient step on what has just come, and nothing else.

    Attributes:
        updates: Gradient steps for each step of the stream.
    """

    updates: int = 1

    def __post_init__(self) -> None:
        positive("updates", self.updates)

    def begin(self, weights: Params, x: Tensor, y: Tensor) -> State:  # noqa: ARG002
        """The rule's part of a lifetime's state, for a stream of rows like x (S, …) and y."""
        return {}

    def enter(
        self,
        state: State,
        weights: Params,  # noqa: ARG002
        loss: RowLoss,  # noqa: ARG002
        step: Step,  # noqa: ARG002
    ) -> State:
        """Before a step is learned from."""
        return state

    def rows(
        self,
        state: State,  # noqa: ARG002
        x: Tensor,
        y: Tensor,
        step: Step,  # noqa: ARG002
        update: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """The rows of one gradient step."""
        return x, y

    def penalty(self, state: State, weights: Params) -> Tensor | None:  # noqa: ARG002
        """What is added to the loss."""
        return None

    def leave(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:  # noqa: ARG002
        """After a step was learned from."""
        return state


@dataclass(frozen=True)
class Replay(UpdateStrategy):
    """Experience replay with a reservoir (Chaudhry et al. 2019; Riemer et al. 2019, Algorithm 4).

    Every row of the stream so far is in the memory with the same probability (Vitter 1985,
    Algorithm R).

    Attributes:
        memory: Rows remembered, M.
        replayed: Of them that are joined to the incoming rows in a gradient step.
    """

    memory: int = 200
    replayed: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("memory", self.memory)
        positive("replayed", self.replayed)

    def begin(self, weights: Params, x: Tensor, y: Tensor) -> State:  # noqa: ARG002
        return {
            "memory.x": x.new_zeros(self.memory, *x.shape[1:]),
            "memory.y": y.new_zeros(self.memory, *y.shape[1:]),
        }

    def rows(
        self, state: State, x: Tensor, y: Tensor, step: Step, update: int
    ) -> tuple[Tensor, Tensor]:
        filled = min(step.rows, self.memory)
        if not filled:
            return x, y
        key = draw_key(state, step, update, x.device)
        chosen = seeding.choose(key, _SLOT_REPLAY, filled, min(self.replayed, filled))
        return (
            torch.cat([x, state["memory.x"].index_select(0, chosen)]),
            torch.cat([y, state["memory.y"].index_select(0, chosen)]),
        )

    def leave(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:
        memory = {name: state[name] for name in ("memory.x", "memory.y")}
        key = draw_key(state, step, 0, x.device)
        for place in range(len(x)):
            memory = self._remember(memory, key, x[place], y[place], step.rows + place, place)
        return {**state, **memory}

    def _remember(
        self, memory: State, key: Tensor, x: Tensor, y: Tensor, before: int, place: int
    ) -> State:
        """The memory after one more row, when there were `before` rows."""
        number = torch.tensor(before, device=x.device)
        if before >= self.memory:
            own = seeding.fold(key, torch.tensor(place, device=x.device))
            number = seeding.integers(own, _SLOT_RESERVOIR, before + 1)
        here = torch.arange(self.memory, device=x.device) == number
        return {
            "memory.x": torch.where(expanded(here, memory["memory.x"]), x, memory["memory.x"]),
            "memory.y": torch.where(expanded(here, memory["memory.y"]), y, memory["memory.y"]),
        }


@dataclass(frozen=True)
class Joint(UpdateStrategy):
    """Joint training on everything seen so far: the ceiling that an online learner is held to.

    Attributes:
        batch: Rows of a gradient step, drawn evenly from all that came, the incoming included.
    """

    batch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("batch", self.batch)

    def begin(self, weights: Params, x: Tensor, y: Tensor) -> State:  # noqa: ARG002
        return {"memory.x": torch.zeros_like(x), "memory.y": torch.zeros_like(y)}

    def rows(
        self, state: State, x: Tensor, y: Tensor, step: Step, update: int
    ) -> tuple[Tensor, Tensor]:
        key = draw_key(state, step, update, x.device)
        known = step.rows
        number = seeding.integers(key, _SLOT_JOINT, known + len(x), (self.batch,))
        return (
            torch.cat([state["memory.x"][:known], x]).index_select(0, number),
            torch.cat([state["memory.y"][:known], y]).index_select(0, number),
        )

    def leave(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:
        after = step.rows + len(x)
        return {
            **state,
            **{
                name: torch.cat([state[name][: step.rows], rows, state[name][after:]])
                for name, rows in (("memory.x", x), ("memory.y", y))
            },
        }


@dataclass(frozen=True)
class Elastic(UpdateStrategy):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3).

    Adds strength / 2 * sum_k (w - w_k)^T F_k (w - w_k) over the tasks k learned before, with F_k
    the diagonal of the empirical Fisher information at w_k, where the task ended. The sum needs
    no more than sum F_k and sum F_k w_k, however many tasks there are.

    Attributes:
        strength: Of the pull.
        fisher_rows: Rows of a task, its last ones, that F_k is taken over.
    """

    strength: float = 1.0
    fisher_rows: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("fisher_rows", self.fisher_rows)
        if not 0.0 <= self.strength < math.inf:
            raise ValueError(f"algo.strength={self.strength}: expected 0 or more")

    def begin(self, weights: Params, x: Tensor, y: Tensor) -> State:
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        return {
            **add_prefix("fisher.", zeros),
            **add_prefix("pull.", zeros),
            "recent.x": x.new_zeros(self.fisher_rows, *x.shape[1:]),
            "recent.y": y.new_zeros(self.fisher_rows, *y.shape[1:]),
            "recent.count": torch.zeros((), dtype=torch.int64, device=x.device),
        }

    def enter(self, state: State, weights: Params, loss: RowLoss, step: Step) -> State:
        if not step.begins_visit or not step.rows:
            return state
        x, y = state["recent.x"], state["recent.y"]

        def of_row(x: Tensor, y: Tensor) -> Params:
            return gradient(lambda w: loss(w, x[None], y[None]), weights, first_order=True)

        grads = torch.func.vmap(of_row)(x, y)
        count = state["recent.count"].clamp(max=self.fisher_rows)
        known = torch.arange(self.fisher_rows, device=x.device) >= self.fisher_rows - count
        after = {**state, "recent.count": torch.zeros_like(state["recent.count"])}
        for name, grad in grads.items():
            squares = torch.where(expanded(known, grad), grad.square(), torch.zeros_like(grad))
            fisher = squares.sum(0) / count
            after[f"fisher.{name}"] = state[f"fisher.{name}"] + fisher
            after[f"pull.{name}"] = state[f"pull.{name}"] + fisher * weights[name]
        return after

    def penalty(self, state: State, weights: Params) -> Tensor | None:
        fisher, pull = strip_prefix("fisher.", state), strip_prefix("pull.", state)
        # Up to a constant: what is summed over the tasks is expanded.
        terms = [
            (0.5 * fisher[name] * weight.square() - pull[name] * weight).sum()
            for name, weight in weights.items()
        ]
        return self.strength * torch.stack(terms).sum()

    def leave(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:  # noqa: ARG002
        keep = self.fisher_rows
        return {
            **state,
            "recent.x": torch.cat([state["recent.x"], x])[-keep:],
            "recent.y": torch.cat([state["recent.y"], y])[-keep:],
            "recent.count": state["recent.count"] + len(x),
        }


def with_adam(weights: Params) -> State:
    """Weights that Adam is to move, with its state, as entries of a lifetime's."""
    return _entries(weights, adam_start(weights))


def adam_moved(state: State, grads: Params, lr: Tensor) -> State:
    """The entries of `with_adam` after one update, with betas 0.9 and 0.999."""
    before = AdamState(
        strip_prefix("first.", state), strip_prefix("second.", state), state["updates"]
    )
    weights = strip_prefix("weights.", state)
    return _entries(*adam_step(weights, grads, before, lr=lr, betas=(0.9, 0.999)))


def _entries(weights: Params, adam: AdamState) -> State:
    return {
        **add_prefix("weights.", weights),
        **add_prefix("first.", adam.first),
        **add_prefix("second.", adam.second),
        "updates": adam.count,
    }


def draw_key(state: State, step: Step, update: int, device: torch.device) -> Tensor:
    """The key of the draws of one gradient step of a lifetime."""
    numbers = torch.tensor([step.number, update], device=device)
    return seeding.fold(seeding.fold(state["key"], numbers[0]), numbers[1])


def expanded(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (M,) of the rows of a tensor (M, …), to broadcast against it."""
    return mask.reshape(len(mask), *(1,) * (like.dim() - 1))
