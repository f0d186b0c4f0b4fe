"""Tests of folder names: equal for runs with equal results, different for all others."""

from __future__ import annotations

from typing import Any

import pytest

from metarun.config.naming import digest, job_name, slug

PLAIN: dict[str, Any] = {
    "seed": 1,
    "device": "cpu",
    "threads": None,
    "published": None,
    "train": {"steps": 5},
    "names": {"algo": "maml", "data": "sinusoid", "backbone": "mlp"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda"},
        {"threads": 2},
        {"published": {"paper": "Finn"}},
        {"sweep": {"fail_fast": True}},
        {"names": {**PLAIN["names"], "experiment": "finn2017"}},
    ],
    ids=str,
)
def test_how_a_run_is_run_is_not_part_of_its_hash(change: dict[str, Any]) -> None:
    assert digest({**PLAIN, **change}) == digest(PLAIN)


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"train": {"steps": 6}}, {"names": {**PLAIN["names"], "algo": "anil"}}]
)
def test_what_a_run_computes_is(change: dict[str, Any]) -> None:
    assert digest({**PLAIN, **change}) != digest(PLAIN)


def test_the_order_of_the_words_is_not_part_of_a_name() -> None:
    name = job_name(["seed=1", "algo=maml"], PLAIN)
    assert name == job_name(["algo=maml", "threads=2", "hydra/launcher=joblib", "seed=1"], PLAIN)
    assert name == f"algo=maml_seed=1-{digest(PLAIN)}"


def test_a_run_without_words_is_named_after_its_parts() -> None:
    assert job_name(["device=cpu"], PLAIN) == f"maml_sinusoid-{digest(PLAIN)}"


def test_a_name_has_no_character_that_a_file_system_minds() -> None:
    assert slug(["data.root='/a b/c'", "algo.x=[1,2]"], 80) == "data.root=_a_b_c_algo.x=_1_2"
    assert len(slug(["x" * 500], 80)) == 80


def test_a_newer_key_at_its_default_leaves_the_names_of_earlier_runs() -> None:
    before = {**PLAIN, "eval": {"episodes": 600}}
    added = {"temperature": "none", "measures": []}
    assert digest({**before, "eval": {**before["eval"], **added}}) == digest(before)
    for change in ({"temperature": "val"}, {"measures": ["my.own"]}):
        assert digest({**before, "eval": {**before["eval"], **added, **change}}) != digest(before)
