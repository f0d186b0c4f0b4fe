"""Update strategies of online learning: the rows of a gradient step, and penalties on weights.

A strategy is a set of pure functions of one rollout's state, which `online.WeightLearner` calls
around its gradient steps. Shapes: S rows of a stream, B rows of a step, M rows of a memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
from metarun.core.checks import at_least

State = dict[str, Tensor]
"""State of a rollout: tensors by name, which hold everything that it has learned."""

RowLoss = Callable[[Params, Tensor, Tensor], Tensor]
"""Function from (weights, x, y) to the mean loss on the rows x with targets y."""

_SLOT_RESERVOIR, _SLOT_REPLAY, _SLOT_JOINT = 30, 31, 32


@dataclass(frozen=True, slots=True)
class Step:
    """Position of a step in the stream, equal in all rollouts of a batch.

    Attributes:
        number: Number of earlier steps.
        rows: Number of rows in earlier steps.
        task: Task of the step's rows; None if task ids are unknown.
        begins_visit: Whether a visit to a task begins here; False if task ids are unknown.
    """

    number: int
    rows: int
    task: int | None
    begins_visit: bool


@dataclass(frozen=True)
class UpdateStrategy:
    """Plain online learning: gradient steps on the rows of the current step only.

    Attributes:
        updates: Number of gradient steps per step of the stream.
    """

    updates: int = 1

    def __post_init__(self) -> None:
        at_least("algo", 1, updates=self.updates)

    def begin(self, weights: Params, x: Tensor, y: Tensor) -> State:  # noqa: ARG002
        """Return the strategy's part of a rollout's state, for a stream of rows x (S, …), y."""
        return {}

    def enter(
        self,
        state: State,
        weights: Params,  # noqa: ARG002
        loss: RowLoss,  # noqa: ARG002
        step: Step,  # noqa: ARG002
    ) -> State:
        """Return the state after preparations that precede the gradient steps."""
        return state

    def rows(
        self,
        state: State,  # noqa: ARG002
        x: Tensor,
        y: Tensor,
        step: Step,  # noqa: ARG002
        update: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one gradient step."""
        return x, y

    def penalty(self, state: State, weights: Params) -> Tensor | None:  # noqa: ARG002
        """Return the penalty added to the loss, 0-dimensional; None is no penalty."""
        return None

    def leave(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:  # noqa: ARG002
        """Return the state after the gradient steps of a step, for example with its rows stored."""
        return state


@dataclass(frozen=True)
class Replay(UpdateStrategy):
    """Experience replay with a reservoir (Chaudhry et al. 2019; Riemer et al. 2019, Algorithm 4).

    Every row of the stream so far is in the replay buffer with the same probability (Vitter 1985,
    Algorithm R).

    Attributes:
        memory: Number of rows in the replay buffer, M.
        replayed: Number of stored rows that join the incoming rows in a gradient step.
    """

    memory: int = 200
    replayed: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algo", 1, memory=self.memory, replayed=self.replayed)

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
        """Return the memory after one more row of the stream, preceded by `before` rows."""
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
    """Joint training on all rows so far, an upper bound for online learners.

    Attributes:
        batch: Number of rows of a gradient step, drawn uniformly from all rows so far, including
            the incoming ones.
    """

    batch: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algo", 1, batch=self.batch)

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

    Adds the penalty strength / 2 * sum_k (w - w_k)^T F_k (w - w_k) over earlier visits k. w_k are
    the weights at the end of visit k, and F_k is the diagonal of the empirical Fisher information
    there. The gradient needs only sum_k F_k and sum_k F_k w_k, for any number of tasks.

    Attributes:
        strength: Factor of the penalty.
        fisher_rows: Number of rows, the last of a visit, from which F_k is estimated.
    """

    strength: float = 1.0
    fisher_rows: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("algo", 1, fisher_rows=self.fisher_rows)
        at_least("algo", 0, strength=self.strength)

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
        # The sum of squares over visits is expanded, without its constant term.
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
    """Return weights and the initial state of Adam as entries of a rollout's state."""
    return _entries(weights, adam_start(weights))


def adam_moved(state: State, grads: Params, lr: Tensor) -> State:
    """Return the entries of `with_adam` after one update, with betas 0.9 and 0.999."""
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
    """Return the key of the random draws of one gradient step of a rollout."""
    numbers = torch.tensor([step.number, update], device=device)
    return seeding.fold(seeding.fold(state["key"], numbers[0]), numbers[1])


def expanded(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask (M,) with dimensions appended to broadcast against a tensor (M, …)."""
    return mask.reshape(len(mask), *(1,) * (like.dim() - 1))
