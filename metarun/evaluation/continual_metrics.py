"""Continual-learning metrics, computed from the measurements along a stream.

`matrix[…, i, j]` is the metric on task j after visit i: R[i, j] of Lopez-Paz & Ranzato (2017).
`visits[i]` is the task of visit i. A gain is positive for accuracies and for errors:
differences of errors change their sign (`higher` is False). Every function works on the last
dimensions and keeps the leading ones.

Shapes: N rollouts, V visits, J tasks, K steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from metarun.core.statistics import Floats, interval, quiet

if TYPE_CHECKING:
    # `metarun table` starts without torch.
    from metarun.core.types import Stream

FIGURE = "figure/"
"""Prefix of the names of `summary` in a file that also has those of `Rollouts.measured`."""


@quiet
def summary(
    stream_record: Mapping[str, Floats],
    stream: Stream,
    *,
    higher: bool,
    proficiency: float | None = None,
) -> dict[str, Floats]:
    """Return every metric of N rollouts that needs no other run, (N,) arrays by name.

    Args:
        stream_record: Measurements of `Rollouts.measured`, with `untrained`.
        stream: Layout of the streams.
        higher: Whether a higher metric is better.
        proficiency: Threshold of `to_proficiency`; None leaves this metric out. If tasks return,
            first and later visits are also averaged separately.
    """
    visits, after = stream.visits, stream_record["matrix"][:, 1:]
    figures = {
        "average": average(after),
        "anytime": prequential(stream_record["incoming"])[:, -1],
        "cumulative_loss": cumulative(stream_record["incoming_loss"], stream)[:, -1],
    }
    if stream.num_tasks > 1:  # Transfer and forgetting need a second task.
        figures |= {
            "backward_transfer": backward_transfer(after, visits, higher=higher),
            "forward_transfer": forward_transfer(
                after, stream_record["untrained"], visits, higher=higher
            ),
            "forgetting": forgetting(after, visits, higher=higher),
        }
    if proficiency is not None:
        needed = to_proficiency(
            stream_record["current"], proficiency, len(visits), stream.rows, higher=higher
        )
        figures["rows_to_proficiency"] = needed.mean(-1)
        new = [list(visits).index(task) == visit for visit, task in enumerate(visits)]
        if not all(new):
            figures["rows_to_proficiency_new"] = needed[:, new].mean(-1)
            figures["rows_to_proficiency_returning"] = needed[:, np.logical_not(new)].mean(-1)
    return figures


@quiet
def curves(stream_record: Mapping[str, Floats], stream: Stream) -> str:
    """Return the curves along a stream as CSV: a line for each step, means and 95 % intervals.

    `incoming` is the metric of the step's rows before the learner learns from them. `current` is
    the metric on the held-out rows of their task after the step. `cumulative_loss` is the loss of
    all incoming rows so far. `seen` is the metric averaged over the tasks met so far, measured
    at the end of each visit.
    """
    seen = seen_so_far(stream_record["matrix"][:, 1:], stream.visits)
    columns = {
        "incoming": stream_record["incoming"],
        "current": stream_record["current"],
        "cumulative_loss": cumulative(stream_record["incoming_loss"], stream),
    }
    head = ["step", "rows", "task", "tasks_met"]
    head += [name + part for name in (*columns, "seen") for part in ("", "_ci95")]
    lines = [",".join(head)]
    for step in range(stream.num_steps):
        visit = step // stream.steps
        met = len(set(stream.visits[: visit + 1]))
        facts = [step + 1, (step + 1) * stream.rows, stream.visits[visit], met]
        values = [interval(column[:, step]) for column in columns.values()]
        if (step + 1) % stream.steps == 0:
            values.append(interval(seen[:, visit]))
        cells = [_cell(number) for pair in values for number in pair]
        lines.append(",".join([*map(str, facts), *cells, *[""] * (len(head) - 4 - len(cells))]))
    return "\n".join(lines) + "\n"


def average(matrix: Floats) -> Floats:
    """Return the final metric (N,), averaged over tasks: ACC (Lopez-Paz & Ranzato 2017, eq. 2)."""
    last: Floats = matrix[..., -1, :].mean(-1)
    return last


def backward_transfer(matrix: Floats, visits: Sequence[int], *, higher: bool) -> Floats:
    """Return the backward transfer (N,): BWT (Lopez-Paz & Ranzato 2017, eq. 3).

    It is the mean of R[V - 1, j] - R[f(j), j] over all tasks j but the one visited last; f(j) is
    the first visit to j. It measures the effect of later learning on earlier tasks.
    """
    tasks = [task for task in range(matrix.shape[-1]) if task != visits[-1]]
    first = [list(visits).index(task) for task in tasks]
    gains = matrix[..., -1, tasks] - matrix[..., first, tasks]
    return _gain(gains.mean(-1) if tasks else np.full(matrix.shape[:-2], np.nan), higher)


def forward_transfer(
    matrix: Floats, untrained: Floats, visits: Sequence[int], *, higher: bool
) -> Floats:
    """Return the forward transfer (N,): FWT (Lopez-Paz & Ranzato 2017, eq. 4).

    It is the mean of R[f(j) - 1, j] - b[j] over all tasks j but the first; f(j) is the first
    visit to j. It measures the effect of earlier learning on tasks not yet met.

    Args:
        matrix: (N, V, J) metric on each task after each visit, R.
        untrained: (N, J) metric at random initialization, b.
        visits: (V,) task of each visit.
        higher: Whether a higher metric is better.
    """
    tasks = [task for task in range(matrix.shape[-1]) if task != visits[0]]
    before = [list(visits).index(task) - 1 for task in tasks]
    gains = matrix[..., before, tasks] - untrained[..., tasks]
    return _gain(gains.mean(-1) if tasks else np.full(matrix.shape[:-2], np.nan), higher)


def forgetting(matrix: Floats, visits: Sequence[int], *, higher: bool) -> Floats:
    """Return the forgetting (N,) of Chaudhry et al. (2018, eq. 3); lower is better.

    It is the mean of max_i R[i, j] - R[V - 1, j] over all tasks j but the one visited last, with
    i from the first visit to j to the last visit but one.
    """
    goodness = matrix if higher else -matrix
    tasks = [task for task in range(matrix.shape[-1]) if task != visits[-1]]
    if not tasks:
        return np.full(matrix.shape[:-2], np.nan)
    lost = [
        goodness[..., list(visits).index(task) : -1, task].max(-1) - goodness[..., -1, task]
        for task in tasks
    ]
    mean: Floats = np.stack(lost).mean(0)
    return mean


def seen_so_far(matrix: Floats, visits: Sequence[int]) -> Floats:
    """Return the metric after each visit, averaged over the tasks met so far, (N, V)."""
    means = [matrix[..., i, sorted(set(visits[: i + 1]))].mean(-1) for i in range(matrix.shape[-2])]
    return np.stack(means, -1)


def prequential(incoming: Floats) -> Floats:
    """Return the running mean (N, K) of the metric of steps, each predicted before learning.

    This is the prequential error with a landmark window (Gama et al. 2013). Its last value is
    the anytime accuracy of online continual learning (Cai et al. 2021).
    """
    means: Floats = incoming.cumsum(-1) / np.arange(1, incoming.shape[-1] + 1)
    return means


def cumulative(losses: Floats, stream: Stream) -> Floats:
    """Return the summed loss (N, K) of all rows up to each step, predicted before learning.

    Args:
        losses: (N, K) mean loss of the rows of each step.
        stream: Layout of the streams, which has the number of rows of a step.
    """
    curve: Floats = stream.rows * losses.cumsum(-1)
    return curve


@quiet
def regret(losses: Floats, comparator: Floats, stream: Stream) -> Floats:
    """Return the regret (N, K): cumulative loss above a comparator's on the same rows.

    Finn et al. (2019, eq. 2) define it.

    Args:
        losses: (N, K) losses of the learner, as in `cumulative`.
        comparator: (N, K) losses of a learner trained on the whole stream in advance.
        stream: Layout of the streams.
    """
    return cumulative(losses - comparator, stream)


def growth(curve: Floats) -> Floats:
    """Return the exponent p (N,) of the power law c k^p that fits a growing curve best.

    The fit is least squares of log curve on log k, over the steps after the first tenth at which
    the curve is positive. The exponent is NaN if the curve does not end above zero, or if fewer
    than two steps remain.
    """
    steps = np.arange(1, curve.shape[-1] + 1)
    late = steps > curve.shape[-1] // 10
    rows = curve.reshape(-1, curve.shape[-1])
    fitted = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        use = late & (row > 0)
        if use.sum() > 1 and row[-1] > 0:
            fitted[number] = np.polyfit(np.log(steps[use]), np.log(row[use]), 1)[0]
    return fitted.reshape(curve.shape[:-1])


def to_proficiency(
    current: Floats, threshold: float, visits: int, rows: int, *, higher: bool
) -> Floats:
    """Return the rows (N, V) of each visit until the task's metric first reaches a threshold.

    A visit that never reaches it counts all of its rows. Finn et al. (2019, section 5) count the
    data points of a task that a learner needs.

    Args:
        current: (N, K) metric on the task of each step, after the step.
        threshold: Metric that counts as proficient.
        visits: Number of visits V, all with the same number of steps.
        rows: Rows of a step.
        higher: Whether a higher metric is better.
    """
    reached = current >= threshold if higher else current <= threshold
    by_visit = reached.reshape(*reached.shape[:-1], visits, -1)
    first = by_visit.argmax(-1) + 1
    needed: Floats = np.where(by_visit.any(-1), first, by_visit.shape[-1]) * float(rows)
    return needed


def _cell(number: float) -> str:
    return "" if np.isnan(number) else f"{number:.6g}"


def _gain(difference: Floats, higher: bool) -> Floats:
    return difference if higher else -difference
