"""Tests of folder names: equal for runs with equal results, different for all others."""

from __future__ import annotations

from pathlib import Path
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


def test_the_order_of_the_words_is_not_part_of_a_name(tmp_path: Path) -> None:
    name = job_name(["seed=1", "algo=maml"], PLAIN, tmp_path)
    words = ["algo=maml", "threads=2", "hydra/launcher=joblib", "seed=1", "train.max_minutes=9"]
    assert name == job_name(words, PLAIN, tmp_path)
    assert name == f"algo=maml_seed=1-{digest(PLAIN)}"


def test_a_run_without_words_is_named_after_its_parts(tmp_path: Path) -> None:
    assert job_name(["device=cpu"], PLAIN, tmp_path) == f"maml_sinusoid-{digest(PLAIN)}"


LONG = [f"algo.option_{number}=some_value" for number in range(9)]


def test_a_name_is_short(tmp_path: Path) -> None:
    name = job_name(LONG, PLAIN, tmp_path)
    assert name == f"{slug(LONG, 60)}-{digest(PLAIN)}"
    assert len(name) == 69


def test_a_run_with_the_longer_name_of_earlier_versions_is_found(tmp_path: Path) -> None:
    earlier = f"{slug(LONG, 160)}-{digest(PLAIN)}"
    (tmp_path / earlier).mkdir()
    assert job_name(LONG[::-1], PLAIN, tmp_path) == earlier
    assert job_name(LONG, {**PLAIN, "seed": 2}, tmp_path) != earlier


def test_experiments_that_compute_the_same_have_runs_of_their_own(tmp_path: Path) -> None:
    long = "experiment=" + "x" * 70
    names = {job_name([*LONG, f"{long}{end}"], PLAIN, tmp_path) for end in "ab"}
    assert names == {f"{long}{end}-{digest(PLAIN)}" for end in "ab"}


def test_a_name_has_no_character_that_a_file_system_minds() -> None:
    assert slug(["data.root='/a b/c'", "algo.x=[1,2]"], 80) == "data.root=_a_b_c_algo.x=_1_2"
    assert len(slug(["x" * 500], 80)) == 80


def test_a_newer_key_at_its_default_leaves_the_names_of_earlier_runs() -> None:
    before = {**PLAIN, "eval": {"episodes": 600}}
    added = {"temperature": "none", "measures": []}
    assert digest({**before, "eval": {**before["eval"], **added}}) == digest(before)
    for change in ({"temperature": "val"}, {"measures": ["my.own"]}):
        assert digest({**before, "eval": {**before["eval"], **added, **change}}) != digest(before)
