"""What finished runs have reached, read from their folders.

Shapes: N episodes, P points of the adaptation curve, K steps or presentations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from metarun.core.statistics import Floats, interval
from metarun.evaluation import continual_metrics
from metarun.reporting.tables import Figure
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.core.types import Stream

UNTRAINED = "untrained.json"
"""What a run's learner reaches before any training, on the same test episodes."""

EXTRA_METRICS = {"log_likelihood": "log-likelihood", "coverage": "within the 95 % band, %"}
"""What a record has beside the metric, and what it is called in a table."""


@dataclass(frozen=True)
class Result:
    """What one finished run has reached.

    Attributes:
        record: Its `results.json`.
        episodes: (N,) the metric of each test episode.
        curve: (P, N) the same after 0 … P - 1 inner steps; None where it was not taken.
        presentations: (N, K) the same at each presentation of a class; None where there are none.
        untrained: The mean with the initial parameters; None where it was not measured.
        extra: (N,) each of `EXTRA_METRICS` that it has.
        figures: On a stream, (N,) each of `continual.summary`.
        losses: On a stream, (N, K) the loss of each step before it was learned.
        stream: Its layout.
    """

    record: Mapping[str, Any]
    episodes: Floats
    untrained: float | None
    curve: Floats | None = None
    presentations: Floats | None = None
    extra: Mapping[str, Floats] = field(default_factory=dict)
    figures: Mapping[str, Floats] = field(default_factory=dict)
    losses: Floats | None = None
    stream: Stream | None = None


def read_result(run: RunFolder) -> Result | None:
    """The result of a run; None while it has none.

    Raises:
        ValueError: A file of the run is damaged.
    """
    if not run.has("results.json") or run.status().get("state") != "finished":
        return None
    record = run.read_results()
    prefix = continual_metrics.FIGURE
    wanted = (record["metric"], "curve", "presentations", "incoming_loss", *EXTRA_METRICS)
    with np.load(run.path / "episodes.npz") as file:
        # What else there is of a stream is large, and read by its figures alone.
        names = [name for name in file if name in wanted or name.startswith(prefix)]
        arrays = {name: np.asarray(file[name], dtype=np.float64) for name in names}
    untrained = run.read_json(UNTRAINED)["mean"] if run.has(UNTRAINED) else None
    return Result(
        record,
        arrays[record["metric"]],
        untrained,
        arrays.get("curve"),
        arrays.get("presentations"),
        {name: arrays[name] for name in EXTRA_METRICS if name in arrays},
        {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)},
        arrays.get("incoming_loss"),
        _layout(record),
    )


def _layout(record: Mapping[str, Any]) -> Stream | None:
    """The layout of the stream that a run is on; torch is loaded for streams alone."""
    if "layout" not in record:
        return None
    from metarun.core.types import Stream

    return Stream.of(record["layout"])


def figure_of(
    results: Sequence[Result], inner_steps: int | None = None, presentation: int | None = None
) -> Figure:
    """What runs that differ in their seed have reached; an accuracy in percent.

    Args:
        results: One for each seed, on the same episodes.
        inner_steps: A point of the adaptation curve; None takes the reported figure.
        presentation: That of a class, from 1; None takes the reported figure.

    Raises:
        LookupError: A run has no such point.
    """
    values = [_values(result, inner_steps, presentation) for result in results]
    return over_seeds(values, _places(results))


def paired(better: Sequence[Result], worse: Sequence[Result]) -> Figure:
    """The mean difference of two methods on the same episodes, with its interval.

    The interval of paired differences leaves out zero where a paired t-test at the 5 % level
    tells the methods apart. Over several seeds each episode is averaged first.
    """
    one, other = (
        np.mean([_values(result) for result in results], axis=0) for results in (better, worse)
    )
    mean, ci95 = interval(one - other)
    return Figure(mean, ci95, len(one), places=_places(better))


def _places(results: Sequence[Result]) -> int | None:
    """Digits behind the point of a `Figure`: one of an accuracy in percent."""
    return 1 if results[0].record["metric"] == "accuracy" else None


def _values(
    result: Result, inner_steps: int | None = None, presentation: int | None = None
) -> Floats:
    """(N,) figures of the episodes in the unit in which they are shown."""
    values = result.episodes
    if presentation is not None:
        if result.presentations is None or presentation > result.presentations.shape[1]:
            raise LookupError(f"not measured at presentation {presentation}: shot")
        values = result.presentations[:, presentation - 1]
    if inner_steps is not None:
        if result.curve is None or inner_steps >= len(result.curve):
            raise LookupError(f"not measured after {inner_steps} steps: eval.curve_steps")
        values = result.curve[inner_steps]
    return 100.0 * values if result.record["metric"] == "accuracy" else values


def over_seeds(values: Sequence[Floats], places: int | None = None) -> Figure:
    """Arrays (N,) of the same lifetimes, one for each seed, as a figure."""
    mean, ci95 = interval(np.mean(values, axis=0))
    over_seeds = interval([v.mean() for v in values])[1] if len(values) > 1 else None
    return Figure(mean, ci95, len(values[0]), len(values), over_seeds, places)
