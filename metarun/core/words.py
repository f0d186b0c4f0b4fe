"""Counts and lists in words."""

from __future__ import annotations

from collections.abc import Sequence


def number_of(count: int, what: str) -> str:
    """Return a count with its noun, such as `1 line` and `2 lines`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first names, and how many more there are: `a, b, c and 1,204 more`."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
