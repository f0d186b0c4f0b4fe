"""Sweeps: how Hydra runs them, checks of their overrides, and their expansion into single runs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from metarun.config.naming import hashed_slug
from metarun.config.overrides import text_of
from metarun.config.schema import SEVERAL
from metarun.core.errors import one_line

_MOST_JOBS = 10_000


@dataclass(frozen=True)
class SweepMethod:
    """How Hydra chooses and starts the runs of a sweep.

    Attributes:
        launcher: Value of `hydra/launcher`.
        sweeper: Value of `hydra/sweeper`.
        direction: `minimize` or `maximize`; None if the sweeper has no direction.
        processes: Number of processes of each run.
    """

    launcher: str
    sweeper: str
    direction: str | None
    processes: int = 1

    @property
    def searches(self) -> bool:
        """Whether the sweeper chooses runs by the results of earlier ones."""
        return self.sweeper != "basic"

    @property
    def parallel(self) -> bool:
        """Whether runs are executed in other processes, several at a time."""
        return self.launcher != "basic"


def one_of_each(parsed: Sequence[Override], groups: Sequence[str]) -> list[str]:
    """Return the overrides without swept ones, except the first choice of a swept group.

    The chosen groups determine which keys exist; those of each run are checked with it.
    """
    words: list[str] = []
    for override in parsed:
        if not override.is_sweep_override():
            words.append(text_of(override))
        elif override.key_or_group in groups and override.is_choice_sweep():
            first = next(iter(override.sweep_string_iterator()), None)
            words += [] if first is None else [f"{override.key_or_group}={first}"]
    return words


def method_of(hydra: DictConfig) -> SweepMethod:
    """Return the launcher and the sweeper of Hydra's node of a sweep.

    Raises:
        ValueError: A run would have no process, or would have several machines where there is one.
    """
    choices = hydra.runtime.choices
    launcher = str(choices["hydra/launcher"])
    # Only submitit's launchers have these keys.
    numbers = {key: hydra.launcher.get(key, 1) for key in ("nodes", "tasks_per_node")}
    for key, number in numbers.items():
        if number < 1:
            raise ValueError(f"hydra.launcher.{key}={number}: expected 1 or more")
    if launcher == "submitit_local" and numbers["nodes"] > 1:
        raise ValueError(
            f"hydra.launcher.nodes={numbers['nodes']}: expected 1, since hydra/launcher={launcher} "
            "starts all processes on this machine"
        )
    direction = hydra.sweeper.get("direction")
    return SweepMethod(
        launcher,
        str(choices["hydra/sweeper"]),
        None if direction is None else str(getattr(direction, "name", direction)),
        numbers["nodes"] * numbers["tasks_per_node"],
    )


def completed(overrides: Sequence[str], typed: Collection[str]) -> list[str]:
    """Return the overrides of a search, completed with those that it needs.

    Optuna writes its result into the sweep's folder, so each search gets a folder of its own, and
    it would stop at the first failed run without a failure rate.

    Args:
        overrides: Overrides as typed.
        typed: Their keys.
    """
    named_words = sorted(word for word in overrides if not word.startswith("hydra"))
    added = {
        "hydra.sweep.dir": f"outputs/sweeps/{hashed_slug(named_words, 60)}",
        "hydra.sweeper.max_failure_rate": "1.0",
    }
    more = [f"{key}='{value}'" for key, value in added.items() if key not in typed]
    return [*overrides, *more]


def check_swept(parsed: Sequence[Override], groups: Sequence[str], *, searches: bool) -> None:
    """Check the swept overrides; unknown keys and groups are reported with the single runs.

    Raises:
        ValueError: The runs would be identical, infinitely many, or a search for a lucky seed.
    """
    for override in parsed:
        if override.key_or_group == "hydra.sweeper.max_batch_size" and override.value() == 0:
            raise ValueError(f"{text_of(override)}: expected 1 or more, or null")
        if not override.is_sweep_override():
            continue
        key, text = override.key_or_group, text_of(override)
        if key.startswith("sweep."):
            raise ValueError(f"{text}: it belongs to the sweep as a whole: expected one value")
        if searches and key == "seed":
            raise ValueError(
                f"{text}: a search would choose the luckiest seed; search with one seed, then "
                "repeat the best run with seed=0,1,2"
            )
        if not searches and key in SEVERAL:
            raise ValueError(
                f"{text}: these runs would be identical and share a folder; to use several in one "
                f"run, type {key}=[A,B]"
            )
        if not searches and key not in groups and not override.is_discrete_sweep():
            raise ValueError(
                f"{text}: expected a list, range() or glob(); interval() needs hydra/sweeper=optuna"
            )


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
