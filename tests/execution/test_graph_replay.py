"""Replays equal their functions bit for bit, and are not used where they might differ."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from metarun.algorithms.base import Algorithm
from metarun.core.types import Progress
from metarun.execution import graph_replay
from metarun.execution.engine import Engine
from metarun.execution.graph_replay import Computed, Graphs, Replay, _followed
from tests.algorithms.test_contract import PAIRS, answers, build
from tests.helpers import slow

# Classes of the learners whose steps are replayed, by the name of one; others are settings of them.
REPLAYING = {
    *("anil", "anp", "baseline", "cavia", "frn", "mamlpp", "matching", "mixture", "protomaml"),
    *("protonet", "r2d2", "relation", "simpleshot"),
}
DIFFERENT = [(algo, data) for algo, data in PAIRS if algo in REPLAYING]
QUICK = {("anp", "sinusoid"), ("cavia", "sinusoid"), ("protonet", "omniglot_small")}
SMALLER = {"omniglot_small": ["data.image_size=28"], "sinusoid": []}


def num_replays(algorithm: Algorithm) -> int:
    return len(algorithm.engine.graphs.replays)


def found(
    kind: Any, function: Any, args: Any = None, graphs: Graphs | None = None, calls: int = 3
) -> Any:
    """Return the replay of a function after some calls, or None."""
    graphs = graphs or Graphs()
    for _ in range(calls):
        made = graphs.find(kind, "key", function, NET, function, args or ARGS)
    return made.function if isinstance(made, Replay) else None


def learned(algo: str, data: str, engine: Engine) -> tuple[Algorithm, Tensor]:
    """Return a learner after updates that are far apart in the run, and its predictions."""
    torch.manual_seed(0)
    own = {"mamlpp": ["algo.inner_steps=2"], "relation": ["backbone.blocks=4"]}.get(algo, [])
    made = build(algo, data, "train.tasks_per_step=3", *SMALLER[data], *own)
    made.algorithm.engine = engine
    for step in (0, 1, 2, 6, 7):
        made.algorithm.update(made.source.batch("train", 3 * step, 3), Progress(step, 8))
    batch = made.source.batch("test", 0, 4)
    return made.algorithm, [answers(made.algorithm, batch) for _ in range(3)][-1]


@pytest.mark.parametrize(
    ("algo", "data", "kind"),
    [
        *(
            (algo, data, "vmap") if (algo, data) in QUICK else slow(algo, data, "vmap")
            for algo, data in DIFFERENT
        ),
        slow("fomaml", "omniglot_small", "threads"),
        slow("protonet", "omniglot_small", "threads"),
    ],
)
def test_a_learner_is_replayed_bit_for_bit(algo: str, data: str, kind: Any) -> None:
    engine = {"kind": kind, "tasks_per_chunk": 1 if kind == "threads" else None, "threads": 2}
    called, expected = learned(algo, data, Engine(**engine, graph="none"))
    replayed, found = learned(algo, data, Engine(**engine, graph="replay"))
    assert torch.equal(found, expected)
    ours, theirs = replayed.state_dict(), called.state_dict()
    assert all(torch.equal(ours[n], v) for n, v in theirs.items() if isinstance(v, Tensor))
    assert num_replays(replayed)
    assert not num_replays(called)


def squares(values: list[Tensor]) -> Tensor:
    return values[0] ** 2


ARGS = ([torch.tensor([1.0, 2.0])],)
NET = nn.Identity()


def test_auto_follows_a_function_at_its_200th_call() -> None:
    graphs = Graphs()
    made = [graphs.find("auto", "key", squares, NET, squares, ARGS) for _ in range(202)]
    computed = [call for call, one in enumerate(made, 1) if isinstance(one, Computed)]
    # The first of these finds out which code is executed.
    assert computed == [180, 200]
    assert made[:179] == [None] * 179
    assert isinstance(made[200], Replay)
    assert made[201] == made[200]
    assert torch.equal(made[200].function([torch.tensor([3.0, 4.0])]), torch.tensor([9.0, 16.0]))


def test_a_few_sizes_are_followed_and_all_others_are_called() -> None:
    graphs = Graphs()
    for size in range(1, 30):
        args = ([torch.arange(1.0 + size)],)
        for _ in range(3):
            graphs.find("replay", "key", squares, NET, squares, args)
    assert len(graphs.replays) == 16


def test_another_shape_is_followed_by_itself() -> None:
    graphs = Graphs()
    found("replay", squares, graphs=graphs)
    longer = ([torch.tensor([1.0, 2.0, 3.0])],)
    assert found("replay", squares, longer, graphs, calls=2) is None
    replay = found("replay", squares, longer, graphs, calls=1)
    assert torch.equal(replay(*longer), torch.tensor([1.0, 4.0, 9.0]))


@pytest.mark.parametrize("kind", ["replay", "compile"])
def test_a_function_that_reads_other_tensors_is_not_replayed(kind: Any) -> None:
    factor = torch.tensor([2.0, 2.0])
    assert found(kind, lambda values: values[0] * factor) is None


def test_a_function_that_computes_something_else_each_time_is_not_replayed() -> None:
    calls = iter(range(100))
    assert found("replay", lambda values: values[0] * next(calls)) is None


def test_a_function_that_cannot_be_followed_is_not_replayed() -> None:
    def branches(values: list[Tensor]) -> Tensor:
        return values[0] if float(values[0].sum()) > 0 else -values[0]

    assert found("replay", branches) is None


def test_a_replay_reads_buffers_as_they_are_by_then() -> None:
    net = nn.Module()
    net.register_buffer("offset", torch.tensor(1.0))
    net.forward = lambda x: x + net.offset  # type: ignore[method-assign]
    engine = Engine("vmap", graph="replay")

    def task(net: nn.Module, _: dict[str, Tensor], x: Tensor) -> Tensor:
        shifted: Tensor = x + net.offset
        return shifted

    rows = (torch.zeros(2, 3),)
    for _ in range(3):
        assert torch.equal(engine.map(task, net, {}, rows), torch.ones(2, 3))
    assert engine.graphs.replays
    net.offset = torch.tensor(5.0)
    assert torch.equal(engine.map(task, net, {}, rows), torch.full((2, 3), 5.0))
    assert len(engine.graphs.replays) == 1


def test_a_batch_of_another_size_has_its_own_mean() -> None:
    net = nn.Linear(2, 1)
    params: dict[str, Tensor] = dict(net.named_parameters())

    def task(net: nn.Module, params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        answers = torch.func.functional_call(net, params, (x,))
        return answers.square().mean(), answers

    replayed, called = Engine("loop", graph="replay"), Engine("loop", graph="none")
    for num_tasks in (4, 4, 4, 2, 2, 2):
        rows = (torch.randn(num_tasks, 3, 2),)
        found, _ = replayed.gradients(task, net, params, rows)
        expected, _ = called.gradients(task, net, params, rows)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # One task at a time in both batches; the mean is over the batch.
    assert len(replayed.graphs.replays) == 2


def test_a_copy_of_a_learner_has_no_graphs_of_the_original() -> None:
    engine = Engine(graph="replay")
    found("replay", squares, graphs=engine.graphs)
    assert engine.graphs.replays
    assert not copy.deepcopy(engine).graphs.replays


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile takes a C++ compiler")
@pytest.mark.slow
def test_a_compiled_run_that_goes_on_equals_one_that_did_not_stop() -> None:
    """All its steps are compiled, from the first one on."""

    def started() -> Any:
        torch.manual_seed(0)
        made = build("maml", "sinusoid", "train.tasks_per_step=3")
        made.algorithm.engine = Engine("vmap", graph="compile")
        return made

    def train(made: Any, steps: range) -> None:
        for step in steps:
            made.algorithm.update(made.source.batch("train", 3 * step, 3), Progress(step, 9))

    whole, stopped, resumed = started(), started(), started()
    train(whole, range(9))
    train(stopped, range(4))
    resumed.algorithm.load_state_dict(copy.deepcopy(stopped.algorithm.state_dict()))
    train(resumed, range(4, 9))
    for name, value in whole.algorithm.named_parameters():
        assert torch.equal(resumed.algorithm.get_parameter(name), value)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile takes a C++ compiler")
@pytest.mark.slow
def test_what_is_compiled_agrees_to_rounding() -> None:
    called, expected = learned("maml", "sinusoid", Engine("vmap", graph="none"))
    compiled, found = learned("maml", "sinusoid", Engine("vmap", graph="compile"))
    assert num_replays(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, value in called.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), value, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile takes a C++ compiler")
@pytest.mark.slow
def test_any_number_of_graphs_is_compiled_in_one_process() -> None:
    # Of one function's code torch compiles eight variants and then gives up; one here.
    with torch._dynamo.config.patch(recompile_limit=1):
        for function in (squares, lambda values: values[0] + 1.0):
            graph = found("compile", function)
            assert graph is not None
            assert torch.equal(graph(*ARGS), function(*ARGS))


def test_what_a_captured_graph_gave_stays_when_it_is_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def writes_over_its_results(function: Any, **_: Any) -> Any:
        result = torch.zeros(2)
        return lambda *tensors: [result.copy_(*function(*tensors))]

    monkeypatch.setattr(torch, "compile", writes_over_its_results)
    monkeypatch.setattr(graph_replay, "_on_gpu", lambda _: True)
    graph = found("compile", squares)
    assert graph is not None
    first = graph(*ARGS)
    graph([torch.tensor([5.0, 6.0])])
    assert torch.equal(first, torch.tensor([1.0, 4.0]))


def test_a_function_is_followed_without_being_computed() -> None:
    """Computing it would keep all intermediate results until its end."""
    seen: list[Tensor] = []

    def function(values: list[Tensor]) -> Tensor:
        seen.append(values[0] * 2)
        return seen[-1].sum()

    _followed(function, ARGS)
    assert isinstance(seen[0], FakeTensor)


@pytest.mark.parametrize(("rows", "of_weights"), [(2, 1), (40_000, 3)])
def test_what_is_small_or_made_of_the_data_alone_is_made_once(rows: int, of_weights: int) -> None:
    def function(weights: list[Tensor], data: list[Tensor]) -> Tensor:
        (weight,), (x,) = weights, data
        return sum(weight.exp() * (x.cosh() + x.tanh() * 0.5) for _ in range(3)).sum()

    args = ([torch.tensor([1.0, 2.0]).repeat(rows)], [torch.tensor([3.0, 4.0]).repeat(rows)])
    module = _followed(function, args)
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(torch.ops.aten.cosh.default) == 1
    # Repeated operations on weights may be intended, to save memory.
    assert targets.count(torch.ops.aten.exp.default) == of_weights
    assert torch.equal(module(*args), function(*args))


def test_data_that_are_changed_in_their_place_are_not_shared() -> None:
    def function(weights: list[Tensor], data: list[Tensor]) -> Tensor:
        (weight,), (x,) = weights, data
        first, second = x.cosh(), x.cosh()
        first.mul_(2.0)
        return (weight * (first + second)).sum()

    args = ([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
    assert torch.equal(_followed(function, args)(*args), function(*args))


def test_summands_that_are_nothing_are_left_out() -> None:
    def function(values: list[Tensor]) -> Tensor:
        zeros = torch.zeros_like(values[0])
        return zeros.view(1, -1).expand(3, -1) + (values[0] + zeros).exp()

    module = _followed(function, ARGS)
    targets = [node.target for node in module.graph.nodes]
    # One summand has another shape than the sum, the other has the same.
    assert targets.count(torch.ops.aten.add.Tensor) == 1
    assert torch.equal(module(*ARGS), function(*ARGS))


def test_zeros_that_something_is_written_into_are_kept() -> None:
    def function(values: list[Tensor]) -> Tensor:
        sums = torch.zeros_like(values[0])
        sums.view(-1).add_(values[0])
        return values[0] + sums

    assert torch.equal(_followed(function, ARGS)(*ARGS), 2 * ARGS[0][0])
