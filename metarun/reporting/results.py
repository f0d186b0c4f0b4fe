"""Results of finished runs, read from their folders.

Shapes: N episodes, P points of the adaptation curve, K steps or presentations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from metarun.core.measures import Measure
from metarun.core.results import Results, measures_of
from metarun.core.statistics import Floats, interval
from metarun.evaluation import continual_metrics
from metarun.reporting.tables import Figure
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.core.types import Stream

SOURCE = "source"
"""Array of the data set of each episode, in a file of episodes from several."""
UNTRAINED = "untrained.json"
"""File with the figure of a run's learner before training, on the same test episodes."""


@dataclass(frozen=True)
class Result:
    """The result of one finished run.

    Attributes:
        record: Contents of `results.json`.
        episodes: (N,) metric of each test episode.
        curve: (P, N) metric after 0 … P - 1 inner steps; None if not measured.
        presentations: (N, K) metric at each presentation of a class; None without any.
        untrained: Mean metric of the initial parameters; None if not measured.
        measures: Measures of the record by name, (N,) each.
        figures: On a stream, the figures of `continual_metrics.summary`, (N,) each.
        losses: On a stream, (N, K) loss of each step before learning from it.
        stream: Layout of the stream; None for other tasks.
        sources: (N,) position of each episode's data set in `record["sources"]`; None for one.
    """

    record: Results
    episodes: Floats
    untrained: float | None
    curve: Floats | None = None
    presentations: Floats | None = None
    measures: Mapping[str, Floats] = field(default_factory=dict)
    figures: Mapping[str, Floats] = field(default_factory=dict)
    losses: Floats | None = None
    stream: Stream | None = None
    sources: Floats | None = None


def read_result(run: RunFolder) -> Result | None:
    """Return the result of a run; None if it is not finished.

    Raises:
        ValueError: A file of the run is damaged.
    """
    if run.status().get("state") != "finished":
        return None
    return read_figures(run)


def read_figures(run: RunFolder) -> Result:
    """Return the result in a folder of a finished run or meta-test.

    Raises:
        ValueError: A file of the folder is damaged.
    """
    record = run.read_results()
    prefix = continual_metrics.FIGURE
    measures = record["measures"]
    wanted = (record["metric"], "curve", "presentations", "incoming_loss", SOURCE, *measures)
    # The other arrays of a stream are large, and only its figures read them.
    read = run.read_episodes(lambda name: name in wanted or name.startswith(prefix))
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in read.items()}
    untrained = run.read_json(UNTRAINED)["mean"] if run.has(UNTRAINED) else None
    return Result(
        record,
        arrays[record["metric"]],
        untrained,
        arrays.get("curve"),
        arrays.get("presentations"),
        {name: arrays[name] for name in measures},
        {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)},
        arrays.get("incoming_loss"),
        _layout(record),
        arrays.get(SOURCE) if "sources" in record else None,
    )


def _layout(record: Results) -> Stream | None:
    """Return the layout of a run's stream; torch is imported only for streams."""
    if "layout" not in record:
        return None
    from metarun.core.types import Stream

    return Stream.of(record["layout"])


def figure_of(
    results: Sequence[Result], inner_steps: int | None = None, presentation: int | None = None
) -> Figure:
    """Return the figure of runs that differ in their seed; accuracies are in percent.

    Args:
        results: Results of the seeds, on the same episodes.
        inner_steps: Point of the adaptation curve; None selects the reported figure.
        presentation: Presentation of a class, from 1; None selects the reported figure.

    Raises:
        LookupError: A run was not measured at this point.
    """
    values = [_values(result, inner_steps, presentation) for result in results]
    return over_seeds(values, _places(results))


def measures_on_request(results: Sequence[Result], names: Sequence[str]) -> list[Measure]:
    """Return the descriptions of the measures that a user names as columns of a table.

    Raises:
        ValueError: No result has a measure of a name.
    """
    known = {m.name: m for result in results for m, _ in measures_of(result.record)}
    for name in names:
        if name not in known:
            listed = f"expected {', '.join(known)}" if known else "these runs have no measures"
            raise ValueError(f"--columns {name}: {listed}")
    return [known[name] for name in names]


def measure_figure(results: Sequence[Result], measure: Measure) -> str | Figure:
    """Return a measure over the seeds that have it; a dash if none has it."""
    found = [result.measures.get(measure.name) for result in results]
    values = [measure.scale * own for own in found if own is not None]
    return over_seeds(values, measure.places) if values else "–"


def paired(better: Sequence[Result], worse: Sequence[Result]) -> Figure:
    """Return the mean difference of two methods on the same episodes, with its interval.

    The interval of paired differences excludes zero exactly if a paired t-test at the 5 % level
    rejects equality. With several seeds, each episode is averaged over them first.
    """
    one, other = (
        np.mean([_values(result) for result in results], axis=0) for results in (better, worse)
    )
    mean, ci95 = interval(one - other)
    return Figure(mean, ci95, len(one), places=_places(better))


def _places(results: Sequence[Result]) -> int | None:
    """Return the decimal places of a `Figure`: one for an accuracy in percent."""
    return 1 if results[0].record["metric"] == "accuracy" else None


def _values(
    result: Result, inner_steps: int | None = None, presentation: int | None = None
) -> Floats:
    """Return the (N,) figures of the episodes in the displayed unit."""
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
    """Return arrays (N,) over the same episodes, one for each seed, as a figure."""
    mean, ci95 = interval(np.mean(values, axis=0))
    over_seeds = interval([v.mean() for v in values])[1] if len(values) > 1 else None
    return Figure(mean, ci95, len(values[0]), len(values), over_seeds, places)
