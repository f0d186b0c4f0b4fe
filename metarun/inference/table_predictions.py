"""Predictions for the rows of a table, from a table with a few examples.

Shapes: N rows, D targets, W classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metarun.core.files import csv_cell
from metarun.data.storage.table_files import (
    Columns,
    Numbers,
    Texts,
    as_texts,
    check_names,
    in_order,
    read_table,
)
from metarun.inference.learner import Learner

_ALONE = ""
"""Name of the task of tables without a column of tasks."""


@dataclass(frozen=True, slots=True)
class TablePredictions:
    """Predictions of rows.

    Attributes:
        header: Names of the columns.
        rows: Cells of each row of the query, in its order.
        tasks: Number of tasks.
        examples: Number of rows of the support.
        error: What the predictions are worth where the query has the targets, in words; empty
            where it has not.
    """

    header: list[str]
    rows: list[list[Any]]
    tasks: int
    examples: int
    error: str


def predict_table(learner: Learner, support: Path, query: Path) -> TablePredictions:
    """Predict the rows of a table.

    Where both tables have the column that says the task of a row, each task is learned from its own
    rows of the support. Else all rows are of one task.

    Args:
        learner: Learner of a run on a table.
        support: Table of the examples, with targets.
        query: Table of the rows to predict.

    Raises:
        ValueError: A table cannot be read, a column is missing, or a task has no example.
    """
    encoding = learner.encoding
    few = read_table(support, "--support", text=encoding.texts)
    rows = read_table(query, "--query", text=encoding.texts)
    for name in encoding.target_names:
        check_names({"the target": name}, few, f"--support {support}")
    # What both lack is told before a task is learned.
    for table, where in ((few, f"--support {support}"), (rows, f"--query {query}")):
        encoding.encode({name: column[:1] for name, column in table.items()}, where)
    tasks = _tasks(encoding.task, few, rows, query)
    num_rows = len(next(iter(rows.values())))
    found: dict[int, list[Any]] = {}
    header: list[str] = []
    targets = _targets(encoding, few, f"--support {support}", complete=True)
    known = None
    if all(name in rows for name in encoding.target_names):
        known = _targets(encoding, rows, f"--query {query}", complete=False)
    classes = in_order((encoding.label and set(targets.names)) or [])
    errors: list[Any] = []
    for own, asked in tasks:
        learner_rows = _some(few, own), targets[own]
        if encoding.label is None:
            values, spread = _regressed(learner, learner_rows, _some(rows, asked))
            cells = [[*v, *s] for v, s in zip(values, spread, strict=True)]
            if known is not None:
                errors.append(np.stack([values - known[asked], known[asked]]))
        else:
            answers = _classified(learner, learner_rows, _some(rows, asked), classes)
            cells = [[classes[int(row.argmax())], row.max(), *row] for row in answers]
            if known is not None:
                truth = known[asked].values()
                pairs = zip(cells, truth, strict=True)
                errors.append(np.array([c[0] == t for c, t in pairs if t], dtype=bool))
        found |= dict(zip(asked.tolist(), cells, strict=True))
    names = list(encoding.target_names)
    if encoding.label is None:
        spreads = [f"{name}_spread" for name in names]
        width = len(found[0]) - len(names)
        header = [*names, *spreads[:width]]
    else:
        header = [*names, "probability", *(f"p({name})" for name in classes)]
    lines = [[n + 1, *map(_cell, found[n])] for n in range(num_rows)]
    by_task = encoding.task in rows and encoding.task in few
    if by_task:
        header = [encoding.task, *header]
        shown = as_texts(rows[encoding.task]).values()
        lines = [[line[0], csv_cell(shown[n]), *line[1:]] for n, line in enumerate(lines)]
    return TablePredictions(
        ["row", *header], lines, len(tasks), len(targets), _error(errors, encoding)
    )


def fit_table(learner: Learner, support: Path) -> tuple[list[str], Numbers]:
    """Adapt a learner to the rows of a table, which are of one task.

    Args:
        learner: Learner of a run on a table.
        support: Table of the examples, with targets.

    Returns:
        The classes in the order of the outputs, none in a regression; and the rows as the network
        receives them, (N, width).

    Raises:
        ValueError: The table cannot be read, a column is missing, or it has several tasks.
    """
    encoding, where = learner.encoding, f"--support {support}"
    few = read_table(support, "--support", text=encoding.texts)
    for name in encoding.target_names:
        check_names({"the target": name}, few, where)
    tasks = as_texts(few[encoding.task]).names if encoding.task in few else []
    if len(set(tasks)) > 1:
        raise ValueError(
            f"{where} has rows of several tasks ({encoding.task} {tasks[0]}, {tasks[1]}, …): a "
            "classifier or predictor is of one task"
        )
    rows = encoding.encode(few, where)
    targets = _targets(encoding, few, where, complete=True)
    if encoding.label is None:
        learner.fit(rows, targets)
        return [], rows
    classes = in_order(set(targets.names))
    place = np.array([classes.index(name) for name in targets.names])
    learner.fit(rows, place[targets.codes])
    return classes, rows


def _cell(value: Any) -> Any:
    return csv_cell(value) if isinstance(value, str) else float(f"{value:.6g}")


def _some(table: Columns, rows: Any) -> Mapping[str, Any]:
    return {name: column[rows] for name, column in table.items()}


def _tasks(task: str | None, few: Columns, rows: Columns, query: Path) -> list[tuple[Any, Any]]:
    """Return the numbers of the rows of each task in the support and in the query."""
    lengths = [len(next(iter(table.values()))) for table in (few, rows)]
    if task is None or task not in few or task not in rows:
        return [(np.arange(lengths[0]), np.arange(lengths[1]))]
    own, asked = as_texts(few[task]), as_texts(rows[task])
    unknown = asked.first(set(asked.names) - set(own.names))
    if unknown is not None:
        raise ValueError(
            f"--query {query}: {task} {unknown[1]} of row {unknown[0]} has no row in --support: "
            "add a few with targets"
        )
    place = {name: code for code, name in enumerate(own.names)}
    return [
        (np.flatnonzero(own.codes == place[name]), np.flatnonzero(asked.codes == code))
        for code, name in enumerate(asked.names)
    ]


def _targets(encoding: Any, table: Columns, where: str, *, complete: bool) -> Any:
    """Return the targets: `Texts`, or values (N, D); NaN where one is missing.

    Args:
        encoding: Encoding of the run.
        table: The table.
        where: Where it comes from, for messages.
        complete: Whether every row needs its targets.
    """
    values: list[Numbers] = []
    for name in encoding.target_names:
        column = table[name]
        if isinstance(column, Texts):
            if encoding.label is None:
                raise ValueError(f"{where}: the target {name} has texts: expected numbers")
            empty = column.first([""])
            row = None if empty is None else empty[0]
        else:
            bad = np.flatnonzero(~np.isfinite(column))
            row = int(bad[0]) + 1 if len(bad) else None
            values.append(column)
        if row is not None and complete:
            raise ValueError(f"{where}: the target {name} is missing in row {row}")
    return table[encoding.label] if encoding.label is not None else np.stack(values, 1)


def _regressed(learner: Learner, few: Any, rows: Any) -> tuple[Any, Any]:
    """Return values (N, D), and spreads (N, D) or (N, 0)."""
    learner.fit(*few)
    values, spread = learner.predict(rows), learner.predict_spread(rows)
    return values, np.empty((len(values), 0)) if spread is None else spread


def _classified(learner: Learner, few: Any, rows: Any, classes: list[str]) -> Any:
    """Return probabilities (N, W) of all classes, zero for those that the task lacks."""
    inputs, labels = few
    # By number, since labels that are numbers are in the order of the numbers.
    place = np.array([classes.index(name) for name in labels.names])
    learner.fit(inputs, place[labels.codes])
    own = learner.predict_proba(rows)
    answers = np.zeros((len(own), len(classes)))
    answers[:, learner.classes_] = own
    return answers


def _error(errors: list[Any], encoding: Any) -> str:
    """Return how far the predictions are from the targets of the query, if it has them."""
    return "; ".join(_measured(errors, encoding)) if errors else ""


def _measured(errors: list[Any], encoding: Any) -> Iterator[str]:
    if encoding.label is not None:
        right = np.concatenate(errors)
        if len(right):
            yield f"accuracy {100 * right.mean():.1f} %: {right.sum():,} of {len(right):,} rows"
        return
    apart, truth = np.concatenate(errors, 1)
    for place, name in enumerate(encoding.target_names):
        there = ~np.isnan(truth[:, place])
        if there.any():
            rmse = np.sqrt(np.square(apart[there, place]).mean())
            yield (
                f"root mean squared error of {name}: {rmse:.4g} over {there.sum():,} rows (their "
                f"standard deviation is {truth[there, place].std():.4g})"
            )
