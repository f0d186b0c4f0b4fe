"""Checks of numbers that a user sets. A message names the key, the value and what is expected.

Not a number and infinity are refused everywhere. None is not checked, since types decide where a
key may be null.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(group: str, *, null: str = "", **values: float | None) -> None:
    """Check that numbers are greater than 0.

    Args:
        group: Key above the numbers, such as `algo`; empty for keys at the root.
        null: For the message, where null is allowed: `or null`, with its meaning.
        **values: The numbers by key.

    Raises:
        ValueError: A number is not.
    """
    _check(group, values, lambda value: value > 0, "a positive number", null)


def at_least(group: str, least: float, *, null: str = "", **values: float | None) -> None:
    """Check that numbers are `least` or more; see `positive`."""
    _check(group, values, lambda value: value >= least, f"{least} or more", null)


def within(group: str, interval: str, **values: float | None) -> None:
    """Check that numbers are in an interval, such as `[0, 1)`; see `positive`."""
    low, high = map(float, interval[1:-1].split(","))
    closed = interval[0] == "[", interval[-1] == "]"

    def inside(value: float) -> bool:
        above = low <= value if closed[0] else low < value
        return above and (value <= high if closed[1] else value < high)

    expected = f"{low:g} to {high:g}" if all(closed) else f"a number in {interval}"
    _check(group, values, inside, expected)


def pair(key: str, values: Sequence[Number], least: float = -math.inf) -> tuple[Number, Number]:
    """Return two numbers, the smaller one first and at least `least`.

    Raises:
        ValueError: They are not such a pair.
    """
    if len(values) == 2 and all(map(math.isfinite, values)) and least <= values[0] <= values[1]:
        return values[0], values[1]
    bound = "" if least == -math.inf else f" from {least:g} on"
    shown = ",".join(f"{value:g}" for value in values)
    raise ValueError(f"{key}=[{shown}]: expected two numbers{bound}, the smaller one first")


def _check(
    group: str,
    values: dict[str, float | None],
    holds: Callable[[float], bool],
    expected: str,
    null: str = "",
) -> None:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and holds(value)):
            key = f"{group}.{name}" if group else name
            raise ValueError(f"{key}={value}: expected {expected}{null and f', {null}'}")
