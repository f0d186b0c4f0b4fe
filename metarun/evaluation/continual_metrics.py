"""Figures of lifelong learning, from what was measured along a stream.

`matrix[…, i, j]` is the metric on task j after visit i, as R[i, j] of Lopez-Paz & Ranzato (2017);
`visits[i]` is the task of visit i. What is a gain is positive, whether the metric is an accuracy
or an error: differences of errors change their sign (`higher` is False). Every function works on
the last dimensions and keeps the leading ones.

Shapes: N lifetimes, V visits, J tasks, K steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from metarun.core.statistics import Floats, interval, quiet

if TYPE_CHECKING:
    # Tables are printed at once, without torch.
    from metarun.core.types import Stream

FIGURE = "figure/"
"""What the names of `summary` begin with where they stand beside those of `Rollouts.measured`."""


@quiet
def summary(
    stream_record: Mapping[str, Floats],
    stream: Stream,
    *,
    higher: bool,
    proficiency: float | None = None,
) -> dict[str, Floats]:
    """Every figure of N lifetimes that needs no other run, (N,) each by name.

    Args:
        stream_record: What `Rollouts.measured` gives, with `untrained`.
        stream: The layout.
        higher: Whether a higher metric is better.
        proficiency: See `to_proficiency`; None leaves it out. Where tasks return, first and later
            visits are also counted apart.
    """
    visits, after = stream.visits, stream_record["matrix"][:, 1:]
    figures = {
        "average": average(after),
        "anytime": prequential(stream_record["incoming"])[:, -1],
        "cumulative_loss": cumulative(stream_record["incoming_loss"], stream)[:, -1],
    }
    if stream.num_tasks > 1:  # else there is none to transfer to, or to forget
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
    """What happens along a stream, as CSV: a line for each step, means and 95 % intervals.

    `incoming` is the metric of the step's rows before they were learned, `current` that on the
    held-out rows of their task after it, `cumulative_loss` the loss of all incoming rows so far,
    `seen` the metric averaged over the tasks met, which is measured where a visit ends.
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
    """(N,) the metric at the end, averaged over tasks: ACC (Lopez-Paz & Ranzato 2017, eq. 2)."""
    last: Floats = matrix[..., -1, :].mean(-1)
    return last


def backward_transfer(matrix: Floats, visits: Sequence[int], *, higher: bool) -> Floats:
    """(N,) what later learning did to earlier tasks: BWT (Lopez-Paz & Ranzato 2017, eq. 3).

    The mean over the tasks but the one that was visited last of R[V - 1, j] - R[f(j), j], with
    f(j) the visit after which j had been learned for the first time.
    """
    tasks = [task for task in range(matrix.shape[-1]) if task != visits[-1]]
    first = [list(visits).index(task) for task in tasks]
    gains = matrix[..., -1, tasks] - matrix[..., first, tasks]
    return _gain(gains.mean(-1) if tasks else np.full(matrix.shape[:-2], np.nan), higher)


def forward_transfer(
    matrix: Floats, untrained: Floats, visits: Sequence[int], *, higher: bool
) -> Floats:
    """(N,) what earlier learning did for tasks not met: FWT (Lopez-Paz & Ranzato 2017, eq. 4).

    The mean over the tasks but the first of R[f(j) - 1, j] - b[j], with f(j) the first visit to
    j, and b[j] the metric on j of a network at random initialization.

    Args:
        matrix: (N, V, J).
        untrained: (N, J), b.
        visits: (V,).
        higher: Whether a higher metric is better.
    """
    tasks = [task for task in range(matrix.shape[-1]) if task != visits[0]]
    before = [list(visits).index(task) - 1 for task in tasks]
    gains = matrix[..., before, tasks] - untrained[..., tasks]
    return _gain(gains.mean(-1) if tasks else np.full(matrix.shape[:-2], np.nan), higher)


def forgetting(matrix: Floats, visits: Sequence[int], *, higher: bool) -> Floats:
    """(N,) how far tasks are below their best: Chaudhry et al. (2018, eq. 3); here 0 is the best.

    The mean over the tasks but the one that was visited last of max_i R[i, j] - R[V - 1, j], i
    from the first visit to j to the last but one of all.
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
    """(N, V) after each visit the metric averaged over the tasks that have been met."""
    means = [matrix[..., i, sorted(set(visits[: i + 1]))].mean(-1) for i in range(matrix.shape[-2])]
    return np.stack(means, -1)


def prequential(incoming: Floats) -> Floats:
    """(N, K) the mean metric of the steps up to each, every one judged before it was learned.

    The prequential error with a landmark window (Gama et al. 2013); its last value is the
    anytime accuracy of online continual learning (Cai et al. 2021).
    """
    means: Floats = incoming.cumsum(-1) / np.arange(1, incoming.shape[-1] + 1)
    return means


def cumulative(losses: Floats, stream: Stream) -> Floats:
    """(N, K) the loss of all rows up to each step, each judged before it was learned.

    Args:
        losses: (N, K) the mean loss of the rows of each step.
        stream: The layout, for the rows of a step.
    """
    curve: Floats = stream.rows * losses.cumsum(-1)
    return curve


@quiet
def regret(losses: Floats, comparator: Floats, stream: Stream) -> Floats:
    """(N, K) cumulative loss above a comparator's on the same rows (Finn et al. 2019, eq. 2).

    Args:
        losses: (N, K) of the learner, as in `cumulative`.
        comparator: (N, K) of one that had learned the whole stream before it began.
        stream: The layout.
    """
    return cumulative(losses - comparator, stream)


def growth(curve: Floats) -> Floats:
    """(N,) the exponent p of the power law that fits a growing curve best, of c k^p.

    By least squares between log k and log curve over the steps from the first tenth on, where
    the curve is positive; not a number of a curve that does not end above zero, or is so at
    fewer than two steps.
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
    """(N, V) rows of a visit until the task's metric first reached a threshold.

    A visit in which it never did counts all of its rows (Finn et al. 2019, section 5, counts the
    data points of a task that a learner needs).

    Args:
        current: (N, K) the metric on the task of each step, after the step.
        threshold: What is proficient.
        visits: V; they have equally many steps.
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
