"""The runs that the words of a sweep select."""

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
    """How Hydra goes through a sweep.

    Attributes:
        launcher: The word for `hydra/launcher`.
        sweeper: The word for `hydra/sweeper`.
        direction: `minimize` or `maximize`, where the sweeper has one.
    """

    launcher: str
    sweeper: str
    direction: str | None

    @property
    def searches(self) -> bool:
        """Whether the sweeper chooses runs by the results of others."""
        return self.sweeper != "basic"

    @property
    def parallel(self) -> bool:
        """Whether runs happen in other processes, several at a time."""
        return self.launcher != "basic"


def _choices(parsed: Sequence[Override]) -> dict[str, list[str]]:
    """The words that each key is set to; of an interval its ends."""
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
            raise ValueError(f"{override.input_line} selects nothing: `metarun list` shows names")
    return choices


def corners(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """Few jobs that together meet every word: one key changes at a time."""
    choices = _choices(parsed)
    first = {key: words[0] for key, words in choices.items()}
    changed = [{**first, key: word} for key, words in choices.items() for word in words[1:]]
    return [tuple(words.values()) for words in (first, *changed)]


def product(parsed: Sequence[Override]) -> list[tuple[str, ...]]:
    """The words of every job, in the order of Hydra's basic sweeper."""
    choices = _choices(parsed)
    count = 1
    for values in choices.values():
        count *= len(values)
    if count > _MOST_JOBS:
        raise ValueError(f"the sweep asks for more than {_MOST_JOBS} runs: make it smaller")
    return list(itertools.product(*choices.values()))
