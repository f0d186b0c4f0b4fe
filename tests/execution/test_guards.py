"""A replay is used only while everything that its function reads is as it was when traced."""

from __future__ import annotations

import gc
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, forward, own_parameters
from metarun.algorithms.functional import Params
from metarun.algorithms.metric.protonet import ProtoNet
from metarun.algorithms.optimization.maml import MAML
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Adapted, Metrics, Prediction, Progress, TaskBatch
from metarun.execution import graph_replay
from metarun.execution.engine import Engine
from metarun.execution.graph_replay import _MOST_TRACES
from tests.helpers import TINY_BACKBONES, image_batch, image_spec, make

STEPS = 12
PARAMS = {"w": torch.tensor([1.0, 2.0])}
ROWS = (torch.arange(6.0).view(3, 2),)
Task = Callable[..., Any]


def losses(kind: type[Algorithm], graph: Any, change: Callable[[Any, int], None]) -> list[Tensor]:
    """Return the loss of each update of a learner that is changed before each of them."""
    spec = image_spec()
    backbone = "conv4 max-pool" if change is in_padding else "mlp"
    learner = make(kind, spec, TINY_BACKBONES[backbone])
    learner.engine = Engine("vmap", graph=graph)
    found = []
    for step in range(STEPS):
        change(learner, step)
        metrics = learner.update(image_batch(spec, seed=step), Progress(step, STEPS))
        found.append(metrics["loss"])
        if graph == "replay" and step == 3:
            assert learner.engine.graphs.replays, "nothing was replayed: the test shows nothing"
    return found


@dataclass
class Settings:
    scale: float = 1.0


class Plain:
    """Object of an ordinary class."""

    def __init__(self) -> None:
        self.inner = Settings()


SCALE = 1.0


def scale_of_module() -> float:
    return SCALE


def doubled(x: Tensor) -> Tensor:
    return 2.0 * x


def halved(x: Tensor) -> Tensor:
    return 0.5 * x


def scaled(x: Tensor, scale: float = 1.0, *, by: float = 1.0) -> Tensor:
    return scale * by * x


SCALED = scaled.__code__
bend = doubled


def value(step: int) -> float:
    """Return a scale that stays for some steps, changes, and comes back."""
    return (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0, 5.0, 5.0, 1.0)[step]


class Scaled(ProtoNet):
    """Prototypical network with a factor on its logits that it finds in some place."""

    bias: ClassVar[float] = 1.0

    def __init__(self, setup: LearnerSetup) -> None:
        super().__init__(setup)
        self.settings = Settings()
        self.plain = Plain()
        self.listed = [[1.0], 2.0]
        self.named = {"scale": {"now": 1.0}}
        self.hidden = 1.0
        self.factor = lambda: 1.0
        self.of = partial(scaled, scale=1.0)

    def _logits(self, features: Tensor, support_y: Tensor, ways: int) -> Tensor:
        return self.times(super()._logits(features, support_y, ways))

    def times(self, x: Tensor) -> Tensor:
        return x


def in_attribute(learner: Any, step: int) -> None:
    learner.scale = value(step)


class InSettings(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.settings.scale * x


def in_settings(learner: Any, step: int) -> None:
    learner.settings.scale = value(step)


def in_new_settings(learner: Any, step: int) -> None:
    learner.settings = Settings(value(step))


class InPlain(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.plain.inner.scale * x


def in_plain(learner: Any, step: int) -> None:
    learner.plain.inner.scale = value(step)


class InList(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.listed[0][0] * x


def in_list(learner: Any, step: int) -> None:
    learner.listed[0][0] = value(step)


class InLength(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return len(self.listed) * x


def in_length(learner: Any, step: int) -> None:
    learner.listed = [0.0] * int(value(step))


class InDict(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.named["scale"]["now"] * x


def in_dict(learner: Any, step: int) -> None:
    learner.named["scale"]["now"] = value(step)


class InGlobal(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return SCALE * x


class InGlobalOfAnother(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return scale_of_module() * x


def in_global(_: Any, step: int) -> None:
    globals()["SCALE"] = value(step)


class InClass(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.bias * x


def in_class(_: Any, step: int) -> None:
    InClass.bias = value(step)


def in_shadow(learner: Any, step: int) -> None:
    """An attribute of the instance hides the one of its class, and goes away."""
    if value(step) != 1.0:
        learner.bias = value(step)
    else:
        vars(learner).pop("bias", None)


def in_method(learner: Any, step: int) -> None:
    learner.times = doubled if value(step) != 1.0 else halved


class InProperty(Scaled):
    @property
    def current(self) -> float:
        return self.hidden * 2.0

    def times(self, x: Tensor) -> Tensor:
        return self.current * x


def in_property(learner: Any, step: int) -> None:
    learner.hidden = value(step)


class InCell(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.factor() * x


def in_cell(learner: Any, step: int) -> None:
    if step == 0:
        learner.cell = cell = [1.0]
        learner.factor = lambda: cell[0]
    learner.cell[0] = value(step)


class InSwapped(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return bend(x)


def in_swapped(_: Any, step: int) -> None:
    globals()["bend"] = doubled if value(step) == 1.0 else halved


class InDefault(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return scaled(x)


def in_default(_: Any, step: int) -> None:
    scaled.__defaults__ = (value(step),)


def in_keyword_default(_: Any, step: int) -> None:
    scaled.__kwdefaults__ = {"by": value(step)}


class InPartial(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return self.of(x)


def in_partial(learner: Any, step: int) -> None:
    learner.of = partial(scaled, scale=value(step))


class InCode(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return scaled(x)


def tripled(x: Tensor, scale: float = 1.0, *, by: float = 1.0) -> Tensor:  # noqa: ARG001
    return 3.0 * x


def in_code(_: Any, step: int) -> None:
    scaled.__code__ = SCALED if value(step) == 1.0 else tripled.__code__


class InSign(Scaled):
    def times(self, x: Tensor) -> Tensor:
        return math.copysign(1.0, self.hidden) * x


def in_sign(learner: Any, step: int) -> None:
    learner.hidden = 0.0 if value(step) == 1.0 else -0.0


def in_padding(learner: Any, step: int) -> None:
    # The maps of 4x4 grow to 6x6; their pooled mean has the same shape only at 4x4 and 5x5.
    learner.net.body.convs[1].stride = (1, 1) if value(step) == 1.0 else (2, 2)


def in_hook(learner: Any, step: int) -> None:
    if step == 0:
        learner.hook = None
    if value(step) == 1.0 and learner.hook is not None:
        learner.hook = learner.hook.remove()
    if value(step) != 1.0 and learner.hook is None:
        learner.hook = learner.net.body.register_forward_hook(lambda _, __, out: 3.0 * out)


CHANGES: list[Any] = [
    pytest.param(*pair, id=pair[1].__name__)
    for pair in [
        (ProtoNet, in_attribute),
        (InSettings, in_settings),
        (InSettings, in_new_settings),
        (InPlain, in_plain),
        (InList, in_list),
        (InLength, in_length),
        (InDict, in_dict),
        (InGlobal, in_global),
        (InClass, in_class),
        (InClass, in_shadow),
        (Scaled, in_method),
        (InProperty, in_property),
        (InCell, in_cell),
        (InSwapped, in_swapped),
        (InDefault, in_default),
        (InDefault, in_keyword_default),
        (InPartial, in_partial),
        (InCode, in_code),
        (InSign, in_sign),
        (ProtoNet, in_padding),
        (ProtoNet, in_hook),
    ]
] + [pytest.param(InGlobalOfAnother, in_global, id="in_global_of_another")]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    before = {"SCALE": SCALE, "bend": bend}
    yield
    globals().update(before)
    InClass.bias = 1.0
    scaled.__defaults__, scaled.__kwdefaults__, scaled.__code__ = (1.0,), {"by": 1.0}, SCALED


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_a_learner_that_changes_is_the_one_without_replays_bit_for_bit(
    kind: type[Algorithm], change: Callable[[Any, int], None]
) -> None:
    assert losses(kind, "replay", change) == losses(kind, "none", change)


def test_a_replay_comes_back_with_the_value_that_it_was_traced_for() -> None:
    spec = image_spec()
    learner = make(ProtoNet, spec, TINY_BACKBONES["mlp"])
    learner.engine = Engine("vmap", graph="replay")
    for step, scale in enumerate((1.0, 1.0, 2.0, 2.0, 1.0, 2.0)):
        learner.scale = scale
        learner.update(image_batch(spec), Progress(step, 6))
    assert len(learner.engine.graphs.replays) == 2


class Softer(MAML):
    """MAML that overrides its inner loss."""

    def _support_loss(self, *args: Any) -> Any:
        loss = super()._support_loss(*args)
        return lambda adapted: self.softness * loss(adapted)


def soften(learner: Any, step: int) -> None:
    learner.softness = value(step)


def test_a_subclass_of_maml_that_overrides_its_inner_loss_is_right() -> None:
    assert losses(Softer, "replay", soften) == losses(Softer, "none", soften)


def test_a_term_of_the_inner_loss_at_evaluation_is_not_replayed_without_it() -> None:
    spec = image_spec()
    batch = image_batch(spec)
    found = {}
    for graph in ("none", "replay"):
        learner = make(MAML, spec, TINY_BACKBONES["mlp"], inner_lr=0.5)
        learner.engine = Engine("vmap", graph=graph)  # type: ignore[arg-type]
        found[graph] = []
        for step in range(9):
            with_term = 3 <= step < 6
            learner.term_at_evaluation = (
                (lambda x: lambda outputs, _: outputs.square().mean() * x.mean())
                if with_term
                else None
            )
            rows = batch.support_x, batch.support_y, batch.query_x
            found[graph].append(learner.predict(*rows).outputs)
    assert all(map(torch.equal, found["replay"], found["none"]))
    assert not torch.equal(found["none"][0], found["none"][3])


class Stranger(Algorithm):
    """Learner of somebody who has never heard of replays."""

    def __init__(self, setup: LearnerSetup) -> None:
        super().__init__(setup)
        self.net = self.build_network(self.spec.output_dim)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        def task(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            loss = self.loss(forward(net, params, x, ForwardContext()), y)
            return loss, loss

        grads, found = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), (batch.query_x, batch.query_y)
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        return {"loss": found.mean()}

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        raise NotImplementedError

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        raise NotImplementedError


def test_a_collection_of_garbage_is_no_part_of_a_function() -> None:
    gc.callbacks.append(lambda *_: time.perf_counter())
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        learner = make(ProtoNet, image_spec(), TINY_BACKBONES["mlp"])
        learner.engine = Engine("vmap", graph="replay")
        for step in range(3):
            learner.update(image_batch(image_spec(), seed=step), Progress(step, 3))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert learner.engine.graphs.replays
    assert gc.isenabled()


def test_an_algorithm_that_knows_nothing_of_replays_is_replayed() -> None:
    spec = image_spec()
    learner = make(Stranger, spec, TINY_BACKBONES["mlp"])
    learner.engine = Engine("vmap", graph="replay")
    called = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal called
        called += event == "call" and frame.f_code.co_qualname == "Stranger.update.<locals>.task"

    sys.setprofile(count)
    for step in range(STEPS):
        learner.update(image_batch(spec, seed=step), Progress(step, STEPS))
    sys.setprofile(None)
    # The trace: the two calls before it are watched by the guards instead of this counter.
    assert called == 1
    assert len(learner.engine.graphs.replays) == 1


def run(task: Task, steps: int = 6, net: nn.Module | None = None, **options: Any) -> list[Tensor]:
    """Return the results of `Engine.map` with a task function in several calls."""
    engine = Engine(**{"kind": "loop", "graph": "replay", **options})
    net = net or nn.Identity()
    found = [engine.map(task, net, PARAMS, ROWS) for _ in range(steps)]
    found.append(torch.tensor(len(engine.graphs.replays)))
    return found


OWN = torch.tensor(2.0)
CLOCK = time.time
DRAW = random.Random(0)
ARRAY = np.ones(2)


def reads_time(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * (time.perf_counter() > 0)


def reads_a_clock(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * (CLOCK() > 0)


def reads_random(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * (random.random() >= 0.0)


def reads_a_generator(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * (DRAW.random() >= 0.0)


def reads_numpy(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * float(np.ones(2).sum())


def reads_an_array(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * len(ARRAY)


def reads_an_item(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * OWN.item()


def reads_a_float(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * float(OWN)


def reads_a_list(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * OWN.tolist()


def reads_an_index(_: Any, params: Params, x: Tensor) -> Tensor:
    return x[torch.ones((), dtype=torch.int64) * (OWN > 0)] * params["w"]


def reads_by_a_computed_name(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * getattr(Settings(), "sca" + "le")


def reads_the_dictionary(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * len(vars(Settings()))


def reads_a_file(_: Any, params: Params, x: Tensor) -> Tensor:
    with open(__file__) as file:  # noqa: PTH123
        return x * params["w"] * len(file.read(1))


def imports(_: Any, params: Params, x: Tensor) -> Tensor:
    import os

    return x * params["w"] * len(os.sep)


def draws(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * torch.rand(())


def reads_the_seed(_: Any, params: Params, x: Tensor) -> Tensor:
    return x * params["w"] * (torch.initial_seed() >= 0)


def prints(_: Any, params: Params, x: Tensor) -> Tensor:
    print("called")
    return x * params["w"]


UNGUARDED = [
    reads_time, reads_a_clock, reads_random, reads_a_generator, reads_numpy, reads_an_array,
    reads_an_item, reads_a_float, reads_a_list, reads_an_index, reads_by_a_computed_name,
    reads_the_dictionary, reads_a_file, imports, draws, reads_the_seed, prints,
]  # fmt: skip


@pytest.mark.parametrize("task", UNGUARDED)
def test_what_cannot_be_guarded_is_called(task: Task) -> None:
    assert run(task)[-1] == 0


def test_a_plain_function_of_the_same_form_is_replayed() -> None:
    def task(_: Any, params: Params, x: Tensor) -> Tensor:
        return x * params["w"] * math.sqrt(2.0)

    assert run(task)[-1] == 1


COUNT = {"calls": 0}


class Counter:
    calls = 0


def test_a_function_with_a_side_effect_is_called_once_for_each_task_of_each_call() -> None:
    counter, history, own = Counter(), [], 0
    steps, tasks = 6, len(ROWS[0])

    def counts(_: Any, params: Params, x: Tensor) -> Tensor:
        counter.calls += 1
        return x * params["w"]

    def counts_in_a_global(_: Any, params: Params, x: Tensor) -> Tensor:
        COUNT["calls"] += 1
        return x * params["w"]

    def appends(_: Any, params: Params, x: Tensor) -> Tensor:
        history.append(1)
        return x * params["w"]

    def counts_in_a_cell(_: Any, params: Params, x: Tensor) -> Tensor:
        nonlocal own
        own += 1
        return x * params["w"]

    for task in (counts, counts_in_a_global, appends, counts_in_a_cell):
        assert run(task, steps)[-1] == 0
    assert [counter.calls, COUNT["calls"], len(history), own] == [steps * tasks] * 4


def test_a_function_that_keeps_a_tensor_is_called() -> None:
    kept = Plain()

    def keeps(_: Any, params: Params, x: Tensor) -> Tensor:
        kept.inner = x
        return x * params["w"]

    assert run(keeps)[-1] == 0
    assert type(kept.inner) is Tensor


def test_a_value_that_differs_in_each_call_is_not_traced_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traced = []
    monkeypatch.setattr(graph_replay, "_followed", lambda *_: traced.append(1))
    engine, net = Engine("loop"), nn.Identity()
    with caplog.at_level(logging.DEBUG, logger=graph_replay.__name__):
        for step in range(300):

            def task(_: Any, params: Params, x: Tensor, number: int = step) -> Tensor:
                return x * params["w"] * number

            engine.map(task, net, PARAMS, ROWS)
    assert not traced
    assert f"{_MOST_TRACES} sets of values" in caplog.text


def test_a_progress_of_which_nothing_is_read_does_not_matter() -> None:
    engine, net = Engine("loop", graph="replay"), nn.Identity()
    for step in range(5):
        progress = Progress(step, 5)

        def task(_: Any, params: Params, x: Tensor, seen: Any = progress) -> Tensor:
            return x * params["w"] if seen is not None else x

        engine.map(task, net, PARAMS, ROWS)
    assert len(engine.graphs.replays) == 1


def test_a_network_that_is_no_longer_used_is_not_kept() -> None:
    engine = Engine("loop")
    for _ in range(5):
        engine.map(lambda _, params, x: x * params["w"], nn.Linear(2, 2), PARAMS, ROWS)
    assert not engine.graphs._sites


def test_an_engine_inside_a_task_is_called() -> None:
    inner = Engine("loop", graph="replay")

    def task(net: nn.Module, params: Params, x: Tensor) -> Tensor:
        return inner.map(lambda _, p, row: row * p["w"], net, params, (x[None],))[0]

    *found, replays = run(task)
    assert replays == 0
    assert all(torch.equal(one, ROWS[0] * PARAMS["w"]) for one in found)
