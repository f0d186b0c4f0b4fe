from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
import torch

from metarun.bench.measuring import LEAST_ROUNDS, interleave, operations, peak, set_tf32
from metarun.bench.memory import memory_of_step, throughput
from metarun.bench.results import Entry, Result, Times
from metarun.bench.workloads import TF32, Variant
from tests.bench.tiny import BY_NAME

CPU = torch.device("cpu")


def test_operations_of_dense_layers_are_those_counted_by_hand() -> None:
    workload = replace(BY_NAME["sinusoid"], tasks=3, shot=10, query=10, first_order=True)
    forward = 2 * 10 * (1 * 40 + 40 * 40 + 40 * 1)
    # Products for the weights of three layers, and for the inputs of the last two.
    backward = forward + 2 * 10 * (40 * 40 + 40 * 1)
    assert operations(replace(workload, steps=0)) == 3 * (forward + backward)
    assert operations(workload) == 3 * 2 * (forward + backward)


def test_second_derivatives_are_counted() -> None:
    first = operations(BY_NAME["mini-first"])
    second = operations(BY_NAME["mini"])
    assert first is not None
    assert second is not None
    assert second > 1.5 * first


@pytest.mark.parametrize("name", ["conv4-15", "protonet-resnet12", "mann", "evaluation"])
def test_operations_are_proportional_to_tasks(name: str) -> None:
    one, three = (operations(replace(BY_NAME[name], tasks=tasks)) for tasks in (1, 3))
    assert one is not None
    assert three == 3 * one > 0


def test_sides_take_turns_in_as_many_rounds_for_each() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = interleave(steps, 0.0, CPU)
    turns = [name for name, _ in groupby(calls)]
    assert turns == ["a", "b"] * (2 + LEAST_ROUNDS)
    assert {len(side.steps) for side in times.values()} == {LEAST_ROUNDS}


def test_a_ratio_is_of_medians_with_the_quartiles_of_the_rounds() -> None:
    ours = Entry("metarun", Times(9.0, (1.0, 1.0, 2.0, 1.0, 4.0)))
    theirs = Entry("plain", Times(9.0, (2.0, 3.0, 8.0, 5.0, 4.0)))
    result = Result(BY_NAME["mann"], Variant(), "vmap", 100, 50.0, ours, (theirs,))
    ratio = result.ratio(theirs)
    # Ratios of the rounds: 2, 3, 4, 5, 1.
    assert (ratio.value, ratio.low, ratio.high) == (4.0, 2.0, 4.0)
    assert result.share(theirs) == 100 / 4.0 / 50.0


def test_the_peak_of_products_is_a_number_of_operations() -> None:
    assert peak(CPU, torch.float32, seconds=0.0, most=64) > 2 * 64**3


@pytest.mark.parametrize(
    ("word", "convolutions", "products"),
    [("none", False, False), ("convolutions", True, False), ("all", True, True)],
)
def test_the_peak_is_in_the_arithmetic_of_convolutions_and_products_keep_theirs(
    word: str, convolutions: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def note(*_: object) -> float:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return 1.0

    monkeypatch.setattr("metarun.bench.measuring._seconds", note)
    try:
        set_tf32(word)
        peak(CPU, torch.float32, seconds=0.0, most=8)
        assert torch.backends.cuda.matmul.allow_tf32 == products
    finally:
        set_tf32(TF32[0])
    assert set(seen) == {convolutions}


def test_more_tasks_at_once_need_more_memory() -> None:
    workload = replace(BY_NAME["conv4-1"], filters=16)
    few, many = (
        memory_of_step(Variant("vmap"), replace(workload, tasks=tasks), CPU) for tasks in (4, 32)
    )
    if few is None:
        pytest.skip("this system does not say what a process needs")
    assert many is not None
    assert many > 3 * few > 0


@pytest.mark.slow
def test_recomputed_inner_steps_need_no_more_memory_for_being_many() -> None:
    """With stored graphs, five inner steps need 3.3 times the memory of one."""
    workload = replace(BY_NAME["conv4-1"], tasks=2, filters=32, image=84)
    side = Variant("vmap", memory="lean")
    one, five = (memory_of_step(side, replace(workload, steps=steps), CPU) for steps in (1, 5))
    if one is None or five is None:
        pytest.skip("this system does not say what a process needs")
    assert 0 < five < 1.1 * one


def test_processes_work_side_by_side() -> None:
    assert throughput("functional", BY_NAME["sinusoid"], 2, 0.01) > 0
