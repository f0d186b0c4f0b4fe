"""Plans of the engine: which tasks run together, and what they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metarun.execution.engine import Engine, TwoStageTask

PARAMS = {"scale": torch.tensor([2.0, 3.0], dtype=torch.float64)}


class Calls:
    """Two-stage function that records the calls of its stages."""

    def __init__(self) -> None:
        self.first: list[torch.Size] = []
        self.then: list[torch.Size] = []
        self.leaves: list[Tensor] = []
        self.function = TwoStageTask(self._first, self._then, reads=(0,))

    def _first(self, _: nn.Module, params: dict[str, Tensor], few: Tensor) -> dict[str, Tensor]:
        self.first.append(few.shape)
        return {
            "weight": params["scale"] * few.sum(),
            "same": params["scale"],
            "constant": few.mean(),
        }

    def _then(
        self,
        _: nn.Module,
        params: dict[str, Tensor],
        made: dict[str, Tensor],
        _few: Tensor,
        many: Tensor,
    ) -> tuple[Tensor, Any]:
        self.then.append(many.shape)
        self.leaves.append(params["scale"])
        weight = made["weight"].square() + made["same"] * made["constant"]
        loss = (weight.sum() * params["scale"][0] * many).mean()
        return loss, {"loss": loss, "weight": weight}


def rows(few: int, many: int, tasks: int = 5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(tasks, count, dtype=torch.float64, generator=draw) for count in (few, many)
    )


def by_hand(few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the mean loss, and the weights, from one graph of all tasks."""
    scale = PARAMS["scale"].clone().requires_grad_()
    weight = (scale * few.sum(1, keepdim=True)) ** 2 + scale * few.mean(1, keepdim=True)
    loss = (weight.sum(1) * scale[0] * many.mean(1)).mean()
    return torch.autograd.grad(loss, scale)[0], weight.detach()


@pytest.mark.parametrize("graph", ["none", "replay"])
@pytest.mark.parametrize("kind", ["threads", "loop", "vmap"])
@pytest.mark.parametrize("many", [10, 20])
def test_stages_have_the_gradients_and_values_of_the_whole(
    kind: Any, many: int, graph: Any
) -> None:
    calls, batch = Calls(), rows(4, many)
    gradient, weight = by_hand(*batch)
    engine, net = Engine(kind, threads=2, graph=graph), nn.Identity()
    for _ in range(3):
        found, extras = engine.gradients(calls.function, net, PARAMS, batch)
        torch.testing.assert_close(found["scale"], gradient)
        torch.testing.assert_close(extras["weight"], weight)
        _, values = engine.map(calls.function, net, PARAMS, batch)
        torch.testing.assert_close(values["weight"], weight)


@pytest.mark.parametrize(
    ("few", "many", "tasks", "firsts", "thens"),
    [
        # Many rows in total: the first stage runs three and two tasks, the second one each.
        (4, 20, 5, 2, 5),
        # At most eight tasks to a chunk, in equal parts.
        (4, 20, 18, 4, 18),
        # Many rows in both stages: one task after the other.
        (20, 20, 5, 5, 5),
        # Few rows in both stages: all tasks of a thread together.
        (4, 4, 5, 2, 2),
    ],
)
def test_tasks_share_a_stage_that_has_few_rows(
    few: int, many: int, tasks: int, firsts: int, thens: int
) -> None:
    calls = Calls()
    engine = Engine("threads", threads=2)
    engine.gradients(calls.function, nn.Identity(), PARAMS, rows(few, many, tasks))
    assert (len(calls.first), len(calls.then)) == (firsts, thens)


def test_chunks_that_were_asked_for_are_not_made_in_stages() -> None:
    calls = Calls()
    engine = Engine("threads", threads=2, tasks_per_chunk=1)
    engine.gradients(calls.function, nn.Identity(), PARAMS, rows(4, 20))
    assert (len(calls.first), len(calls.then)) == (5, 5)


def test_no_two_chunks_share_a_leaf() -> None:
    """Threads that accumulate into the same leaf can deadlock."""
    calls = Calls()
    engine = Engine("threads", threads=2, tasks_per_chunk=1)
    engine.gradients(calls.function, nn.Identity(), PARAMS, rows(4, 20))
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in calls.leaves)
    assert len({id(leaf) for leaf in calls.leaves}) == 5
    assert not PARAMS["scale"].requires_grad
