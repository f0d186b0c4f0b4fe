"""Learners by the data that they were trained on and the data that they were tested on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metarun.core.errors import one_line
from metarun.core.sizes import most, size_text
from metarun.reporting.results import Result, figure_of, read_figures
from metarun.reporting.tables import Figure, Line, Table
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.reporting.published import Group, Run

_log = logging.getLogger(__name__)


class _Setting(NamedTuple):
    way: int
    shot: int
    size: str


_WHICH = {"folder": "root", "torchvision": "name", "csv": "file"}
"""The option that says which data they are, where their name does not."""


def across_data(groups: Sequence[Group]) -> list[Table]:
    """Return a table for each number of ways and shots in which runs were tested on other data.

    Args:
        groups: Runs that differ only in their seed, by their labels.

    Returns:
        Tables with a row for each group and a column for each data set of a test.
    """
    settings: dict[_Setting, dict[str, dict[str, list[Result]]]] = {}
    for group in groups:
        for run in group.runs:
            for name, result in _tests(run).items():
                record = result.record
                size = size_text({**record})
                setting = _Setting(most(record["way"]), most(record["shot"]), size)
                columns = settings.setdefault(setting, {})
                columns.setdefault(name, {}).setdefault(group.label, []).append(result)
    return [
        _table(setting, columns, groups)
        for setting, columns in sorted(settings.items())
        if len(columns) > 1
    ]


def _tests(run: Run) -> dict[str, Result]:
    """Return the results of a run by what it was tested on: its own data, and other ones."""
    if run.result is None:
        return {}
    own = _name(run.result.record)
    found = {own: run.result}
    paths = sorted(run.path.glob("tests/*/results.json"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        folder = RunFolder(path.parent)
        # Those with overrides are of another experiment, which has a row of its own.
        if folder.has("overrides.yaml"):
            continue
        try:
            result = read_figures(folder)
        except (OSError, ValueError) as error:
            _log.warning("%s is damaged and left out: %s", path.parent, one_line(error))
            continue
        if (name := _name(result.record)) != own:
            found[name] = result
    return found


def _name(record: Mapping[str, Any]) -> str:
    """Return the name of a test's data: `cifar_fs`, `folder photos`, `mnist, all classes`."""
    name, options = str(record["data"]), record.get("data_options", {})
    if (which := options.get(_WHICH.get(name, ""))) is not None:
        name = f"{name} {Path(str(which)).name}"
    return f"{name}, all classes" if options.get("classes") == "all" else name


def _trained_on(group: Group) -> str:
    config = group.config
    return _name({"data": config["names"]["data"], "data_options": config["data"]})


def _table(
    setting: _Setting, columns: dict[str, dict[str, list[Result]]], groups: Sequence[Group]
) -> Table:
    rows = [group for group in groups if any(group.label in cells for cells in columns.values())]
    names = [(group.config["names"]["algo"], _trained_on(group)) for group in rows]
    counts = Counter(names)
    lines: list[Line] = []
    for group, name in zip(rows, names, strict=True):
        line: dict[str, str | Figure] = {
            # Several runs of a learner on the same data are told apart by what was typed.
            "learner": name[0] if counts[name] == 1 else group.label,
            "trained on": name[1],
        }
        for head in sorted(columns):
            results = columns[head].get(group.label)
            line[head] = figure_of(results) if results else "not run"
        lines.append(line)
    return Table(f"trained on one, tested on another: {setting.size}", lines)
