"""The figures that the bench takes, and how they are written down. No torch is imported here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metarun.bench.workloads import Variant, Workload


@dataclass(frozen=True)
class Times:
    """Of one side.

    Attributes:
        first: Seconds of the first step, with whatever is compiled or loaded in it.
        steps: Mean seconds of a step in each round.
    """

    first: float
    steps: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.steps)


@dataclass(frozen=True)
class Entry:
    """The figures of one side.

    Attributes:
        name: `metarun`, or a rival's.
        times: Of a step.
        memory: MiB at the peak of a step beside what is there before; None where not measured.
        difference: From ours; see `exact.differences`. None where there is none to take.
    """

    name: str
    times: Times
    memory: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is: of medians, and the quartiles of the rounds' ratios."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A workload, a variant of ours, and its rivals, timed in the same rounds.

    Attributes:
        workload: What was done.
        variant: How ours did it.
        engine: How its tasks ran in the end.
        operations: Floating-point operations of the plain loop's step; None where not counted.
        peak: Operations a second of the machine's products; None where not measured.
        ours: Our figures.
        baselines: Theirs.
    """

    workload: Workload
    variant: Variant
    engine: str
    operations: int | None
    peak: float | None
    ours: Entry
    baselines: tuple[Entry, ...]

    @property
    def label(self) -> str:
        """Of our line: how tasks ran, and what of the variant is no default."""
        words = [self.variant.name] if self.variant.name else []
        if self.engine and self.variant.engine == "auto":
            words.insert(0, self.engine)
        return f"metarun ({', '.join(words)})" if words else "metarun"

    def ratio(self, baseline: Entry) -> Ratio:
        """How many times faster ours is than a rival."""
        pairs = zip(baseline.times.steps, self.ours.times.steps, strict=True)
        low, high = quartiles([theirs / ours for theirs, ours in pairs])
        return Ratio(baseline.times.median / self.ours.times.median, low, high)

    def share(self, entry: Entry) -> float | None:
        """Of the machine's peak that a side's step would use if it were the plain loop's."""
        if self.operations is None or self.peak is None:
            return None
        return self.operations / entry.times.median / self.peak


@dataclass(frozen=True)
class Point:
    """A size of a growth curve.

    Attributes:
        size: Tasks, shots, …
        milliseconds: Of a step; None of processes.
        memory: MiB of a step; None where not measured.
        tasks_per_second: Of all processes together, or of the one.
    """

    size: int
    milliseconds: float | None
    memory: float | None
    tasks_per_second: float


@dataclass(frozen=True)
class Curve:
    """How a side's figures grow with one size of a workload."""

    workload: str
    size: str
    side: str
    points: tuple[Point, ...]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half lies."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def record(
    machine: dict[str, Any],
    peaks: dict[str, float],
    results: Sequence[Result],
    curves: Sequence[Curve],
    **others: Any,
) -> dict[str, Any]:
    """All of it, for a JSON file."""
    return {
        "machine": machine,
        "peak_gflops": {name: value / 1e9 for name, value in peaks.items()},
        "results": [_result(result) for result in results],
        "growth": [asdict(curve) for curve in curves],
        **others,
    }


def _result(result: Result) -> dict[str, Any]:
    baselines = []
    for baseline in result.baselines:
        ratio = result.ratio(baseline)
        baselines.append(
            {
                **_entry(result, baseline),
                "difference": baseline.difference,
                "ratio": ratio.value,
                "ratio_quartiles": [ratio.low, ratio.high],
            }
        )
    return {
        "workload": asdict(result.workload),
        "variant": asdict(result.variant),
        "engine": result.engine,
        "gflop": None if result.operations is None else result.operations / 1e9,
        "metarun": _entry(result, result.ours),
        "rivals": baselines,
    }


def _entry(result: Result, entry: Entry) -> dict[str, Any]:
    steps = [1e3 * seconds for seconds in entry.times.steps]
    return {
        "name": entry.name,
        "milliseconds": 1e3 * entry.times.median,
        "milliseconds_quartiles": list(quartiles(steps)),
        "rounds": len(steps),
        "first_milliseconds": 1e3 * entry.times.first,
        "share_of_peak": result.share(entry),
        "memory_mib": entry.memory,
    }
