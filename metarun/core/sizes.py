"""Sizes that a user types as one number, such as `way=5`, or as a range, such as `way=5..50`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Count = int | str
"""A number, or a range as text."""

SizeRule = Literal["meta_dataset"]
"""A rule that draws the sizes of tasks: that of Triantafillou et al. (2020)."""

_RANGE = re.compile(r"\s*(\d{1,10})\s*\.\.\s*(\d{1,10})\s*")


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from `low` to `high`, both included.

    A single number is a range whose ends are equal.
    """

    low: int
    high: int

    @classmethod
    def of(cls, key: str, value: Count) -> Range:
        """Return the range of a typed value.

        Args:
            key: Name of the setting, for messages.
            value: A number, or two as `low..high`.

        Raises:
            ValueError: The text is no range, or it is backwards.
        """
        if isinstance(value, int):
            return cls(value, value)
        found = _RANGE.fullmatch(value)
        if found is None:
            raise ValueError(f"{key}={value}: expected a whole number, or a range such as 5..50")
        low, high = map(int, found.groups())
        if low > high:
            raise ValueError(f"{key}={value} is an empty range: expected {high}..{low}")
        return cls(low, high)

    @property
    def varies(self) -> bool:
        """Whether there is more than one number in it."""
        return self.low < self.high

    @property
    def typed(self) -> Count:
        """The value as a user types it."""
        return f"{self.low}..{self.high}" if self.varies else self.low

    def clipped(self, greatest: int) -> Range:
        """Return the range without the numbers above `greatest`, which remains itself."""
        return Range(min(self.low, greatest), min(self.high, greatest))

    def __str__(self) -> str:
        return str(self.typed)


def varies(value: Count) -> bool:
    """Return whether a typed value is a range of several numbers."""
    return isinstance(value, str) and Range.of("", value).varies


def least(value: Count) -> int:
    """Return the smallest number of a typed value."""
    return Range.of("", value).low


def most(value: Count) -> int:
    """Return the greatest number of a typed value."""
    return Range.of("", value).high


def chance(value: Count) -> float:
    """Return the expected accuracy of guessing among a typed number of classes."""
    own = Range.of("", value)
    return sum(1.0 / way for way in range(own.low, own.high + 1)) / (own.high - own.low + 1)


def size_text(config: Mapping[str, Any]) -> str:
    """Return the size of the tasks of a classification in words, such as `5-way 1-shot`.

    Args:
        config: A configuration or results: `way`, `shot`, and `sizes` if a rule draws them.
    """
    if config.get("sizes") == "meta_dataset":
        return "Meta-Dataset's ways and shots"
    return f"{config['way']}-way {config['shot']}-shot"
