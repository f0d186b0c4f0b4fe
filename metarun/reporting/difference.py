"""What differs between two runs: settings, versions, data, and the metric on the same episodes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.config.schema import Config
from metarun.core.nested import flat
from metarun.core.types import Record
from metarun.reporting.results import Result, figure_of, paired, read_result
from metarun.reporting.tables import Figure, Line, Table
from metarun.runs.folder import RunFolder

A, B = "A", "B"
"""Names of the two runs in all tables."""

_NOT_COMPARED = ("sweep", "published", "command", "resumed")
"""Entries of a configuration and of `environment.json` without influence on a run."""


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Attributes:
        path: Folder of the run.
        config: Its stored configuration.
        environment: Its versions, machine, code and data; empty if they were not recorded.
        state: Its state.
        result: Its result; None until it is finished.
    """

    path: Path
    config: Config
    environment: Record
    state: str
    result: Result | None

    @classmethod
    def read(cls, name: str) -> Side:
        """Read a run by its path or another name.

        Raises:
            ValueError: There is no such run, or it is damaged.
        """
        run = RunFolder.open(name)
        state = str(run.status().get("state"))
        return cls(run.path, run.configuration(), run.environment(), state, read_result(run))


def tables(one: Side, other: Side) -> list[Table]:
    """Return the tables of what differs; the second says which run is better, if any is."""
    runs: list[Line] = [
        {"run": name, "folder": str(side.path), "state": side.state}
        for name, side in ((A, one), (B, other))
    ]
    differing = {
        "settings": _differing(one.config, other.config),
        "versions, machine and data": _differing(one.environment, other.environment),
    }
    equal = " ".join(f"The {what} are the same." for what, lines in differing.items() if not lines)
    return [
        Table("runs", runs, equal[:1].upper() + equal[1:]),
        _measured(one.result, other.result),
        *(Table(f"{what} that differ", lines) for what, lines in differing.items() if lines),
    ]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Line]:
    """Return a line for each leaf that differs; a dash stands for a key that is not there."""
    here, there = (
        flat({key: value for key, value in side.items() if key not in _NOT_COMPARED})
        for side in (one, other)
    )
    lines: list[Line] = []
    for key in {**here, **there}:
        texts = [_text(side.get(key, "–")) for side in (here, there)]
        if texts[0] != texts[1]:
            if key.endswith("_target_"):
                classes = [text.rpartition(".")[2] for text in texts]
                # The names of modules are long, and two classes seldom differ in theirs alone.
                texts = classes if classes[0] != classes[1] else texts
            lines.append({"key": key, A: texts[0], B: texts[1]})
    return lines


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _measured(one: Result | None, other: Result | None) -> Table:
    """Return the figures of both runs and, on the same episodes, their paired difference."""
    if one is None or other is None:
        missing = [name for name, result in ((A, one), (B, other)) if result is None]
        lines: list[Line] = [{"run": name, "meta-test": "no result yet"} for name in missing]
        return Table("meta-test", lines)
    here, there = one.record, other.record
    line: dict[str, str | Figure] = {A: figure_of([one]), B: figure_of([other])}
    unit = ", %" if here["metric"] == "accuracy" else ""
    title = f"meta-test: {here['metric']}{unit}"
    if here["metric"] != there["metric"]:
        return Table("meta-test", [line], f"A has the {here['metric']}, B the {there['metric']}.")
    if here["episodes_hash"] != there["episodes_hash"] or len(one.episodes) != len(other.episodes):
        return Table(title, [line], f"The test episodes are not the same. {_UNPAIRED}")
    difference = paired([one], [other])
    line |= {"A - B": difference, "episodes": str(difference.episodes)}
    verdict = _verdict(difference, here["metric"])
    return Table(title, [line], f"The test episodes are the same. {verdict}")


_UNPAIRED = (
    "Neither run is shown to be better: to compare them, meta-test one in the setting of the other "
    "(metarun test=RUN)."
)


def _verdict(difference: Figure, metric: str) -> str:
    """Return the sentence that says which run is better, or that none is shown to be."""
    if not math.isfinite(difference.mean):
        return "A run diverged: the difference is not finite."
    if difference.meets(Figure(0.0)):
        return (
            "Neither run is shown to be better: the 95 % interval of the paired difference, "
            f"{difference}, contains zero."
        )
    better = A if (difference.mean > 0) == (metric == "accuracy") else B
    return (
        f"{better} is better on these episodes: the 95 % interval of the paired difference, "
        f"{difference}, leaves out zero. It says nothing of other training seeds."
    )
