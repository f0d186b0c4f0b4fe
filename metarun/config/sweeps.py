"""Expansion of the overrides of a sweep into single runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from metarun.config.overrides import text_of
from metarun.core.errors import one_line

_MOST_JOBS = 10_000


@dataclass(frozen=True)
class SweepMethod:
    """How Hydra chooses and starts the runs of a sweep.

    Attributes:
        launcher: Value of `hydra/launcher`.
        sweeper: Value of `hydra/sweeper`.
        direction: `minimize` or `maximize`; None if the sweeper has no direction.
    """

    launcher: str
    sweeper: str
    direction: str | None

    @property
    def searches(self) -> bool:
        """Whether the sweeper chooses runs by the results of earlier ones."""
        return self.sweeper != "basic"

    @property
    def parallel(self) -> bool:
        """Whether runs are executed in other processes, several at a time."""
        return self.launcher != "basic"


def _choices(parsed: Sequence[Override]) -> dict[str, list[str]]:
    """Return all overrides of each key; for an interval, its two ends."""
    choices: dict[str, list[str]] = {}
    for override in parsed:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [text_of(override)]
            continue
        try:
            value = override.value()
            if isinstance(value, IntervalSweep):
                texts: Iterator[Any] = iter((value.start, value.end))
            else:
                texts = itertools.islice(override.sweep_string_iterator(), _MOST_JOBS + 1)
            choices[key] = [f"{key}={text}" for text in texts]
        except (HydraException, ValueError, ArithmeticError) as error:
            raise ValueError(f"{override.input_line}: {one_line(error)}") from error
        if not choices[key]:
            raise ValueError(
                f"{override.input_line} selects nothing: `metarun list` shows the names"
            )
    return choices


def corners(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """Return few jobs that together use every listed value, changing one key at a time."""
    choices = _choices(parsed)
    first = {key: words[0] for key, words in choices.items()}
    changed = [{**first, key: word} for key, words in choices.items() for word in words[1:]]
    return [tuple(words.values()) for words in (first, *changed)]


def product(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """Return the overrides of every job, in the order of Hydra's basic sweeper.

    Raises:
        ValueError: There are more than `_MOST_JOBS` jobs.
    """
    choices = _choices(parsed)
    count = 1
    for values in choices.values():
        count *= len(values)
    if count > _MOST_JOBS:
        raise ValueError(f"the sweep has more than {_MOST_JOBS} runs: list fewer values")
    return list(itertools.product(*choices.values()))
