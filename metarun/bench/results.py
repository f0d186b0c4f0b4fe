"""Results of the bench, and their JSON form. This module does not import torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metarun.bench.workloads import Variant, Workload


@dataclass(frozen=True)
class Times:
    """Times of one implementation.

    Attributes:
        first: Seconds of the first step, including compilation and imports.
        steps: Mean seconds of a step in each round.
    """

    first: float
    steps: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a step over rounds."""
        return statistics.median(self.steps)


@dataclass(frozen=True)
class Entry:
    """Measurements of one implementation.

    Attributes:
        name: `metarun`, or the name of a baseline.
        times: Times of a step.
        memory: Peak memory of a step in MiB, beyond that in use before; None if not measured.
        difference: Difference from ours, see `exact.differences`; None if there is none.
    """

    name: str
    times: Times
    memory: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Ratio:
    """Speed of ours relative to a baseline: ratio of medians, quartiles of the rounds' ratios."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """A workload with a variant of ours and its baselines, timed in the same rounds.

    Attributes:
        workload: Workload that was timed.
        variant: Variant of our implementation.
        engine: Name of the resolved engine.
        operations: Floating-point operations of a step of the plain loop; None if not counted.
        peak: Operations per second of the machine's matrix products; None if not measured.
        ours: Measurements of our implementation.
        baselines: Measurements of the baselines.
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
        """Label of our line: the resolved engine, and the options that are not defaults."""
        words = [self.variant.name] if self.variant.name else []
        if self.engine and self.variant.engine == "auto":
            words.insert(0, self.engine)
        return f"metarun ({', '.join(words)})" if words else "metarun"

    def ratio(self, baseline: Entry) -> Ratio:
        """Return how many times faster ours is than a baseline."""
        pairs = zip(baseline.times.steps, self.ours.times.steps, strict=True)
        low, high = quartiles([theirs / ours for theirs, ours in pairs])
        return Ratio(baseline.times.median / self.ours.times.median, low, high)

    def share(self, entry: Entry) -> float | None:
        """Return the share of the machine's peak, with the operations of the plain loop."""
        if self.operations is None or self.peak is None:
            return None
        return self.operations / entry.times.median / self.peak


@dataclass(frozen=True)
class Point:
    """A point of a growth curve.

    Attributes:
        size: Value of the size: number of tasks, shots, …
        milliseconds: Time of a step; None for processes.
        memory: Memory of a step in MiB; None if not measured.
        tasks_per_second: Tasks per second of all processes together.
    """

    size: int
    milliseconds: float | None
    memory: float | None
    tasks_per_second: float


@dataclass(frozen=True)
class Curve:
    """Growth of an implementation's time and memory with one size of a workload."""

    workload: str
    size: str
    side: str
    points: tuple[Point, ...]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile."""
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
    """Return all measurements as plain data for a JSON file."""
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
        "baselines": baselines,
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
