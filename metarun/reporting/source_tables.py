"""A table of learners that were tested on the episodes of several data sets, by data set.

Shapes: G groups of runs, M sources, N episodes, N_m those of one source, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from metarun.core.statistics import Floats, average_ranks, mean_of_groups
from metarun.reporting.results import over_seeds
from metarun.reporting.tables import Figure, Line, Table

if TYPE_CHECKING:
    from metarun.reporting.published import Group

_TITLE = "by source: mean, and average rank where several met the same episodes; 1 is the best"


def by_source(groups: Sequence[Group]) -> list[Table]:
    """Return a table for each set of episodes from several sources, with all groups that met it."""
    together: dict[str, list[Group]] = {}
    for own in groups:
        if own.results and own.results[0].sources is not None:
            together.setdefault(str(own.results[0].record["episodes_hash"]), []).append(own)
    return [Table(_TITLE, _lines(members)) for members in together.values()]


def _lines(groups: Sequence[Group]) -> list[Line]:
    first = groups[0].results[0]
    assert first.sources is not None
    places, names = first.sources.astype(int), list(first.record["sources"])
    values = [[100.0 * result.episodes for result in own.results] for own in groups]
    ranks = _ranks([np.mean(own, axis=0) for own in values], places)
    lines: list[Line] = []
    for own, runs, rank in zip(groups, values, ranks, strict=True):
        line: dict[str, str | Figure] = {"run": own.label}
        for number, name in enumerate(names):
            line[name] = over_seeds([run[places == number] for run in runs], 1)
        mean, ci95 = mean_of_groups(np.mean(runs, axis=0), places)
        line["mean"] = Figure(mean, ci95, len(places), len(runs), places=1)
        line["average rank"] = rank
        lines.append(line)
    return lines


def _ranks(values: Sequence[Floats], places: Floats) -> list[str | Figure]:
    """Return the average rank of each group; nothing for a single one."""
    if len(values) == 1:
        return [""]
    means, widths = average_ranks(np.stack(values), places)
    return [Figure(*own, len(places), places=2) for own in zip(means, widths, strict=True)]
