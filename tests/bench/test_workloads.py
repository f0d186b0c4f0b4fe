from __future__ import annotations

from typing import get_args

import pytest

from metarun.bench.workloads import BASELINES, WORKLOADS, Variant, grown, grows, select, variants
from metarun.execution.engine import Kind
from tests.bench.tiny import BY_NAME

WORDS = {
    "engine": ["auto"],
    "precision": ["float32"],
    "graph": ["replay"],
    "memory": ["plain"],
}


def test_without_words_the_slow_workloads_are_left_out() -> None:
    assert select([]) == [workload for workload in WORKLOADS if not workload.slow]


def test_a_pattern_takes_the_slow_ones_too_in_the_catalogues_order() -> None:
    names = [workload.name for workload in select(["mini*", "sinusoid"])]
    assert names == ["sinusoid", "mini", "mini-first"]


def test_every_workload_has_somebody_to_beat() -> None:
    for workload in WORKLOADS:
        assert any(workload.method in methods for methods in BASELINES.values())


def test_variants_are_all_combinations_of_the_words() -> None:
    made = variants(WORDS | {"engine": ["vmap", "loop"], "graph": ["replay", "none"]})
    assert [variant.name for variant in made] == ["vmap", "vmap, none", "loop", "loop, none"]


def test_the_engines_words_are_the_engines_own() -> None:
    for word in get_args(Kind):
        (variant,) = variants(WORDS | {"engine": [word], "graph": ["none"]})
        assert variant.engine_options == {"kind": word, "graph": "none"}
    with pytest.raises(ValueError, match="--engine vmpa: did you mean vmap"):
        variants(WORDS | {"engine": ["vmpa"]})


def test_lean_is_one_task_at_a_time() -> None:
    (variant,) = variants(WORDS | {"memory": ["lean"]})
    assert variant.name == "lean"
    assert variant.engine_options == {"kind": "auto", "graph": "replay", "tasks_per_chunk": 1}


def test_a_size_grows_alone() -> None:
    workload = BY_NAME["conv4-1"]
    larger = grown(workload, "shots", 7)
    assert larger.shot == 7
    assert grown(larger, "shots", workload.shot) == workload


def test_inner_steps_mean_nothing_where_nothing_adapts() -> None:
    assert grows(BY_NAME["sinusoid"], "steps")
    assert not grows(BY_NAME["protonet"], "steps")
    assert not grows(BY_NAME["sinusoid"], "image")


def test_the_default_variant_has_no_name() -> None:
    assert Variant().name == ""
