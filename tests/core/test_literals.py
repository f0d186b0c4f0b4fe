"""Tests of stored YAML: it is read as OmegaConf reads it, and holds plain values."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from metarun.core.literals import find_interpolation, read_literals

TEXTS = ["a: 1e-3\nb: [1, null, true, x, '1', 2020-01-01, .inf]\nc: {d: 0x10, e: 1_000, f: on}\n",
         "[]\n", "- a=1\n- 'b: 2'\n", "x: {1: a, 2.5: b}\n", "a: ???\n"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_those_that_omegaconf_reads(text: str) -> None:
    assert read_literals(text) == OmegaConf.to_container(OmegaConf.create(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "it has an alias"),
        ("a: !!python/object/apply:pathlib.Path [x]\n", "Path: expected plain values"),
        ("a: !!binary aGk=\n", "bytes: expected plain values"),
        ("a: !!set {x}\n", "set: expected plain values"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        read_literals(text)


def test_an_interpolation_is_found_anywhere() -> None:
    assert find_interpolation({"a": [1, {"b": "x${c}"}]}) == "x${c}"
    assert find_interpolation({"${a}": 1}) == "${a}"
    assert find_interpolation({"a": "$x {y}", "b": [None, 1.5]}) is None
