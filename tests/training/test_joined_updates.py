"""Several updates in one call: the same run, for any number of updates in a call."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metarun.algorithms.optimization.maml import MAML
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.mlp import MLP
from metarun.core.errors import Interrupted, RunError
from metarun.core.types import Metrics, Progress, Split, TaskBatch
from metarun.execution import graph_replay
from metarun.execution.engine import Engine
from metarun.runs.checkpoints import read_checkpoint
from tests.helpers import make
from tests.tiny_run import STEPS, NoisyMAML, Watched, go, make_algorithm, same_state

OPTIM: dict[str, Any] = {"method": "adam", "lr": 0.01, "schedule": "cosine", "clip_norm": 0.5}


class OneSize(Watched):
    """A data set whose tasks have the same size in all steps."""

    def layout(self, split: Split, index: int) -> Hashable:  # noqa: ARG002
        return None


class Counted(MAML):
    """MAML that counts its updates.

    Attributes:
        calls: Number of updates in each call for several.
    """

    calls: list[int]

    def update_several(self, steps: Any) -> list[Metrics]:
        made = super().update_several(steps)
        self.calls.append(len(made))
        return made


def algorithm(graph: Any = "compile", optim: dict[str, Any] = OPTIM, **options: Any) -> Counted:
    backbone = partial(MLP, hidden=[6])
    outer = partial(OuterOptimizer, **optim)
    made: Counted = make(Counted, Watched().spec, backbone, optim=outer, inner_lr=0.1, **options)
    made.engine = Engine("vmap", graph=graph)
    made.calls = []
    return made


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the operators of a trace as they are, where a compiler would fuse them."""
    monkeypatch.setattr(graph_replay, "_compiled", lambda graph, _: graph.forward)


def last(path: Path) -> dict[str, Any]:
    """Return what a run has learned, with the state of its optimizer and its metrics."""
    found = read_checkpoint(path / "checkpoints" / "last.pt")
    return {"state": found["state"], "metrics": (path / "metrics.jsonl").read_text()}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "optim",
    [OPTIM, {"method": "sgd", "lr": 0.05, "momentum": 0.9, "clip_value": 0.1, "weight_decay": 0.1}],
)
def test_updates_of_one_call_are_those_of_calls_of_their_own(optim: dict[str, Any]) -> None:
    called, joined = algorithm("none", optim), algorithm("compile", optim)
    steps = [(OneSize().batch("train", 2 * step, 2), step) for step in range(9)]
    progress = [(batch, Progress(step, 9)) for batch, step in steps]
    expected = [called.update(*step) for step in progress]
    found = [joined.update(*progress[0]), *joined.update_several(progress[1:6])]
    found += joined.update_several(progress[6:])
    assert joined.calls == [5, 3]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
    for name, value in called.named_parameters():
        torch.testing.assert_close(joined.get_parameter(name), value, rtol=1e-10, atol=1e-12)
    theirs = called.state_dict()["optimizer._extra_state"]["state"]
    ours = joined.state_dict()["optimizer._extra_state"]["state"]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("traced")
def test_a_run_is_the_same_for_any_number_of_updates_in_a_call(tmp_path: Path) -> None:
    many, few = algorithm(), algorithm()
    go(tmp_path / "many", OneSize(), many, log_every=60, eval_every=60, checkpoint_every=60)
    go(tmp_path / "few", OneSize(), few, log_every=60, eval_every=60, checkpoint_every=2)
    assert sum(many.calls) == sum(few.calls) == STEPS
    assert max(many.calls) > 20
    assert max(few.calls) == 2
    assert same_state(last(tmp_path / "many"), last(tmp_path / "few"))


@pytest.mark.usefixtures("traced")
def test_a_run_that_stops_and_goes_on_is_the_same(tmp_path: Path) -> None:
    go(tmp_path / "whole", OneSize(), algorithm())

    def stop(split: str, index: int) -> None:
        if split == "val" and index == 0:
            stops.append(index)
            if len(stops) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    stops: list[int] = []
    with pytest.raises(Interrupted):
        go(tmp_path / "stopped", OneSize(stop), algorithm())
    assert 0 < read_checkpoint(tmp_path / "stopped" / "checkpoints" / "last.pt")["step"] < STEPS
    go(tmp_path / "stopped", OneSize(), algorithm())
    assert same_state(last(tmp_path / "stopped"), last(tmp_path / "whole"))


class Broken(OneSize):
    """A data set with a value that is not a number in the tasks of one step."""

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        batch = super().batch(split, index, num_tasks)
        if split == "train" and index <= 2 * 33 < index + num_tasks:
            batch.query_y[2 * 33 - index] = float("nan")
        return batch


@pytest.mark.usefixtures("traced")
def test_an_update_that_fails_leaves_those_before_it(tmp_path: Path) -> None:
    broken, whole = algorithm(), algorithm()
    every = {"log_every": 60, "eval_every": 60, "checkpoint_every": 60}
    with pytest.raises(RunError, match=r"step 33: the gradient of net\S+ is nan"):
        go(tmp_path / "broken", Broken(), broken, **every)
    steps = [(OneSize().batch("train", 2 * step, 2), step) for step in range(33)]
    whole.update_several([(batch, Progress(step, STEPS)) for batch, step in steps])
    assert whole.calls == [33]
    assert sum(broken.calls) == 33
    assert same_state(broken.state_dict(), whole.state_dict())


@pytest.mark.usefixtures("traced")
def test_a_call_ends_where_the_function_of_a_task_changes(tmp_path: Path) -> None:
    joined, called = algorithm(second_order_from=25), algorithm("none", second_order_from=25)
    every = {"log_every": 60, "eval_every": 60, "checkpoint_every": 60}
    go(tmp_path / "joined", OneSize(), joined, **every)
    go(tmp_path / "called", OneSize(), called, **every)
    ends = {sum(joined.calls[:count]) for count in range(len(joined.calls))}
    assert 25 in ends
    for name, value in called.named_parameters():
        torch.testing.assert_close(joined.get_parameter(name), value, rtol=1e-9, atol=1e-11)


class Limited(MAML):
    """MAML with clipping of its own."""

    def limited(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: grad.clamp(-1, 1) for name, grad in grads.items()}


def test_updates_that_are_more_than_a_gradient_have_calls_of_their_own() -> None:
    compiled = Engine("vmap", graph="compile")
    backbone = partial(MLP, hidden=[6])
    assert algorithm().joins_updates
    assert not algorithm("replay").joins_updates
    noisy = make_algorithm()
    noisy.engine = compiled
    assert isinstance(noisy, NoisyMAML)
    assert not noisy.joins_updates
    for kind, net in ((Limited, backbone), (MAML, partial(MLP, hidden=[6], batch_norm=True))):
        learner = make(kind, Watched().spec, net)
        learner.engine = compiled
        assert not learner.joins_updates


def test_a_function_that_cannot_be_compiled_has_calls_of_its_own(tmp_path: Path) -> None:
    class Drawing(Counted):
        """MAML whose tasks draw random numbers."""

        def inner_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return self.loss(outputs, targets + 0.1 * torch.randn(targets.shape))

    def go_to(path: Path) -> Any:
        learner: Drawing = make(Drawing, Watched().spec, partial(MLP, hidden=[6]), inner_lr=0.01)
        learner.engine = Engine("loop", graph="compile")
        learner.calls = []
        go(path, OneSize(), learner)
        assert not any(learner.calls)
        return last(path)

    assert same_state(go_to(tmp_path / "one"), go_to(tmp_path / "other"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile takes a C++ compiler")
@pytest.mark.slow
def test_compiled_updates_are_those_of_calls_of_their_own(tmp_path: Path) -> None:
    joined, called = algorithm(), algorithm("none")
    go(tmp_path / "joined", OneSize(), joined)
    go(tmp_path / "called", OneSize(), called)
    assert sum(joined.calls) == STEPS
    for name, value in called.named_parameters():
        torch.testing.assert_close(joined.get_parameter(name), value, rtol=1e-9, atol=1e-11)
    go(tmp_path / "again", OneSize(), algorithm(), checkpoint_every=4)
    assert same_state(last(tmp_path / "joined")["state"], last(tmp_path / "again")["state"])
