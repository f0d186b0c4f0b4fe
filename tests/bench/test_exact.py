from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from metarun.bench import baselines
from metarun.bench.exact import differences
from metarun.bench.workloads import Variant
from tests.bench.tiny import BY_NAME, TINY

CPU = torch.device("cpu")
# Tracing takes longer than a step of these sizes; other tests show that replays are exact.
PLAIN = Variant(graph="none")
COMPARED = [workload for workload in TINY if workload.method != "sampling"]


@pytest.mark.parametrize("workload", COMPARED, ids=lambda workload: workload.name)
def test_our_gradients_are_those_of_every_rival(workload: Any) -> None:
    names = baselines.baselines_of(workload)
    assert names
    found = differences(workload, PLAIN, names, CPU)
    assert list(found) == names
    assert max(found.values()) < 1e-10


@pytest.mark.parametrize("engine", ["vmap", "loop", "threads"])
def test_they_are_with_every_engine(engine: str) -> None:
    found = differences(BY_NAME["mini"], Variant(engine, graph="none"), ["functional"], CPU)
    assert found["functional"] < 1e-10


def test_another_inner_rate_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(net: Any, workload: Any, batch: Any) -> None:
        baselines.functional_backward(net, replace(workload, inner_lr=0.2), batch)

    monkeypatch.setitem(baselines.BACKWARD["maml"], "functional", other)
    found = differences(BY_NAME["conv4-1"], PLAIN, ["functional"], CPU)
    assert found["functional"] > 1e-3


def test_second_order_shows_against_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(net: Any, workload: Any, batch: Any) -> None:
        baselines.functional_backward(net, replace(workload, first_order=False), batch)

    monkeypatch.setitem(baselines.BACKWARD["maml"], "functional", other)
    found = differences(BY_NAME["mini-first"], PLAIN, ["functional"], CPU)
    assert found["functional"] > 1e-3


def test_a_mixed_variant_is_close_and_not_exact() -> None:
    found = differences(
        BY_NAME["sinusoid"], Variant(precision="mixed", graph="none"), ["functional"], CPU
    )
    assert 1e-6 < found["functional"] < 0.1


def test_evaluations_reach_the_same_accuracy() -> None:
    from metarun.bench.implementations import our_step

    workload = replace(BY_NAME["evaluation"], tasks=30)
    step, _ = our_step(workload, PLAIN, CPU)
    ours: Any = step()
    theirs = baselines.baseline_step("functional", workload, CPU)()
    assert ours.values.mean() == pytest.approx(theirs, abs=1e-6)


def test_a_rival_that_cannot_be_imported_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(baselines._MODULES, "higher", "no_such_module")
    baselines._imported.cache_clear()
    try:
        assert "higher" not in baselines.baselines_of(BY_NAME["sinusoid"])
        assert "no_such_module" in str(baselines.why_missing("higher"))
    finally:
        baselines._imported.cache_clear()
