"""Tests of the checks of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from metarun.core.checks import at_least, pair, positive, within


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: positive("algo", lr=0.1, scale=0), "algo.scale=0: expected a positive number"),
        (lambda: positive("", lr=-1.0), "lr=-1.0: expected a positive number"),
        (lambda: positive("algo", lr=math.inf), "algo.lr=inf: expected a positive number"),
        (lambda: positive("algo", lr=math.nan), "algo.lr=nan: expected a positive number"),
        (
            lambda: positive("algo", null="or null", clip=0.0),
            "algo.clip=0.0: expected a positive number, or null",
        ),
        (lambda: at_least("data", 2, tasks=1), "data.tasks=1: expected 2 or more"),
        (lambda: at_least("data", 0, noise=math.nan), "data.noise=nan: expected 0 or more"),
        (
            lambda: at_least("algo", 1, null="or null for all rows", batch=0),
            "algo.batch=0: expected 1 or more, or null for all rows",
        ),
        (lambda: within("algo", "[0, 1]", rate=1.5), "algo.rate=1.5: expected 0 to 1"),
        (lambda: within("data", "[8, 512]", side=7), "data.side=7: expected 8 to 512"),
        (lambda: within("a", "[0, 1)", rate=1.0), "a.rate=1.0: expected a number in [0, 1)"),
        (lambda: within("a", "(0, 1]", rate=0.0), "a.rate=0.0: expected a number in (0, 1]"),
        (lambda: within("a", "(0, 1)", rate=math.nan), "a.rate=nan: expected a number in (0, 1)"),
        (lambda: pair("x", [3, 1]), "x=[3,1]: expected two numbers, the smaller one first"),
        (lambda: pair("x", [1.5]), "x=[1.5]: expected two numbers, the smaller one first"),
        (
            lambda: pair("x", [0, math.inf]),
            "x=[0,inf]: expected two numbers, the smaller one first",
        ),
        (
            lambda: pair("x", [0, 4], 1),
            "x=[0,4]: expected two numbers from 1 on, the smaller one first",
        ),
    ],
)
def test_a_number_that_is_not_allowed_is_named_with_what_is(
    check: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check()
    assert str(caught.value) == message


def test_what_is_allowed_passes_and_so_does_null() -> None:
    positive("algo", lr=1e-9, steps=3, clip=None)
    at_least("algo", 0, steps=0, memory=None)
    within("algo", "[0, 1]", low=0.0, high=1.0)
    within("algo", "(0, 1)", inside=0.5, nothing=None)
    assert pair("x", [2, 2], 2) == (2, 2)
    assert pair("x", (-5.0, 5.0)) == (-5.0, 5.0)
